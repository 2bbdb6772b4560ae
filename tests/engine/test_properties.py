"""Check properties of any gradients, on one process against the reference and over ranks that are threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf, isnan, nan
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import distclip
from distclip import reference
from distclip.comm import Comm, threads
from distclip.norms.measure import measure
from distclip.norms.reduce import reduce
from distclip.norms.spec import NormSpec
from distclip.sharding.shard import Shard, Shards

CPU = torch.device("cpu")

# All runs have the same examples, and none depends on the speed of the machine.
many = settings(max_examples=100)
some = settings(many, max_examples=30)

RANGES: dict[torch.dtype, tuple[int, int]] = {
    torch.float16: (-3, 4),
    torch.bfloat16: (-25, 25),
    torch.float32: (-25, 25),
    torch.float64: (-80, 80),
    torch.complex64: (-25, 25),
    torch.complex128: (-80, 80),
}
"""Powers of ten that a dtype can represent, and whose third powers do not overflow float64."""

COARSE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 3e-7, torch.complex64: 3e-7}
"""Relative error of a scaled element in dtypes that are coarser than float64."""

norm_types = st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, inf])
fractions = st.sampled_from([0.0, 0.01, 0.5, 0.999, 1.001, 2.0, inf])
seeds = st.integers(0, 2**32 - 1)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def stored_as(grad: Tensor, how: str) -> Tensor:
    """Store the numbers in other memory: with reversed strides, in every other element, or unchanged."""
    if how == "reversed":
        dims = tuple(reversed(range(grad.ndim)))
        return grad.permute(dims).contiguous().permute(dims)
    if how == "strided":
        twice = torch.zeros([2 * n for n in grad.shape], dtype=grad.dtype)
        return twice[(slice(None, None, 2),) * grad.ndim].copy_(grad)
    return grad


@st.composite
def gradients(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = tuple(RANGES)) -> Tensor:
    """Draw a gradient of any shape, dtype, magnitude and strides, with some zeros."""
    dtype = draw(st.sampled_from(dtypes))
    scale = 10.0 ** draw(st.integers(*RANGES[dtype]))
    generator = torch.Generator().manual_seed(draw(seeds))
    drawn = torch.complex128 if dtype.is_complex else torch.float64
    shape = draw(shapes)
    numbers = torch.randn(shape, generator=generator, dtype=drawn)
    if not dtype.is_complex:
        # Otherwise a float16 could overflow.
        numbers.clamp_(-3, 3)
    numbers = numbers * (torch.rand(shape, generator=generator) < draw(st.sampled_from([0.3, 1.0])))
    return stored_as((numbers * scale).to(dtype), draw(st.sampled_from(["plain", "reversed", "strided"])))


def parameters_with(grads: Sequence[Tensor | None]) -> list[nn.Parameter]:
    """Make parameters with these gradients, not with copies."""
    parameters: list[nn.Parameter] = []
    for grad in grads:
        param = nn.Parameter(torch.zeros(3) if grad is None else torch.zeros_like(grad))
        param.grad = grad
        parameters.append(param)
    return parameters


def widened(grad: Tensor) -> Tensor:
    """Return a copy in float64 or complex128."""
    return grad.to(torch.complex128 if grad.is_complex() else torch.float64, copy=True)


def norm_rtol(grads: Sequence[Tensor]) -> float:
    """Return the error allowed for a norm. The magnitude of a complex64 element is a float32."""
    return 2e-7 if any(g.dtype == torch.complex64 for g in grads) else 1e-12


def check_norm(norm: Tensor, grads: Sequence[Tensor], norm_type: float) -> None:
    """Check that a norm is the reference's, a plain 0-d tensor, and float64 only if it must be."""
    expected = reference.total_norm(grads, norm_type)
    needs_float64 = any(g.dtype in (torch.float64, torch.complex128) for g in grads) or bool(expected.float().isinf())
    assert type(norm) is Tensor
    assert norm.shape == ()
    assert norm.dtype == (torch.float64 if needs_float64 else torch.float32)
    rtol = max(norm_rtol(grads), 1e-12 if needs_float64 else 1e-7)
    torch.testing.assert_close(norm.double(), expected, rtol=rtol, atol=0)


