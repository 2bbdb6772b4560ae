"""Decide, step, then commit: a step that the optimizer declines leaves no trace in the clipper."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import distclip
from distclip import ArgumentError, GradClipper, Policy
from distclip.monitor import Recorder
from tests.tables import policies

pytestmark = pytest.mark.quick


class Wrapper(torch.optim.Optimizer):
    """Steps its optimizer only if it agrees, as torchft's does."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optim, self.agrees = optimizer, True

    @property
    def param_groups(self) -> Any:
        return self.optim.param_groups

    @property
    def state(self) -> Any:
        return self.optim.state

    def step(self, closure: Any = None) -> None:
        if self.agrees:
            self.optim.step()


class Lookahead(torch.optim.Optimizer):
    """Has torch's hooks itself, and averages the weights in steps in which the optimizer in it does nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.inner, self.agrees = [optimizer], True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if self.agrees:
            for param in self.param_groups[0]["params"]:
                param.mul_(0.9)


class Direct(Wrapper):
    """Makes the step without a call that torch's hooks see."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if self.agrees:
            for param in self.param_groups[0]["params"]:
                param.sub_(param.grad, alpha=0.1)


class Loop:
    """A training loop with one clipper.

    Args:
        policy: of the clipper.
        wrap: makes the optimizer that may decline.
        way: of clipping.
    """

    def __init__(self, policy: Policy, wrap: Callable[[Any], Any], way: str) -> None:
        torch.manual_seed(1)
        self.model = nn.Linear(3, 2)
        self.clipper = GradClipper(self.model, policy)
        self.optimizer = wrap(torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9))
        self.way = way
        if way == "attach":
            self.clipper.attach(self.optimizer)

    def step(self, scale: float, agrees: bool = True) -> Any:
        self.model.zero_grad()
        (self.model(torch.ones(4, 3)).sum() * scale).backward()
        self.optimizer.agrees = agrees
        if self.way == "step":
            return self.clipper.step(self.optimizer)
        report = self.clipper.clip() if self.way == "clip" else None
        self.optimizer.step()
        if self.way == "clip" and not agrees:
            self.clipper.discard()
        return report

    def state(self) -> str:
        state = tree_map(lambda x: x.tolist() if isinstance(x, torch.Tensor) else x, self.clipper.state_dict())
        weights = {name: value.tolist() for name, value in self.model.state_dict().items()}
        return f"{state} {weights} {self.clipper.incidents}"


SCALES = [1.0, 2.0, 0.5, 4.0, 1.0, 1.0, 2.0]
WRAPPERS = {"wrapper": Wrapper, "nested": lambda one: Wrapper(Wrapper(one)), "hooked": Lookahead, "direct": Direct}


