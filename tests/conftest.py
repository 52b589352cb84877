"""How the tests start processes of the package."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import preloaded


def pytest_configure() -> None:
    preloaded.fork_children()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Start real interpreters in tests marked ``real_start``, and in the fixtures that they are the first to use."""
    if item.get_closest_marker("real_start") is None:
        return (yield)
    with preloaded.real_start():
        return (yield)
