"""Every measure against a slow reference that follows its definition word by word, on fresh random inputs."""

from __future__ import annotations

import itertools
import json
import math
import random
import secrets
from collections import defaultdict

import numpy as np
import pytest

from dasd_megatron.config import HealthConfig
from dasd_megatron.evaluation import health
from dasd_megatron.samples import Sample
from dasd_megatron.verify.steps import StepCheck, chain_sum_steps
from tests.support.phrase_reference import slow_count
from tests.support.small_samples import make_sample


@pytest.fixture
def draw() -> random.Random:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    return random.Random(seed)


def packed(rows: list[list]) -> tuple[list, list[int]]:
    return [value for row in rows for value in row], [len(row) for row in rows]


def test_profile(draw):
    for _ in range(50):
        rows = [
            [draw.random() for _ in range(draw.choice([1, 2, 9, 10, 11, draw.randint(1, 200)]))]
            for _ in range(draw.randint(1, 12))
        ]
        edges = sorted(draw.sample(range(1, 150), draw.randint(0, 5)))
        found = health.token_profile(*packed(rows), edges)
        for index, row in enumerate(rows):
            deciles, positions = defaultdict(list), defaultdict(list)
            for place, value in enumerate(row):
                deciles[math.floor(10 * place / len(row) + 1e-9)].append(value)
                positions[sum(edge <= place for edge in edges)].append(value)
            for sums, counts, expected in (
                (found.decile_sum, found.decile_count, deciles),
                (found.position_sum, found.position_count, positions),
            ):
                assert counts[index].tolist() == [len(expected[place]) for place in range(counts.shape[1])]
                assert sums[index] == pytest.approx([sum(expected[place]) for place in range(counts.shape[1])])


def slow_repetition(row: list[int], n: int) -> tuple[float, int]:
    grams = [tuple(row[place : place + n]) for place in range(len(row) - n + 1)]
    repeated = [gram in grams[:place] for place, gram in enumerate(grams)]
    if len(grams) < 2:
        return 0.0, 0
    longest = current = 0
    for is_repeated in repeated:
        current = current + 1 if is_repeated else 0
        longest = max(longest, current)
    return 1 - len(set(grams)) / len(grams), longest + n - 1 if longest else 0


def test_repetition(draw):
    for _ in range(60):
        n = draw.randint(1, 6)
        rows = [
            [draw.randrange(draw.choice([2, 4, 1000])) for _ in range(draw.randint(1, 80))]
            for _ in range(draw.randint(1, 6))
        ]
        rows[0] += rows[0][-draw.randint(1, 9) :] * draw.randint(1, 5)
        share, run = health.repetition(*packed(rows), n)
        expected = [slow_repetition(row, n) for row in rows]
        assert share.tolist() == pytest.approx([found for found, _ in expected])
        assert run.tolist() == [longest for _, longest in expected]


def test_a_loop_is_one_long_run():
    share, run = health.repetition([*range(100, 150), *([7, 8, 9] * 40)], [170], 4)
    assert run.tolist() == [117] and share[0] == pytest.approx(114 / 167)


def test_distinct_per_group(draw):
    for _ in range(50):
        group = [draw.randrange(4) for _ in range(draw.randint(1, 30))]
        value = [draw.randrange(5) for _ in group]
        counts = [draw.random() < 0.6 for _ in group]
        expected = sum(
            len({v for g, v, c in zip(group, value, counts, strict=True) if g == member and c}) for member in set(group)
        )
        assert health.distinct_per_group(group, value, counts) == pytest.approx(expected / len(set(group)))
    assert health.distinct_per_group([1, 1, 2], [5, 5, 5]) == 1.0


def test_auroc(draw):
    for _ in range(100):
        score = [draw.choice([draw.random(), draw.randrange(3)]) for _ in range(draw.randint(2, 40))]
        positive = [draw.random() < 0.5 for _ in score]
        pairs = [
            (a > b) + 0.5 * (a == b)
            for a, p in zip(score, positive, strict=True)
            if p
            for b, q in zip(score, positive, strict=True)
            if not q
        ]
        assert health.auroc(score, positive) == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)


