"""Compare every layout of the table with the float64 norm of the whole gradient, for every order of the norm."""

from __future__ import annotations

import pytest
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip import reference
from tests.ranks import on_ranks
from tests.sharding.checks import LAYOUT_CASES, check_layout, check_norm, check_scaled, stored
from tests.tables.layouts import LAYOUTS


@pytest.mark.parametrize(("name", "num_ranks"), LAYOUT_CASES)
@on_ranks()
def test_norm_and_gradients(name: str) -> None:
    check_layout(name)


@on_ranks(4)
@pytest.mark.parametrize(
    "name", ["ddp", "fsdp2_ragged", "hsdp", "tp_plain_norm", "fsdp2_tp", "many_meshes", "partial", "stages_fsdp2"]
)
def test_clips_in_two_steps(name: str) -> None:
    """Call get_total_norm on gradients, then clip_grads_with_norm_ on parameters."""
    case = LAYOUTS[name].build()
    parameters = list(case.parameters)
    grads = [p.grad for p in parameters]
    before = [stored(g).clone() for g in grads]
    expected = reference.total_norm(case.whole)
    norm = distclip.get_total_norm(grads, split_over=case.split_over)
    check_norm(norm, expected, case, name)
    distclip.clip_grads_with_norm_(parameters, float(expected) / 3, norm)
    coef = float(reference.clip_coefficient(expected, float(expected) / 3))
    for grad, old in zip(grads, before, strict=True):
        check_scaled(stored(grad), old, coef, name)


@on_ranks(4)
@pytest.mark.parametrize("bound", [0.5, (-0.1, 0.3), 1e6])
@pytest.mark.parametrize("name", ["ddp", "fsdp2_empty", "fsdp2_tp", "stages_fsdp2", "mixed_dtypes", "strides"])
def test_clamps_elements(name: str, bound: float | tuple[float, float]) -> None:
    case = LAYOUTS[name].build()
    parameters = list(case.parameters)
    low, high = bound if isinstance(bound, tuple) else (-bound, bound)
    expected = reference.total_norm(case.whole)
    out_of_bounds = any(((g.double() < low) | (g.double() > high)).any() for g in case.whole)
    before = [stored(p.grad).clone() for p in parameters]
    with CommDebugMode() as counter:
        distclip.clip_grad_value_(parameters, bound)
    assert counter.get_total_counts() == 0
    for param, old in zip(parameters, before, strict=True):
        assert stored(param.grad).equal(old.double().clamp(low, high).to(old.dtype))
        stored(param.grad).copy_(old)
    policy = distclip.Value(low, high)
    report = distclip.GradClipper(parameters, policy, split_over=case.split_over).clip()
    check_norm(report.norm, expected, case, name)
    # A rank must also report what only another rank clamped.
    assert bool(report.clipped) == out_of_bounds
    for param, old in zip(parameters, before, strict=True):
        assert stored(param.grad).equal(old.double().clamp(low, high).to(old.dtype))
