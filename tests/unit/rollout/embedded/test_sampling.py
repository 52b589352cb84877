"""The embedded server's sampler: its distribution, its cuts and its purity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dasd_megatron.rollout.embedded.sampling import TOP_K_ALL, counter_uniforms, keep_top, sample_tokens

# 99.99% quantiles of chi-square, so that a correct sampler fails once in ten thousand seeds; the seeds are fixed.
CHI2_9999 = {4: 23.51, 9: 33.72, 19: 50.80, 255: 348.6}


def draw(logits, seeds, *, position=7, temperature=1.0, top_k=TOP_K_ALL, top_p=1.0):
    """Tokens of ``len(seeds)`` rows that share one [V] logit vector."""
    n = len(seeds)
    tokens, _ = sample_tokens(
        logits.expand(n, -1),
        torch.full((n,), temperature, dtype=torch.float64),
        torch.full((n,), top_k),
        torch.full((n,), top_p, dtype=torch.float64),
        torch.from_numpy(counter_uniforms(np.asarray(seeds), np.full(n, position))),
    )
    return tokens


def chi_square(tokens, probs):
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    expected = probs * len(tokens)
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    return float(((counts - expected)[live] ** 2 / expected[live]).sum())


@pytest.mark.parametrize("varying", ["seed", "position"])
def test_uniforms_are_uniform_and_uncorrelated(varying):
    index = np.arange(100_000)
    u = (
        counter_uniforms(index, np.zeros_like(index))
        if varying == "seed"
        else counter_uniforms(np.full_like(index, 3), index)
    )
    assert u.min() > 0.0 and u.max() < 1.0
    ks = np.abs(np.sort(u) - (index + 0.5) / len(index)).max()
    assert ks < 2.23 / np.sqrt(len(index))  # Kolmogorov's 99.99% quantile
    bins = np.bincount((u * 256).astype(int), minlength=256)
    assert ((bins - len(u) / 256) ** 2 / (len(u) / 256)).sum() < CHI2_9999[255]
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / np.sqrt(len(u))


def test_uniforms_depend_on_seed_and_position_alone():
    seeds, positions = np.array([5, -5, 2**63 - 1, -(2**63)]), np.array([1, 2, 3, 4])
    together = counter_uniforms(seeds, positions)
    alone = [counter_uniforms(seeds[i : i + 1], positions[i : i + 1])[0] for i in range(4)]
    assert together.tolist() == alone
    assert len(set(together.tolist())) == 4
    # A seed and a position must not be interchangeable, or row s at position p would copy row p at position s.
    assert counter_uniforms(np.array([3]), np.array([9])) != counter_uniforms(np.array([9]), np.array([3]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax(temperature):
    logits = torch.randn(20, generator=torch.Generator().manual_seed(1)) * 1.5
    tokens = draw(logits, np.arange(40_000), temperature=temperature)
    assert chi_square(tokens, torch.softmax(logits.double() / temperature, -1)) < CHI2_9999[19]


def test_draws_of_one_seed_along_positions_follow_the_softmax():
    logits = torch.linspace(-1, 1, 10)
    uniforms = torch.from_numpy(counter_uniforms(np.full(40_000, 11), np.arange(40_000)))
    ones = torch.ones(40_000, dtype=torch.float64)
    tokens, _ = sample_tokens(logits.expand(40_000, -1), ones, torch.full((40_000,), TOP_K_ALL), ones, uniforms)
    assert chi_square(tokens, torch.softmax(logits.double(), -1)) < CHI2_9999[9]


def test_top_k_keeps_the_k_best_and_their_ratios():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(2))
    best = logits.topk(5).indices
    probs = torch.zeros(50, dtype=torch.float64)
    probs[best] = torch.softmax(logits[best].double(), -1)
    assert chi_square(draw(logits, np.arange(20_000), top_k=5), probs) < CHI2_9999[4]


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    probs = torch.tensor([0.05, 0.4, 0.25, 0.1, 0.2], dtype=torch.float64)
    # Before 0.1 stands a mass of 0.85 > 0.8; before 0.2 one of 0.65.
    kept = keep_top(probs[None], torch.tensor([TOP_K_ALL]), torch.tensor([0.8], dtype=torch.float64))[0]
    assert kept.tolist() == [0.0, 0.4, 0.25, 0.0, 0.2]
    tokens = draw(probs.log(), np.arange(20_000), top_p=0.8)
    assert chi_square(tokens, kept / kept.sum()) < CHI2_9999[4]


def test_top_k_and_top_p_cut_together_and_per_row():
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 3, dtype=torch.float64)
    kept = keep_top(probs, torch.tensor([2, TOP_K_ALL, 3]), torch.tensor([1.0, 0.35, 0.75], dtype=torch.float64))
    assert (kept > 0).tolist() == [[True, True, False, False], [True, False, False, False], [True, True, True, False]]


def test_greedy_takes_the_largest_logit_beside_sampling_rows():
    logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, 0.0, 0.0]])
    tokens, log_probs = sample_tokens(
        logits,
        torch.ones(2, dtype=torch.float64),
        torch.tensor([1, TOP_K_ALL]),
        torch.ones(2, dtype=torch.float64),
        torch.tensor([0.999999, 0.5], dtype=torch.float64),
    )
    assert tokens.tolist() == [1, 1]
    torch.testing.assert_close(log_probs, torch.log_softmax(logits.double(), -1))


def test_log_probs_are_after_temperature_and_before_the_cuts():
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    _, log_probs = sample_tokens(
        logits,
        temperature,
        torch.tensor([2, 2, 2]),
        torch.full((3,), 0.5, dtype=torch.float64),
        torch.full((3,), 0.3, dtype=torch.float64),
    )
    torch.testing.assert_close(log_probs, torch.log_softmax(logits.double() / temperature[:, None], -1))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.floats(-60, 60), st.just(float("-inf"))), min_size=2, max_size=12).filter(
        lambda x: max(x) > -61
    ),
    st.sampled_from([2.0**-49, 0.25, 0.5, 1 - 2.0**-49]),
    st.sampled_from([1.0, 0.6, 1e-9]),
    st.sampled_from([TOP_K_ALL, 1, 3]),
)
def test_a_token_without_mass_is_never_drawn(logits, uniform, top_p, top_k):
    logits = torch.tensor([logits])
    tokens, log_probs = sample_tokens(
        logits,
        torch.ones(1, dtype=torch.float64),
        torch.tensor([top_k]),
        torch.tensor([top_p], dtype=torch.float64),
        torch.tensor([uniform], dtype=torch.float64),
    )
    kept = keep_top(log_probs.exp(), torch.tensor([top_k]), torch.tensor([top_p], dtype=torch.float64))
    assert kept[0, tokens[0]] > 0
