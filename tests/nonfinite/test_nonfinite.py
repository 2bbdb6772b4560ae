"""A NaN or an Inf on one rank only, in every layout: all ranks do the same about it, and say whose it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip import NonFiniteError, Report, TooManySkippedSteps, reference
from tests.ranks import World, everywhere
from tests.rig import (
    INF,
    KINDS,
    NAN,
    alike,
    bits,
    build,
    everywhere_,
    frozen,
    memory,
    quietly,
)

POLICIES = {
    "zclip": lambda: distclip.zclip(warmup=2),
    "adagc": lambda: distclip.adagc(warmup=2),
    "median_mad": lambda: distclip.median_mad(window=4),
    "global_norm": lambda: distclip.global_norm(1.0),
}


def check_skip(name: str, kind: str, policy: str, how: str, values: tuple[float, ...]) -> None:
    """Beside a twin that never sees the bad step."""
    rig, twin = build(name), build(name)
    clippers = [one.clipper(POLICIES[policy]()) for one in (rig, twin)]
    optimizers = [one.optimizer(kind) for one in (rig, twin)]
    clipper, optimizer = clippers[0], optimizers[0]
    if how == "attach":
        clipper.attach(optimizer)

    def step() -> Report | None:
        if how == "step":
            return clipper.step(optimizer)
        report = clipper.clip() if how == "clip" else None
        optimizer.step()
        return report

    def healthy(number: int) -> None:
        for one in (rig, twin):
            one.fill(number)
        step()
        clippers[1].step(optimizers[1])

    for number in range(3):
        healthy(number)
    before, remembered = frozen(rig, optimizer), memory(clipper)
    rig.fill(3)
    whose = rig.poison(dist.get_world_size() - 1, *values)
    report, said = quietly(step)
    assert said == [f"step 4 was skipped (1 in all): elements are not finite in {whose}."]
    assert frozen(rig, optimizer) == before
    assert memory(clipper) == remembered
    assert report is None or (bool(report.skipped), bool(report.finite), bool(report.clipped)) == (True, False, False)
    assert (not rig.grads()) == (how != "step")
    assert [(i.step, i.action) for i in clipper.incidents] == [(4, "skip")] and clipper.skipped == 1
    assert str(clipper.incidents[0].culprits[0]) == whose
    alike(clipper)
    for number in range(4, 6):
        healthy(number)
    assert frozen(rig, optimizer) == frozen(twin, optimizers[1]) != before
    assert memory(clipper) == memory(clippers[1])


WAYS: list[dict[str, Any]] = [
    {"kind": "sgd", "policy": "zclip", "how": "step", "values": (NAN,)},
    {"kind": "adamw", "policy": "adagc", "how": "step", "values": (INF, NAN)},
    {"kind": "fused", "policy": "median_mad", "how": "step", "values": (-INF,)},
    {"kind": "sgd", "policy": "adagc", "how": "clip", "values": (NAN, NAN)},
    {"kind": "fused", "policy": "zclip", "how": "attach", "values": (INF,)},
]


@everywhere_
def test_skip(world: Callable[[int], World], name: str, size: int) -> None:
    for way in WAYS[:: 1 if size == 4 else 2]:
        world(size).run(check_skip, name=name, **way)


def check_raise(name: str) -> None:
    rig = build(name)
    clipper, optimizer = rig.clipper(distclip.zclip(), on_nonfinite="raise"), rig.optimizer("sgd")
    for call in (clipper.clip, lambda: clipper.step(optimizer)):
        rig.fill(0)
        whose = rig.poison(0, NAN, INF, -INF)
        before, frozen_before, remembered = bits(rig.grads()), frozen(rig, optimizer), memory(clipper)
        text = ""
        try:
            call()
        except NonFiniteError as error:
            text = str(error)
        assert f"elements are not finite in {whose}. No gradient was changed." in text, text
        assert len(set(everywhere(text))) == 1
        assert (bits(rig.grads()), frozen(rig, optimizer), memory(clipper)) == (before, frozen_before, remembered)
        alike(clipper)
    rig.fill(1)
    assert not clipper.step(optimizer).skipped
    if not rig.alike:
        last = dist.get_world_size() - 1
        for rank in (0, last):
            rig.poison(rank, NAN)
        try:
            clipper.clip()
        except NonFiniteError as error:
            assert f"{rig.target} (2 NaN on ranks 0, {last})" in str(error), error
        else:
            raise AssertionError("two bad shards were let through")


def check_overflow(name: str, on_nonfinite: str) -> None:
    """Finite elements, and a norm beyond float64."""
    rig = build(name)
    for _, param in rig.named:
        param.data = param.data.double()
    clipper = rig.clipper(distclip.global_norm(), on_nonfinite=on_nonfinite)
    rig.fill(0, 1e200)
    before = bits(rig.grads())
    if on_nonfinite == "raise":
        try:
            clipper.clip()
        except NonFiniteError as error:
            assert "the norm overflowed: every element is finite" in str(error), error
        else:
            raise AssertionError("an infinite norm was let through")
    else:
        _, said = quietly(lambda: clipper.step(rig.optimizer("sgd")))
        assert "the norm overflowed: every element is finite" in said[0]
    assert bits(rig.grads()) == before
    assert clipper.incidents[0].culprits == ()
    alike(clipper)


@everywhere_
def test_raise(world: Callable[[int], World], name: str, size: int) -> None:
    world(size).run(check_raise, name=name)
    for on_nonfinite in ("raise", "skip", "zero"):
        world(size).run(check_overflow, name=name, on_nonfinite=on_nonfinite)


def check_zero(name: str) -> None:
    rig = build(name)
    clipper = rig.clipper(distclip.global_norm(1.0), on_nonfinite="zero")
    rig.fill(0)
    whose = rig.poison(0, NAN, INF, -INF)
    expected = {key: g.nan_to_num(0, 0, 0) for key, g in rig.gathered(lambda p: p.grad).items()}
    report, said = quietly(clipper.clip)
    assert said == [f"step 1: elements are not finite in {whose}; they were set to zero."]
    norm = reference.total_norm(expected.values())
    torch.testing.assert_close(report.norm.double(), norm, rtol=1e-6, atol=0)
    assert not report.skipped and report.finite and report.clipped and clipper.skipped == 0
    for key, grad in rig.gathered(lambda p: p.grad).items():
        torch.testing.assert_close(grad, expected[key] * reference.clip_coefficient(norm, 1.0), rtol=2e-6, atol=1e-12)
    assert [(i.step, i.action) for i in clipper.incidents] == [(1, "zero")]
    alike(clipper, float(report.coef))


def check_propagate(name: str, value: float) -> None:
    """Whatever torch makes of the whole gradient."""
    rig = build(name)
    clipper = rig.clipper(distclip.global_norm(1.0), on_nonfinite="propagate")
    rig.fill(0)
    rig.poison(0, value)
    wholes = [nn.Parameter(torch.zeros_like(g)) for g in rig.gathered(lambda p: p.grad).values()]
    for param, grad in zip(wholes, rig.gathered(lambda p: p.grad).values(), strict=True):
        param.grad = grad
    norm = torch.nn.utils.clip_grad_norm_(wholes, 1.0)
    report, said = quietly(clipper.clip)
    assert said == [] and not report.skipped and not report.finite and clipper.skipped == 0
    torch.testing.assert_close(report.norm.double(), norm, equal_nan=True)
    for got, param in zip(rig.gathered(lambda p: p.grad).values(), wholes, strict=True):
        torch.testing.assert_close(got, param.grad, equal_nan=True)


@everywhere_
def test_zero_and_propagate(world: Callable[[int], World], name: str, size: int) -> None:
    world(size).run(check_zero, name=name)
    for value in (NAN, INF):
        world(size).run(check_propagate, name=name, value=value)


def check_max_skips(name: str) -> None:
    rig = build(name)
    clipper, optimizer = rig.clipper(distclip.global_norm(), max_skips=3), rig.optimizer("adamw")
    raised: list[int] = []
    for number, bad in enumerate((True, True, False, True, True, True)):
        rig.fill(number)
        if bad:
            rig.poison(number % dist.get_world_size(), NAN)
        try:
            quietly(lambda: clipper.step(optimizer))
        except TooManySkippedSteps as error:
            assert "step 6: 3 steps in a row were skipped (max_skips=3)" in str(error), error
            raised.append(number)
    assert raised == [5]
    alike(clipper)


def check_random(name: str, kind: str) -> None:
    """Ten steps with bad elements anywhere: one all-reduce in each that is healthy, one outcome everywhere."""
    rig = build(name)
    clipper, optimizer = rig.clipper(distclip.median_mad(window=4, cap=2.0)), rig.optimizer(kind)
    dice = torch.Generator().manual_seed(7)
    trace = []
    for number in range(10):
        rig.fill(number)
        bad = bool(torch.rand((), generator=dice) < 0.4)
        rank = int(torch.randint(dist.get_world_size(), (), generator=dice))
        if bad:
            rig.poison(rank, NAN)
        with CommDebugMode() as counter:
            report, said = quietly_alone(lambda: clipper.step(optimizer))
        assert bool(report.skipped) == bad == bool(said)
        # The first call with an optimizer asks the other ranks about theirs.
        assert bad or not number or counter.get_total_counts() == (name != "ddp"), counter.get_comm_counts()
        trace.append(report.as_dict()["coef"])
    assert 0 < clipper.skipped < 10
    copies = {name: bits([p])[0] for name, p in rig.named if rig.key(name, p) == name and not isinstance(p, DTensor)}
    alike(clipper, trace, copies)


def quietly_alone(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Without asking the other ranks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return call(), [str(warning.message) for warning in caught]


@everywhere_
def test_runs(world: Callable[[int], World], name: str, size: int) -> None:
    world(size).run(check_max_skips, name=name)
    for kind in KINDS:
        world(size).run(check_random, name=name, kind=kind)
