"""The buffer of the all-reduce: what ranks write is what all of them read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import pytest
import torch

from distclip.comm import Comm, threads
from distclip.norms.measure import Partials
from distclip.norms.message import COUNTS, FACTS, FIELDS, check_bits
from distclip.norms.reduce import Totals, gather_facts, reduce
from distclip.norms.spec import NormSpec

NAN, INF = float("nan"), float("inf")

BOOLS = [*COUNTS, *(fact.name for fact in FACTS)]
"""Names of all bools of the message."""


def reduced(by_rank: list[Partials], spec: NormSpec) -> list[Totals]:
    """Return the totals on every rank, with the facts of all ranks."""
    comms = threads(len(by_rank))

    def run(comm: Comm) -> Totals:
        partials = by_rank[comm.rank]
        totals = reduce(partials, spec, comm)
        if totals.same_call.read():
            return totals
        return gather_facts(totals, partials, spec, None, comm)

    with ThreadPoolExecutor(len(by_rank)) as pool:
        return list(pool.map(run, comms))


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_every_field_has_its_writer_and_its_reader() -> None:
    written = {field.name for field in fields(Partials)}
    read = {field.name for field in fields(Totals)}
    names = [*FIELDS, *BOOLS]
    for name in names:
        assert name in written, f"Partials lacks {name}"
        assert name in read, f"Totals lacks {name}"
    assert len(set(names)) == len(names)
    # What a spec can ask for is in the message.
    everything = NormSpec(needs_weights=True, moment_eps=1e-8, limits=(-1.0, 1.0)).measured
    assert everything == {*FIELDS, *COUNTS}


@pytest.mark.parametrize("norm_type", [2.0, 1.0, INF, -INF])
@pytest.mark.parametrize("needs_weights", [False, True])
def test_powers_of_all_ranks_are_combined(norm_type: float, needs_weights: bool) -> None:
    rows = [vector(1.0, 5.0), vector(4.0, 2.0), vector(2.0, 0.0)]
    weights = [row + 10 for row in rows]
    by_rank = [Partials(row, weight if needs_weights else None) for row, weight in zip(rows, weights, strict=True)]
    for totals in reduced(by_rank, NormSpec(norm_type, needs_weights=needs_weights)):
        combine = torch.amax if math.isinf(norm_type) else torch.sum
        assert torch.equal(totals.powers, combine(torch.stack(rows), 0))
        if needs_weights:
            assert totals.weight_powers is not None
            assert torch.equal(totals.weight_powers, combine(torch.stack(weights), 0))
        else:
            assert totals.weight_powers is None


@pytest.mark.parametrize("norm_type", [2.0, INF])
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("name", BOOLS)
def test_fact_of_one_rank_holds_for_all(name: str, rank: int, norm_type: float) -> None:
    flags: dict[str, Any] = {name: True}
    by_rank = [Partials(vector(1.0 + i), **(flags if i == rank else {})) for i in range(3)]
    for totals in reduced(by_rank, NormSpec(norm_type, limits=(-1.0, 1.0))):
        holding = {name for name in BOOLS if getattr(totals, name).read()}
        assert holding == {name}
        assert float(totals.powers) == (3.0 if math.isinf(norm_type) else 6.0)


@pytest.mark.parametrize("norm_type", [2.0, INF])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_nan_of_one_rank_reaches_its_slot_and_no_other(rank: int, norm_type: float) -> None:
    by_rank = [Partials(vector(NAN if i == rank else 1.0, 2.0)) for i in range(3)]
    for totals in reduced(by_rank, NormSpec(norm_type)):
        assert totals.powers[0].isnan()
        assert totals.powers[1].isfinite()
        assert not totals.finite.read()


@pytest.mark.parametrize("holders", [range(300), range(0, 300, 7), [299]], ids=["all", "some", "one"])
def test_number_of_ranks_has_no_limit_from_the_encoding(holders: Sequence[int]) -> None:
    """Reduce facts of 300 ranks, none of which overflows into another."""
    flags = dict.fromkeys(BOOLS, True)
    by_rank = [Partials(vector(1.0), **(flags if i in holders else {})) for i in range(300)]
    (totals, *_) = reduced(by_rank, NormSpec(limits=(-1.0, 1.0)))
    assert float(totals.powers) == 300
    assert all(getattr(totals, name).read() for name in BOOLS)


@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_ordinary_message_has_one_number_besides_the_norms(norm_type: float) -> None:
    """The latency of gloo grows with the number of elements, so nothing may be added carelessly."""
    lengths: list[int] = []

    class Counted:
        """Communicator that keeps the lengths of sums."""

        rank, size, ranks, device, covers_holders = 0, 2, None, torch.device("cpu"), False

        def sum_(self, tensor: torch.Tensor) -> None:
            lengths.append(len(tensor))
            tensor[-1] = 0.0

        def max_(self, tensor: torch.Tensor) -> None:
            pass

    reduce(Partials(vector(1.0, 2.0)), NormSpec(norm_type), Counted())  # type: ignore[arg-type]
    assert lengths == [3]


@pytest.mark.parametrize("size", [2, 8, 1000, 2**17, 2**20])
def test_weighted_checksums_stay_exact(size: int) -> None:
    """Add the largest possible summands, also those of four checks, without rounding."""
    for dtype, limit in ((torch.float64, 2**53), (torch.float32, 2**24)):
        if (bits := check_bits(dtype, size)) > 0:
            assert 4 * (2**bits - 1) * (size - 1) < limit