def check_scaled(grad: Tensor, before: Tensor, coef: Tensor, rtol: float) -> None:
    """Check that a gradient is the old one times the factor, bit by bit if the factor is 1."""
    if coef == 1:
        assert torch.equal(widened(grad), before)
        return
    tiny = torch.finfo(grad.dtype).tiny
    torch.testing.assert_close(widened(grad), before * coef, rtol=max(rtol, COARSE.get(grad.dtype, 0.0)), atol=tiny)


@many
@given(st.lists(st.none() | gradients(), max_size=4), norm_types, fractions)
def test_clips_any_gradients_as_the_reference_does(
    grads: list[Tensor | None], norm_type: float, fraction: float
) -> None:
    """Clip any shapes, dtypes, strides, magnitudes and missing gradients in one call."""
    existing = [g for g in grads if g is not None]
    before = [widened(g) for g in existing]
    expected = reference.total_norm(existing, norm_type)
    max_norm = fraction * float(expected) if expected > 0 else fraction
    parameters = parameters_with(grads)
    norm = distclip.clip_grad_norm_(parameters, max_norm, norm_type)
    # The gradients are already scaled, so the norm is computed from copies.
    check_norm(norm, [b.to(g.dtype) for b, g in zip(before, existing, strict=True)], norm_type)
    coef = torch.ones(()) if max_norm == inf else reference.clip_coefficient(expected, max_norm)
    for grad, old in zip(existing, before, strict=True):
        check_scaled(grad, old, coef, norm_rtol(existing))
    assert all(p.grad is g for p, g in zip(parameters, grads, strict=True))


@many
@given(st.lists(gradients(), min_size=1, max_size=3), norm_types, st.sampled_from([0.1, 0.7, 3.0]))
def test_two_calls_equal_one(grads: list[Tensor], norm_type: float, fraction: float) -> None:
    """Call get_total_norm and clip_grads_with_norm_, and compare with clip_grad_norm_."""
    parameters, twins = parameters_with(grads), parameters_with([g.clone() for g in grads])
    max_norm = fraction * float(reference.total_norm(grads, norm_type))
    norm = distclip.get_total_norm(grads, norm_type)
    distclip.clip_grads_with_norm_(parameters, max_norm, norm)
    assert torch.equal(distclip.clip_grad_norm_(twins, max_norm, norm_type), norm)
    for param, twin in zip(parameters, twins, strict=True):
        rtol = COARSE.get(param.grad.dtype, 2e-7)
        torch.testing.assert_close(param.grad, twin.grad, rtol=rtol, atol=torch.finfo(param.grad.dtype).tiny)


@many
@given(gradients([torch.float32]), norm_types, st.lists(st.integers(0, 200), max_size=4), seeds)
def test_norm_depends_on_elements_and_not_on_their_order_or_tensor(
    grad: Tensor, norm_type: float, cuts: list[int], seed: int
) -> None:
    """Shuffle the elements of a gradient and split them into several."""
    whole = distclip.get_total_norm([grad], norm_type)
    order = torch.randperm(grad.numel(), generator=torch.Generator().manual_seed(seed))
    pieces = list(grad.reshape(-1)[order].tensor_split(sorted(min(c, grad.numel()) for c in cuts)))
    torch.testing.assert_close(distclip.get_total_norm(pieces, norm_type), whole, rtol=2e-7, atol=0)


@many
@given(st.lists(gradients([torch.float32, torch.float64, torch.bfloat16]), max_size=3), norm_types)
def test_norm_after_clipping_is_at_most_the_bound(grads: list[Tensor], norm_type: float) -> None:
    """Allow the rounding of bfloat16."""
    distclip.clip_grad_norm_(parameters_with(grads), 0.5, norm_type)
    assert reference.total_norm(grads, norm_type) <= 0.5 * (1 + 8e-3)


