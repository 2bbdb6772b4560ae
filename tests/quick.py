"""Select the quick subset: `bash launch/test.sh --quick`, which runs `pytest -m quick`.

It covers every folder of tests in under three minutes on two cores. A test is in the subset if it has the marker
`quick`, and is not if it has the marker `slow`. These rules select from all others:

- Tests in the process of pytest: the first cases of each test.
- Tests on ranks: one case, in a world of two ranks if there is one, and of tests of all layouts every sixth layout.
- Tests in folders that start jobs: the first test of each folder, unless another one has the marker `quick`.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from tests.tables.layouts import LAYOUTS

__all__ = ["mark_quick"]

TESTS = Path(__file__).parent
STARTING_JOBS = ("integrations", "launch")
NUM_CASES = 2
"""Number of cases of a test in the process of pytest."""


def mark_quick(items: Sequence[pytest.Item]) -> None:
    """Add the marker `quick` to the tests of the subset."""
    items = [item for item in items if not item.get_closest_marker("slow")]
    for folder, in_folder in itertools.groupby(items, key=lambda item: item.path.parent):
        if folder.is_relative_to(TESTS) and folder.relative_to(TESTS).parts[:1] in [(name,) for name in STARTING_JOBS]:
            of_folder = list(in_folder)
            if not any(item.get_closest_marker("quick") for item in of_folder):
                of_folder[0].add_marker("quick")
            continue
        for name, cases in itertools.groupby(in_folder, key=lambda item: item.nodeid.partition("[")[0]):
            for item in _select(name, list(cases)):
                item.add_marker("quick")


def _select(name: str, cases: list[pytest.Item]) -> Iterable[pytest.Item]:
    """Return the cases of a test that are in the subset."""
    sizes = [_num_ranks(case) for case in cases]
    if sizes[0] is None:
        return cases[:NUM_CASES]
    # The smallest world of each layout comes last, so that it stays. In a world of one rank nothing is exchanged.
    in_order = sorted(zip(cases, sizes, strict=True), key=lambda pair: (pair[1] != 1, -pair[1]))
    by_layout = {case.callspec.params.get("name"): case for case, _ in in_order if hasattr(case, "callspec")}
    if len(by_layout.keys() & LAYOUTS.keys()) > len(LAYOUTS) // 4:
        return list(by_layout.values())[::6]
    smallest = min((size for size in sizes if size != 1), default=1)
    cases = [case for case, size in zip(cases, sizes, strict=True) if size == smallest]
    # Another case for each test, but the same one in every run.
    return [cases[zlib.crc32(name.encode()) % len(cases)]]


def _num_ranks(item: pytest.Item) -> int | None:
    """Return the number of ranks that a test runs on, None for a test in the process of pytest."""
    marker = item.get_closest_marker("ranks")
    if marker is None:
        return None
    return item.callspec.params["num_ranks"] if "num_ranks" in item.fixturenames else marker.args[0]
