"""Attach a clipper to optimizers: closures, steps in turn, steps within backward, and steps that are not made."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

import distclip
from distclip import ArgumentError, GradClipper, UnclippedStepWarning
from distclip.monitor import Recorder
from tests.ranks import on_ranks
from tests.rig import LOSS_SCALE, NAN, assert_raises_on_ranks, make_scaler, to_bytes


class ZeroFilling(Optimizer):
    """Takes zero for a missing gradient, has weight decay and momentum, and counts its steps."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.num_steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.num_steps += 1
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for param in group["params"]:
                momentum = self.state[param].setdefault("momentum", torch.ones_like(param))
                momentum.mul_(0.9).add_(torch.zeros_like(param) if param.grad is None else param.grad)
                param.mul_(0.99).sub_(group["lr"] * momentum)
        return loss


class Perturbing(SGD):
    """Moves its parameters, evaluates the closure there, and steps from where they were."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        params = [param for group in self.param_groups for param in group["params"]]
        for param in params:
            param.add_(0.25)
        with torch.enable_grad():
            loss = closure()
        for param in params:
            param.sub_(0.25)
        super().step()
        return loss


def one_weight(size: int = 4) -> nn.Parameter:
    return nn.Parameter(torch.ones(size))


def clipper_of(*weights: nn.Parameter, **options: Any) -> GradClipper:
    return GradClipper([(f"weight{i}", w) for i, w in enumerate(weights)], distclip.global_norm(1.0), **options)


def closure_for(optimizer: Optimizer, weight: Tensor, loss: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(weight)
        value.backward()
        return value

    return closure


def states_of(*optimizers: Any) -> list[Any]:
    """Return everything that the steps of optimizers change."""
    found: list[Any] = []
    for optimizer in optimizers:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        values = [v for p in params for v in optimizer.state.get(p, {}).values()]
        groups = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
        counters = {key: value for key, value in vars(optimizer).items() if isinstance(value, int)}
        tensors = [v for v in values if isinstance(v, Tensor)]
        found.append((to_bytes([*params, *tensors]), len(values), copy.deepcopy(groups), counters))
    return found


CLOSURE_OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=1.0),
    "Adam": lambda params: Adam(params, lr=1.0),
    "fused": lambda params: AdamW(params, lr=1.0, fused=True),
    "LBFGS": lambda params: LBFGS(params, lr=1.0, max_iter=4),
    "Perturbing": lambda params: Perturbing(params, lr=1.0),
    "ZeroFilling": lambda params: ZeroFilling(params, lr=1.0),
}


@pytest.mark.parametrize("kind", CLOSURE_OPTIMIZERS)
@pytest.mark.parametrize("by_keyword", [True, False])
def test_clips_after_the_closure(kind: str, by_keyword: bool) -> None:
    """Clip every evaluation, as the same optimizer does whose closure clips by itself."""
    weights = [one_weight(), one_weight()]
    optimizers = [CLOSURE_OPTIMIZERS[kind]([weight]) for weight in weights]
    clipper = clipper_of(weights[0])
    clipper.attach(optimizers[0])

    def loss(weight: Tensor) -> Tensor:
        return 80 * (weight - 2).square().sum()

    def clipped_closure() -> Tensor:
        value = closure_for(optimizers[1], weights[1], loss)()
        distclip.clip_grad_norm_(weights[1], 1.0)
        return value

    for _ in range(3):
        closure = closure_for(optimizers[0], weights[0], loss)
        value = optimizers[0].step(closure=closure) if by_keyword else optimizers[0].step(closure)
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(optimizers[1].step(clipped_closure)))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-6)
    assert clipper.state_dict()["counts"]["steps"] >= 3
    assert float(weights[0].grad.norm()) <= 1 + 1e-5


@pytest.mark.parametrize("kind", CLOSURE_OPTIMIZERS)
@pytest.mark.parametrize("bad_evaluation", [0, 2])
def test_skips_in_a_closure_without_a_trace(kind: str, bad_evaluation: int) -> None:
    weight = one_weight()
    optimizer = CLOSURE_OPTIMIZERS[kind]([weight])
    clipper_of(weight).attach(optimizer)
    optimizer.step(closure_for(optimizer, weight, lambda w: (w - 2).square().sum()))
    before, evaluations = states_of(optimizer), []

    def loss(weight: Tensor) -> Tensor:
        evaluations.append(NAN if len(evaluations) == (bad_evaluation if kind == "LBFGS" else 0) else 1.0)
        return (weight - 3).pow(4).sum() * evaluations[-1]

    with pytest.warns(distclip.NonFiniteWarning):
        value = optimizer.step(closure_for(optimizer, weight, loss))
    assert torch.as_tensor(value).isnan()
    assert states_of(optimizer) == before
    optimizer.step(closure_for(optimizer, weight, lambda w: (w - 2).square().sum()))
    assert states_of(optimizer) != before


def step_method(optimizer: Optimizer, clipper: GradClipper) -> Callable[[], Any]:
    return lambda: clipper.step(optimizer)


def clip_method(optimizer: Optimizer, clipper: GradClipper) -> Callable[[], Any]:
    return lambda: (clipper.clip(), optimizer.step())


def attach_method(optimizer: Optimizer, clipper: GradClipper) -> Callable[[], Any]:
    clipper.attach(optimizer)
    return optimizer.step


def attach_late(optimizer: Optimizer, clipper: GradClipper) -> Callable[[], Any]:
    """Call a method that was looked up before the clipper was attached."""
    step = optimizer.step
    clipper.attach(optimizer)
    return step


def attach_before_scheduler(optimizer: Optimizer, clipper: GradClipper) -> Callable[[], Any]:
    clipper.attach(optimizer)
    StepLR(optimizer, 1)
    return optimizer.step


def attach_after_scheduler(optimizer: Optimizer, clipper: GradClipper) -> Callable[[], Any]:
    StepLR(optimizer, 1)
    clipper.attach(optimizer)
    return optimizer.step


METHODS = [step_method, clip_method, attach_method, attach_late, attach_before_scheduler, attach_after_scheduler]

SKIPPED_OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "ZeroFilling": ZeroFilling,
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda params: AdamW(params, lr=0.1, weight_decay=0.1),
    "fused": lambda params: AdamW(params, lr=0.1, fused=True),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", SKIPPED_OPTIMIZERS)
def test_a_skipped_step_leaves_no_trace(kind: str, method: Callable[..., Callable[[], Any]]) -> None:
    weight = one_weight()
    optimizer = SKIPPED_OPTIMIZERS[kind]([weight])
    clipper = clipper_of(weight)
    train = method(optimizer, clipper)
    for step, value in enumerate((1.0, NAN, NAN, 2.0, NAN)):
        weight.grad = torch.full((4,), value)
        before = states_of(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train()
        assert (states_of(optimizer) == before) == (value != value), step
    assert clipper.skipped == 3
    # A step without a clip is the caller's.
    weight.grad = torch.ones(4)
    before = states_of(optimizer)
    if method is clip_method:
        optimizer.step()
        assert states_of(optimizer) != before


def test_a_scheduler_works_with_an_attached_clipper() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in (attach_before_scheduler, attach_after_scheduler):
            weight = one_weight()
            optimizer = SGD([weight], lr=1.0)
            clipper = clipper_of(weight)
            if make is attach_before_scheduler:
                clipper.attach(optimizer)
            scheduler = StepLR(optimizer, 1, gamma=0.5)
            if make is attach_after_scheduler:
                clipper.attach(optimizer)
            for _ in range(2):
                weight.grad = torch.full((4,), 3.0)
                optimizer.step()
                scheduler.step()
            torch.testing.assert_close(weight.detach(), torch.full((4,), 1 - 0.5 - 0.25), rtol=1e-5, atol=1e-5)


def test_an_attached_optimizer_is_copied_pickled_and_freed() -> None:
    weight = one_weight()
    optimizer = SGD([weight], lr=1.0)
    handle = clipper_of(weight).attach(optimizer)
    other = pickle.loads(pickle.dumps(optimizer))
    copied = copy.deepcopy(optimizer)
    for one in (other, copied):
        (param,) = one.param_groups[0]["params"]
        param.grad = torch.full((4,), 3.0)
        one.step()
        assert torch.equal(param.detach(), torch.full((4,), -2.0)), "a copy is not attached"
    handle.remove()
    weight.grad = torch.full((4,), 3.0)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.full((4,), -2.0))
    reference = weakref.ref(optimizer)
    del optimizer, handle
    gc.collect()
    assert reference() is None


def test_two_clippers_of_one_optimizer() -> None:
    weights = [one_weight(), one_weight()]
    optimizer = SGD(weights, lr=1.0)
    clippers = [clipper_of(weight, partial=True) for weight in weights]
    for clipper in clippers:
        clipper.attach(optimizer)
    for value in (3.0, NAN):
        before = to_bytes(weights)
        weights[0].grad, weights[1].grad = torch.full((4,), 3.0), torch.full((4,), value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        assert (to_bytes(weights) == before) == (value != value)
    torch.testing.assert_close(weights[0].detach(), torch.full((4,), 0.5))
    assert [clipper.skipped for clipper in clippers] == [0, 1]


@on_ranks(1, 2)
def test_refuses_steps_within_backward() -> None:
    model = nn.Linear(4, 4)
    own = {param: SGD([param], lr=1.0) for param in model.parameters()}
    GradClipper(model, distclip.global_norm(1.0), split_over=dist.group.WORLD).attach(*own.values())
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda param: own[param].step())
    loss = model(torch.ones(4, 4)).sum()
    assert_raises_on_ranks(loss.backward, ArgumentError, "within backward", unchanged=model.weight.data)


@on_ranks(1, 2)
@pytest.mark.parametrize("all_ranks", [True, False])
def test_step_refuses_to_run_in_a_hook(all_ranks: bool) -> None:
    """Step in a hook of one parameter, on all ranks or on one, and in the callback at the end of backward."""
    model = nn.Linear(4, 4)
    optimizer = SGD(model.parameters(), lr=1.0)
    clipper = GradClipper(model, distclip.global_norm(1.0), split_over=dist.group.WORLD)
    in_hook = all_ranks or dist.get_rank() == 0
    where = "hook" if in_hook else "callback"

    def on_gradient(_: Any) -> None:
        if where == "hook":
            clipper.step(optimizer)
        elif where == "callback":
            torch.autograd.Variable._execution_engine.queue_callback(lambda: clipper.step(optimizer))

    model.weight.register_post_accumulate_grad_hook(on_gradient)
    loss = model(torch.ones(4, 4)).sum()
    assert_raises_on_ranks(loss.backward, ArgumentError, "clipper.in_backward", unchanged=model.weight.data)
    where = "callback"
    optimizer.zero_grad()
    model(torch.ones(4, 4)).sum().backward()
    assert clipper.steps == 1


class Players:
    """Two networks with an optimizer each, and a clipper attached to both.

    Args:
        here: whether this rank has parameters of the second one.
    """

    def __init__(self, here: bool = True, **options: Any) -> None:
        self.one, self.two = one_weight(), one_weight()
        self.optimizers = [SGD([self.one], lr=1.0), SGD([self.two] if here else [one_weight(0)], lr=1.0)]
        named = [("one", self.one), ("two", self.two)] if here else [("one", self.one)]
        empty = [] if here else [("empty", self.optimizers[1].param_groups[0]["params"][0])]
        self.clipper = GradClipper([*named, *empty], distclip.global_norm(1.0), **options)
        self.clipper.attach(*self.optimizers)

    def step(self, i: int) -> float:
        """Step one optimizer, and return how far its parameter has moved."""
        param = (self.one, self.two)[i]
        before = param.detach().clone()
        self.optimizers[i].step()
        return float((param.detach() - before).norm())

    @property
    def num_steps(self) -> int:
        return int(self.clipper.state_dict()["counts"]["steps"])


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("zero_all", [True, False])
def test_optimizers_in_turn(set_to_none: bool, zero_all: bool) -> None:
    players = Players()
    params = (players.one, players.two)
    for turn, i in enumerate((1, 0, 1, 0, 0, 1)):
        for optimizer in players.optimizers if zero_all else [players.optimizers[i]]:
            optimizer.zero_grad(set_to_none=set_to_none)
        (50 * params[i].sum()).backward()
        assert players.step(i) == pytest.approx(1.0, abs=1e-5)
        assert players.num_steps == turn + 1


@pytest.mark.parametrize("first", ["discriminator", "generator"])
def test_leftover_gradients_of_another_network_do_not_count(first: str) -> None:
    """Train a generator through a discriminator, which then has gradients that it discards."""
    players, lengths = Players(), []
    for turn in range(8):
        if (turn % 2 == 0) == (first == "discriminator"):
            players.optimizers[1].zero_grad()
            (50 * players.two.sum()).backward()
            lengths.append(players.step(1))
        else:
            players.optimizers[0].zero_grad()
            (50 * (players.one + players.two).sum()).backward()
            lengths.append(players.step(0))
    # The first time nothing shows that the other gradient will not be stepped, so that the step is too short.
    assert lengths[0] == pytest.approx(1.0 if first == "discriminator" else 0.5**0.5, abs=1e-5)
    assert lengths[1:] == pytest.approx([1.0] * 7, abs=1e-5)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_shared_loss_has_one_norm(order: tuple[int, int]) -> None:
    players = Players()
    for turn in range(4):
        for optimizer in players.optimizers:
            optimizer.zero_grad(set_to_none=turn % 2 == 0)
        (30 * players.one.sum() + 40 * players.two.sum()).backward()
        lengths = [players.step(i) for i in order]
        assert [lengths[order.index(i)] for i in range(2)] == pytest.approx([0.6, 0.8], abs=1e-5)
        assert players.num_steps == turn + 1


def test_two_steps_between_two_backward_passes() -> None:
    players = Players()
    (30 * players.one.sum() + 40 * players.two.sum()).backward()
    lengths = [players.step(i) for i in (0, 0, 1, 1)]
    assert lengths == pytest.approx([0.6, 0.6, 0.8, 0.8], abs=1e-5)
    assert players.num_steps == 1


def test_a_skipped_step_of_a_shared_loss_skips_all_optimizers() -> None:
    players = Players()
    for bad in (False, True, False):
        for optimizer in players.optimizers:
            optimizer.zero_grad()
        (30 * players.one.sum() + 40 * players.two.sum() * (NAN if bad else 1.0)).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lengths = [players.step(i) for i in range(2)]
        assert lengths == pytest.approx([0.0, 0.0] if bad else [0.6, 0.8], abs=1e-5)


@on_ranks(2)
def test_ranks_take_turns_together() -> None:
    """Only one rank has gradients of the second network, and the other rank has none at all in its turn."""
    here = dist.get_rank() == 0
    players = Players(here, split_over=dist.group.WORLD)
    for i in (1, 0, 1, 0):
        for optimizer in players.optimizers:
            optimizer.zero_grad()
        if i == 0 or here:
            (50 * (players.one, players.two)[i].sum()).backward()
        moved = players.step(i)
        expected = (1.0 if here else 0.0) if i else 0.5**0.5
        assert moved == pytest.approx(expected, abs=1e-5)
    # An error on one rank is raised on both.
    if here:
        foreign = one_weight()
        foreign.grad = torch.ones(4)
        players.optimizers[1].add_param_group({"params": [foreign]})
    assert_raises_on_ranks(players.optimizers[1].step, ArgumentError, "does not have")


class Summing(SGD):
    """Makes its gradients in its step, from what backward has summed elsewhere."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = param.summed.clone()
        return super().step(closure)