@pytest.mark.filterwarnings("ignore::distclip.FrequentClippingWarning", "ignore::UserWarning")
@pytest.mark.parametrize("way", ["step", "attach", "clip"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_declined_step_leaves_no_trace(wrap: Callable[[Any], Any], way: str) -> None:
    for name, row in policies.ADAPTIVE.items():
        if (wrap, way) != (Wrapper, "step") and name not in ("ema", "zclip"):
            continue
        assert row.small is not None
        plain, loop = (Loop(row.small(), wrap, way) for _ in range(2))
        for scale in SCALES:
            loop.step(1e3 * scale, agrees=False)
            plain.step(scale)
            loop.step(scale)
            assert loop.state() == plain.state()


class TwoOptimizers:
    """A training loop with two attached optimizers that may decline, of the weight and of the bias."""

    def __init__(self) -> None:
        self.model = nn.Linear(3, 2)
        nn.init.ones_(self.model.weight)
        nn.init.ones_(self.model.bias)
        self.optimizers = [Wrapper(torch.optim.SGD([param], lr=0.1)) for param in self.model.parameters()]
        self.clipper = GradClipper(self.model, distclip.ema(warmup=1, cap=1e9))
        self.clipper.attach(*self.optimizers)

    def step(self, scale: float, *agree: bool | None, losses: int = 1) -> None:
        """Step the optimizers, after one loss or one each. None leaves an optimizer out."""
        for i, (optimizer, agrees) in enumerate(zip(self.optimizers, agree, strict=True)):
            if i < losses:
                self.model.zero_grad()
                out = torch.nn.functional.linear(torch.ones(4, 3), *map(self._only(i, losses), self.model.parameters()))
                (out.sum() * scale).backward()
            if agrees is not None:
                optimizer.agrees = agrees
                optimizer.step()

    def _only(self, i: int, losses: int) -> Callable[[nn.Parameter], torch.Tensor]:
        own = list(self.model.parameters())[i]
        return lambda param: param if losses == 1 or param is own else param.detach()

    state = Loop.state


@pytest.mark.filterwarnings("ignore::distclip.FrequentClippingWarning", "ignore::distclip.UnclippedStepWarning")
@pytest.mark.parametrize("losses", [1, 2])
def test_step_that_several_optimizers_decline(losses: int) -> None:
    plain, loop = TwoOptimizers(), TwoOptimizers()
    for scale in SCALES:
        loop.step(1e3 * scale, False, False, losses=losses)
        for one in (plain, loop):
            one.step(scale, True, True, losses=losses)
        assert loop.state() == plain.state()


def test_step_that_one_optimizer_declines_and_the_other_leaves_out() -> None:
    loop = TwoOptimizers()
    loop.step(1.0, False, None)
    # From here on the optimizers look as if they stepped in turn, so that each has its decision.
    loop.step(1.0, True, True)
    assert loop.clipper.steps == 2


@pytest.mark.filterwarnings("ignore::distclip.FrequentClippingWarning", "ignore::distclip.UnclippedStepWarning")
@pytest.mark.parametrize("agree", [(False, True), (True, False)])
def test_step_that_one_of_several_optimizers_declines(agree: tuple[bool, bool]) -> None:
    """The norm is that of both, so that the decision holds if either makes its step."""
    loop = TwoOptimizers()
    for scale in SCALES:
        loop.step(scale, *agree)
    assert loop.clipper.steps == len(SCALES)
    # In turn, each decision is about one optimizer.
    loop = TwoOptimizers()
    for scale in SCALES:
        loop.step(scale, *agree, losses=2)
    assert loop.clipper.steps == len(SCALES)


@pytest.mark.filterwarnings("ignore::distclip.NonFiniteWarning")
def test_discard_after_a_skipped_step() -> None:
    plain, loop = (Loop(distclip.ema(), Wrapper, "clip") for _ in range(2))
    for scale in SCALES:
        loop.step(float("nan"), agrees=False)
        for one in (plain, loop):
            one.step(scale)
        assert loop.state() == plain.state()
        assert loop.clipper.skipped == 0


def test_report_of_a_declined_step() -> None:
    loop = Loop(distclip.ema(), Wrapper, "step")
    assert loop.step(1.0, agrees=False).as_dict()["skipped"]
    assert not loop.step(1.0).as_dict()["skipped"]
    assert loop.clipper.skipped == 0


def test_recorder_leaves_declined_steps_out(tmp_path: Path) -> None:
    loop = Loop(distclip.ema(), Wrapper, "step")
    with Recorder(loop.clipper, tmp_path) as recorder:
        for i, agrees in enumerate([True, False, True, False, False, True]):
            loop.step(1.0 + i, agrees)
            recorder.note(index=i)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()][1:]
    assert [(line["step"], line["index"]) for line in lines] == [(1, 0), (2, 2), (3, 5)]


def test_nothing_to_discard() -> None:
    loop = Loop(distclip.ema(), Wrapper, "clip")
    clipper = loop.clipper
    loop.step(1.0)
    clipper.discard()
    with pytest.raises(ArgumentError, match=r"discard: there is no decision since .* Call it once after clip\(\)"):
        clipper.discard()
    loop.step(1.0)
    clipper.load_state_dict(clipper.state_dict())
    with pytest.raises(ArgumentError, match="discard: there is no decision"):
        clipper.discard()


def test_state_that_is_loaded_within_a_step() -> None:
    """An optimizer that heals its weights in its step has a coefficient of the old state."""
    loop = Loop(distclip.ema(), Wrapper, "step")
    state = loop.clipper.state_dict()
    inner = loop.optimizer.optim
    inner.register_step_pre_hook(lambda *_: loop.clipper.load_state_dict(state))
    with pytest.raises(ArgumentError, match="has loaded another state into the clipper within its step"):
        loop.step(1.0)
