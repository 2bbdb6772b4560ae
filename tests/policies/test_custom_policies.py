"""Policies and thresholds of users that return wrong things: an error on all ranks, before any gradient is changed."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import distclip
from distclip import ArgumentError, GradClipper, NormPolicy, devices
from distclip.policies import NormSpec, Rule, State, Verdict
from tests.ranks import gather_from_ranks, on_ranks
from tests.rig import build_rig, to_bytes


class Custom:
    """A policy that returns what a function makes of the norms."""

    def __init__(self, decide: Callable[[Tensor], Any], state: Any = None, spec: Any = None) -> None:
        self.spec = spec or NormSpec(per="tensor")
        self._decide, self._state = decide, {} if state is None else state

    def init(self, slots: int, device: torch.device) -> Any:
        return self._state

    def decide(self, totals: Any, state: Any) -> Any:
        result = self._decide(totals.norms)
        return (result, state) if isinstance(result, Verdict) else result


class Threshold:
    """A threshold that returns what a function makes of the norms."""

    def __init__(self, bounds: Callable[[Tensor], Any], state: Any = None) -> None:
        self._bounds, self._state = bounds, {} if state is None else state

    def init(self, slots: int, device: torch.device) -> Any:
        return self._state

    def __call__(self, totals: Any, state: Any) -> Any:
        bounds = self._bounds(totals.norms)
        return bounds if isinstance(bounds, list | tuple) else (bounds, state)


class ThresholdRule(Threshold, Rule):
    """The same, as a subclass of `Rule`."""


WRONG_COEFS: dict[str, Callable[[Tensor], Any]] = {
    "nan": lambda norms: norms * nan,
    "one nan": lambda norms: torch.where(norms == norms.max(), nan, 1.0),
    "negative": lambda norms: -torch.ones_like(norms),
    "above 1": lambda norms: torch.full_like(norms, 1.5),
    "inf": lambda norms: torch.full_like(norms, inf),
    "number": lambda norms: 0.5,
    "none": lambda norms: None,
    "list": lambda norms: norms.tolist(),
    "0-d": lambda norms: torch.tensor(0.5),
    "too many": lambda norms: torch.cat([norms, norms]),
    "too few": lambda norms: norms[:1],
    "two dims": lambda norms: torch.ones_like(norms).unsqueeze(0),
    "whole numbers": lambda norms: torch.ones_like(norms, dtype=torch.int64),
    "truth": lambda norms: norms > 0,
    "complex": lambda norms: torch.ones_like(norms) + 0j,
    "meta": lambda norms: torch.ones_like(norms, device="meta"),
}
"""Coefficients that no policy has. A bound may be above 1, and inf."""

WRONG_VERDICTS: dict[str, Callable[[Tensor], Any]] = {
    "nothing": lambda norms: None,
    "coefs alone": lambda norms: torch.ones_like(norms),
    "one of two": lambda norms: (Verdict(torch.ones_like(norms)),),
    "coefs and state": lambda norms: (torch.ones_like(norms), {}),
    "no state": lambda norms: (Verdict(torch.ones_like(norms)), None),
    "other state": lambda norms: (Verdict(torch.ones_like(norms)), {"new": norms}),
    "bounds": lambda norms: Verdict(torch.ones_like(norms), bounds=1.0),  # type: ignore[arg-type]
    "shape of bounds": lambda norms: Verdict(torch.ones_like(norms), bounds=norms[:1]),
    "skip": lambda norms: Verdict(torch.ones_like(norms), skip=norms > 0),
    "dtype of skip": lambda norms: Verdict(torch.ones_like(norms), skip=norms.sum()),
    "limits": lambda norms: Verdict(torch.ones_like(norms), limits=(-1.0, 1.0)),
}


def make_clipper(policy: Any) -> tuple[GradClipper, list[torch.nn.Parameter]]:
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    for i, param in enumerate(params):
        param.grad = torch.full((3,), 1.0 + i)
    return GradClipper([(f"p{i}", param) for i, param in enumerate(params)], policy), params


def check_refused(policy: Any, match: str) -> None:
    """Check that a step raises, and changes neither gradients nor state."""
    clipper, params = make_clipper(policy)
    with pytest.raises(ArgumentError, match=match):
        clipper.clip()
    for i, param in enumerate(params):
        assert param.grad is not None
        assert (param.grad == 1.0 + i).all()


@pytest.mark.parametrize("name", WRONG_COEFS)
def test_wrong_coefficients_raise(name: str) -> None:
    decide = WRONG_COEFS[name]
    check_refused(Custom(lambda norms: Verdict(decide(norms))), "^policy=.*Return")


@pytest.mark.parametrize("name", WRONG_VERDICTS)
def test_wrong_verdicts_raise(name: str) -> None:
    check_refused(Custom(WRONG_VERDICTS[name]), r"^policy=.*(Return|limits)")


@pytest.mark.parametrize("make", [Threshold, ThresholdRule])
@pytest.mark.parametrize("name", [name for name in WRONG_COEFS if name not in ("above 1", "inf")])
def test_wrong_bounds_raise(name: str, make: Any) -> None:
    check_refused(NormPolicy(make(WRONG_COEFS[name]), per="tensor"), "^(policy|threshold)=.*Return")


@pytest.mark.parametrize("make", [Threshold, ThresholdRule])
@pytest.mark.parametrize(
    "state", [{"new": torch.ones(2)}, None, 1.0, [("old", 1)], {"old": 1.0}, {"old": torch.ones(3)}]
)
def test_wrong_states_of_a_threshold_raise(make: Any, state: Any) -> None:
    before = {"old": torch.zeros(2)}
    result = [torch.ones(2, dtype=torch.float64), state]
    check_refused(NormPolicy(make(lambda norms: tuple(result), before), per="tensor"), "^threshold=.*Return a")
    check_refused(
        NormPolicy(make(lambda norms: result, before), per="tensor"), r"^threshold=.*Return \(bounds, state\)"
    )


@pytest.mark.parametrize(
    "state", [[1], {"a": 1.0}, {"a": torch.ones(3)}, {"a": torch.ones(())}, {1: torch.ones(2)}], ids=str
)
def test_wrong_first_states_raise(state: Any) -> None:
    for policy in (NormPolicy(Threshold(torch.ones_like, state), per="tensor"), Custom(Verdict, state)):
        with pytest.raises(ArgumentError, match=r"^(threshold|policy)=.*init returned"):
            make_clipper(policy)


@pytest.mark.parametrize("cap", [-1.0, nan, "high", None])
def test_wrong_caps_raise(cap: Any) -> None:
    threshold = Threshold(torch.ones_like)
    threshold.cap = cap  # type: ignore[attr-defined]
    with pytest.raises(ArgumentError, match=r"^cap="):
        NormPolicy(threshold)


@pytest.mark.parametrize("policy", [Custom(Verdict, spec="tensor"), Custom(Verdict, spec={"per": "tensor"}), Custom])
def test_wrong_policies_raise(policy: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^policy="):
        make_clipper(policy)


class Growing(distclip.EMA):
    """A subclass of a rule of distclip's, whose bound is wrong."""

    def __call__(self, totals: Any, state: State) -> tuple[Tensor, State]:
        bound, state = super().__call__(totals, state)
        return -bound.clamp(max=1.0), state