class Synchronizing(SGD):
    """Fills missing gradients with zeros, and casts the others."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = torch.zeros_like(param) if param.grad is None else param.grad.bfloat16().float()
        return super().step(closure)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("before", [None, 5.0])
def test_gradients_made_within_the_step(attached: bool, before: float | None) -> None:
    for kind in (Summing, Synchronizing):
        weight = one_weight()
        weight.summed = torch.full((4,), 40.0)
        optimizer, clipper = kind([weight], lr=1.0), clipper_of(weight)
        if attached:
            clipper.attach(optimizer)
        messages = []
        for _ in range(9):
            weight.grad = None if before is None else torch.full((4,), before)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step() if attached else clipper.step(optimizer)
            messages += [str(w.message) for w in caught if w.category is UnclippedStepWarning]
        if before is None and kind is Summing:
            messages = [message for message in messages if "no gradient" not in message]
        assert len(messages) == (kind is Summing)
        assert all(f"optimizer={kind.__name__}" in message for message in messages)


class Interrupted(BaseException):
    """Ends a step like a KeyboardInterrupt, which would end the test run as well."""


@pytest.mark.parametrize(("error", "where"), [(KeyError, "hook"), (Interrupted, "hook"), (Interrupted, "observer")])
@pytest.mark.parametrize("attached", [True, False])
def test_an_exception_leaves_no_trace(error: type[BaseException], where: str, attached: bool, tmp_path: Path) -> None:
    """Compare with a twin whose step is not interrupted and tried again."""
    twins = []
    for interrupted in (True, False):
        weight = one_weight()
        optimizer = AdamW([weight], lr=0.1)
        clipper = GradClipper([("weight", weight)], distclip.zclip(warmup=2))
        recorder = Recorder(clipper, tmp_path / str(interrupted), every=100)
        if attached:
            clipper.attach(optimizer)
        fails = [False]

        def fail(*_: Any, fails: list[bool] = fails) -> None:
            if fails[0]:
                raise error("in the step")

        optimizer.register_step_pre_hook(fail) if where == "hook" else clipper.observe(fail)
        for step in range(6):
            for attempt in range(2 if interrupted and step in (2, 4) else 1):
                weight.grad = torch.full((4,), float(step + 1))
                fails[0] = interrupted and step in (2, 4) and attempt == 0
                try:
                    optimizer.step() if attached else clipper.step(optimizer)
                except error:
                    assert fails[0]
        recorder.flush()
        lines = [line.split('"time"')[0] for line in recorder.path.read_text().splitlines()[1:]]
        twins.append((states_of(optimizer), str(clipper.state_dict()), lines))
    assert twins[0] == twins[1]


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_failed_can_be_tried_again_with_a_scaler(fused: bool) -> None:
    weights = [one_weight(), one_weight()]
    for weight, fails in zip(weights, (True, False), strict=True):
        optimizer, clipper, scaler = AdamW([weight], lr=0.1, fused=fused), clipper_of(weight), make_scaler()
        if fails:

            def fail(*_: Any) -> None:
                raise KeyError("in the step")

            hook = optimizer.register_step_pre_hook(fail)
        weight.grad = torch.full((4,), 3 * LOSS_SCALE)
        if fails:
            with pytest.raises(KeyError):
                clipper.step(optimizer, scaler)
            hook.remove()
        clipper.step(optimizer, scaler)
        scaler.update()
        assert clipper.state_dict()["counts"]["steps"] == 1
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-6)


def test_max_skips_raises_before_the_step() -> None:
    weight = one_weight()
    optimizer, clipper = ZeroFilling([weight]), clipper_of(weight, max_skips=2)
    clipper.attach(optimizer)
    before = states_of(optimizer)
    for expected in (distclip.NonFiniteWarning, None):
        weight.grad = torch.full((4,), NAN)
        if expected:
            with pytest.warns(expected):
                optimizer.step()
        else:
            with pytest.raises(distclip.TooManySkippedSteps):
                optimizer.step()
        assert states_of(optimizer) == before
    assert clipper.skipped == 2