def test_calibration(draw):
    for _ in range(50):
        confidence = [draw.choice([0.0, 0.1, 1.0, draw.random()]) for _ in range(draw.randint(1, 60))]
        right = [draw.random() < 0.5 for _ in confidence]
        bins = defaultdict(list)
        for value, is_right in zip(confidence, right, strict=True):
            bins[min(int(value * 10), 9)].append((value, is_right))
        found = health.calibration(confidence, right)
        error = 0.0
        for place in range(10):
            members = bins[place]
            assert found.responses[place] == len(members)
            if members:
                mean, accuracy = (sum(column) / len(members) for column in zip(*members, strict=True))
                assert (found.confidence[place], found.accuracy[place]) == (
                    pytest.approx(mean),
                    pytest.approx(accuracy),
                )
                error += len(members) / len(confidence) * abs(accuracy - mean)
        assert found.error == pytest.approx(error)


def random_samples(draw: random.Random, groups: int, per_group: int) -> tuple[list[Sample], list[float], list[float]]:
    samples, entropies, log_probs = [], [], []
    for group in range(groups):
        for number in range(per_group):
            length = draw.randint(1, 60)
            text = draw.choice(["3\n#### -4", "Hmm, 4-1=2. Wait, 4-1=3\n#### -4.0", "wait 5\n#### 4", ""])
            answer = {"-4": "-4", ".0": "-4.0", " 4": "4", "": None}[text[-2:]]
            mask = [int(draw.random() < 0.7) for _ in range(length - 1)] + [1] if draw.random() < 0.3 else None
            tokens, logs = (
                [draw.randrange(3) for _ in range(length)],
                [float(np.float32(-draw.random())) for _ in range(length)],
            )
            sample = make_sample(
                group,
                number,
                tokens,
                text,
                predicted_answer=answer,
                reward=float(answer in ("-4", "-4.0")),
                response_mask=mask,
                rollout_log_probs=logs,
            )
            samples.append(sample)
            entropies += [draw.random() for _ in sample.sampled]
            log_probs += [logs[place] for place in sample.sampled]
    return samples, entropies, log_probs


def test_the_metrics_of_samples(draw):
    settings = HealthConfig(repetition_ngram=3, position_bins=[8, 30])
    samples, entropies, log_probs = random_samples(draw, groups=40, per_group=5)
    table = health.measure(samples, settings, entropy=entropies, checker=chain_sum_steps)
    metrics = health.health_metrics(table, settings)
    bounds = np.cumsum([0, *(len(sample.sampled) for sample in samples)]).tolist()
    tokens = [slice(start, end) for start, end in zip(bounds, bounds[1:], strict=False)]
    lengths = [len(sample.sampled) for sample in samples]
    right = [sample.reward > 0 for sample in samples]

    assert metrics["health/length_p50"] == np.median(lengths) and metrics["health/length_p90"] == pytest.approx(
        np.quantile(lengths, 0.9)
    )
    for place in range(10):
        values = [
            value
            for own, length in zip(tokens, lengths, strict=True)
            for t, value in enumerate(entropies[own])
            if 10 * t // length == place
        ]
        assert metrics[f"health/entropy_decile_{place + 1}"] == pytest.approx(np.mean(values))
    late = [value for own in tokens for value in entropies[own][30:]]
    assert metrics["health/entropy_from_30"] == pytest.approx(np.mean(late))
    phrases = sum(slow_count(sample.text, settings.epistemic_words) for sample in samples)
    assert metrics["health/epistemic_per_100"] == pytest.approx(100 * phrases / sum(lengths))
    repeated = [slow_repetition([sample.response_ids[place] for place in sample.sampled], 3) for sample in samples]
    assert metrics["health/repetition"] == pytest.approx(np.mean([share for share, _ in repeated]))
    assert metrics["health/repeated_run_mean"] == pytest.approx(np.mean([run for _, run in repeated]))
    assert metrics["health/repeated_run_max"] == max(run for _, run in repeated)
    assert metrics["health/correction_phrase_share"] == pytest.approx(
        np.mean(["wait" in sample.text.lower() for sample in samples])
    )
    assert metrics["health/self_correction_share"] == pytest.approx(
        np.mean(["Hmm" in sample.text for sample in samples])
    )
    groups = [[sample for sample in samples if sample.group == group] for group in range(40)]
    # -4.0 is -4.
    answers = [
        {sample.predicted_answer.removesuffix(".0") for sample in group if sample.predicted_answer} for group in groups
    ]
    assert metrics["health/distinct_answers"] == pytest.approx(np.mean([len(found) for found in answers]))
    assert metrics["health/distinct_paths"] == pytest.approx(
        np.mean([len({sample.text for sample in group}) for group in groups])
    )
    correct = [len({sample.text for sample in group if sample.reward}) for group in groups]
    assert metrics["health/distinct_correct_paths"] == pytest.approx(np.mean(correct))
    means = [np.mean(entropies[own]) for own in tokens]
    assert metrics["health/entropy_auroc"] == pytest.approx(health.auroc(means, [not is_right for is_right in right]))
    confidence = [math.exp(np.mean(log_probs[own])) for own in tokens]
    assert metrics["health/calibration_error"] == pytest.approx(health.calibration(confidence, right).error)
    checks = [chain_sum_steps(sample.problem, sample.text) for sample in samples]
    assert metrics["health/step_accuracy"] == pytest.approx(np.mean([check.correct / 2 for check in checks]))
    assert metrics["health/first_wrong_step"] == pytest.approx(
        np.mean([check.first_wrong for check in checks if check.first_wrong])
    )
    rows = health.health_tables(table)["calibration"]
    assert sum(row["responses"] for row in rows) == 200 and json.loads(json.dumps(rows)) == rows


