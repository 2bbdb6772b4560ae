"""Every layout of the table, every norm: the fp64 norm of the whole gradient, the same bits and factor everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip import reference
from distclip.sharding import named
from tests.ranks import World
from tests.tables.layouts import LAYOUTS, Case


def stored(grad: Tensor) -> Tensor:
    """What this rank stores of a gradient."""
    local = grad.to_local() if isinstance(grad, DTensor) else grad
    return local._values() if local.is_sparse else local


def check_layout(name: str) -> None:
    row = LAYOUTS[name]
    case = row.build()
    if case.idle:
        return
    # A generator is read once per call: keep what it holds.
    read_once = isinstance(case.parameters, Iterator)
    kept = list(case.parameters) if read_once else case.parameters
    grads = [p.grad for _, p in named(kept) if p.grad is not None]
    before = [stored(g).clone() for g in grads]

    def clip(max_norm: float, norm_type: float) -> Tensor:
        passed = iter(kept) if read_once else kept
        return distclip.clip_grad_norm_(passed, max_norm, norm_type, split_over=case.split_over)

    # The first call finds out who is concerned; it is counted like any other.
    for norm_type in row.norms:
        expected = reference.total_norm(case.whole, norm_type)
        for fraction in (0.5, 2.0):
            where = f"{name}, p={norm_type}, {fraction} x"
            writes = [stored(g)._version for g in grads]
            with CommDebugMode() as counter:
                norm = clip(fraction * float(expected), norm_type)
            check_norm(norm, expected, case, where)
            check_counts(counter, case, where)
            coef = float(reference.clip_coefficient(expected, fraction * float(expected)))
            assert coef < 1 or [stored(g)._version for g in grads] == writes, f"{where}: written without need"
            for grad, old in zip(grads, before, strict=True):
                check_scaled(stored(grad), old, coef, where)
                stored(grad).copy_(old)
        writes = [stored(g)._version for g in grads]
        assert torch.equal(clip(float("inf"), norm_type), norm), f"{where}: two calls differ"
        assert [stored(g)._version for g in grads] == writes, f"{where}: measuring wrote"
    policy = distclip.global_norm(float(norm) / 2, norm_type)
    report = distclip.GradClipper(kept, policy, split_over=case.split_over).clip()
    assert torch.equal(report.norm, norm), f"{where}: a clipper sees another norm"
    for grad, old in zip(grads, before, strict=True):
        check_scaled(stored(grad), old, float(report.coef), where)


def check_norm(norm: Tensor, expected: Tensor, case: Case, where: str) -> None:
    assert type(norm) is Tensor and norm.ndim == 0, f"{where}: not a plain 0-d tensor"
    wide = any(g.dtype in (torch.float64, torch.complex128) for g in case.whole) or expected > 3.4e38
    assert norm.dtype == (torch.float64 if wide else torch.float32), f"{where}: {norm.dtype}"
    error = abs(float(norm) - float(expected)) / max(float(expected), 1e-300)
    assert error <= case.tolerance, f"{where}: {float(norm)} for {float(expected)}, error {error:.1e}"
    bits: list[bytes] = [b""] * dist.get_world_size(case.ranks)
    dist.all_gather_object(bits, norm.double().numpy().tobytes(), group=case.ranks)
    assert len(set(bits)) == 1, f"{where}: ranks differ"


def check_counts(counter: CommDebugMode, case: Case, where: str) -> None:
    counts = {str(op): n for op, n in counter.get_comm_counts().items()}
    reduces = sum(n for op, n in counts.items() if "allreduce" in op or "all_reduce" in op)
    others = sum(counts.values()) - reduces
    assert reduces == case.all_reduces, f"{where}: {counts}"
    assert (others > 0) == (case.other_collectives > 0), f"{where}: {counts}"


def check_scaled(grad: Tensor, old: Tensor, coef: float, where: str) -> None:
    wide = torch.complex128 if old.is_complex() else torch.float64
    rtol = 1e-12 if grad.dtype == torch.float64 else 2e-6 if grad.dtype != torch.bfloat16 else 4e-3
    rtol = 1e-3 if grad.dtype == torch.float16 else rtol
    tiny = torch.finfo(grad.dtype).tiny
    torch.testing.assert_close(grad.to(wide), old.to(wide) * coef, rtol=rtol, atol=tiny, msg=where)


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, row in LAYOUTS.items() for size in row.worlds])
def test_layout(world: Callable[[int], World], name: str, size: int) -> None:
    world(size).run(check_layout, name=name)


def check_norm_of_gradients(name: str) -> None:
    """The two halves by themselves: get_total_norm on gradients, clip_grads_with_norm_ on parameters."""
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


@pytest.mark.parametrize(
    "name", ["ddp", "fsdp2_ragged", "hsdp", "tp_plain_norm", "fsdp2_tp", "many_meshes", "partial", "stages_fsdp2"]
)
def test_norm_of_gradients(world: Callable[[int], World], name: str) -> None:
    world(4).run(check_norm_of_gradients, name=name)


def check_values(name: str, bound: float | tuple[float, float]) -> None:
    case = LAYOUTS[name].build()
    parameters = list(case.parameters)
    low, high = bound if isinstance(bound, tuple) else (-bound, bound)
    expected = reference.total_norm(case.whole)
    outside = any(((g.double() < low) | (g.double() > high)).any() for g in case.whole)
    before = [stored(p.grad).clone() for p in parameters]
    with CommDebugMode() as counter:
        distclip.clip_grad_value_(parameters, bound)
    assert counter.get_total_counts() == 0
    for param, old in zip(parameters, before, strict=True):
        assert torch.equal(stored(param.grad), old.double().clamp(low, high).to(old.dtype))
        stored(param.grad).copy_(old)
    policy = distclip.Value(low, high)
    report = distclip.GradClipper(parameters, policy, split_over=case.split_over).clip()
    check_norm(report.norm, expected, case, name)
    assert bool(report.clipped) == outside, f"{name}: a rank does not know that another one clipped"
    for param, old in zip(parameters, before, strict=True):
        assert torch.equal(stored(param.grad), old.double().clamp(low, high).to(old.dtype))


@pytest.mark.parametrize("bound", [0.5, (-0.1, 0.3), 1e6])
@pytest.mark.parametrize("name", ["ddp", "fsdp2_empty", "fsdp2_tp", "stages_fsdp2", "mixed_dtypes", "strides"])
def test_values(world: Callable[[int], World], name: str, bound: float | tuple[float, float]) -> None:
    world(4).run(check_values, name=name, bound=bound)
