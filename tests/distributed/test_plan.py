"""``dasd plan`` counts what Megatron-Core allocates: to the byte for weights, gradients and optimizer, within 20% for
activations."""

from __future__ import annotations

from pathlib import Path

import pytest

from dasd_megatron.models.tiny import character_tokenizer
from tests.support.small_models import LAYOUTS, MODELS, PP, TP, VPP
from tests.support.worker_scripts import run_alone, torchrun

pytestmark = pytest.mark.distributed

DP = "parallel.data_parallel_size="
# Of one rank each, in the layouts of the documentation; the whole counts are those of the published weights.
LARGE = [
    (["model=qwen2.5_7b", TP + "4", PP + "2", DP + "1"], 5, 7_615_616_512),
    (["model=qwen3_8b", TP + "8", PP + "1", DP + "1"], 3, 8_190_735_360),
    (["model=qwen3_32b", TP + "8", PP + "4", DP + "1"], 0, 32_762_123_264),
    (["model=qwen3_32b", TP + "8", PP + "4", DP + "1"], 31, None),
    (["model=qwen2.5_32b", TP + "8", PP + "2", VPP + "2", DP + "2"], 8, 32_763_876_352),
    (["model=llama3_70b", TP + "8", PP + "4", VPP + "2", DP + "4"], 0, 70_553_706_496),
    (["model=llama3_70b", TP + "8", PP + "4", VPP + "2", DP + "4"], 127, None),
    (["model=qwen3_4b", TP + "2", PP + "2", DP + "1"], 0, 4_022_468_096),
    (["model=qwen3_4b", TP + "2", PP + "2", DP + "1"], 3, None),
    (["model=smollm2_135m", TP + "3", PP + "1", DP + "1"], 2, 134_515_008),
]
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", "parallel.bucket_size=20000"]
SMALL = {
    "single": ("qwen3-tied", 1, [TP + "1"]),
    "single-recompute": ("qwen3-tied", 1, [TP + "1", "precision.recompute=full"]),
    "single-selective": ("qwen2-untied", 1, [TP + "1", "precision.recompute=selective"]),
    "single-bf16": ("qwen3-tied", 1, [TP + "1", "precision=bf16"]),
    "tp2-sp": ("qwen2-untied", *LAYOUTS["tp2-sp"]),
    "dp2": ("qwen3-untied", 2, [TP + "1", DP + "2"]),
    "pp2-dp2-uneven-overlap": (
        "qwen3-untied",
        4,
        [TP + "1", PP + "2", DP + "2", "parallel.first_pipeline_num_layers=5", *OVERLAP],
    ),
    "dp2-bf16": ("llama3-tied", 2, [TP + "1", DP + "2", "precision=bf16"]),
    "dp2-replicated": ("qwen2-tied", 2, [TP + "1", DP + "2", "optimizer.distributed=false"]),
    "pp2-dp2-tied": ("qwen3-tied", 4, [TP + "1", PP + "2", DP + "2"]),
}


def test_one_rank_of_large_models_has_the_planned_parameters() -> None:
    output = run_alone("plan_matches_meta", LARGE)
    assert output.count("model=") == len(LARGE)


# Each has what another case has too, with weights in another place or of another kind.
AGAIN = {"single-selective", "dp2-bf16", "dp2-replicated", "pp2-dp2-tied"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.drill] if case in AGAIN else []) for case in SMALL]
)
def test_a_real_model_takes_the_planned_bytes(case: str, tmp_path: Path) -> None:
    name, nproc, overrides = SMALL[case]
    MODELS[name]().save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    torchrun("plan_matches_run", nproc, {"path": str(tmp_path), "overrides": overrides})
