"""Clip after the step that reads the gradients: each function warns of it, and of nothing else."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW, Optimizer

import distclip
from distclip import GradClipper, UnclippedStepWarning
from distclip.apply import consumed
from distclip.sharding.table import ShardTable
from tests.ranks import gather_from_ranks, on_ranks

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "for each": lambda params: SGD(params, lr=0.1, momentum=0.9, foreach=False),
    "foreach": lambda params: AdamW(params, lr=0.1, foreach=True),
    # Its kernels write the gradients.
    "fused": lambda params: AdamW(params, lr=0.1, fused=True),
}

FUNCTIONS: dict[str, Callable[[list[nn.Parameter], Optimizer], Callable[[], object]]] = {
    "clip": lambda params, _: GradClipper(params, distclip.global_norm(1.0)).clip,
    "isolated": lambda params, _: GradClipper(params, distclip.global_norm(1.0), isolate=True).clip,
    "step": lambda params, optimizer: partial(GradClipper(params, distclip.zclip(cap=1.0)).step, optimizer),
    "clip_grad_norm_": lambda params, _: lambda: distclip.clip_grad_norm_(params, 1.0),
    "clip_grad_value_": lambda params, _: lambda: distclip.clip_grad_value_(params, 0.1),
    "clip_grads_with_norm_": lambda params, _: lambda: distclip.clip_grads_with_norm_(params, 1.0, torch.tensor(9.0)),
}

MEASURING: dict[str, Callable[[list[nn.Parameter], Optimizer], Callable[[], object]]] = {
    "clip": lambda params, _: GradClipper(params, distclip.global_norm(math.inf)).clip,
    "clip_grad_norm_": lambda params, _: lambda: distclip.clip_grad_norm_(params, math.inf),
    "clip_grad_value_": lambda params, _: lambda: distclip.clip_grad_value_(params, math.inf),
    "get_total_norm": lambda params, _: lambda: distclip.get_total_norm([p.grad for p in params if p.grad is not None]),
}


def params_of(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2)) for _ in range(count)]


def texts_of(run: Callable[[], object]) -> list[str]:
    """Return the texts of the warnings about unclipped steps. Any other warning is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    assert {warning.category for warning in caught} <= {UnclippedStepWarning}
    return [str(warning.message) for warning in caught]


def train(params: list[nn.Parameter], calls: list[Callable[[], object]], *, set_to_none: bool = True) -> None:
    """Make three steps, each of a backward and then some calls."""
    for _ in range(3):
        for param in params:
            param.grad = None if set_to_none or param.grad is None else param.grad.zero_()
        torch.stack([(param + 3).square().sum() for param in params]).sum().backward()
        for call in calls:
            call()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_clip_after_the_step_warns_once(function: str, optimizer: str, set_to_none: bool) -> None:
    params = params_of(20)
    one = OPTIMIZERS[optimizer](params)
    call = FUNCTIONS[function](params, one)
    (text,) = texts_of(lambda: train(params, [one.step, call], set_to_none=set_to_none))
    assert "has stepped with these gradients already" in text


@pytest.mark.parametrize("function", MEASURING)
def test_measurements_after_the_step_are_silent(function: str) -> None:
    params = params_of(3)
    one = SGD(params, lr=0.1)
    call = MEASURING[function](params, one)
    assert texts_of(lambda: train(params, [one.step, call])) == []
    # A measurement before the step clips nothing.
    late = FUNCTIONS["clip_grad_norm_"](params, one)
    assert len(texts_of(lambda: train(params, [call, one.step, late]))) == 1


@settings(max_examples=40)
@given(
    order=st.lists(st.sampled_from(["clip", "other clip", "step", "backward"]), max_size=6),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    set_to_none=st.booleans(),
)
def test_a_warning_means_that_a_gradient_was_stepped_unclipped(
    order: list[str], optimizer: str, set_to_none: bool
) -> None:
    """Clip, step and accumulate in any order: exactly a clip of gradients that a step has read unclipped warns."""
    params = params_of(2)
    one, other = OPTIMIZERS[optimizer](params), SGD(params_of(1), lr=0.1)
    clips = {name: GradClipper(params, distclip.global_norm(1.0)).clip for name in ("clip", "other clip")}
    is_clipped = is_late = expected = False

    def backward() -> None:
        torch.stack([(param + 3).square().sum() for param in params]).sum().backward()

    texts = texts_of(backward)
    for event in order:
        if event == "backward":
            is_clipped = is_late = False
            texts += texts_of(backward)
        elif event == "step":
            is_late = is_late or not is_clipped
            texts += texts_of(lambda: (one.step(), other.step()))
        else:
            expected = expected or is_late
            is_clipped, is_late = True, False
            texts += texts_of(clips[event])
    assert bool(texts) == expected


