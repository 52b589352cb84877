"""Float64 definitions of what the Triton kernels compute, and checks of a kernel module against them, on any device."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

MAX, Z, MEAN, TARGET, TEACHER_MAX, TEACHER_Z, TEACHER_MEAN, TEACHER_TARGET, CROSS = range(9)

# Optional coefficients of the gradient that occur together, from the log-prob alone to everything at once.
COEFFICIENTS = [
    (),
    ("one_hot",),
    ("linear",),
    ("linear", "one_hot"),
    ("linear", "cross"),
    ("teacher_share",),
    ("linear", "teacher_share", "one_hot"),
    ("linear", "cross", "teacher_share", "one_hot"),
]

# float32 rounds by 6e-8 a step, and an exponent in proportion to its size.
_ROUNDING = 5e-7
_EXPONENT_ROUNDING = 2e-7
_OUTPUT_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
# Triton's interpreter cuts bfloat16 off instead of rounding it.
_INTERPRETER_ROUNDING = _OUTPUT_ROUNDING | {torch.bfloat16: 2.0**-7}
# Half of the smallest subnormal number, or more: where those are flushed to 0.
_OUTPUT_SMALLEST = {torch.bfloat16: 2.0**-126, torch.float16: 2.0**-25, torch.float32: 2.0**-126}


@contextmanager
def interpreted_kernels() -> Iterator[ModuleType]:
    """A copy of the kernel module that runs on the CPU, through Triton's interpreter.

    Whether a kernel is interpreted is settled when it is decorated, hence a copy. Triton's own ``sum`` and ``max`` were
    decorated when Triton was first imported, by whatever test came first, so they are replaced by the reductions they
    stand for.
    """
    import triton.language as tl

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(tl, "sum", lambda values, axis: tl.reduce(values, axis, tl.standard._sum_combine))
        patch.setattr(tl, "max", lambda values, axis: tl.reduce(values, axis, tl.standard._elementwise_max))
        spec = importlib.util.find_spec("dasd_megatron.losses.triton_kernels")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


class Case(NamedTuple):
    """Logits, teacher logits and targets of one shard, and which columns it holds."""

    logits: Tensor
    teacher: Tensor
    targets: Tensor
    columns: int
    first_column: int
    temperature: float

    @property
    def place(self) -> dict[str, float]:
        return {
            "columns": self.columns,
            "first_column": self.first_column,
            "inverse_temperature": 1.0 / self.temperature,
        }

    def local_targets(self) -> tuple[Tensor, Tensor]:
        """This shard's column of each target, and whether it is one of this shard's."""
        local = self.targets - self.first_column
        owned = (local >= 0) & (local < self.columns)
        return torch.where(owned, local, 0), owned


def make_case(
    generator: torch.Generator,
    tokens: int,
    columns: int,
    *,
    padding: int = 3,
    gap: int = 5,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    scale: float = 3.0,
    level: float = 0.0,
    temperature: float = 1.0,
    first_column: int = 1000,
) -> Case:
    """Rows lie ``gap`` elements apart, the teacher's twice that. The padding columns and the gaps hold NaN, which
    nothing may read."""
    device = generator.device
    sides = []
    for kind, between in ((dtype, gap), (teacher_dtype or dtype, 2 * gap)):
        memory = torch.full((tokens, columns + padding + between), math.nan, dtype=kind, device=device)
        memory[:, :columns] = (torch.randn(tokens, columns, generator=generator, device=device) * scale + level).to(
            kind
        )
        sides.append(memory[:, : columns + padding])
    # Some targets belong to the neighbouring shards, some lie in the padding, and where there is room the first two at
    # this shard's ends.
    low, high = max(first_column - columns // 4 - 1, 0), first_column + columns + padding + columns // 4 + 1
    targets = torch.randint(low, high, (tokens,), generator=generator, device=device)
    targets[:1], targets[1:2] = first_column, first_column + columns - 1
    return Case(*sides, targets, columns, first_column, temperature)


def _shifted(logits: Tensor, maximum: Tensor, case: Case) -> Tensor:
    shift = torch.where(maximum == -math.inf, 0.0, maximum.double())
    return (logits[:, : case.columns].double() - shift[:, None]) / case.temperature


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Products; 0 where the weight is 0, whatever the value."""
    return torch.where(weights == 0, 0.0, weights * values)


def _expectation(weights: Tensor, values: Tensor) -> Tensor:
    mass = weights.sum(-1)
    return torch.where(mass == 0, 0.0, _weighted(weights, values).sum(-1) / mass)


def _expectation_bound(weights: Tensor, values: Tensor, exponents: Tensor) -> Tensor:
    """Bound how far float32 may be from the expectation of ``values`` under weights ``exp(exponents)``."""
    mean = _expectation(weights, values.abs())
    spread = _expectation(weights, (values * exponents).abs()) + mean * _expectation(weights, exponents.abs())
    return _ROUNDING * mean + _EXPONENT_ROUNDING * spread


