"""How the tests start processes of the package, and in which order their files run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import preloaded

# What takes longest comes first, so that all workers are busy until the end. The rest takes less than half a minute.
LONGEST = (
    "integration/rollout_contract",
    "integration/test_documented_commands.py",
    "distributed/test_parity.py",
    "integration/test_fault_drill.py",
    "integration/test_crash_matrix.py",
    "integration/test_conversion.py",
    "integration/test_faults.py",
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


# Before xdist reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {item: item.path.relative_to(Path(__file__).parent).as_posix() for item in items}

    def order(item: pytest.Item) -> int:
        return next((index for index, place in enumerate(LONGEST) if places[item].startswith(place)), len(LONGEST))

    items.sort(key=order)
    for item in items:
        group = next((place for place in TOGETHER if places[item].startswith(place)), places[item])
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Start real interpreters in tests marked ``real_start``, and in the fixtures that they are the first to use."""
    if item.get_closest_marker("real_start") is None:
        return (yield)
    with preloaded.real_start():
        return (yield)
