"""Skip spikes by a policy: nothing changes in such a step, and it is no overflow of the loss scale."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import distclip
from distclip import GradClipper, TooManySkippedSteps


def train(policy: distclip.NormPolicy, norms: list[float], **options: object) -> tuple[nn.Parameter, list, GradClipper]:
    """Train a weight of one element by SGD with momentum, with gradients of these norms."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.5)
    clipper = GradClipper([("weight", weight)], policy, **options)
    steps = []
    for norm in norms:
        weight.grad = torch.tensor([norm])
        before = weight.detach().clone()
        report = clipper.step(optimizer)
        steps.append((bool(report.skipped), bool(report.finite), float(report.coef), float(before - weight.detach())))
    return weight, steps, clipper


def test_skips_a_spike_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, steps, clipper = train(distclip.median_mad(warmup=4, skip=True), [1.0] * 8 + [50.0, 1.0])
    assert [skipped for skipped, *_ in steps] == [False] * 8 + [True, False]
    assert steps[8] == (True, True, 1.0, 0.0)
    assert clipper.skipped == 1
    assert not clipper.incidents


def test_momentum_ignores_a_skipped_step() -> None:
    clean, _, _ = train(distclip.median_mad(warmup=4, skip=True), [1.0] * 10)
    other, _, _ = train(distclip.median_mad(warmup=4, skip=True), [1.0] * 8 + [50.0, 1.0, 1.0])
    assert torch.equal(clean, other)


def test_cap_clips_during_the_warmup() -> None:
    """Train with a cap that is too low, which must not skip every step from the first one."""
    _, steps, _ = train(distclip.median_mad(warmup=4, cap=2.0, skip=True), [8.0] * 3)
    assert [skipped for skipped, *_ in steps] == [False] * 3
    assert steps[0][2] == pytest.approx(0.25, rel=1e-6)


def test_skips_norms_above_the_rule_also_above_the_cap() -> None:
    _, steps, _ = train(distclip.median_mad(warmup=4, cap=1.2, skip=True), [1.0] * 6 + [1.3, 50.0])
    assert [skipped for skipped, *_ in steps] == [False] * 7 + [True]
    assert steps[6][2] == pytest.approx(1.2 / 1.3, rel=1e-6)


def test_follows_a_new_level_or_raises_after_max_skips() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, steps, _ = train(distclip.median_mad(window=16, warmup=4, skip=True), [1.0] * 16 + [3.0] * 16)
        assert not steps[-1][0]
        with pytest.raises(TooManySkippedSteps, match=r"3 steps in a row.*above the bound"):
            train(distclip.median_mad(warmup=4, skip=True), [1.0] * 8 + [3.0] * 3, max_skips=3)


@pytest.mark.parametrize("fused", [False, True])
def test_loss_scale_does_not_back_off_after_a_skipped_spike(fused: bool) -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    clipper = GradClipper([("weight", weight)], distclip.median_mad(warmup=4, skip=True))
    for norm in [1.0] * 8 + [50.0]:
        optimizer.zero_grad()
        scaler.scale((weight * norm).sum()).backward()
        before = weight.detach().clone()
        report = clipper.step(optimizer, scaler)
        scaler.update()
    assert report.skipped
    assert torch.equal(weight, before)
    assert scaler.get_scale() == 1024.0
    assert int(optimizer.state[weight]["step"]) == 8