def _side(logits: Tensor, case: Case) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """One distribution's four rows and their bounds, shifted logits and weights."""
    local, owned = case.local_targets()
    nothing = torch.zeros(len(local), dtype=torch.float64, device=local.device)
    maximum, target = nothing - math.inf, nothing
    if case.columns:
        maximum = logits[:, : case.columns].double().amax(-1)
        target = torch.where(owned, logits.double().gather(1, local[:, None])[:, 0], 0.0)
    d = _shifted(logits, maximum, case)
    weights = d.exp()
    mass, mean = weights.sum(-1), _expectation(weights, d)
    bounds = [nothing, mass * (_ROUNDING + _EXPONENT_ROUNDING * mean.abs()), _expectation_bound(weights, d, d), nothing]
    return [maximum, mass, mean, target], bounds, d, weights


def reference_partials(case: Case, divergence: str | None) -> tuple[Tensor, Tensor]:
    """The packed numbers, and how far float32 may be from them."""
    rows, bounds, d, p = _side(case.logits, case)
    if divergence is None:
        return torch.stack(rows), torch.stack(bounds)
    teacher_rows, teacher_bounds, e, q = _side(case.teacher, case)
    if divergence not in ("reverse_kl", "forward_kl", "jsd"):
        raise ValueError(f"the reference has no divergence {divergence!r}: write its sums here")
    if divergence != "forward_kl":
        teacher_rows[MEAN] = teacher_bounds[MEAN] = torch.zeros_like(rows[MEAN])
    cross = cross_bound = torch.zeros_like(rows[MEAN])
    if divergence != "jsd":
        weights, values, exponents = (p, e, d) if divergence == "reverse_kl" else (q, d, e)
        ruled_out = values == -math.inf
        lost = _expectation(weights, ruled_out.double())
        values = torch.where(ruled_out, 0.0, values)
        cross, cross_bound = _expectation(weights, values), _expectation_bound(weights, values, exponents)
        cross = torch.where(lost > 1e-7, -math.inf, cross)
        # So small a mass is neither surely 0 in float32 nor surely above 0.
        cross_bound = torch.where((lost > 0) & (lost <= 1e-7), math.inf, cross_bound)
    return torch.stack([*rows, *teacher_rows, cross]), torch.stack([*bounds, *teacher_bounds, cross_bound])


def check_partials(kernels: ModuleType, case: Case, divergence: str | None, message: str = "") -> Tensor:
    teacher = None if divergence is None else case.teacher
    got = kernels.local_partials(
        case.logits, teacher, case.targets, divergence=divergence or "reverse_kl", **case.place
    )
    want, bound = reference_partials(case, divergence)
    assert got.dtype == torch.float32 and got.shape == want.shape, f"{message}: {got.dtype} {tuple(got.shape)}"
    _assert_within(got, want, bound, f"{message} partials {divergence}")
    return got


class Normalisers(NamedTuple):
    """Maxima and log normalisers over all shards, float32 ``[T]``."""

    p_max: Tensor
    p_log_z: Tensor
    q_max: Tensor
    q_log_z: Tensor


def normalisers(case: Case, generator: torch.Generator, *, others: bool = True) -> Normalisers:
    """Return the numbers of this shard alone or, with ``others``, as if other shards held larger logits and most of
    the mass."""
    result = []
    for logits in (case.logits, case.teacher):
        (maximum, mass, *_), *_ = _side(logits, case)
        total_max, total = maximum, mass
        if others:
            rise, more = torch.rand(2, len(mass), generator=generator, device=mass.device, dtype=torch.float64)
            total_max = (torch.where(maximum == -math.inf, 0.0, maximum) + rise).float().double()
            total = mass * ((maximum - total_max) / case.temperature).exp() + 1.0 + more
        result += [total_max.float(), total.log().float()]
    return Normalisers(*result)


def _log_probs(case: Case, norm: Normalisers) -> tuple[Tensor, Tensor]:
    return (
        _shifted(case.logits, norm.p_max, case) - norm.p_log_z.double()[:, None],
        _shifted(case.teacher, norm.q_max, case) - norm.q_log_z.double()[:, None],
    )


def _log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(weight), log_q + math.log1p(-weight))


