"""Process groups that are destroyed and created again leave nothing stale, and leak nothing."""

from __future__ import annotations

from tests.comm import cycles


def test_cycles_leak_nothing() -> None:
    for counts in cycles.run(12).values():
        assert cycles.growth(counts) == {}
