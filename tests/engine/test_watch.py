"""Scalars of the user travel in the all-reduce of a step, and count for its non-finite check."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import distclip
from distclip import ArgumentError, DisagreementError, GradClipper, NonFiniteError, NonFiniteWarning
from distclip.comm import threads
from distclip.comm.consensus import FirstError
from distclip.norms.watch import NO_WATCH, Watch
from tests.ranks import on_ranks
from tests.rig import assert_raises_on_ranks
from tests.tables.layouts.meshes import world_mesh
from tests.tables.layouts.tensors import plain_param, random_grad

NAN, INF = float("nan"), float("inf")


class Counted:
    """Communicator around another one that counts the collectives."""

    def __init__(self, comm: Any) -> None:
        self._comm, self.sums, self.others = comm, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def sum_(self, tensor: torch.Tensor) -> None:
        self.sums += 1
        self._comm.sum_(tensor)

    def max_(self, tensor: torch.Tensor) -> None:
        self.others += 1
        self._comm.max_(tensor)

    def gather_objects(self, value: Any) -> list[Any]:
        self.others += 1
        return self._comm.gather_objects(value)


def clipper_on_ranks(policy: Any = None, **options: Any) -> tuple[GradClipper, nn.Parameter, torch.optim.Optimizer]:
    """Return a clipper over all ranks, whose gradients differ, with its parameter and optimizer."""
    param = plain_param(random_grad(5, 3, seed=dist.get_rank()))
    clipper = GradClipper([("w", param)], policy or distclip.global_norm(1.0), split_over=dist.group.WORLD, **options)
    return clipper, param, torch.optim.SGD([param], lr=0.5)


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6), st.sampled_from([NAN, INF, -INF])), min_size=1, max_size=5))
def test_each_kind_is_that_of_the_ranks_that_have_a_value(by_rank: list[float | None]) -> None:
    size = len(by_rank)
    like = torch.zeros((), dtype=torch.float64)
    watches = [
        Watch.of(
            {
                "a": value,
                "b": (value, "sum"),
                "c": None if value is None else (torch.tensor(value, dtype=torch.float64), "max"),
            },
            FirstError(),
        )
        if value is not None
        else Watch.of({"a": None, "b": (None, "sum"), "c": (None, "max")}, FirstError())
        for value in by_rank
    ]
    comms = threads(size)
    numbers = sum(watch.write(like, comm) for watch, comm in zip(watches, comms, strict=True))
    totals = watches[0].read(numbers, comms[0])
    present = [value for value in by_rank if value is not None]
    assert totals.finite.read() == all(map(math.isfinite, present))
    if all(map(math.isfinite, present)):
        mean = sum(present) / len(present) if present else NAN
        expected = {"a": mean, "b": float(sum(present)), "c": max(present, default=NAN)}
        found = {name: float(value) for name, value in totals.values.items()}
        assert found == pytest.approx(expected, nan_ok=True, abs=1e-6)


@pytest.mark.parametrize(
    ("watch", "word"),
    [
        ({"loss": torch.zeros(2)}, "shape (2,)"),
        ({"loss": torch.zeros(0)}, "shape (0,)"),
        ({"loss": torch.zeros((), dtype=torch.complex64)}, "complex64"),
        ({"loss": "2.0"}, "watch['loss']='2.0'"),
        ({"loss": [1.0]}, "watch['loss']=[1.0]"),
        ({"loss": (1.0, "median")}, "'median'"),
        ({"norm": 1.0}, "'norm'"),
        ({1: 1.0}, "watch={1: 1.0}"),
        ([1.0], "watch=[1.0]"),
        ({f"x{i}": 0.0 for i in range(17)}, "17 scalars"),
    ],
)
def test_what_is_no_scalar_is_refused_before_a_gradient_is_written(watch: Any, word: str) -> None:
    param = plain_param(random_grad(4))
    before = param.grad.clone()
    clipper = GradClipper([param], distclip.global_norm(1e-3))
    for call in (clipper.clip, lambda **options: clipper.step(torch.optim.SGD([param], lr=1.0), **options)):
        with pytest.raises(ArgumentError) as raised:
            call(watch=watch)
        assert word in str(raised.value)
    assert torch.equal(param.grad, before)
    assert clipper.steps == 0


def test_an_empty_watch_is_none_and_sixteen_fit() -> None:
    assert Watch.of({}, FirstError()) is NO_WATCH
    param = plain_param(random_grad(4))
    report = GradClipper([param], distclip.global_norm(1.0)).clip(watch={f"x{i}": float(i) for i in range(16)})
    assert report.watch is not None
    assert {name: float(value) for name, value in report.watch.items()} == {f"x{i}": float(i) for i in range(16)}
    assert report.as_dict()["x3"] == 3.0


@on_ranks(2, 4)
def test_watched_scalars_take_no_further_collective(num_ranks: int) -> None:
    from distclip.comm import ProcessGroupComm

    rank, comm = dist.get_rank(), Counted(ProcessGroupComm(dist.group.WORLD))
    param = plain_param(random_grad(3, seed=rank))
    optimizer = torch.optim.SGD([param], lr=0.1)
    clipper = GradClipper([("w", param)], distclip.global_norm(1.0), comm=comm, split_over=dist.group.WORLD)
    last = rank == num_ranks - 1
    for step in range(3):
        comm.sums = comm.others = 0
        # A dictionary may have another order on each rank, and a rank may have no loss.
        scalars: list[tuple[str, Any]] = [
            ("loss", torch.tensor(2.0 + step) if last else None),
            ("tokens", (rank, "sum")),
        ]
        scalars.append(("slowest", (torch.tensor(float(-rank)), "max")))
        report = clipper.step(optimizer, watch=dict(scalars if rank % 2 else scalars[::-1]))
        assert (comm.sums, comm.others) == ((2, 0) if step == 0 else (1, 0)), step
        assert report.as_dict()["loss"] == 2.0 + step
        assert report.as_dict()["tokens"] == sum(range(num_ranks))
        assert report.as_dict()["slowest"] == 0.0
        assert not report.skipped
    # Without them the message stays as long, so that a rank that leaves them out is noticed.
    comm.sums = 0
    assert clipper.step(optimizer).watch is None
    assert comm.sums == 1


@on_ranks(2)
@pytest.mark.parametrize("norm_type", [2.0, INF])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["mean", "sum", "max"])
def test_a_value_that_is_not_finite_skips_the_step_on_all_ranks(norm_type: float, bad: float, kind: str) -> None:
    clipper, param, optimizer = clipper_on_ranks(distclip.median_mad(norm_type=norm_type))
    before, rank = param.detach().clone(), dist.get_rank()
    with pytest.warns(NonFiniteWarning, match=r"watch\['loss'\].*on rank 1"):
        report = clipper.step(optimizer, watch={"loss": (torch.tensor(bad if rank == 1 else 1.0), kind)})
    assert report.skipped
    assert not report.finite
    assert bool(report.norms.isfinite().all())
    assert torch.equal(param, before)
    assert clipper.skipped == 1
    assert int(clipper._engine.state["count"][0]) == 0
    assert [culprit.name for culprit in clipper.incidents[-1].culprits] == ["watch['loss']"]
    assert not clipper.step(optimizer, watch={"loss": (1.0, kind)}).skipped


@on_ranks(2)
@pytest.mark.parametrize("rule", ["raise", "zero", "propagate"])
def test_the_rule_for_non_finite_steps_applies(rule: Any) -> None:
    clipper, param, optimizer = clipper_on_ranks(on_nonfinite=rule)
    before, grad = param.detach().clone(), param.grad.clone()
    watch = {"loss": NAN if dist.get_rank() == 0 else 1.0}
    if rule == "raise":
        with pytest.raises(NonFiniteError, match="loss"):
            clipper.step(optimizer, watch=watch)
        assert torch.equal(param.grad, grad)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteWarning)
            report = clipper.step(optimizer, watch=watch)
        assert not report.finite
        assert bool(report.skipped) == (rule == "zero")
    assert torch.equal(param, before) == (rule != "propagate")


@on_ranks(2)
def test_ranks_that_watch_different_scalars_raise_together() -> None:
    clipper, param, optimizer = clipper_on_ranks()
    rank, local = dist.get_rank(), param.grad
    for first in (True, False):
        # In the first call with watched scalars, and once the ranks have agreed on some.
        for mine, other, error, word in [
            ({"loss": 1.0}, {"los": 1.0}, DisagreementError, "los"),
            ({"loss": 1.0}, {"loss": (1.0, "sum")}, DisagreementError, "sum"),
            ({"loss": 1.0}, None, DisagreementError, "watch"),
            ({"loss": 1.0}, {"loss": 1.0, "aux": 1.0}, DisagreementError, "aux"),
            ({"loss": 1.0}, {"loss": torch.ones(3)}, ArgumentError, "shape (3,)"),
            ({"loss": 1.0}, {f"x{i}": 0.0 for i in range(17)}, ArgumentError, "17 scalars"),
        ]:
            for this in (0, 1):
                watch: Any = mine if rank == this else other
                assert_raises_on_ranks(lambda watch=watch: clipper.clip(watch=watch), error, word, unchanged=local)
        if first:
            clipper.step(optimizer, watch={"loss": 1.0})
    assert float(clipper.step(optimizer, watch={"loss": float(rank)}).watch["loss"]) == 0.5
    assert float(clipper.step(optimizer, watch={"aux": (rank, "max"), "loss": 0.0}).watch["aux"]) == 1.0


@on_ranks(2)
def test_attached_clippers_watch_what_a_function_returns() -> None:
    clipper, param, optimizer = clipper_on_ranks()
    losses, seen = iter([1.0, NAN, 3.0]), []
    clipper.observe(lambda outcome: seen.append(outcome.report().as_dict()["loss"]))
    handle = clipper.attach(optimizer, watch=lambda: {"loss": next(losses) + dist.get_rank()})
    optimizer.step()
    before = param.detach().clone()
    with pytest.warns(NonFiniteWarning, match="loss"):
        optimizer.step()
    assert torch.equal(param, before)
    param.grad = random_grad(5, 3)
    optimizer.step()
    assert seen[0] == 1.5
    assert seen[2] == 3.5
    if dist.get_rank() == 1:
        losses = iter(())
    param.grad = random_grad(5, 3)
    with pytest.raises((StopIteration, distclip.PeerError)):
        optimizer.step()
    handle.remove()


@on_ranks(2)
def test_isolated_groups_are_skipped_together() -> None:
    mesh = world_mesh("dp")
    params = [plain_param(random_grad(4, seed=i)) for i in range(2)]
    clipper = GradClipper([], distclip.global_norm(1.0), isolate=True, split_over=mesh["dp"])
    clipper.add_groups({name: [param] for name, param in zip("ab", params, strict=True)})
    before = [param.detach().clone() for param in params]
    with pytest.warns(NonFiniteWarning, match="loss"):
        report = clipper.step(torch.optim.SGD(params, lr=1.0), watch={"loss": NAN if dist.get_rank() else 1.0})
    assert bool(report.skipped)
    assert all(map(torch.equal, params, before))


def test_watched_scalars_stay_on_the_device() -> None:
    param = nn.Parameter(torch.zeros(3, device="meta"))
    param.grad = torch.zeros(3, device="meta")
    clipper = GradClipper([("w", param)], distclip.global_norm(1.0), on_nonfinite="propagate", replicas="off")
    report = clipper.clip(watch={"loss": torch.zeros((), device="meta"), "tokens": (3, "sum"), "top": (1.0, "max")})
    assert {name: value.device.type for name, value in report.watch.items()} == dict.fromkeys(
        ("loss", "tokens", "top"), "meta"
    )
