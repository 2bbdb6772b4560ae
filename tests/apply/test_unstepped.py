"""Clip gradients that no optimizer steps: a warning once it is certain, and none in any other program."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

import distclip
from distclip import GradClipper, UnclippedStepWarning
from distclip.apply import unstepped


@pytest.fixture(autouse=True)
def no_other_optimizers() -> Iterator[None]:
    """Forget the optimizers of other tests, of which a process may have more than are remembered."""
    with mock.patch.dict(unstepped._stepped, clear=True):
        yield


CLIPS: dict[str, Callable[[nn.Module], Callable[[], object]]] = {
    "clip": lambda module: GradClipper(module, distclip.global_norm(1.0)).clip,
    "clip_grad_norm_": lambda module: lambda: distclip.clip_grad_norm_(module, 1.0),
}

Program = Callable[[nn.Sequential, Callable[[], object]], Iterator[None]]
"""Trains a module, and yields after each step."""


def backward(module: nn.Module) -> None:
    module.zero_grad()
    (module(torch.ones(1, 2)) + 3).square().sum().backward()


def part(module: nn.Sequential, clip: Callable[[], object]) -> Iterator[None]:
    """Step one layer of two."""
    optimizer = SGD(module[1].parameters(), lr=0.1)
    while True:
        backward(module)
        clip()
        yield optimizer.step()


def both(module: nn.Sequential, clip: Callable[[], object]) -> Iterator[None]:
    """Step each layer by another optimizer."""
    optimizers = [SGD(layer.parameters(), lr=0.1) for layer in module]
    while True:
        backward(module)
        clip()
        for one in optimizers:
            one.step()
        yield


def by_hand(module: nn.Sequential, clip: Callable[[], object]) -> Iterator[None]:
    """Step one layer without an optimizer."""
    optimizer = SGD(module[1].parameters(), lr=0.1)
    while True:
        backward(module)
        clip()
        with torch.no_grad():
            for param in module[0].parameters():
                param -= 0.1 * param.grad  # type: ignore[operator]
        yield optimizer.step()


def frozen(module: nn.Sequential, clip: Callable[[], object]) -> Iterator[None]:
    """Freeze one layer."""
    module[0].requires_grad_(requires_grad=False)
    return part(module, clip)


def in_turn(module: nn.Sequential, clip: Callable[[], object]) -> Iterator[None]:
    """Step one layer five times, then the other one."""
    optimizers = [SGD(layer.parameters(), lr=0.1) for layer in module]
    while True:
        for one in [optimizers[1]] * 5 + optimizers[:1]:
            backward(module)
            clip()
            yield one.step()


def copies(module: nn.Sequential, clip: Callable[[], object]) -> Iterator[None]:
    """Step copies of the first layer, and write them back, too little to change it."""
    masters = [param.detach().clone() for param in module[0].parameters()]
    optimizer = SGD([*masters, *module[1].parameters()], lr=0.1)
    while True:
        backward(module)
        clip()
        yield optimizer.step()


def without_step(module: nn.Sequential, clip: Callable[[], object]) -> Iterator[None]:
    """Step nothing after most clips."""
    optimizer = SGD(module[1].parameters(), lr=0.1)
    while True:
        for _ in range(4):
            backward(module)
            clip()
            yield None
        optimizer.step()


PROGRAMS: dict[str, tuple[Program, int]] = {
    "a part": (part, 1),
    "both": (both, 0),
    "by hand": (by_hand, 0),
    "frozen": (frozen, 0),
    "in turn": (in_turn, 0),
    "copies": (copies, 0),
    "without a step": (without_step, 0),
}
"""Programs, and the number of warnings."""


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("function", CLIPS)
def test_gradients_that_no_optimizer_steps_warn_once(function: str, name: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    program, expected = PROGRAMS[name]
    steps = program(module, CLIPS[function](module))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(24):
            next(steps)
    assert [warning.category for warning in caught] == [UnclippedStepWarning] * expected
    assert all("no optimizer has stepped 0.weight, 0.bias" in str(warning.message) for warning in caught)


def test_optimizers_that_no_longer_exist_hide_nothing() -> None:
    """Warn in a program that has made as many optimizers as are remembered, and uses one of them."""
    gone = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    others = {-i: (weakref.ref(gone), 0) for i in range(1, unstepped._MAX_OPTIMIZERS)}
    del gone
    with mock.patch.dict(unstepped._stepped, others, clear=True):
        test_gradients_that_no_optimizer_steps_warn_once("clip", "a part")


class Hidden(Optimizer):
    """An optimizer of another library that shows no parameters."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.param_groups = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


def test_optimizers_that_show_no_parameters_are_silent() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    clip, optimizer = CLIPS["clip_grad_norm_"](module), Hidden(module.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(24):
            backward(module)
            clip()
            optimizer.step()
