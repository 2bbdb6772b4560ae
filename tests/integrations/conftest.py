"""Frameworks leave much behind in a process: ranks that have met one meet no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.ranks import World, worlds


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], World]]:
    """`ranks(2)`: as the fixture `world`, but of one file alone."""
    with worlds() as of:
        yield of
