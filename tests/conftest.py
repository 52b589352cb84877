"""Start of the package's processes in tests, and the order in which test files run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import preloaded

# What takes longest comes first, so that all workers are busy until the end. The rest takes less than half a minute.
LONGEST = (
    "integration/rollout_contract",
    "integration/test_documented_commands.py",
    "distributed/test_model_parallel.py",
    "integration/test_conversion.py",
    "distributed/test_parity.py",
    "integration/test_crash_matrix.py",
    "integration/test_faults.py",
    "integration/test_fault_drill.py",
    "integration/test_slurm.py",
    "integration/test_weight_sync.py",
    "integration/test_hosts.py",
    "integration/test_non_finite.py",
    "integration/test_cli.py",
    "integration/test_evaluate.py",
    "integration/test_discovery.py",
    "integration/test_stopping.py",
    "distributed",
    "integration",
)
# Files that share what takes long to set up.
TOGETHER = ("integration/rollout_contract",)


def pytest_configure() -> None:
    preloaded.fork_children()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent

    def order(item: pytest.Item) -> int:
        place = item.path.relative_to(folder).as_posix()
        return next((index for index, start in enumerate(LONGEST) if place.startswith(start)), len(LONGEST))

    items.sort(key=order)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker a file at a time, or files that belong together, in the order of the tests."""
    from xdist.scheduler import LoadScopeScheduling

    class FileScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((place for place in TOGETHER if file.startswith(f"tests/{place}")), file)

    config.option.loadscopereorder = False
    return FileScheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Start real interpreters in tests marked ``real_start``, and in the fixtures that they are the first to use."""
    if item.get_closest_marker("real_start") is None:
        return (yield)
    with preloaded.real_start():
        return (yield)
