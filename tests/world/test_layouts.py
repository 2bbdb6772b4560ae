"""Every layout of the table, for every norm: the fp64 norm of the whole gradient, the same bits and factor everywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip import reference
from distclip.sources import named
from tests.layouts import LAYOUTS, Case
from tests.ranks import World


def stored(grad: Tensor) -> Tensor:
    """What this rank stores of a gradient."""
    local = grad.to_local() if isinstance(grad, DTensor) else grad
    return local._values() if local.is_sparse else local


def check_layout(name: str) -> None:
    row = LAYOUTS[name]
    case = row.build()
    if case.idle:
        return
    if not isinstance(case.parameters, torch.nn.Module | Tensor):
        # A generator is read once per call: keep what it holds.
        kept = list(case.parameters)
        source = type(case.parameters)
    else:
        kept, source = case.parameters, None
    grads = [p.grad for _, p in named(kept) if p.grad is not None]
    before = [stored(g).clone() for g in grads]

    def passed() -> object:
        return (p for p in kept) if source is not None and source.__name__ == "generator" else kept

    # The first call finds out who is concerned; it is counted like any other.
    for norm_type in row.norms:
        for fraction in (0.5, 2.0):
            expected = reference.total_norm(case.whole, norm_type)
            max_norm = fraction * float(expected)
            with CommDebugMode() as counter:
                norm = distclip.clip_grad_norm_(passed(), max_norm, norm_type, split_over=case.split_over)
            where = f"{name}, p={norm_type}, {fraction} x"
            check_norm(norm, expected, case, where)
            check_counts(counter, case, where)
            coef = float(reference.clip_coefficient(expected, max_norm))
            for grad, old in zip(grads, before, strict=True):
                check_scaled(stored(grad), old, coef, where)
                stored(grad).copy_(old)
        again = distclip.clip_grad_norm_(passed(), float("inf"), norm_type, split_over=case.split_over)
        assert torch.equal(again, norm), f"{where}: two calls differ"
        assert all(torch.equal(stored(g), o) for g, o in zip(grads, before, strict=True)), f"{where}: measuring wrote"


def check_norm(norm: Tensor, expected: Tensor, case: Case, where: str) -> None:
    assert type(norm) is Tensor and norm.ndim == 0, f"{where}: not a plain 0-d tensor"
    wide = any(g.dtype in (torch.float64, torch.complex128) for g in case.whole) or expected > 3.4e38
    if not where.startswith("annotated_partial"):
        assert norm.dtype == (torch.float64 if wide else torch.float32), f"{where}: {norm.dtype}"
    error = abs(float(norm) - float(expected)) / max(float(expected), 1e-300)
    assert error <= case.tolerance, f"{where}: {float(norm)} for {float(expected)}, error {error:.1e}"
    if dist.get_world_size() > 1 and not LAYOUTS[where.split(",")[0]].name.startswith("second_model"):
        bits: list[bytes] = [b""] * dist.get_world_size()
        dist.all_gather_object(bits, norm.double().numpy().tobytes())
        assert len(set(bits)) == 1, f"{where}: ranks differ"


def check_counts(counter: CommDebugMode, case: Case, where: str) -> None:
    counts = {str(op): n for op, n in counter.get_comm_counts().items()}
    reduces = sum(n for op, n in counts.items() if "allreduce" in op or "all_reduce" in op)
    others = sum(counts.values()) - reduces
    assert reduces == case.all_reduces, f"{where}: {counts}"
    assert (others > 0) == (case.other_collectives > 0), f"{where}: {counts}"


def check_scaled(grad: Tensor, old: Tensor, coef: float, where: str) -> None:
    if coef == 1.0:
        assert torch.equal(grad, old), f"{where}: written though nothing was to be clipped"
        return
    wide = torch.complex128 if old.is_complex() else torch.float64
    rtol = 1e-12 if grad.dtype == torch.float64 else 2e-6 if grad.dtype != torch.bfloat16 else 4e-3
    rtol = 1e-3 if grad.dtype == torch.float16 else rtol
    tiny = torch.finfo(grad.dtype).tiny
    torch.testing.assert_close(grad.to(wide), old.to(wide) * coef, rtol=rtol, atol=tiny, msg=where)


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, row in LAYOUTS.items() for size in row.worlds])
def test_layout(world: Callable[[int], World], name: str, size: int) -> None:
    world(size).run(check_layout, name=name)