def test_the_spread_over_processes_and_files_changes_nothing(draw):
    settings = HealthConfig()
    samples, _, log_probs = random_samples(draw, groups=30, per_group=5)
    whole = health.health_metrics(health.measure(samples, settings, log_prob=log_probs), settings)
    assert "health/nll_decile_1" in whole and "health/nll_auroc" in whole and "health/step_accuracy" not in whole
    draw.shuffle(samples)
    parts = [health.measure(part, settings) for part in (samples[:31], samples[31:])]
    assert health.health_metrics(health.join(parts), settings) == whole
    rows = json.loads(json.dumps(health.to_rows(parts[0]) + health.to_rows(parts[1])))
    assert health.health_metrics(health.join([health.from_rows(rows)]), settings) == whole


def test_measures_of_ones_own_are_means_over_the_responses_that_have_them(draw):
    settings = HealthConfig()
    samples, _, _ = random_samples(draw, groups=12, per_group=4)
    names = {name for name in "abc" if draw.random() < 0.9}
    for sample in samples:
        sample.measures = {name: draw.uniform(-2, 2) for name in sorted(names) if draw.random() < 0.3} or None
    whole = health.health_metrics(health.measure(samples, settings), settings)
    for name in "abc":
        values = [sample.measures[name] for sample in samples if sample.measures and name in sample.measures]
        assert whole.get(f"measure/{name}") == (pytest.approx(np.mean(values)) if values else None)
    # A replica or a request may have no response with a measure.
    parts = [health.measure(samples[first : first + 4], settings) for first in range(0, 48, 4)]
    assert health.health_metrics(health.join(parts), settings) == pytest.approx(whole)
    rows = json.loads(json.dumps([row for part in parts for row in health.to_rows(part)]))
    assert health.health_metrics(health.join([health.from_rows(rows)]), settings) == pytest.approx(whole)


def test_problems_whose_steps_cannot_be_checked_do_not_count(draw):
    settings = HealthConfig()
    samples, _, _ = random_samples(draw, groups=10, per_group=4)
    turns = itertools.cycle((True, False))
    some, none = (
        health.health_metrics(health.measure(samples, settings, checker=checker), settings)
        for checker in (lambda problem, text: StepCheck(1, 4, 2) if next(turns) else None, lambda problem, text: None)
    )
    assert some["health/step_accuracy"] == 0.25 and some["health/first_wrong_step"] == 2
    assert "health/step_accuracy" not in none


def test_one_short_response():
    settings = HealthConfig()
    metrics = health.health_metrics(health.measure([make_sample(0, 0, [3], "")], settings, entropy=[0.25]), settings)
    assert metrics["health/entropy_decile_1"] == metrics["health/entropy_from_0"] == 0.25
    assert not {"health/entropy_decile_2", "health/entropy_from_16", "health/entropy_auroc"} & metrics.keys()
    assert (
        metrics["health/repetition"] == metrics["health/distinct_answers"] == 0
        and metrics["health/distinct_paths"] == 1
    )
    assert all(math.isfinite(value) for value in metrics.values())
