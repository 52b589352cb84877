from __future__ import annotations

import json
import random

import pytest

from dasd_megatron.observability.report.rollouts import extreme_groups, halving_order
from dasd_megatron.observability.report.run_files import read_rollouts, read_run
from dasd_megatron.rollout_files import rollouts_path, save_samples
from dasd_megatron.rollout_json import as_json
from tests.support.random_samples import random_group
from tests.support.report_runs import inspected, load_page, make_run, rollout, write_lines


def test_tokens_carry_their_numbers(tmp_path):
    _, _, data = load_page(make_run(tmp_path / "run", text="a\nb", tokens=["a", "\n", "b"]))
    shown = data["rollouts"][0]
    assert (shown["t"], shown["h"], shown["d"], shown["w"]) == (
        ["a", "\n", "b"],
        [0.25] * 3,
        [-0.125] * 3,
        [0.4, -0.4, 0.4],
    )
    assert (shown["a"], shown["p"], shown["q"]) == ([0.5, 0.6, 0.7], [0.5] * 3, [0.75] * 3)
    assert (shown["tau"], shown["sigma"], shown["advantage"], shown["whole"]) == (0.5, 0.2, 0.5, True)


def test_runs_without_advantages_of_tokens_show_the_verifiers(tmp_path):
    run = make_run(tmp_path / "run")
    entry = inspected("ab", ["a", "b"])
    del entry["token_advantage"]
    (run / "inspect" / "step_000001.json").write_text(json.dumps([entry]))
    _, _, data = load_page(run)
    assert data["rollouts"][0]["a"] == [0.5, 0.5] and not data["rollouts"][0]["whole"] and data["rollouts"][1]["whole"]


def test_the_heat_map_shows_the_sample_behind_it(tmp_path):
    run = make_run(tmp_path / "run")
    write_lines(
        run / "rollouts" / "step_000001.jsonl",
        [rollout("other"), rollout("1+1=2\n\\boxed{2}", predicted_answer="the-answer", finish_reason="length")],
    )
    _, _, data = load_page(run)
    assert (data["rollouts"][0]["answer"], data["rollouts"][0]["end"]) == ("the-answer", "length")


def test_what_the_teacher_saw_is_shown_as_text(tmp_path):
    run = make_run(tmp_path / "run", steps=1)
    hostile = "</pre><script>alert(1)</script>" + "x" * 5000
    rows = [
        rollout("1+1=2\n\\boxed{2}", group=0, privileged_source="peer", privileged=hostile),
        rollout("other", group=1, privileged_source="solution", privileged="1 + 1 = 2"),
        rollout("alone", group=2, privileged_source=None, privileged=""),
        rollout("odd", group=3, privileged_source=["<b>"], privileged={"<i>": 1}),
    ]
    write_lines(run / "rollouts" / "step_000001.jsonl", rows)
    text, page, data = load_page(run)
    samples = {
        sample["text"]: sample
        for end in ("best", "worst")
        for group in data["groups"][end]
        for sample in group["samples"]
    }
    shown = samples["1+1=2\n\\boxed{2}"]
    assert shown["source"] == "peer" and shown["seen"].startswith("</pre><script>") and len(shown["seen"]) < 1000
    # The reference solution stands on the page already.
    assert "seen" not in samples["other"] and "seen" not in samples["alone"] and "<i>" in samples["odd"]["seen"]
    assert data["rollouts"][0]["seen"] == shown["seen"]
    assert len(page.all("script")) == 2 and page.all("b") == load_page(make_run(tmp_path / "plain", steps=1))[1].all(
        "b"
    )


def test_best_and_worst_groups(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    noise = random.Random(3)
    means = {}
    for step in (1, 2):
        rows = []
        for group in range(50):
            rewards = [float(noise.random() < 0.5) for _ in range(6)]
            means[step, group] = sum(rewards) / 6
            rows += [
                rollout(
                    f"sample {i} of {group}",
                    group=group,
                    sample=i,
                    reward=reward,
                    response_ids=[0] * (i + 1),
                    problem=f"p{step}-{group}",
                )
                for i, reward in enumerate(rewards)
            ]
        noise.shuffle(rows)
        write_lines(run / "rollouts" / f"step_{step:06d}.jsonl", rows)
    _, page, data = load_page(run)
    found = {end: [(group["step"], group["group"]) for group in data["groups"][end]] for end in ("best", "worst")}
    assert found["best"] == sorted(means, key=lambda key: (-means[key], -key[0], key[1]))[:30]
    assert found["worst"] == sorted(means, key=lambda key: (means[key], -key[0], key[1]))[:30]
    first = data["groups"]["best"][0]
    assert first["count"] == 6 and len(first["samples"]) == 4 and first["tokens"] == 21 and len(first["rewards"]) == 6
    assert "Of 100 groups in 2 saved steps, the 60 with the highest or lowest mean reward" in page.text()
    assert "40 groups between them are left out" in page.text()


def test_large_rollouts_are_read_in_part_and_it_is_said(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", steps=9)
    size = (run / "rollouts" / "step_000001.jsonl").stat().st_size
    groups = extreme_groups(read_run(run), max_bytes=3 * size)
    assert (groups.steps_read, groups.steps_saved, groups.count) == (3, 9, 3)
    assert {group["step"] for group in groups.best + groups.worst} == {1, 5, 9}


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 101])
def test_any_first_part_of_the_order_is_spread_evenly(count):
    order = halving_order(count)
    assert sorted(order) == list(range(count))
    for length in range(2, count):
        gaps = [
            later - earlier for earlier, later in zip(sorted(order[:length]), sorted(order[:length])[1:], strict=False)
        ]
        assert max(gaps) <= 4 * count / length


def test_rewards_that_are_no_numbers_are_left_out(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    path = run / "rollouts" / "step_000002.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, reward in zip(rows, ("NaN", "Infinity", 10**400, [1]), strict=False):
        row["reward"] = reward
    rows[-1]["group"] = [0]
    write_lines(path, rows)
    load_page(run)


def test_columns_are_shown_as_the_same_rollouts_in_lines(tmp_path):
    shown = []
    draw = random.Random(5)
    samples = [sample for group in range(6) for sample in random_group(draw, group, 5, with_teacher=False)]
    for name in ("lines", "columns"):
        run = make_run(tmp_path / name, steps=1)
        folder = run / "rollouts"
        if name == "lines":
            write_lines(folder / "step_000001.jsonl", map(as_json, samples))
        else:
            # A file of each replica, and an older one of the same step, which does not count.
            for replica in range(2):
                save_samples(rollouts_path(folder, 1, replica, 2), samples[15 * replica : 15 * replica + 15])
        shown.append(extreme_groups(read_run(run)))
    assert shown[0] == shown[1] and shown[0].count == 6


def test_columns_that_cannot_be_read_are_noted(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    path = rollouts_path(run / "rollouts", 2)
    path.write_bytes(b"no columns")
    found = read_run(run)
    assert extreme_groups(found).steps_saved == 2
    assert any("rollouts/step_000002.safetensors could not be read: no saved rollouts" in note for note in found.notes)
    save_samples(path, random_group(random.Random(0), 0, 2, with_teacher=False))
    found = read_run(run)
    assert list(read_rollouts(found, [path], most_bytes=99)) == []
    assert any("was left out: it is too large" in note for note in found.notes)
