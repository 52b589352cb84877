"""The metrics of a step's updates."""

from __future__ import annotations

import math

from dasd_megatron.observability.metric_pages import find_metric
from dasd_megatron.training.passes import UpdateResult
from dasd_megatron.training.step_metrics import update_metrics


def result(loss: float, grad_norm: float = 1.0, lr: float = 0.1, applied: bool = True) -> UpdateResult:
    return UpdateResult({"loss": loss, "clip_share": 0.5}, grad_norm, lr, applied)


def test_what_a_loss_reports_is_averaged_under_its_name() -> None:
    metrics = update_metrics([result(1.0, grad_norm=2.0, lr=0.2), result(3.0, grad_norm=4.0, lr=0.1)])
    assert metrics == {
        "update/skipped": 0,
        "update/loss": 2.0,
        "update/clip_share": 0.5,
        "update/grad_norm": 3.0,
        "update/lr": 0.1,
    }
    assert all(find_metric(name) is not None for name in metrics)


def test_updates_that_were_not_applied_are_counted_and_left_out() -> None:
    broken = result(math.nan, grad_norm=math.nan, lr=0.3, applied=False)
    metrics = update_metrics([broken, result(3.0), broken])
    assert metrics["update/skipped"] == 2 and metrics["update/loss"] == 3.0 and metrics["update/lr"] == 0.1
    assert update_metrics([broken]) == {"update/skipped": 1}
