"""Explore schedules of the real protocol, and check that the explorer finds protocols that are broken by hand."""

from __future__ import annotations

from unittest import mock

import pytest

from distclip.comm import waiting
from distclip.testing.exploration import Explorer
from distclip.testing.sampling import SCHEDULES_PER_SCENARIO, all_scenarios, sample_in_processes, scenario_of
from distclip.testing.scenarios import Condition, Scenario
from tests.testing.breakages import BREAKAGES

# One scenario of each condition, in changing calls and layouts.
SCENARIOS = all_scenarios(every_rank=False)[5::7]

SEQUENCES = [
    Scenario(3, (("function", "stages"), ("clipper", "shards")), (Condition("late", 2, 0, 0.5),)),
    Scenario(3, (("clipper", "shards"), ("function", "stages")), (Condition("late", 0, 0, 30.0),)),
    Scenario(3, (("scaler", "halves"), ("function", "stages")), (Condition("late", 1, 0, 5.0),)),
]

# One rank alone has a parameter on a mesh that earlier calls have spanned.
ALONE_ON_A_WIDER_MESH = [
    Scenario(
        4, (*((call, layout) for layout in earlier), (call, "halves")), (Condition("wider mesh", 3, len(earlier)),)
    )
    for call in ("function", "clipper")
    for earlier in (("shards",), ("shards", "halves"))
]


def test_no_interleaving_breaks_an_invariant() -> None:
    with Explorer() as explorer:
        for scenario in (*SCENARIOS, *SEQUENCES):
            found = explorer.exhaust(scenario, max_states=1000)
            assert not found.findings, str(found.findings[0])
            assert found.schedules > 1


@pytest.mark.parametrize("scenario", ALONE_ON_A_WIDER_MESH, ids=lambda one: f"{one.calls[0][0]}-{len(one.calls)}")
def test_rank_alone_on_a_wider_mesh_fails_with_its_peers(scenario: Scenario) -> None:
    with Explorer() as explorer:
        found = explorer.sample(scenario, range(20))
        assert not found.findings, str(found.findings[0])
        with mock.patch.object(waiting, "_call"):
            assert explorer.sample(scenario, range(20)).findings


def test_random_schedules_of_many_ranks() -> None:
    totals = sample_in_processes(300, 7 * SCHEDULES_PER_SCENARIO - 150, 1)
    assert totals.schedules == 300
    assert not totals.findings, str(totals.findings[0])


def test_schedules_are_reproducible() -> None:
    scenario = scenario_of(0, (8,))
    with Explorer() as explorer:
        first, second = (explorer.sample(scenario, range(10)) for _ in range(2))
    assert first.states == second.states


@pytest.mark.parametrize("name", BREAKAGES)
def test_broken_protocols_are_found(name: str) -> None:
    scenario, make = BREAKAGES[name]
    with Explorer() as explorer:
        with make():
            assert explorer.exhaust(scenario, max_states=3000).findings
        found = explorer.exhaust(scenario, max_states=100).findings
    assert not found, str(found[0])