@settings(max_examples=40)
@given(
    events=st.lists(
        st.sampled_from(["backward", "clip", "clip a part", "step", "step by hand", "drop", "zero", "other step"]),
        max_size=25,
    ),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
)
def test_a_call_that_does_not_search_would_find_nothing(events: list[str], optimizer: str) -> None:
    """Search in each call that leaves the search out, in programs that begin with ordinary steps."""
    params, others = params_of(5), params_of(2)
    one, other = OPTIMIZERS[optimizer](params), SGD(others, lr=0.1)
    num_quiet, is_quiet = 0, consumed._is_quiet

    def search_anyway(table: ShardTable) -> bool:
        nonlocal num_quiet
        if not is_quiet(table):
            return False
        num_quiet += 1
        with mock.patch.object(consumed, "_is_quiet", return_value=False):
            assert consumed.find_stepped(table) == []
        return True

    def drop(*, set_to_none: bool) -> None:
        for each in (one, other):
            each.zero_grad(set_to_none=set_to_none)

    @torch.no_grad()
    def step_by_hand() -> None:
        for param in params:
            if param.grad is not None:
                param -= 0.1 * param.grad

    run: dict[str, Callable[[], object]] = {
        "backward": lambda: torch.stack([(p + 3).square().sum() for p in [*params, *others]]).sum().backward(),
        "clip": GradClipper(params, distclip.global_norm(1.0)).clip,
        "clip a part": lambda: distclip.clip_grad_norm_(params[::2], 1.0),
        "step": one.step,
        "step by hand": step_by_hand,
        "drop": lambda: drop(set_to_none=True),
        "zero": lambda: drop(set_to_none=False),
        "other step": other.step,
    }
    with mock.patch.object(consumed, "_is_quiet", search_anyway), warnings.catch_warnings():
        for event in ["backward", "clip", "step", "drop"] * 8:
            run[event]()
        assert num_quiet > 0
        warnings.simplefilter("ignore")
        for event in events:
            run[event]()


def test_emptied_gradients_are_counted_in_consecutive_calls() -> None:
    """Warn when the third call in a row finds gradients that were stepped unclipped, and then set to 0."""
    params = params_of(2)
    one, call = SGD(params, lr=0.1), GradClipper(params, distclip.global_norm(1.0)).clip

    def run(*steps: Callable[[], object]) -> None:
        one.zero_grad(set_to_none=False)
        torch.stack([(param + 3).square().sum() for param in params]).sum().backward()
        for step in steps:
            step()

    ordinary = partial(run, call, one.step)
    emptied = partial(run, one.step, lambda: one.zero_grad(set_to_none=False), call)
    assert texts_of(lambda: [ordinary() for _ in range(8)]) == []
    assert texts_of(lambda: (emptied(), emptied(), ordinary(), emptied(), emptied())) == []
    assert len(texts_of(emptied)) == 1


def test_optimizers_of_other_parameters_and_in_turn_are_silent() -> None:
    """Two networks in turn, with a clipper each and with one for both."""
    nets = [params_of(3), params_of(5)]
    optimizers = [SGD(net, lr=0.1) for net in nets]
    for clippers in (
        [GradClipper(net, distclip.global_norm(1.0)) for net in nets],
        [GradClipper([*nets[0], *nets[1]], distclip.global_norm(1.0), partial=True)] * 2,
    ):
        calls = itertools.chain(*((c.clip, one.step) for c, one in zip(clippers, optimizers, strict=True)))
        assert texts_of(lambda calls=calls: train([*nets[0], *nets[1]], list(calls))) == []
    only = GradClipper([*nets[0], *nets[1]], distclip.global_norm(1.0))
    part = lambda: only.clip(only=nets[1])  # noqa: E731
    assert texts_of(lambda: train([*nets[0], *nets[1]], [optimizers[0].step, part, optimizers[1].step])) == []


