"""Check that the quick subset covers every folder of tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def folders(paths: Iterable[Path]) -> set[str]:
    """Return the names of the folders of tests that contain these paths."""
    return {path.relative_to(TESTS).parts[0] for path in paths if path.is_relative_to(TESTS)}


@pytest.mark.quick
def test_quick_subset_covers_every_folder(request: pytest.FixtureRequest) -> None:
    every_folder = folders(TESTS.rglob("test_*.py"))
    items = request.session.items
    if folders(item.path for item in items) != every_folder:
        pytest.skip("only some folders were collected")
    assert folders(item.path for item in items if item.get_closest_marker("quick")) == every_folder
