"""Check that all ranks react together to an error on one of them. cases.py runs these cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import distclip
from distclip import ArgumentError, DisagreementError, GradClipper, LayoutError, NonFiniteError, NonFiniteWarning
from tests.integrations.mpi.model import check_equal_on_ranks, grad_of, raises_on_ranks, split, world

NAN = float("nan")


def _bad_step(on_nonfinite: Any, **kwargs: Any) -> tuple[GradClipper, nn.Parameter, torch.optim.Optimizer]:
    """Build stages of one parameter each, with a NaN in the last rank's gradient."""
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), 2.0)
    if world().rank == world().size - 1:
        weight.grad[1] = NAN
    optimizer = torch.optim.SGD([weight], lr=1.0)
    comm, axis = world(), {"pp": split(0)}
    policy = distclip.zclip(warmup=2, cap=1.0)
    clipper = GradClipper([("w", weight)], policy, comm=comm, split_over=axis, on_nonfinite=on_nonfinite, **kwargs)
    return clipper, weight, optimizer


def case_nan_on_one_rank_skips_on_all() -> None:
    clipper, weight, optimizer = _bad_step("skip")
    before = clipper.state_dict()
    with pytest.warns(NonFiniteWarning, match=f"w \\(1 NaN on rank {world().size - 1}\\)"):
        report = clipper.step(optimizer)
    assert bool(report.skipped)
    assert not bool(report.finite)
    assert torch.equal(weight, torch.ones(3))
    assert clipper.skipped == 1
    assert str(clipper.state_dict()["state"]) == str(before["state"])


def case_nan_on_one_rank_raises_on_all() -> None:
    clipper, weight, optimizer = _bad_step("raise")
    with raises_on_ranks(NonFiniteError, f"1 NaN on rank {world().size - 1}"):
        clipper.step(optimizer)
    assert torch.equal(weight, torch.ones(3))
    with raises_on_ranks(NonFiniteError, "cannot be clipped"):
        distclip.clip_grad_norm_([weight], 1.0, error_if_nonfinite=True, comm=world(), split_over={"pp": split(0)})


def case_nan_on_one_rank_is_zeroed() -> None:
    clipper, weight, optimizer = _bad_step("zero")
    with pytest.warns(NonFiniteWarning, match="set to zero"):
        report = clipper.step(optimizer)
    exact = (4.0 * (3 * world().size - 1)) ** 0.5
    torch.testing.assert_close(report.norm.double(), torch.tensor(exact).double(), rtol=1e-6, atol=0)
    check_equal_on_ranks(report.coef)
    assert bool(weight.isfinite().all())


def case_nan_on_one_rank_propagates_to_all() -> None:
    clipper, weight, optimizer = _bad_step("propagate")
    report = clipper.step(optimizer)
    assert bool(report.norm.isnan())
    assert bool(weight.isnan().all())


def case_too_many_skips_raise_on_all() -> None:
    clipper, _, optimizer = _bad_step("skip", max_skips=1)
    with raises_on_ranks(distclip.TooManySkippedSteps, "1 steps in a row"):
        clipper.step(optimizer)


def case_loss_scale_stays_equal() -> None:
    _, weight, _ = _bad_step("raise")
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper = GradClipper([("w", weight)], distclip.global_norm(1.0), comm=world(), split_over={"pp": split(0)})
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # makes the scale
    assert bool(clipper.step(optimizer, scaler).skipped)
    scaler.update()
    assert scaler.get_scale() == 512.0


def case_attached_clipper_skips_on_all() -> None:
    clipper, weight, optimizer = _bad_step("skip")
    handle = clipper.attach(optimizer)
    with pytest.warns(NonFiniteWarning):
        optimizer.step()
    assert torch.equal(weight, torch.ones(3))
    handle.remove()


def case_invalid_argument_on_one_rank_raises_on_all() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    last = world().rank == world().size - 1
    with raises_on_ranks(ArgumentError, "max_norm=-1"):
        distclip.clip_grad_norm_([weight], -1.0 if last else 1.0, comm=world())
    with raises_on_ranks(ArgumentError, "on_nonfinite='never'"):
        given: Any = "never" if last else "skip"
        GradClipper([weight], distclip.global_norm(1.0), comm=world(), on_nonfinite=given)
    with raises_on_ranks(DisagreementError, "different policies"):
        GradClipper([weight], distclip.global_norm(1.0 + last), comm=world())
    assert torch.equal(grad_of(weight), torch.ones(2))


def case_errors_name_the_rank_in_the_world() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    half = split(world().rank % 2)
    bad = half.rank == half.size - 1
    with pytest.raises(ArgumentError) as caught:
        distclip.clip_grad_norm_([weight], -1.0 if bad else 1.0, comm=half)
    assert bad or f"rank {half.ranks[-1]}: max_norm=-1" in str(caught.value)


def case_axes_without_a_communicator_are_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    with raises_on_ranks(ArgumentError, "Pass comm=MPIComm()"):
        distclip.clip_grad_norm_([weight], 1.0, split_over={"pp": split(0)})
    with raises_on_ranks(ArgumentError, "Pass comm=MPIComm()"):
        GradClipper([weight], distclip.global_norm(1.0), split_over=[split(0)])


def case_axes_beyond_the_communicator_are_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    alone = split(world().rank)
    with raises_on_ranks(LayoutError, "comm= does not contain ranks"):
        distclip.clip_grad_norm_([weight], 1.0, comm=alone, split_over={"pp": split(0)})
    with raises_on_ranks(LayoutError, "comm= does not contain ranks"):
        GradClipper([weight], distclip.global_norm(1.0), comm=alone, split_over={"pp": split(0)})


def case_different_axes_are_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    axis = split(0)
    with raises_on_ranks(DisagreementError, "split_over= differs"):
        over = {"pp": axis} if world().rank else None
        GradClipper([weight], distclip.global_norm(1.0), comm=world(), split_over=over)


def case_tag_without_its_axis_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.tensor_model_parallel = True  # type: ignore[attr-defined]
    with raises_on_ranks(LayoutError, 'Pass split_over={"tp": tp_group}'):
        distclip.clip_grad_norm_([("w", weight)], 1.0, comm=world())