class Odd(Optimizer):
    """An optimizer of another library, which writes gradients, and shows no parameters at first."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            if param.grad is not None:
                param.sub_(param.grad.mul_(0.1).sub_(param.grad.mean()))


def test_optimizers_of_other_libraries() -> None:
    params = params_of(3)
    one = Odd(params)
    clip = FUNCTIONS["clip"](params, one)
    assert texts_of(lambda: train(params, [clip, one.step, clip])) == []
    assert len(texts_of(lambda: train(params, [one.step, clip]))) == 1
    empty = Odd(params_of(1))
    empty.param_groups = []
    with pytest.raises(IndexError):
        empty.step()


def test_watched_parameters_can_be_swapped_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch swaps the contents of parameters in conversions, unless anything refers to them weakly."""
    model = nn.Linear(2, 2)
    one, clip = SGD(model.parameters(), lr=0.1), GradClipper(model, distclip.global_norm(1.0)).clip
    params = list(model.parameters())
    assert texts_of(lambda: train(params, [clip, one.step])) == []
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    model.zero_grad()
    model.double()
    assert len(texts_of(lambda: train(params, [one.step, clip]))) == 1
    # Fewer parameters than the hook has seen.
    one.param_groups[0]["params"].pop()
    one.step()


@on_ranks(2)
def test_warning_that_is_an_error_is_raised_on_all_ranks() -> None:
    """Rank 1 alone steps before it clips, its gradients are DTensors, and warnings are errors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    fully_shard(model)
    one = SGD(model.parameters(), lr=0.1)
    clipper = GradClipper(model, distclip.global_norm(1.0))
    model(torch.ones(2, 4)).square().sum().backward()
    before: list[Tensor] = [param.grad.to_local().clone() for param in model.parameters()]  # type: ignore[union-attr]
    if dist.get_rank() == 1:
        one.step()
    with pytest.raises((UnclippedStepWarning, distclip.DistclipError), match="stepped with these gradients already"):
        clipper.clip()
    after = [param.grad.to_local() for param in model.parameters()]  # type: ignore[union-attr]
    assert all(map(torch.equal, before, after))
    clipper.clip()
    assert gather_from_ranks(clipper.steps) == [1, 1]


def pairs_of_modules() -> tuple[nn.Module, nn.Module]:
    """Return a module, and a copy of it."""
    one = nn.Linear(2, 2)
    return one, copy.deepcopy(one)


OF_MODULE: dict[str, Callable[[nn.Module], Callable[[], object]]] = {
    "clipper": lambda module: GradClipper(module, distclip.global_norm(1.0)).clip,
    "clip_grad_norm_": lambda module: lambda: distclip.clip_grad_norm_(module.parameters(), 1.0),
    "clip_grad_value_": lambda module: lambda: distclip.clip_grad_value_(module.parameters(), 0.1),
    "clip_grads_with_norm_": lambda module: lambda: distclip.clip_grads_with_norm_(module, 1.0, torch.tensor(9.0)),
}


def train_module(module: nn.Module, clips: list[Callable[[], object]], num_steps: int = 6) -> None:
    optimizer = SGD(module.parameters(), lr=0.1)
    for _ in range(num_steps):
        optimizer.zero_grad()
        module(torch.ones(1, 2)).sum().backward()
        for clip in clips:
            clip()
        optimizer.step()


@pytest.mark.parametrize("function", OF_MODULE)
def test_parameters_of_another_module_warn_once(function: str) -> None:
    clipped, trained = pairs_of_modules()
    (text,) = texts_of(lambda: train_module(trained, [OF_MODULE[function](clipped)]))
    assert "SGD steps 2 parameters of another module" in text


@pytest.mark.parametrize("function", OF_MODULE)
def test_parameters_at_the_addresses_of_earlier_ones_are_new_ones(function: str) -> None:
    ids: list[int] = []
    for _ in range(30):
        clipped, trained = pairs_of_modules()
        # The first pair is clipped as it should be.
        module = clipped if ids else trained
        ids += [id(param) for one in (clipped, trained) for param in one.parameters()]
        texts = texts_of(lambda one=trained, other=module: train_module(one, [OF_MODULE[function](other)]))
        assert len(texts) == (module is clipped)
        del clipped, trained, module
    assert len(set(ids)) < len(ids)


@pytest.mark.parametrize("case", ["clipped as well", "frozen", "had gradients", "no step", "other optimizer is quiet"])
@pytest.mark.parametrize("function", OF_MODULE)
def test_modules_that_wait_for_their_turn_do_not_warn(function: str, case: str) -> None:
    idle, trained = pairs_of_modules()
    clips, make = [OF_MODULE[function](idle)], OF_MODULE[function]
    if case == "clipped as well":
        clips.append(make(trained))
    elif case == "frozen":
        idle.requires_grad_(False)
    elif case == "had gradients":
        train_module(idle, clips, num_steps=1)
        for param in idle.parameters():
            param.grad = None
    if case == "no step":
        assert texts_of(lambda: [clip() for _ in range(6) for clip in clips]) == []
    elif case == "other optimizer is quiet":
        quiet = SGD(params_of(1), lr=0.1)
        assert texts_of(lambda: [call() for _ in range(6) for call in (*clips, quiet.step)]) == []
    else:
        assert texts_of(lambda: train_module(trained, clips)) == []


# ---- Gradients that are gone, or that a closure replaces ----


def train_within_backward(module: nn.Module, clip: Callable[[], object], *, set_to_none: bool, clips: bool) -> None:
    """Step each parameter in a hook of the backward pass, and clip before that, or after the backward pass."""
    optimizers = {param: SGD([param], lr=0.1) for param in module.parameters()}

    def hook(param: Tensor) -> None:
        if clips:
            clip()
        optimizers[param].step()  # type: ignore[index]
        optimizers[param].zero_grad(set_to_none=set_to_none)  # type: ignore[index]

    handles = [param.register_post_accumulate_grad_hook(hook) for param in module.parameters()]
    for _ in range(6):
        module(torch.ones(1, 2)).sum().backward()
        if not clips:
            clip()
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("function", OF_MODULE)
def test_clip_after_an_optimizer_within_backward_warns_once(function: str, set_to_none: bool) -> None:
    module, _ = pairs_of_modules()
    clip = OF_MODULE[function](module)
    (text,) = texts_of(lambda: train_within_backward(module, clip, set_to_none=set_to_none, clips=False))
    if not set_to_none:
        assert "has stepped with these gradients already" in text
    elif function == "clipper":
        assert "no gradient in 3 calls in a row" in text
    else:
        assert "SGD has stepped these parameters each time" in text


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("function", ["clip_grad_norm_", "clip_grad_value_"])
def test_clip_within_backward_and_zero_gradients_are_silent(function: str, set_to_none: bool) -> None:
    module, _ = pairs_of_modules()
    clip = OF_MODULE[function](module)
    assert texts_of(lambda: train_within_backward(module, clip, set_to_none=set_to_none, clips=True)) == []
    # The first steps are not clipped, and the gradients of the later ones are 0.
    still, _ = pairs_of_modules()
    optimizer, late = SGD(still.parameters(), lr=0.1), OF_MODULE[function](still)

    def train_with_zeros() -> None:
        for step in range(12):
            optimizer.zero_grad(set_to_none=set_to_none)
            (still(torch.ones(1, 2)).sum() * float(step < 4)).backward()
            if step >= 4:
                late()
            optimizer.step()

    assert texts_of(train_with_zeros) == []


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("place", ["before the step", "within the closure", "before a closure without backward"])
@pytest.mark.parametrize("function", OF_MODULE)
def test_clips_of_gradients_that_a_closure_replaces_warn_once(function: str, place: str, set_to_none: bool) -> None:
    module, _ = pairs_of_modules()
    clip, optimizer = OF_MODULE[function](module), SGD(module.parameters(), lr=0.1)

    def closure() -> float:
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = (module(torch.ones(1, 2)) + 3).square().sum()
        loss.backward()
        if place == "within the closure":
            clip()
        return float(loss.detach())

    def run() -> None:
        for _ in range(6):
            if place != "within the closure":
                closure()
                clip()
            optimizer.step(closure if place != "before a closure without backward" else lambda: 0.0)

    texts = texts_of(run)
    assert len(texts) == (place == "before the step")
    assert all("the closure of the last optimizer step made other gradients" in text for text in texts)


def test_an_attached_clipper_clips_what_a_closure_makes() -> None:
    module, _ = pairs_of_modules()
    optimizer = SGD(module.parameters(), lr=0.1)
    clipper = GradClipper(module, distclip.global_norm(1.0))
    clipper.attach(optimizer)

    def closure() -> float:
        optimizer.zero_grad()
        module(torch.ones(1, 2)).sum().backward()
        return 0.0

    def run() -> None:
        for _ in range(6):
            closure()
            clipper.clip()
            optimizer.step(closure)

    assert texts_of(run) == []
