"""Hold the budgets of what each rank of a simulated job does before its first step."""

from __future__ import annotations

import pytest

from distclip.bench.__main__ import main
from distclip.bench.scale import LAYOUTS, MAX_SLOT_BYTES, measure_rendezvous, measure_search, measure_slots


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [64, 256])
def test_rendezvous_is_within_budget(layout: str, size: int) -> None:
    costs = measure_rendezvous(layout, size)
    assert costs.is_within_budget, costs
    # The messages of a rank do not grow with the job.
    assert costs.sent + costs.received < 400
    assert costs.store_operations == 6 * size


def test_search_is_within_budget() -> None:
    small, large = (measure_search("FSDP2 + experts", size) for size in (256, 512))
    assert large.is_within_budget, large
    # Ranks read the messages in turn.
    assert large.sent + large.received < 1.1 * (small.sent + small.received)
    assert large.store_operations < 17 * 512


def test_bytes_of_slots_do_not_grow_with_the_job() -> None:
    costs = [measure_slots("PP x FSDP2 x TP", size) for size in (64, 256)]
    assert all(one.sent < MAX_SLOT_BYTES // 100 for one in costs)
    assert abs(costs[0].sent - costs[1].sent) < 1000


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cases", "rendezvous", "--ranks", "64"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(LAYOUTS)
    with pytest.raises(SystemExit):
        main(["--cases", "rendezvous", "--ranks", "100"])
    with pytest.raises(SystemExit):
        main(["--cases", "slots", "--ranks", str(32 * 10**10)])
