"""Figures of devices: their overrides, and the page that gives their sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from dasd_megatron.errors import ConfigError
from dasd_megatron.planning.assumptions import DEVICES, FIGURES, assume

PAGE = (Path(__file__).parents[3] / "docs" / "plan.md").read_text()


def test_figures_can_be_replaced() -> None:
    assumed = assume("h200", ["mfu=0.5", "disk_write=1e9", "mfu=0.6"])
    assert (assumed.mfu, assumed.disk_write, assumed.gpu_memory) == (0.6, 1e9, 141e9)
    assert assume("h100", []) == DEVICES["h100"]


@pytest.mark.parametrize(
    "change", ["mfu=0", "mfu=1.1", "mfu=nan", "mfu=", "mfu", "nvlink=inf", "nvlink=-1", "device=1", "speed=3", ""]
)
def test_other_figures_are_refused_in_one_line(change: str) -> None:
    with pytest.raises(ConfigError) as caught:
        assume("h100", [change])
    assert "--assume" in str(caught.value) and "\n" not in str(caught.value)


def test_the_page_has_every_figure_with_its_value_and_source() -> None:
    for name, figure in FIGURES.items():
        values = " / ".join(dict.fromkeys(f"{getattr(device, name):g}" for device in DEVICES.values()))
        assert f"| `{name}` | {values} | {figure.metadata['source']} |" in PAGE, name
