"""A spike in a watched scalar skips a step as a spike in the norm does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import distclip
from distclip import ArgumentError, GradClipper, NormPolicy, median_mad, reference
from distclip.policies import MedianMAD
from tests.ranks import gather_from_ranks, on_ranks
from tests.tables.layouts.tensors import plain_param

LEVELS = st.lists(st.floats(0.5, 2.0) | st.sampled_from([30.0, 100.0]), min_size=1, max_size=12)


def run(clipper: GradClipper, norms: list[float], losses: list[Any]) -> list[bool]:
    """Return which steps are skipped."""
    (param,) = clipper.table.tensors
    optimizer, skipped = torch.optim.SGD([param], lr=0.0), []
    for norm, loss in zip(norms, losses, strict=True):
        param.grad = torch.tensor([norm], dtype=param.dtype)
        skipped.append(bool(clipper.step(optimizer, watch={"loss": loss}).skipped))
    return skipped


def clipper_of(policy: Any) -> GradClipper:
    return GradClipper([("w", plain_param(torch.zeros(1, dtype=torch.float64)))], policy)


@given(st.data(), LEVELS)
def test_a_spike_in_either_skips_the_step(data: st.DataObject, norms: list[float]) -> None:
    losses = data.draw(st.lists(st.floats(0.5, 2.0) | st.just(50.0), min_size=len(norms), max_size=len(norms)))
    policy = median_mad(2.0, window=5, warmup=3, cap=1.0, skip=True, watch="loss")
    bounds = [reference.median_mad_bounds(values, 2.0, 5, 3) for values in (norms, losses)]
    columns = zip(norms, losses, *bounds, strict=True)
    expected = [norm > bound or loss > loss_bound for norm, loss, bound, loss_bound in columns]
    assert run(clipper_of(policy), norms, losses) == expected


def test_values_without_a_logarithm_or_a_rank_are_left_out_of_the_history() -> None:
    clipper = clipper_of(median_mad(warmup=3, skip=True, watch="loss"))
    assert not any(run(clipper, [1.0] * 6, [1.0, None, -3.0, 0.0, 1.0, 1.1]))
    assert int(clipper._engine.state["watch_count"][0]) == 3
    assert run(clipper, [1.0, 1.0], [5.0, 1.0]) == [True, False]


def test_a_rule_that_restarts_follows_a_new_level_of_the_scalar() -> None:
    policy = NormPolicy(distclip.zclip(warmup=4).threshold, skip=True, restart_after=8, watch="loss")
    losses = [1.0, 1.1, 0.9, 1.0, *[10.0 + 0.1 * (i % 3) for i in range(12)]]
    skipped = run(clipper_of(policy), [1.0] * len(losses), losses)
    assert skipped[4]
    assert not any(skipped[-3:])


@pytest.mark.parametrize("per", ["model", "tensor"])
def test_a_checkpoint_has_the_history_of_the_scalar(per: Any) -> None:
    policy = median_mad(warmup=3, per=per, skip=True, watch="loss")
    first = clipper_of(policy)
    run(first, [1.0, 1.1, 1.0], [2.0, 2.1, 2.0])
    saved = first.state_dict()
    assert saved["version"] >= 1
    again = clipper_of(policy)
    again.load_state_dict(saved)
    assert run(again, [1.0, 1.0], [9.0, 2.0]) == run(first, [1.0, 1.0], [9.0, 2.0]) == [True, False]
    # A run may be resumed with or without the scalar.
    plain = clipper_of(median_mad(warmup=3, per=per, skip=True))
    plain.load_state_dict(saved)
    again.load_state_dict(plain.state_dict())
    assert run(again, [1.0, 9.0], [9.0, 2.0]) == [True, True]
    invalid = again.state_dict()
    next(iter(invalid["state"].values()))["watch_log_norms"].fill_(math.nan)
    with pytest.raises(ArgumentError, match="watch_log_norms"):
        again.load_state_dict(invalid)


def test_invalid_arguments() -> None:
    for arguments in ({"watch": "loss"}, {"watch": 3, "skip": True}, {"watch": "", "skip": True}):
        with pytest.raises(ArgumentError, match="watch="):
            NormPolicy(MedianMAD(), **arguments)  # type: ignore[arg-type]
    clipper = clipper_of(median_mad(skip=True, watch="loss"))
    (param,) = clipper.table.tensors
    param.grad = torch.ones(1, dtype=param.dtype)
    with pytest.raises(ArgumentError, match="watch='loss'"):
        clipper.clip(watch={"aux": 1.0})
    assert clipper.steps == 0


@on_ranks(2)
def test_a_spike_on_one_rank_skips_on_all() -> None:
    param = plain_param(torch.ones(3))
    policy = median_mad(warmup=4, skip=True, watch="loss")
    clipper = GradClipper([("w", param)], policy, split_over=dist.group.WORLD)
    optimizer = torch.optim.SGD([param], lr=0.1)
    for step in range(6):
        before = param.detach().clone()
        loss = torch.tensor(2.0 if step < 5 or dist.get_rank() == 0 else 90.0)
        report = clipper.step(optimizer, watch={"loss": loss})
        assert bool(report.skipped) == torch.equal(before, param) == (step == 5)
    assert clipper.skipped == 1
    states = gather_from_ranks({key: value.tolist() for key, value in clipper._engine.state.items()})
    assert states[0] == states[1]


@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_isolated_groups_share_the_scalar(factor: float) -> None:
    params = [plain_param(torch.ones(2)) for _ in range(2)]
    clipper = GradClipper([], median_mad(warmup=4, skip=True, watch="loss"), isolate=True)
    clipper.add_groups({name: [param] for name, param in zip("ab", params, strict=True)})
    for step in range(5):
        report = clipper.step(torch.optim.SGD(params, lr=0.1), watch={"loss": 1.0 if step < 4 else factor})
    assert bool(report.skipped) == (factor > 1)
