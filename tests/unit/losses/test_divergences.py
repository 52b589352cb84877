"""The table of divergences: importable without torch; each value is its formula, each gradient the derivative."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from dasd_megatron.losses import DIVERGENCES, Divergence
from dasd_megatron.losses.divergences import Probabilities, Sums
from tests.support.token_stats_reference import dense

WEIGHT = 0.3


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_the_value_of_the_sums_is_the_definition(divergence: Divergence) -> None:
    generator = torch.Generator().manual_seed(4)
    logits, teacher = torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    want = dense(logits, torch.zeros(5, dtype=torch.int64), teacher, divergence.name, 1.0, 11, WEIGHT).divergence
    log_p, log_q = logits.log_softmax(-1), teacher.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = (WEIGHT * p + (1 - WEIGHT) * q).log()
    d, e = logits - logits.amax(-1, keepdim=True), teacher - teacher.amax(-1, keepdim=True)
    weights, other = (p, e) if divergence.weighted_by == "student" else (q, d)
    sums = Sums(
        student_mean=(p * d).sum(-1),
        student_log_z=d.logsumexp(-1),
        teacher_mean=(q * e).sum(-1),
        teacher_log_z=e.logsumexp(-1),
        cross=(weights * other).sum(-1),
        student_to_mixture=(p * (log_p - log_m)).sum(-1),
        teacher_to_mixture=(q * (log_q - log_m)).sum(-1),
    )
    torch.testing.assert_close(divergence.value(sums, WEIGHT), want)


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_gradient_terms_are_the_derivative(divergence: Divergence) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 11, generator=generator, dtype=torch.float64)
    grad = torch.randn(5, generator=generator, dtype=torch.float64)
    targets = torch.zeros(5, dtype=torch.int64)
    value = dense(logits, targets, teacher, divergence.name, 1.0, 11, WEIGHT).divergence
    (want,) = torch.autograd.grad((value * grad).sum(), logits)

    log_p, log_q = logits.detach().log_softmax(-1), teacher.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_x, centre = log_q, value.detach()
    if divergence.uses_mixture:
        log_x = torch.logaddexp(log_p + math.log(WEIGHT), log_q + math.log1p(-WEIGHT))
        centre = (p * (log_p - log_x)).sum(-1)
    terms = divergence.gradient(grad, centre, WEIGHT)
    linear, cross, share = (
        torch.zeros(5, 1) if term is None else term[:, None]
        for term in (terms.linear, terms.cross, terms.teacher_share)
    )
    got = p * (terms.constant[:, None] + linear * log_p - cross * log_x) - share * q
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_the_entries_sum_to_the_value_and_have_its_slopes(divergence: Divergence) -> None:
    generator = torch.Generator().manual_seed(5)
    logits, teacher = torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    log_p = logits.log_softmax(-1).requires_grad_()
    log_q = teacher.log_softmax(-1)
    entries = divergence.entries(Probabilities(log_p, log_p.exp(), log_q, log_q.exp()), WEIGHT)
    want = dense(logits, torch.zeros(5, dtype=torch.int64), teacher, divergence.name, 1.0, 11, WEIGHT).divergence
    torch.testing.assert_close(entries.contribution.sum(-1), want)
    (slope,) = torch.autograd.grad(entries.contribution.sum(), log_p)
    torch.testing.assert_close(entries.slope, slope)


def test_an_infinite_reverse_kl_has_no_gradient() -> None:
    grad, value = torch.ones(2, dtype=torch.float64), torch.tensor([math.inf, 2.0], dtype=torch.float64)
    terms = DIVERGENCES["reverse_kl"].gradient(grad, value, WEIGHT)
    assert terms.constant.tolist() == [0.0, -2.0]
    assert terms.linear is not None and terms.linear.tolist() == [0.0, 1.0]


def test_the_table_is_by_name_and_imports_no_torch() -> None:
    assert all(divergence.name == name for name, divergence in DIVERGENCES.items())
    script = (
        "import sys; from dasd_megatron.losses import DIVERGENCES; import dasd_megatron.losses.divergences;"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