@many
@given(
    st.lists(gradients([torch.float16, torch.bfloat16, torch.float32, torch.float64]), max_size=3),
    st.floats(0, 1e3, width=16),
    st.floats(0, 1e3, width=16),
    st.sampled_from([None, False, True]),
)
def test_clamps_any_gradients(grads: list[Tensor], low: float, high: float, foreach: bool | None) -> None:
    """Clamp elements to [-low, high] and do not change those within."""
    before = [widened(g) for g in grads]
    distclip.clip_grad_value_(parameters_with(grads), (-low, high), foreach=foreach)
    for grad, old in zip(grads, before, strict=True):
        bounds = [torch.tensor(b).to(grad.dtype).double() for b in (-low, high)]
        assert torch.equal(widened(grad), old.clamp(*bounds))


def run_on_threads(size: int, job: Callable[[Comm], Any]) -> list[Any]:
    """Run `job(comm)` on every rank of a world of threads, and return its results or exceptions."""

    def guarded(comm: Comm) -> Any:
        try:
            return job(comm)
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(guarded, threads(size, timeout=5.0)))


sizes = st.integers(1, 5)


@some
@given(sizes, st.lists(gradients(), max_size=3), norm_types, st.sampled_from([0.3, 2.0]))
def test_replicas_count_once(size: int, grads: list[Tensor], norm_type: float, fraction: float) -> None:
    """Hold plain gradients on any number of ranks: the norm is that of one replica, and all scale equally."""
    before = [widened(g) for g in grads]
    expected = reference.total_norm(grads, norm_type)
    max_norm = fraction * float(expected)
    copies = [[g.clone() for g in grads] for _ in range(size)]

    def job(comm: Comm) -> Tensor:
        return distclip.clip_grad_norm_(parameters_with(copies[comm.rank]), max_norm, norm_type, comm=comm)

    norms = run_on_threads(size, job)
    check_norm(norms[0], grads, norm_type)
    assert all(torch.equal(norm, norms[0]) and norm.dtype == norms[0].dtype for norm in norms)
    coef = reference.clip_coefficient(expected, max_norm)
    for held in copies:
        for grad, old in zip(held, before, strict=True):
            check_scaled(grad, old, coef, norm_rtol(grads))
        assert all(torch.equal(a, b) for a, b in zip(held, copies[0], strict=True)), "ranks differ"


@some
@given(sizes, gradients([torch.float32, torch.float64, torch.bfloat16]), norm_types, st.data())
def test_norm_of_any_shards_is_that_of_the_whole(
    size: int, grad: Tensor, norm_type: float, data: st.DataObject
) -> None:
    """Split a gradient anywhere and give each shard to random ranks, some to several."""
    cuts = data.draw(st.lists(st.integers(0, max(grad.numel(), 1)), max_size=6))
    pieces = grad.reshape(-1).tensor_split(sorted(cuts))
    holders = st.sets(st.integers(0, size - 1), min_size=1)
    held: list[list[Shard]] = [[] for _ in range(size)]
    for i, piece in enumerate(pieces):
        ranks = data.draw(holders)
        for rank in ranks:
            held[rank].append(Shard(f"piece {i}", piece, num_replicas=float(len(ranks))))

    def job(comm: Comm) -> Tensor:
        return reduce(measure(Shards.of(held[comm.rank]), NormSpec(norm_type), CPU), NormSpec(norm_type), comm).norm

    norms = run_on_threads(size, job)
    torch.testing.assert_close(norms[0], reference.total_norm([grad], norm_type), rtol=1e-11, atol=0)
    assert all(torch.equal(norm, norms[0]) for norm in norms), "ranks differ"


