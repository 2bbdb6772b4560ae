"""Check one layout of the table: norm, factor, collectives and writes, against whole gradients in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

import distclip
from distclip import reference
from distclip.sharding import name_tensors
from tests.tables.layouts import LAYOUTS, Case

LAYOUT_CASES = [(name, size) for name, row in LAYOUTS.items() for size in row.worlds if size in (1, max(row.worlds))]
"""(name, number of ranks) of all layouts, for `@on_ranks()`. Policies run on two ranks."""


def stored(grad: Tensor) -> Tensor:
    """Return the elements of a gradient that this rank stores."""
    local = grad.to_local() if isinstance(grad, DTensor) else grad
    return local._values() if local.is_sparse else local


def check_layout(name: str) -> None:
    """Check functions and a clipper in one layout, for every order of the norm."""
    row = LAYOUTS[name]
    case = row.build()
    if case.idle:
        return
    # A generator can be read once, so the parameters are kept for the next calls.
    read_once = isinstance(case.parameters, Iterator)
    params = list(case.parameters) if read_once else case.parameters
    grads = [p.grad for _, p in name_tensors(params) if p.grad is not None]
    before = [stored(g).clone() for g in grads]

    def clip(max_norm: float, norm_type: float) -> Tensor:
        passed = iter(params) if read_once else params
        return distclip.clip_grad_norm_(passed, max_norm, norm_type, split_over=case.split_over)

    # The first call also finds the ranks that take part. Its collectives count like those of any other call.
    if case.exchanges and not read_once:
        clip(math.inf, row.norms[0])
    gathers_once = case.gathers_once
    for norm_type in row.norms:
        expected = reference.total_norm(case.whole, norm_type)
        # The order of the norm has no part in the decision to write.
        for fraction in (0.5, 2.0) if norm_type == row.norms[0] else (0.5,):
            where = f"{name}, p={norm_type}, {fraction} x"
            writes = [stored(g)._version for g in grads]
            with CommDebugMode() as counter:
                norm = clip(fraction * float(expected), norm_type)
            check_norm(norm, expected, case, where)
            check_counts(counter, case, norm_type, where, gathers=gathers_once)
            gathers_once = False
            coef = float(reference.clip_coefficient(expected, fraction * float(expected)))
            assert coef < 1 or [stored(g)._version for g in grads] == writes, f"{where}: written without need"
            for grad, old in zip(grads, before, strict=True):
                check_scaled(stored(grad), old, coef, where)
                stored(grad).copy_(old)
        writes = [stored(g)._version for g in grads]
        assert torch.equal(clip(float("inf"), norm_type), norm), f"{where}: two calls differ"
        assert [stored(g)._version for g in grads] == writes, f"{where}: max_norm=inf wrote"
    policy = distclip.global_norm(float(norm) / 2, norm_type)
    report = distclip.GradClipper(params, policy, split_over=case.split_over, replicas="raise").clip()
    assert torch.equal(report.norm, norm), f"{where}: a clipper measures another norm"
    for grad, old in zip(grads, before, strict=True):
        check_scaled(stored(grad), old, float(report.coef), where)


def check_norm(norm: Tensor, expected: Tensor, case: Case, where: str) -> None:
    """Check value, dtype and type of a norm, and that all ranks have the same bits."""
    assert type(norm) is Tensor, where
    assert norm.ndim == 0, where
    wide = any(g.dtype in (torch.float64, torch.complex128) for g in case.whole) or expected > 3.4e38
    assert norm.dtype == (torch.float64 if wide else torch.float32), where
    error = abs(float(norm) - float(expected)) / max(float(expected), 1e-300)
    assert error <= case.tolerance, f"{where}: {float(norm)} instead of {float(expected)}"
    by_rank: list[bytes] = [b""] * dist.get_world_size(case.ranks)
    dist.all_gather_object(by_rank, norm.double().numpy().tobytes(), group=case.ranks)
    assert len(set(by_rank)) == 1, f"{where}: ranks differ"


def check_counts(counter: CommDebugMode, case: Case, norm_type: float, where: str, *, gathers: bool = False) -> None:
    """Check the number of all-reduces, and whether there are other collectives."""
    # A maximum follows the sum in which ranks compare their calls.
    expected = case.all_reduces + (math.isinf(norm_type) and case.all_reduces > 0)
    counts = {str(op): n for op, n in counter.get_comm_counts().items()}
    num_all_reduces = sum(n for op, n in counts.items() if "allreduce" in op or "all_reduce" in op)
    num_others = sum(counts.values()) - num_all_reduces
    assert num_all_reduces == expected, f"{where}: {counts}"
    assert (num_others > 0) == (gathers or case.other_collectives > 0), f"{where}: {counts}"


def check_scaled(grad: Tensor, old: Tensor, coef: float, where: str) -> None:
    """Check that a gradient is the old one times the coefficient, as exactly as its dtype stores it."""
    wide = torch.complex128 if old.is_complex() else torch.float64
    rtol = 1e-12 if grad.dtype == torch.float64 else 2e-6 if grad.dtype != torch.bfloat16 else 4e-3
    rtol = 1e-3 if grad.dtype == torch.float16 else rtol
    tiny = torch.finfo(grad.dtype).tiny
    torch.testing.assert_close(grad.to(wide), old.to(wide) * coef, rtol=rtol, atol=tiny, msg=lambda m: f"{where}: {m}")


@contextmanager
def enabled(switch: Callable[[bool], None]) -> Iterator[None]:
    """Turn a setting of torch on within the block, which is off otherwise: `torch.__future__.set_swap_…`."""
    switch(True)
    try:
        yield
    finally:
        switch(False)


class CountOperators(TorchDispatchMode):  # type: ignore[misc]
    """Count the operators that torch dispatches, those on DTensors apart."""

    count = 0
    on_dtensors = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if any(issubclass(kind, DTensor) for kind in types):
            self.on_dtensors += 1
            return NotImplemented
        self.count += 1
        return func(*args, **(kwargs or {}))
