"""One warm world per size for the whole run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.ranks import World


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """`world(4)`: four gloo ranks that stay."""
    worlds: dict[int, World] = {}

    def of(size: int) -> World:
        return worlds.setdefault(size, World(size))

    yield of
    for one in worlds.values():
        one.stop()
