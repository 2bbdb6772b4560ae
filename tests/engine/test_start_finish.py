"""A step that is cut in two at its all-reduce: the same numbers, and errors on all ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip import ArgumentError, DisagreementError, GradClipper, NonFiniteWarning, PeerError
from distclip.comm import ProcessGroupComm
from tests.ranks import on_ranks
from tests.rig import assert_raises_on_ranks
from tests.tables.layouts.tensors import plain_param, random_grad

NAN = float("nan")


def clipper_on_ranks(policy: Any = None, **options: Any) -> tuple[GradClipper, nn.Parameter, torch.optim.Optimizer]:
    param = plain_param(random_grad(5, 3, seed=dist.get_rank()))
    options = {"split_over": dist.group.WORLD} | options
    clipper = GradClipper([("w", param)], policy or distclip.global_norm(1.0), **options)
    return clipper, param, torch.optim.SGD([param], lr=0.5)


def split_step(clipper: GradClipper, optimizer: Any, scaler: Any = None, **options: Any) -> Any:
    clipper.start(*(() if scaler is None else (optimizer, scaler)), **options)
    return clipper.finish(optimizer, scaler)


@on_ranks(1, 2)
@pytest.mark.parametrize("policy", ["global_norm", "median_mad", "inf", "value"])
@pytest.mark.parametrize("rule", ["skip", "zero"])
@pytest.mark.parametrize("scaled", [False, True])
def test_start_and_finish_are_a_step(policy: str, rule: Any, scaled: bool) -> None:
    make: Callable[[], Any] = {
        "global_norm": lambda: distclip.global_norm(1.0),
        "median_mad": lambda: distclip.median_mad(warmup=2, skip=True, watch="loss"),
        "inf": lambda: distclip.global_norm(0.5, norm_type=float("inf")),
        "value": lambda: distclip.value(0.5),
    }[policy]
    results = []
    for cut in (False, True):
        clipper, param, optimizer = clipper_on_ranks(make(), on_nonfinite=rule)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
        reports = []
        for step, loss in enumerate([1.0, 1.1, 50.0, 1.0, NAN, 1.0]):
            grad = random_grad(5, 3, seed=10 * step + dist.get_rank())
            if step == 3 and dist.get_rank() == 0:
                grad[0, 0] = NAN
            if scaler is not None:
                scaler.scale(torch.ones(()))
            param.grad = grad * (4.0 if scaler is None else scaler.get_scale())
            # The culprits of a step that is not finite are gathered in `finish`.
            with pytest.warns() if step in (3, 4) and scaler is None else torch.no_grad():
                call = split_step if cut else GradClipper.step
                reports.append(repr(call(clipper, optimizer, scaler, watch={"loss": loss})))
            if scaler is not None:
                scaler.update()
        results.append((reports, param.tolist(), clipper.skipped, str(clipper.state_dict())))
    assert results[0] == results[1]


class Slow:
    """Communicator of a caller whose sum does not return before it is released."""

    def __init__(self, comm: Any) -> None:
        self.rank, self.size, self.ranks = comm.rank, comm.size, comm.ranks
        self.device, self.covers_holders = comm.device, comm.covers_holders
        self.max_, self.gather_objects = comm.max_, comm.gather_objects
        self._comm, self.released, self.sums = comm, threading.Event(), 0
        self.released.set()

    def sum_(self, tensor: torch.Tensor) -> None:
        assert self.released.wait(30)
        self.sums += 1
        self._comm.sum_(tensor)


class SlowGroup(ProcessGroupComm):
    """Process group whose sum does not return before it is released."""

    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self.released, self.sums = threading.Event(), 0
        self.released.set()

    def sum_(self, tensor: torch.Tensor) -> None:
        assert self.released.wait(30)
        self.sums += 1
        super().sum_(tensor)


@on_ranks(2)
@pytest.mark.parametrize("kind", ["protocol", "subclass"])
def test_start_returns_before_the_sum_of_any_communicator(kind: str) -> None:
    comm: Any = Slow(ProcessGroupComm(dist.group.WORLD)) if kind == "protocol" else SlowGroup(dist.group.WORLD)
    clipper, _, optimizer = clipper_on_ranks(comm=comm)
    for _ in range(2):
        comm.sums = 0
        comm.released.clear()
        clipper.start()
        assert comm.sums == 0
        comm.released.set()
        assert bool(clipper.finish(optimizer).clipped)
        assert comm.sums == 1


@on_ranks(2)
def test_the_all_reduce_of_a_process_group_is_asynchronous() -> None:
    clipper, _, optimizer = clipper_on_ranks()
    if dist.get_rank() == 0:
        # The other rank has not entered it yet.
        clipper.start(optimizer)
        dist.barrier()
    else:
        dist.barrier()
        clipper.start(optimizer)
    assert bool(clipper.finish(optimizer).clipped)


@on_ranks(1, 2)
@pytest.mark.parametrize("only", [None, 0])
def test_calls_out_of_order_raise_on_all_ranks(only: int | None) -> None:
    clipper, param, optimizer = clipper_on_ranks()
    here, local = only in (None, dist.get_rank()), param.grad

    def twice() -> None:
        clipper.start()
        if here:
            clipper.start()
        clipper.finish(optimizer)
        clipper.step(optimizer)

    def without_start() -> None:
        if not here:
            clipper.start()
        clipper.finish(optimizer)

    if only is None:
        assert_raises_on_ranks(twice, ArgumentError, "start", unchanged=local)
    assert_raises_on_ranks(without_start, ArgumentError, "finish", unchanged=local)
    assert bool(clipper.step(optimizer).clipped)
    assert bool(split_step(clipper, optimizer).clipped)


@on_ranks(2)
def test_a_rank_that_fails_in_between_shifts_no_later_call() -> None:
    for bad in (False, True):
        clipper, param, optimizer = clipper_on_ranks(distclip.median_mad())
        split_step(clipper, optimizer)
        if bad and dist.get_rank() == 0:
            param.grad[0, 0] = NAN
        clipper.start()
        if dist.get_rank() == 0:
            # It finishes the step, which is skipped with a gather of culprits if a gradient is not finite.
            with pytest.warns(NonFiniteWarning) if bad else torch.no_grad():
                clipper.finish(optimizer)
        param.grad = random_grad(5, 3)
        before = param.detach().clone()
        with pytest.raises((ArgumentError, PeerError), match="not finished"):
            split_step(clipper, optimizer)
        assert torch.equal(param, before)
        for _ in range(2):
            assert bool(split_step(clipper, optimizer).finite)
            assert bool(clipper.step(optimizer).finite)


@on_ranks(1, 2)
@pytest.mark.parametrize("write", ["in place", "view", "replaced", "dropped", "backward"])
def test_a_gradient_written_in_between_is_noticed(write: str) -> None:
    clipper, param, optimizer = clipper_on_ranks(distclip.median_mad())
    before, state = param.detach().clone(), str(clipper.state_dict())
    clipper.start()
    if write == "in place":
        param.grad.mul_(1.0)
    elif write == "view":
        param.grad[1].zero_()
    elif write == "replaced":
        param.grad = param.grad.clone()
    elif write == "dropped":
        param.grad = None
    else:
        param.sum().backward()
    with pytest.raises(ArgumentError, match="after start"):
        clipper.finish(optimizer)
    assert torch.equal(param, before)
    assert str(clipper.state_dict()) == state
    param.grad = random_grad(5, 3)
    assert bool(split_step(clipper, optimizer).finite)


@on_ranks(2)
def test_a_gradient_written_on_one_rank_ends_the_next_step_on_all() -> None:
    clipper, param, optimizer = clipper_on_ranks()
    clipper.start()
    if dist.get_rank() == 1:
        param.grad.zero_()
        with pytest.raises(ArgumentError, match="written after start"):
            clipper.finish(optimizer)
    else:
        clipper.finish(optimizer)
    assert_raises_on_ranks(lambda: clipper.step(optimizer), DisagreementError, "number of steps", unchanged=param.grad)


def test_wrong_arguments() -> None:
    param = plain_param(random_grad(4))
    optimizer, other = (torch.optim.SGD([param], lr=1.0) for _ in range(2))
    clipper = GradClipper([param], distclip.global_norm(1.0))
    before = param.detach().clone()
    for start, finish, word in [
        ((), (None,), "optimizer=None"),
        ((), (torch.optim.SGD([plain_param(random_grad(2))], lr=1.0),), "clipper"),
        ((optimizer,), (other,), "optimizer"),
        ((), (optimizer, torch.amp.GradScaler("cpu")), "scaler"),
    ]:
        clipper.start(*start)
        with pytest.raises(ArgumentError) as raised:
            clipper.finish(*finish)
        assert word in str(raised.value)
        assert torch.equal(param, before)
    with pytest.raises(ArgumentError, match="optimizer"):
        clipper.start("adam")  # type: ignore[arg-type]
    clipper.start()
    for call in (
        lambda: clipper.load_state_dict(clipper.state_dict()),
        lambda: clipper.rebind([param]),
        clipper.measure_tensors,
        clipper.discard,
    ):
        with pytest.raises(ArgumentError, match="was started"):
            call()
    assert bool(clipper.finish(optimizer).clipped)
    assert clipper.steps == 1


@on_ranks(2)
def test_isolated_groups() -> None:
    params = [plain_param(random_grad(4, seed=i)) for i in range(2)]
    clipper = GradClipper([], distclip.global_norm(1.0), isolate=True, split_over=dist.group.WORLD)
    clipper.add_groups({name: [param] for name, param in zip("ab", params, strict=True)})
    params[0].grad[0] = NAN
    clipper.start(watch={"loss": 1.0})
    with pytest.raises(ArgumentError, match="was started"):
        clipper.remove_group("a")
    with pytest.warns(NonFiniteWarning):
        report = clipper.finish(torch.optim.SGD(params, lr=1.0))
    assert report.skips.tolist()[:2] == [True, False]
    assert float(report.watch["loss"]) == 1.0
