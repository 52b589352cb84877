"""The distributional update equals the formulas, computed densely by transformers, in several layouts, precisions and
divergences, where some responses have no teacher; and tokens that the policy did not sample are context in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.small_models import save_model
from tests.support.worker_scripts import torchrun

pytestmark = pytest.mark.distributed

OBJECTIVE = [
    "algorithm.objective=distributional",
    "algorithm.divergence_weight=0.7",
    "algorithm.jsd_weight=0.3",
    "batch.micro_batch_size=3",
]
TP2, PP2, VPP2 = (
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.virtual_pipeline_model_parallel_size=2",
)
MIXTURE = ["teacher.weights=trust_region", "teacher.trust_region_mix=0.3"]
GSPO = ["loss.surrogate=gspo", "loss.aggregation=seq_mean_token_mean"]
CISPO = ["loss.surrogate=cispo", "loss.aggregation=seq_mean_token_sum_norm"]
ENTRIES = ["algorithm.divergence_top_k=20"]
CASES = {
    "single": ("qwen3-tied", "reverse_kl", 1, ["parallel=single"]),
    "tp2-sp, mixture, gspo": (
        "qwen2-untied", "jsd", 2,
        ["parallel=single", TP2, "parallel.sequence_parallel=true", *MIXTURE, *GSPO],
    ),
    "pp2-vpp2, mixture, cispo": (
        "qwen3-tied", "forward_kl", 2, ["parallel=single", PP2, VPP2, *MIXTURE, *CISPO]
    ),
    "tp2-sp, the student's entries": (
        "qwen3-tied", "jsd", 2, ["parallel=single", TP2, "parallel.sequence_parallel=true", *ENTRIES,
        "algorithm.divergence_top_k_of=student"],
    ),
    "pp2-vpp2, a mixture's clipped entries": (
        "qwen2-untied", "forward_kl", 2, ["parallel=single", PP2, VPP2, *MIXTURE, *ENTRIES,
        "algorithm.divergence_tail=false", "algorithm.divergence_entry_clip=0.05"],
    ),
    "bf16": ("qwen2-untied", "reverse_kl", 1, ["parallel=single", "precision=bf16"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_loss_and_divergence_equal_the_formulas(case: str, tmp_path: Path) -> None:
    name, divergence, processes, overrides = CASES[case]
    seed = save_model(name, tmp_path / "model")
    overrides = [*OBJECTIVE, f"algorithm.divergence={divergence}", *overrides]
    torchrun("update_matches_dense", processes, {"path": str(tmp_path / "model"), "seed": seed, "overrides": overrides})


@pytest.mark.parametrize(
    ("processes", "overrides"), [(1, []), (2, [TP2, "parallel.sequence_parallel=true"]), (2, [PP2, VPP2])]
)
def test_tokens_that_were_not_sampled_are_context(processes: int, overrides: list[str], tmp_path: Path) -> None:
    seed = save_model("qwen3-tied", tmp_path / "model")
    overrides = ["parallel=single", "batch.micro_batch_size=3", *overrides]
    torchrun("masked_update", processes, {"path": str(tmp_path / "model"), "seed": seed, "overrides": overrides})


DP2_OVERLAP = ["parallel.data_parallel_size=2", "parallel.overlap_grad_reduce=true", "parallel.bucket_size=3000"]
HEAD_CASES = {
    "tied": ("qwen3-tied", 1, ["precision=bf16"]),
    "tp2-sp, untied": ("qwen2-untied", 2, [TP2, "parallel.sequence_parallel=true"]),
    "pp2-vpp2, tied": ("qwen3-tied", 2, [PP2, VPP2]),
    "dp2, overlap, tied": ("qwen3-tied", 2, DP2_OVERLAP),
    "dp2, overlap, untied, replicated optimizer": (
        "qwen2-untied", 2, [*DP2_OVERLAP, "optimizer.distributed=false"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HEAD_CASES)
def test_gradients_of_the_head_go_into_the_sums_of_ddp(case: str, tmp_path: Path) -> None:
    """As they do when autograd hands them over, with the embedding's where it is the same parameter, on this stage or
    on the first."""
    name, processes, overrides = HEAD_CASES[case]
    seed = save_model(name, tmp_path / "model")
    arguments = {
        "path": str(tmp_path / "model"),
        "seed": seed,
        "tolerance": 1e-2 if "precision=bf16" in overrides else 1e-5,
    }
    torchrun("head_gradient", processes, {**arguments, "overrides": ["batch.micro_batch_size=2", *overrides]})


def test_packed_sequences_update_as_padded_ones(tmp_path: Path) -> None:
    """In half precision; ``tests/gpu/test_packing.py`` runs the same with Transformer Engine, and test_parity.py in
    float32 in layouts."""
    seed = save_model("qwen3-tied", tmp_path / "model")
    overrides = [*OBJECTIVE, "precision=bf16"]
    print(
        torchrun(
            "packing_matches_padded",
            1,
            {"path": str(tmp_path / "model"), "seed": seed, "longest": 80, "overrides": overrides},
        )
    )