class Doubling(NormPolicy):
    """A subclass of `NormPolicy`, whose coefficients are wrong."""

    def decide(self, totals: Any, state: State) -> tuple[Verdict, State]:
        return Verdict(torch.full_like(totals.norms, 2.0)), state


def test_subclasses_are_checked() -> None:
    check_refused(NormPolicy(Growing(), per="tensor"), "policy=.*got the coefficient -")
    check_refused(Doubling(), "policy=.*norm .* of slot 0 got the coefficient 2")


def test_valid_results_of_any_dtype_and_kind_are_taken() -> None:
    """Take float32, a skip as a truth value, a state that becomes float64, and NaN for norms of 0."""
    half = Custom(lambda norms: Verdict(torch.full(norms.shape, 0.5), skip=False))  # type: ignore[arg-type]
    clipper, params = make_clipper(half)
    assert clipper.clip().coefs.tolist() == [0.5, 0.5]
    assert params[1].grad is not None
    assert (params[1].grad == 1.0).all()
    skipping = Custom(lambda norms: Verdict(torch.ones_like(norms), skip=torch.tensor(True), bounds=norms.float()))
    assert make_clipper(skipping)[0].clip().skipped
    growing = Threshold(lambda norms: (torch.ones(2), {"last": norms}), {"last": torch.zeros(2)})
    clipper, _ = make_clipper(NormPolicy(growing, per="tensor"))
    clipper.clip()
    clipper.load_state_dict(clipper.state_dict())
    clipper, params = make_clipper(NormPolicy(Threshold(lambda norms: norms / norms), per="tensor"))
    params[0].grad = None
    assert clipper.clip().coefs.tolist() == [1.0, pytest.approx(12**-0.5)]


@pytest.mark.parametrize("value", [nan, inf])
def test_norms_that_are_not_finite_may_have_any_coefficient(value: float) -> None:
    policy = Custom(lambda norms: Verdict(1 / norms))
    for on_nonfinite in ("skip", "propagate"):
        param = torch.nn.Parameter(torch.zeros(2))
        param.grad = torch.tensor([value, 2.0])
        clipper = GradClipper([("p", param)], policy, on_nonfinite=on_nonfinite)  # type: ignore[arg-type]
        with pytest.warns(distclip.NonFiniteWarning) if on_nonfinite == "skip" else mock.MagicMock():
            clipper.clip()


@on_ranks(2)
@pytest.mark.parametrize("wrong", ["policy", "threshold"])
def test_all_ranks_raise_and_go_on(wrong: str) -> None:
    rig = build_rig("fsdp2")
    threshold = NormPolicy(Threshold(lambda norms: -norms))
    policy = threshold if wrong == "threshold" else Custom(lambda norms: Verdict(norms * nan))
    clipper, good = rig.clipper(policy), rig.clipper(distclip.global_norm(0.1))
    rig.fill(0)
    before = to_bytes(rig.grads())
    for _ in range(2):
        with pytest.raises(ArgumentError, match=r"^policy=.*got the coefficient"):
            clipper.clip()
    assert to_bytes(rig.grads()) == before
    assert len(set(gather_from_ranks(float(good.clip().norm)))) == 1


def test_accelerator_raises_in_the_next_step() -> None:
    """Set the gradient to 0 where the host has not read an invalid coefficient yet."""
    clipper, params = make_clipper(Custom(lambda norms: Verdict(torch.where(norms > 2, nan, 0.5))))
    with mock.patch.object(devices, "host_reads_free", return_value=False):
        assert clipper.clip().coefs.tolist() == [0.5, 0.0]
        with pytest.raises(ArgumentError, match=r"^policy=.*the last step got an invalid coefficient"):
            clipper.clip()
        assert params[0].grad is not None
        assert (params[0].grad == 0.5).all()
        params[1].grad = None
        clipper.clip()
        clipper.clip()


def test_own_policies_are_not_wrapped() -> None:
    """Check nothing that distclip computes itself, because each step would take longer."""
    for policy in (distclip.zclip(), distclip.global_norm(1.0), distclip.value(1.0)):
        assert make_clipper(policy)[0]._engine.policy is policy
