"""A policy that leaves spikes out: nothing changes in such a step, and it is no overflow."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import distclip
from distclip import GradClipper, TooManySkippedSteps


def trained(
    policy: distclip.NormPolicy, norms: list[float], **options: object
) -> tuple[nn.Parameter, list, GradClipper]:
    """A weight of one element, whose gradients have these norms, stepped by SGD with momentum."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.5)
    clipper = GradClipper([("weight", weight)], policy, **options)
    seen = []
    for norm in norms:
        weight.grad = torch.tensor([norm])
        before = weight.detach().clone()
        report = clipper.step(optimizer)
        seen.append((bool(report.skipped), bool(report.finite), float(report.coef), float(before - weight.detach())))
    return weight, seen, clipper


def test_a_spike_is_left_out_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, seen, clipper = trained(distclip.median_mad(warmup=4, skip=True), [1.0] * 8 + [50.0, 1.0])
    assert [skipped for skipped, *_ in seen] == [False] * 8 + [True, False]
    assert seen[8] == (True, True, 1.0, 0.0)
    assert clipper.skipped == 1 and not clipper.incidents


def test_momentum_does_not_see_it() -> None:
    clean, _, _ = trained(distclip.median_mad(warmup=4, skip=True), [1.0] * 10)
    other, _, _ = trained(distclip.median_mad(warmup=4, skip=True), [1.0] * 8 + [50.0, 1.0, 1.0])
    assert torch.equal(clean, other)


def test_in_warmup_the_cap_shortens() -> None:
    """A cap that is too low must not stop training before it has begun."""
    _, seen, _ = trained(distclip.median_mad(warmup=4, cap=2.0, skip=True), [8.0] * 3)
    assert [skipped for skipped, *_ in seen] == [False] * 3
    assert seen[0][2] == pytest.approx(0.25, rel=1e-6)


def test_beyond_the_rule_is_left_out_also_beyond_the_cap() -> None:
    _, seen, _ = trained(distclip.median_mad(warmup=4, cap=1.2, skip=True), [1.0] * 6 + [1.3, 50.0])
    assert [skipped for skipped, *_ in seen] == [False] * 7 + [True]
    assert seen[6][2] == pytest.approx(1.2 / 1.3, rel=1e-6)


def test_a_level_that_stays_is_followed_or_given_up() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, seen, _ = trained(distclip.median_mad(window=16, warmup=4, skip=True), [1.0] * 16 + [3.0] * 16)
        assert not seen[-1][0]
        with pytest.raises(TooManySkippedSteps, match=r"3 steps in a row.*beyond the bound"):
            trained(distclip.median_mad(warmup=4, skip=True), [1.0] * 8 + [3.0] * 3, max_skips=3)


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_does_not_back_off_for_it(fused: bool) -> None:
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
    assert report.skipped and torch.equal(weight, before)
    assert scaler.get_scale() == 1024.0
    assert int(optimizer.state[weight]["step"]) == 8