def check_mixture_sums(kernels: ModuleType, case: Case, norm: Normalisers, weight: float, message: str = "") -> Tensor:
    got = kernels.mixture_sums(
        case.logits,
        case.teacher,
        *norm,
        columns=case.columns,
        inverse_temperature=1.0 / case.temperature,
        weight=weight,
    )
    log_p, log_q = _log_probs(case, norm)
    log_m = _log_mixture(log_p, log_q, weight)
    want, bound = [], []
    for log_part in (log_p, log_q):
        part = log_part.exp()
        terms = _weighted(part, log_part - log_m)
        exponents = _weighted(part, log_part).abs()
        want.append(terms.sum(-1))
        bound.append(
            _ROUNDING * (terms.abs() + part).sum(-1)
            + _EXPONENT_ROUNDING * (exponents + _weighted(terms.abs(), log_part.abs())).sum(-1)
        )
    assert got.dtype == torch.float32 and got.shape == (2, len(case.targets)), (
        f"{message}: {got.dtype} {tuple(got.shape)}"
    )
    _assert_within(got, torch.stack(want), torch.stack(bound), f"{message} mixture sums")
    return got


def check_backward(
    kernels: ModuleType,
    case: Case,
    norm: Normalisers,
    names: tuple[str, ...],
    generator: torch.Generator,
    *,
    mixture_weight: float | None = None,
    inplace: bool = False,
    message: str = "",
) -> None:
    """Against the formula, with random coefficients for ``names``. In place the case's logits are lost."""
    tokens = len(case.targets)
    coefficients = {
        name: torch.randn(tokens, generator=generator, device=generator.device) for name in ("constant", *names)
    }
    reads_teacher = "cross" in names or "teacher_share" in names
    log_p, log_q = _log_probs(case, norm)
    wide = {name: value.double()[:, None] for name, value in coefficients.items()}
    p, q = log_p.exp(), log_q.exp()
    terms = [_weighted(p, wide["constant"].expand_as(p))]
    if "linear" in names:
        terms.append(_weighted(p, wide["linear"] * log_p))
    if "cross" in names:
        terms.append(
            _weighted(
                p, -wide["cross"] * (log_q if mixture_weight is None else _log_mixture(log_p, log_q, mixture_weight))
            )
        )
    exponents = log_p
    if "teacher_share" in names:
        terms.append(-wide["teacher_share"] * q)
        exponents = torch.where(terms[-1] == 0, exponents, torch.minimum(exponents, log_q))
    if "one_hot" in names:
        local, owned = case.local_targets()
        terms.append(torch.zeros_like(p))
        if case.columns:
            terms[-1].scatter_(1, local[:, None], torch.where(owned[:, None], wide["one_hot"], 0.0))
    want = torch.zeros(case.logits.shape, dtype=torch.float64, device=case.logits.device)
    want[:, : case.columns] = sum(terms)
    size = torch.stack(terms).abs().sum(0)
    rounding = _OUTPUT_ROUNDING if case.logits.is_cuda else _INTERPRETER_ROUNDING
    bound = want.abs() * rounding[case.logits.dtype] * 1.01 + _OUTPUT_SMALLEST[case.logits.dtype]
    bound[:, : case.columns] += size * _ROUNDING * 2 + _weighted(size, exponents.abs()) * _EXPONENT_ROUNDING

    if inplace:
        out = case.logits
        beyond = (
            out.as_strided((tokens, out.stride(0)), (out.stride(0), 1))[:, out.shape[1] :] if tokens else out[:, :0]
        )
    else:
        # Rows further apart than the logits', with what must stay untouched between them.
        memory = torch.full(
            (tokens, case.logits.shape[1] + 11), math.nan, dtype=case.logits.dtype, device=case.logits.device
        )
        out, beyond = memory[:, : case.logits.shape[1]], memory[:, case.logits.shape[1] :]
    kernels.backward(
        case.logits,
        case.teacher if reads_teacher else None,
        out,
        case.targets,
        p_max=norm.p_max,
        p_log_z=norm.p_log_z,
        q_max=norm.q_max if reads_teacher else None,
        q_log_z=norm.q_log_z if reads_teacher else None,
        mixture_weight=mixture_weight,
        **coefficients,
        **case.place,
    )
    _assert_within(out, want, bound, f"{message} gradient {names} {mixture_weight}")
    assert beyond.isnan().all(), f"{message}: wrote between the rows"


def _assert_within(got: Tensor, want: Tensor, bound: Tensor, message: str) -> None:
    """NaN and infinities where they are wanted, -1e30 or less standing for -inf; elsewhere within the bound."""
    # The exponential of a GPU is off by two units in the last place, and its sums are taken in another order.
    bound = bound * 3 if got.is_cuda else bound
    got = got.double()
    near = (got - want).abs() <= bound + 1e-37
    good = torch.where(want.isnan(), got.isnan(), torch.where(want == -math.inf, got <= -1e30, near))
    if not good.all():
        place = tuple((~good).nonzero()[0].tolist())
        numbers = f"{got[place].item()} instead of {want[place].item()} +- {bound[place].item():.1e}"
        worst = ((got - want).abs() / (bound + 1e-37))[~good].max().item()
        raise AssertionError(
            f"{message}: {int((~good).sum())} of {good.numel()} wrong, at worst by {worst:.2f} times the bound, the "
            f"first at {place}: {numbers}"
        )