@pytest.mark.filterwarnings("ignore::distclip.ReplicaWarning")
@some
@given(st.integers(2, 5), st.data(), norm_types, st.sampled_from([nan, inf, -inf]), st.sampled_from([1.0, inf]))
def test_nonfinite_element_on_one_rank_changes_the_norm_on_all(
    size: int, data: st.DataObject, norm_type: float, number: float, max_norm: float
) -> None:
    """Write NaN or infinity on one rank, which a maximum over ranks must keep."""
    bad = data.draw(st.integers(0, size - 1))
    copies = [torch.ones(3) for _ in range(size)]
    copies[bad][data.draw(st.integers(0, 2))] = number

    def job(comm: Comm) -> Tensor:
        return distclip.clip_grad_norm_(parameters_with([copies[comm.rank]]), max_norm, norm_type, comm=comm)

    norms = run_on_threads(size, job)
    assert all(bool(norm.isnan() if isnan(number) else norm == inf) for norm in norms), f"{norms}"
    left = torch.full((3,), 1.0 if max_norm == inf else nan if isnan(number) else 0.0)
    for rank, grad in enumerate(copies):
        if rank != bad:
            torch.testing.assert_close(grad, left, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore::distclip.ReplicaWarning")
@some
@given(st.integers(2, 5), st.data(), norm_types, st.sampled_from([nan, inf, -inf]))
def test_error_if_nonfinite_is_raised_by_all(size: int, data: st.DataObject, norm_type: float, number: float) -> None:
    """Write one bad element on one rank: every rank raises, and no gradient is written."""
    bad = data.draw(st.integers(0, size - 1))
    copies = [torch.full((3,), 2.0) for _ in range(size)]
    copies[bad][1] = number
    before = [c.clone() for c in copies]

    def job(comm: Comm) -> Tensor:
        return distclip.clip_grad_norm_(
            parameters_with([copies[comm.rank]]), 1.0, norm_type, error_if_nonfinite=True, comm=comm
        )

    assert [type(error) for error in run_on_threads(size, job)] == [distclip.NonFiniteError] * size
    torch.testing.assert_close(copies, before, rtol=0, atol=0, equal_nan=True)


def interrupted() -> Any:
    """Yield one parameter and raise."""
    yield nn.Parameter(torch.ones(2))
    raise KeyError("no such layer")


FAILURES: dict[str, tuple[dict[str, Any], type[Exception], type[Exception]]] = {
    "negative bound": ({"max_norm": -1}, distclip.ArgumentError, distclip.ArgumentError),
    "NaN bound": ({"max_norm": nan}, distclip.ArgumentError, distclip.ArgumentError),
    "no norm type": ({"norm_type": "two"}, distclip.ArgumentError, distclip.ArgumentError),
    "no tensors": ({"parameters": [3.0]}, distclip.ArgumentError, distclip.ArgumentError),
    "nothing": ({"parameters": None}, distclip.ArgumentError, distclip.ArgumentError),
    "no axis": ({"split_over": "pp"}, distclip.ArgumentError, distclip.ArgumentError),
    "broken generator": ({"parameters": interrupted}, KeyError, distclip.PeerError),
}
"""Arguments of the failing rank, the error that it raises, and the error of the other ranks."""


@pytest.mark.parametrize("failure", FAILURES)
@some
@given(st.integers(2, 5), st.data(), st.sampled_from([0.5, 1.0, 2.0, 3.0, inf]))
def test_failure_of_one_rank_is_raised_by_all(failure: str, size: int, data: st.DataObject, norm_type: float) -> None:
    """Pass an invalid argument on one rank: the others do not hang or clip, and they name that rank."""
    # A rank without a valid order cannot know that the others take a maximum. A first call raises before that.
    assume(not (failure == "no norm type" and norm_type == inf))
    bad = data.draw(st.integers(0, size - 1))
    wrong, own_error, other_error = FAILURES[failure]
    copies = [torch.full((3,), 2.0) for _ in range(size)]

    def job(comm: Comm) -> Tensor:
        passed: dict[str, Any] = {"parameters": parameters_with([copies[comm.rank]]), "max_norm": 1.0}
        passed["norm_type"] = norm_type
        if comm.rank == bad:
            passed |= wrong
            if passed["parameters"] is interrupted:
                passed["parameters"] = interrupted()
        return distclip.clip_grad_norm_(**passed, comm=comm)

    raised = run_on_threads(size, job)
    for rank, error in enumerate(raised):
        assert type(error) is (own_error if rank == bad else other_error), f"rank {rank}: {error!r}"
        assert rank == bad or f"rank {bad}" in str(error)
    assert all(torch.equal(c, torch.full((3,), 2.0)) for c in copies), "a gradient was written"
