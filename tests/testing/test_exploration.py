"""Explore schedules of the real protocol, and check that the explorer finds protocols that are broken by hand."""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import pytest

from distclip.comm import waiting
from distclip.testing.behaviour import Actor
from distclip.testing.exploration import Explorer
from distclip.testing.explored import ExploredWorld
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

# A search, a comparison, a rank that may end at any time, and two calls.
REDUCED = [
    Scenario(2, (("function", "shards"),), (Condition("different split_over", 1),)),
    Scenario(3, (("function", "stages"),), (Condition("different arguments", 1), Condition("NaN", 2))),
    Scenario(2, (("clipper", "halves"), ("function", "stages")), (Condition("dies", 1),)),
    Scenario(2, (("function", "stages"), ("function", "shards")), (Condition("raises before measuring", 1, 1),)),
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
            assert found.states > 10


@pytest.mark.parametrize("scenario", ALONE_ON_A_WIDER_MESH, ids=lambda one: f"{one.calls[0][0]}-{len(one.calls)}")
def test_rank_alone_on_a_wider_mesh_fails_with_its_peers(scenario: Scenario) -> None:
    with Explorer() as explorer:
        found = explorer.sample(scenario, range(20))
        assert not found.findings, str(found.findings[0])
        with mock.patch.object(waiting, "_call"):
            assert explorer.sample(scenario, range(20)).findings


def _ends(scenario: Scenario, *, reduced: bool) -> tuple[set[tuple[str, ...]], int]:
    """Return how the ranks end in all schedules, and the number of states."""
    ends, verdict = set[tuple[str, ...]](), ExploredWorld.verdict

    def noted(world: ExploredWorld) -> str | None:
        ends.add(tuple([f"{node.stage}: {node.result}" for node in world.nodes]))
        return verdict(world)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ExploredWorld, "verdict", noted))
        if not reduced:
            stack.enter_context(mock.patch.object(Actor, "forget"))
        found = stack.enter_context(Explorer()).exhaust(scenario, reduced=reduced)
    assert found.is_complete
    assert not found.findings
    return ends, found.states


@pytest.mark.parametrize("scenario", REDUCED, ids=lambda one: one.conditions[0].name)
def test_reduced_exploration_reaches_the_same_ends(scenario: Scenario) -> None:
    whole, num_states = _ends(scenario, reduced=False)
    ends, num_reduced = _ends(scenario, reduced=True)
    assert ends == whole
    assert num_reduced < num_states


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
