"""Write NaN or Inf on one rank, in every layout: all ranks act in the same way and name that rank."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip import NonFiniteError, Report, TooManySkippedSteps, reference
from tests.ranks import gather_from_ranks, on_ranks
from tests.rig import (
    INF,
    NAN,
    RIG_CASES,
    assert_same_on_ranks,
    build_rig,
    each_rig,
    policy_state,
    record_warnings,
    to_bytes,
    training_state,
)
from tests.tables.optimizers import OPTIMIZERS
from tests.tables.policies import POLICIES

WAYS: list[tuple[str, str, str, tuple[float, ...]]] = [
    ("sgd", "zclip", "step", (NAN,)),
    ("adamw", "adagc", "step", (INF, NAN)),
    ("fused", "median_mad", "step", (-INF,)),
    ("sgd", "adagc", "clip", (NAN, NAN)),
    ("fused", "zclip", "attach", (INF,)),
]
"""Optimizer, policy, method of the clipper, and non-finite elements."""

WITH_ALL_WAYS = [("fsdp2", 2), ("stages_fsdp2", 4)]
SKIPS = [(*rig, *way) for rig in RIG_CASES for way in (WAYS if rig in WITH_ALL_WAYS else WAYS[3:])]
"""Every way in two rigs, and two ways in every rig."""
WITH_REPLICAS = [("tp", 2), ("megatron", 4)]
RANDOM_STEPS = [(*rig, kind) for rig in RIG_CASES for kind in (OPTIMIZERS if rig in WITH_REPLICAS else ["fused"])]
"""Every optimizer in two rigs, and in every rig the one that reads on the device whether a step is skipped."""


@pytest.mark.parametrize(("name", "num_ranks", "kind", "policy", "method", "values"), SKIPS)
@on_ranks()
def test_skipped_step_leaves_no_trace(
    name: str, kind: str, policy: str, method: str, values: tuple[float, ...]
) -> None:
    """Compare with a twin that does not take the non-finite step."""
    small = POLICIES[policy].small
    assert small is not None
    rig, twin = build_rig(name), build_rig(name)
    clippers = [one.clipper(small()) for one in (rig, twin)]
    optimizers = [one.optimizer(kind) for one in (rig, twin)]
    clipper, optimizer = clippers[0], optimizers[0]
    if method == "attach":
        clipper.attach(optimizer)

    def step() -> Report | None:
        if method == "step":
            return clipper.step(optimizer)
        report = clipper.clip() if method == "clip" else None
        optimizer.step()
        return report

    def step_both(number: int) -> None:
        for one in (rig, twin):
            one.fill(number)
        step()
        clippers[1].step(optimizers[1])

    for number in range(3):
        step_both(number)
    before, state_before = training_state(rig, optimizer), policy_state(clipper)
    rig.fill(3)
    culprit = rig.poison(dist.get_world_size() - 1, *values)
    report, messages = record_warnings(step)
    assert messages == [f"step 4 was skipped (1 in total): elements are not finite in {culprit}."]
    assert training_state(rig, optimizer) == before
    assert policy_state(clipper) == state_before
    assert report is None or (bool(report.skipped), bool(report.finite), bool(report.clipped)) == (True, False, False)
    # After clip() the caller steps the optimizer, so a skipped step has removed the gradients.
    assert (not rig.grads()) == (method != "step")
    assert [(i.step, i.action) for i in clipper.incidents] == [(4, "skip")]
    assert clipper.skipped == 1
    assert str(clipper.incidents[0].culprits[0]) == culprit
    assert_same_on_ranks(clipper)
    for number in range(4, 6):
        step_both(number)
    assert training_state(rig, optimizer) == training_state(twin, optimizers[1]) != before
    assert policy_state(clipper) == policy_state(clippers[1])


@each_rig
@on_ranks()
def test_raises_on_all_ranks_and_changes_nothing(name: str) -> None:
    rig = build_rig(name)
    clipper, optimizer = rig.clipper(distclip.zclip(), on_nonfinite="raise"), rig.optimizer("sgd")
    for call in (clipper.clip, lambda: clipper.step(optimizer)):
        rig.fill(0)
        culprit = rig.poison(0, NAN, INF, -INF)
        before = to_bytes(rig.grads()), training_state(rig, optimizer), policy_state(clipper)
        with pytest.raises(NonFiniteError) as caught:
            call()
        assert f"elements are not finite in {culprit}. No gradient was changed." in str(caught.value)
        assert len(set(gather_from_ranks(str(caught.value)))) == 1
        assert (to_bytes(rig.grads()), training_state(rig, optimizer), policy_state(clipper)) == before
        assert_same_on_ranks(clipper)
    rig.fill(1)
    assert not clipper.step(optimizer).skipped


@each_rig
@on_ranks()
def test_names_every_rank_with_a_nan(name: str) -> None:
    rig, last = build_rig(name), dist.get_world_size() - 1
    clipper = rig.clipper(distclip.zclip(), on_nonfinite="raise")
    rig.fill(0)
    culprits = [rig.poison(rank, NAN) for rank in (0, last)]
    # Of replicas, no rank is named.
    expected = culprits[0] if rig.replicated else f"{rig.target} (2 NaN on ranks 0, {last})"
    with pytest.raises(NonFiniteError) as caught:
        clipper.clip()
    assert expected in str(caught.value)


@each_rig
@on_ranks()
@pytest.mark.parametrize("on_nonfinite", ["raise", "skip", "zero"])
def test_overflow_of_the_norm_has_no_culprit(name: str, on_nonfinite: str) -> None:
    """Measure finite elements whose norm overflows float64."""
    rig = build_rig(name)
    for _, param in rig.named:
        param.data = param.data.double()
    clipper = rig.clipper(distclip.global_norm(), on_nonfinite=on_nonfinite)
    rig.fill(0, 1e200)
    before = to_bytes(rig.grads())
    if on_nonfinite == "raise":
        with pytest.raises(NonFiniteError, match="the norm overflowed: every element is finite"):
            clipper.clip()
    else:
        _, messages = record_warnings(lambda: clipper.step(rig.optimizer("sgd")))
        assert "the norm overflowed: every element is finite" in messages[0]
    assert to_bytes(rig.grads()) == before
    assert clipper.incidents[0].culprits == ()
    assert_same_on_ranks(clipper)


@each_rig
@on_ranks()
def test_zeroes_nonfinite_elements_and_clips(name: str) -> None:
    rig = build_rig(name)
    clipper = rig.clipper(distclip.global_norm(1.0), on_nonfinite="zero")
    rig.fill(0)
    culprit = rig.poison(0, NAN, INF, -INF)
    expected = {key: g.nan_to_num(0, 0, 0) for key, g in rig.gather_whole(lambda p: p.grad).items()}
    report, messages = record_warnings(clipper.clip)
    assert messages == [f"step 1: elements are not finite in {culprit}. They were set to zero."]
    norm = reference.total_norm(expected.values())
    torch.testing.assert_close(report.norm.double(), norm, rtol=1e-6, atol=0)
    assert (bool(report.skipped), bool(report.finite), bool(report.clipped)) == (False, True, True)
    assert clipper.skipped == 0
    for key, grad in rig.gather_whole(lambda p: p.grad).items():
        torch.testing.assert_close(grad, expected[key] * reference.clip_coefficient(norm, 1.0), rtol=2e-6, atol=1e-12)
    assert [(i.step, i.action) for i in clipper.incidents] == [(1, "zero")]
    assert_same_on_ranks(clipper, float(report.coef))


@each_rig
@on_ranks()
@pytest.mark.parametrize("value", [NAN, INF])
def test_propagates_as_torch_does(name: str, value: float) -> None:
    rig = build_rig(name)
    clipper = rig.clipper(distclip.global_norm(1.0), on_nonfinite="propagate")
    rig.fill(0)
    rig.poison(0, value)
    wholes = [nn.Parameter(torch.zeros_like(g)) for g in rig.gather_whole(lambda p: p.grad).values()]
    for param, grad in zip(wholes, rig.gather_whole(lambda p: p.grad).values(), strict=True):
        param.grad = grad
    norm = torch.nn.utils.clip_grad_norm_(wholes, 1.0)
    report, messages = record_warnings(clipper.clip)
    assert messages == []
    assert (bool(report.skipped), bool(report.finite), clipper.skipped) == (False, False, 0)
    torch.testing.assert_close(report.norm.double(), norm, equal_nan=True)
    for grad, param in zip(rig.gather_whole(lambda p: p.grad).values(), wholes, strict=True):
        torch.testing.assert_close(grad, param.grad, equal_nan=True)


@each_rig
@on_ranks()
def test_raises_after_max_skips_in_a_row(name: str) -> None:
    rig = build_rig(name)
    clipper, optimizer = rig.clipper(distclip.global_norm(), max_skips=3), rig.optimizer("adamw")

    def step() -> None:
        record_warnings(lambda: clipper.step(optimizer))

    for number, bad in enumerate((True, True, False, True, True, True)):
        rig.fill(number)
        if bad:
            rig.poison(number % dist.get_world_size(), NAN)
        if number == 5:
            with pytest.raises(TooManySkippedSteps) as caught:
                step()
            assert "step 6: 3 steps in a row were skipped (max_skips=3)" in str(caught.value)
        else:
            step()
    assert_same_on_ranks(clipper)


@pytest.mark.parametrize(("name", "num_ranks", "kind"), RANDOM_STEPS)
@on_ranks()
def test_random_steps_have_one_all_reduce_and_one_outcome(name: str, kind: str) -> None:
    """Take ten steps, of which random ones have a NaN on a random rank."""
    rig = build_rig(name)
    clipper, optimizer = rig.clipper(distclip.median_mad(window=4, cap=2.0)), rig.optimizer(kind)
    generator = torch.Generator().manual_seed(7)
    trace = []
    for number in range(10):
        rig.fill(number)
        bad = bool(torch.rand((), generator=generator) < 0.4)
        rank = int(torch.randint(dist.get_world_size(), (), generator=generator))
        if bad:
            rig.poison(rank, NAN)
        with CommDebugMode() as counter, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = clipper.step(optimizer)
        assert bool(report.skipped) == bad
        assert bool(caught) == bad
        # The first step with an optimizer also compares the ranks' optimizers.
        assert bad or number == 0 or counter.get_total_counts() == (name != "ddp"), counter.get_comm_counts()
        trace.append(report.as_dict()["coef"])
    assert 0 < clipper.skipped < 10
    replicas = {
        name: to_bytes([p])[0] for name, p in rig.named if rig.key(name, p) == name and not isinstance(p, DTensor)
    }
    assert_same_on_ranks(clipper, trace, replicas)
