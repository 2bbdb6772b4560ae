"""Warnings point to the line of the user's program, by whatever way it came into the library."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

import distclip
from distclip import GradClipper, NonFiniteWarning
from tests.ranks import on_ranks


def case(policy: object) -> tuple[torch.nn.Parameter, torch.optim.Optimizer, GradClipper]:
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([1.0, float("nan"), 2.0])
    return weight, torch.optim.SGD([weight], lr=0.1), GradClipper([("weight", weight)], policy)  # type: ignore[arg-type]


def by_step(policy: object) -> None:
    _, optimizer, clipper = case(policy)
    clipper.step(optimizer)


def by_clip(policy: object) -> None:
    _, _, clipper = case(policy)
    clipper.clip()


def by_attached_optimizer(policy: object) -> None:
    _, optimizer, clipper = case(policy)
    clipper.attach(optimizer)
    optimizer.step()


def by_zero(policy: object) -> None:
    weight, _, _ = case(policy)
    GradClipper([("weight", weight)], policy, on_nonfinite="zero").clip()  # type: ignore[arg-type]


def by_frequent_clipping(policy: object) -> None:
    weight, _, clipper = case(distclip.autoclip(10, window=8))
    for i in range(200):
        weight.grad = torch.full((3,), 1.0 + i)
        clipper.clip()


def by_missing_state(policy: object) -> None:
    _, _, clipper = case(distclip.zclip())
    state = clipper.state_dict()
    state["state"] = {}
    clipper.load_state_dict(state)


def by_empty_generator(policy: object) -> None:
    distclip.clip_grad_norm_((p for p in ()), 1.0)


@pytest.mark.parametrize(
    "way",
    [by_step, by_clip, by_attached_optimizer, by_zero, by_frequent_clipping, by_missing_state, by_empty_generator],
)
@pytest.mark.parametrize("policy", [distclip.global_norm(1.0), distclip.zclip()], ids=["stateless", "stateful"])
def test_warning_points_to_the_callers_line(way: Callable[[object], None], policy: object) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        way(policy)
    (warning,) = caught
    assert warning.filename == __file__
    first = way.__code__.co_firstlineno
    assert first < warning.lineno < first + 10


def step_with_nan(rank: int) -> None:
    """Make a step in which only one rank has a NaN."""
    weight = torch.nn.Parameter(torch.zeros(2))
    clipper = GradClipper([("weight", weight)], distclip.global_norm(1.0), split_over=dist.group.WORLD)
    weight.grad = torch.tensor([1.0, float("nan") if dist.get_rank() == rank else 2.0])
    clipper.step(torch.optim.SGD([weight], lr=0.1))


@on_ranks(2)
def test_one_rank_prints_a_warning_of_all_ranks() -> None:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()) as printed:
        warnings.simplefilter("always")
        step_with_nan(rank=1)
    assert printed.getvalue().count("NonFiniteWarning: step 1 was skipped") == (1 if dist.get_rank() == 0 else 0)


@on_ranks(2)
def test_all_ranks_record_a_warning_or_raise_it() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step_with_nan(rank=0)
    assert [warning.category for warning in caught] == [NonFiniteWarning]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NonFiniteWarning):
            step_with_nan(rank=0)
