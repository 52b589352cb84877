from __future__ import annotations

from fractions import Fraction
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dasd_megatron.evaluation import avg_at_k, maj_at_k, pass_at_k
from dasd_megatron.evaluation.pass_at_k import bootstrap, interval, mean, nemo_skills_metrics, problem_scores

ROWS = st.lists(st.lists(st.booleans(), min_size=1, max_size=7), min_size=1, max_size=4)


@given(ROWS, st.integers(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(outcomes, k):
    k = min(k, *map(len, outcomes)) if len(outcomes) > 1 else min(k, len(outcomes[0]))
    shares = [Fraction(sum(map(any, combinations(row, k))), sum(1 for _ in combinations(row, k))) for row in outcomes]
    assert pass_at_k(outcomes, k) == pytest.approx(float(sum(shares) / len(shares)), abs=1e-15)


@given(ROWS)
def test_pass_at_1_is_the_average(outcomes):
    assert pass_at_k(outcomes, 1) == pytest.approx(avg_at_k(outcomes), abs=1e-15)


def test_pass_at_k_is_exact_where_floats_overflow_or_cancel():
    # One correct sample in n: the chance to draw it is k / n.
    assert pass_at_k([[True] + [False] * 9_999], 5_000) == 0.5
    assert pass_at_k([[True] + [False] * 9_999], 1) == 1e-4
    assert pass_at_k([[False] * 4_000], 4_000) == 0.0
    assert pass_at_k([[True] * 6 + [False] * 4_994], 4_995) == 1.0


def test_pass_at_k_takes_problems_with_different_numbers_of_samples():
    assert pass_at_k([[True, False], [False, False, True]], 2) == pytest.approx((1 + 2 / 3) / 2)


def test_avg_at_k_weighs_problems_not_samples_alike():
    assert avg_at_k([[True], [False, False, False]]) == 0.5
    assert avg_at_k([[True, False], [True, True]]) == 0.75


@pytest.mark.parametrize(
    ("answers", "outcomes", "k", "expected"),
    [
        (["3", "4", "4"], [True, False, False], 3, 0.0),
        (["3", "4", "4"], [True, False, False], 1, 1.0),
        (["4", "3", "3"], [False, True, True], 3, 1.0),
        ([None, None, "3"], [False, False, True], 3, 1.0),
        ([None, None, "3"], [False, False, True], 2, 0.0),
        # Ties count with the share of right ones among them.
        (["5", "3"], [False, True], 2, 0.5),
        (["5", "3", "4", "3", "5"], [False, True, False, True, False], 5, 0.5),
        (["3", "3"], [True, False], 2, 0.5),
        (["1", "2", "3"], [False, True, False], 3, 1 / 3),
    ],
)
def test_maj_at_k_on_one_problem(answers, outcomes, k, expected):
    assert maj_at_k([answers], [outcomes], k) == expected


@given(st.lists(st.sampled_from([("1", False), ("2", True), ("3", False), (None, False)]), min_size=1, max_size=6))
def test_maj_at_k_agrees_with_counting_by_hand_in_any_order_of_samples(samples):
    votes = [sample for sample in samples if sample[0] is not None]
    most = max(map(votes.count, votes), default=0)
    tied = {vote for vote in votes if votes.count(vote) == most}
    expected = sum(correct for _, correct in tied) / len(tied) if tied else 0.0
    for order in list(permutations(samples))[:24]:
        assert (
            maj_at_k([[answer for answer, _ in order]], [[correct for _, correct in order]], len(samples)) == expected
        )


def test_maj_at_k_averages_problems():
    assert maj_at_k([["1"], ["2"], [None], ["1"]], [[True], [False], [False], [True]], 1) == 0.5


def test_arrays_are_accepted():
    outcomes = np.array([[True, False], [True, True]])
    assert pass_at_k(outcomes, 2) == 1.0
    assert avg_at_k(outcomes) == 0.75
    assert maj_at_k([["1", "2"], ["1", "1"]], outcomes, 2) == 0.75


@pytest.mark.parametrize(
    ("outcomes", "k", "message"),
    [
        ([], 1, "outcomes is empty"),
        ([[True], []], 1, "problem 1 has no samples"),
        ([[True], [0.5]], 1, "problem 1 has the outcome 0.5"),
        ([[True], ["no"]], 1, "problem 1 has the outcome 'no'"),
        ([[True]], 0, "k is 0"),
        ([[True]], -1, "k is -1"),
        ([[True]], 1.0, "k is 1.0"),
        ([[True]], True, "k is True"),
        ([[True, True], [True]], 2, "k is 2, but problem 1 has 1 samples"),
    ],
)
def test_bad_arguments_are_refused(outcomes, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(outcomes, k)
    with pytest.raises(ValueError, match=message):
        maj_at_k([["1"] * len(row) for row in outcomes], outcomes, k)
    if not message.startswith("k"):
        with pytest.raises(ValueError, match=message):
            avg_at_k(outcomes)


@pytest.mark.parametrize("answers", [[["1"]], [["1"], ["1"]], [["1", "2"]]])
def test_answers_of_another_shape_are_refused(answers):
    with pytest.raises(ValueError, match="differ in shape"):
        maj_at_k(answers, [[True, True], [True]], 1)


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(st.sampled_from(["1", "2", None]), min_size=n, max_size=n), min_size=1)
    )
)
def test_scores_of_problems_have_the_metrics_as_their_means(answers):
    outcomes = [[answer == "1" for answer in row] for row in answers]
    n = len(answers[0])
    means = {name: mean(values) for name, values in problem_scores(answers, outcomes, range(1, n + 1)).items()}
    expected = {f"avg@{n}": avg_at_k(outcomes)}
    for k in range(1, n + 1):
        expected |= {f"pass@{k}": pass_at_k(outcomes, k), f"maj@{k}": maj_at_k(answers, outcomes, k)}
    assert means == expected
    metrics = nemo_skills_metrics(answers, outcomes, [[5] * n] * len(answers))
    for k in range(1, n + 1):
        assert metrics[f"pass@{k}"]["symbolic_correct"] == 100 * expected[f"pass@{k}"]
        assert k == 1 or metrics[f"majority@{k}"]["symbolic_correct"] == 100 * expected[f"maj@{k}"]


def test_scores_need_as_many_samples_of_each_problem():
    with pytest.raises(ValueError, match="different numbers of samples"):
        problem_scores([["1"], ["1", "2"]], [[True], [True, False]], [1])


def test_confidence_intervals_have_the_width_of_theory_and_their_seed():
    scores = [[float(problem % 2), 1.0] for problem in range(400)]
    means = bootstrap(scores, 4000, seed=3)
    assert means.shape == (4000, 2) and (means == bootstrap(scores, 4000, seed=3)).all()
    assert (means != bootstrap(scores, 4000, seed=4)).any()
    (low, top), (high, other_top) = interval(means, 0.95)
    # The mean of 400 fair coins has a standard deviation of 2.5 points.
    assert (low, high) == (pytest.approx(0.451, abs=0.006), pytest.approx(0.549, abs=0.006))
    assert top == other_top == 1.0


def test_drawings_of_one_seed_and_another_name_are_independent():
    scores = [[problem / 30] for problem in range(30)]
    first, second = (bootstrap(scores, 4000, [5, number])[:, 0] for number in (1, 2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        low, high = interval(bootstrap((generator.random((60, 1)) < 0.3).astype(float), 400, seed), 0.9)
        covered += low[0] <= 0.3 <= high[0]
    assert 0.82 < covered / 300 < 0.95
