"""Thresholds that a user writes: two methods are enough, and the members of `Rule` are used where they exist."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor

from distclip.errors import ArgumentError
from distclip.norms.reduce import Totals
from distclip.policies import Fixed, NormPolicy, Policy, Rule, State, agc, value, zclip

CPU = torch.device("cpu")


def totals(*norms: float) -> Totals:
    """Return the totals of a step with these norms."""
    return Totals(torch.tensor(norms, dtype=torch.float64) ** 2)


@dataclass(frozen=True)
class LastNorm:
    """A bound of 1, and the last norm as state."""

    def init(self, slots: int, device: torch.device) -> State:
        return {"last": torch.zeros(slots, dtype=torch.float64, device=device)}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        return torch.ones_like(totals.norms), {"last": totals.norms}


@dataclass(frozen=True)
class WithMembers(LastNorm):
    """A threshold with all members of `Rule` that does not subclass it."""

    needs_weights: bool = True
    cap: float = 0.5

    def restart(self, norms: Tensor, state: State) -> State:
        return {"last": norms.mean(1)}


@dataclass(frozen=True)
class UnboundedRule(Rule):
    """A subclass of `Rule` that allows any norm up to its cap."""

    cap: float = 3.0

    def init(self, slots: int, device: torch.device) -> State:
        return {}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        return torch.full_like(totals.norms, inf), state


def test_two_methods_are_enough() -> None:
    policy = NormPolicy(LastNorm(), eps=0.0)
    assert isinstance(policy, Policy)
    assert not policy.spec.needs_weights
    state = policy.init(2, CPU)
    assert state.keys() == {"last"}
    verdict, state = policy.decide(totals(4.0, 0.5), state)
    assert verdict.coefs.tolist() == [0.25, 1.0]
    assert verdict.bounds is not None
    assert verdict.bounds.tolist() == [1.0, 1.0]
    assert (verdict.skip, verdict.limits) == (None, None)
    assert state["last"].tolist() == [4.0, 0.5]


def test_members_of_a_rule_are_used_without_subclassing_it() -> None:
    policy = NormPolicy(WithMembers(), eps=0.0, restart_after=2)
    assert policy.spec.needs_weights
    state = policy.init(1, CPU)
    assert state.keys() == {"last", "recent_norms", "recent_clipped", "since_restart", "restarts"}
    verdict, _ = policy.decide(totals(4.0), state)
    assert verdict.coefs.tolist() == [0.125], "the cap is below the rule's bound"
    policy = NormPolicy(WithMembers(cap=inf), restart_after=2)
    for norm in (4.0, 6.0):
        _, state = policy.decide(totals(norm), state)
    assert state["last"].tolist() == [5.0]
    assert state["restarts"].tolist() == [1]
    assert state["since_restart"].tolist() == [0]


def test_the_cap_of_a_rule_is_applied_by_the_policy() -> None:
    policy = NormPolicy(UnboundedRule(), eps=0.0, skip=True)
    verdict, _ = policy.decide(totals(4.0, 2.0), {})
    assert verdict.coefs.tolist() == [0.75, 1.0]
    assert verdict.bounds is not None
    assert verdict.bounds.tolist() == [3.0, 3.0]
    assert verdict.skip is not None
    assert not verdict.skip, "a norm that is only above the cap is scaled down"


def test_a_policy_keeps_the_object_of_the_user() -> None:
    threshold = LastNorm()
    policy = NormPolicy(threshold)
    assert policy.threshold is threshold
    assert policy == NormPolicy(LastNorm()) != NormPolicy(WithMembers())
    assert repr(policy).startswith("NormPolicy(threshold=LastNorm(), norm_type=2.0")
    assert "_rule" not in repr(policy)
    assert replace(policy, threshold=WithMembers()).spec.needs_weights


@pytest.mark.parametrize("policy", [NormPolicy(LastNorm()), zclip(2.0, cap=3.0), value(0.5)], ids=repr)
def test_policies_can_be_pickled(policy: Policy) -> None:
    copy = pickle.loads(pickle.dumps(policy))
    assert copy == policy
    assert copy.spec == policy.spec


@pytest.mark.parametrize(
    "threshold",
    [1.0, None, LastNorm, object(), lambda totals, state: (1.0, state)],
    ids=["number", "none", "class", "object", "function"],
)
def test_other_objects_are_refused(threshold: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^threshold=.*the methods init.*\. Use threshold=") as raised:
        NormPolicy(threshold)
    assert repr(threshold)[:80] in str(raised.value)


def test_value_declares_its_limits() -> None:
    policy = value(-0.25, 0.5)
    assert policy.spec.limits == (-0.25, 0.5)
    verdict, state = policy.decide(totals(4.0), {})
    assert verdict.coefs.tolist() == [1.0]
    assert verdict.limits == (-0.25, 0.5)
    assert (verdict.skip, verdict.bounds, state) == (None, None, {})


def test_the_spec_has_the_arguments_of_the_policy() -> None:
    spec = NormPolicy(Fixed(1.0), "1", "group", {"a": "b"}, ["c"]).spec
    assert (spec.norm_type, spec.per, spec.groups, spec.exclude) == (1.0, "group", {"a": "b"}, ("c",))
    assert (spec.needs_weights, spec.limits) == (False, None)
    assert agc().spec.needs_weights
