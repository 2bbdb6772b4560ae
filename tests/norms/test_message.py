"""The buffer of the all-reduce: what ranks write is what all of them read."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import pytest
import torch

from distclip.comm import threads
from distclip.norms.measure import Partials
from distclip.norms.message import FACTS, FIELDS
from distclip.norms.reduce import Totals, reduce
from distclip.norms.spec import NormSpec

NAN, INF = float("nan"), float("inf")


def reduced(by_rank: list[Partials], spec: NormSpec) -> list[Totals]:
    """Return the totals on every rank."""
    comms = threads(len(by_rank))
    with ThreadPoolExecutor(len(by_rank)) as pool:
        return list(pool.map(lambda comm: reduce(by_rank[comm.rank], spec, comm), comms))


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_every_field_has_its_writer_and_its_reader() -> None:
    written = {field.name for field in fields(Partials)}
    read = {field.name for field in fields(Totals)}
    for field in (*FIELDS, *FACTS):
        assert field.name in written, f"Partials lacks {field.name}"
        assert field.name in read, f"Totals lacks {field.name}"
    names = [field.name for field in (*FIELDS, *FACTS)]
    assert len(set(names)) == len(names)


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
@pytest.mark.parametrize("name", [fact.name for fact in FACTS])
def test_fact_of_one_rank_holds_for_all(name: str, rank: int, norm_type: float) -> None:
    flags: dict[str, Any] = {name: True}
    by_rank = [Partials(vector(1.0), **(flags if i == rank else {})) for i in range(3)]
    for totals in reduced(by_rank, NormSpec(norm_type)):
        holding = {fact.name for fact in FACTS if getattr(totals, fact.name).read()}
        assert holding == {name}


@pytest.mark.parametrize("norm_type", [2.0, INF])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_nan_of_one_rank_reaches_its_slot_and_no_other(rank: int, norm_type: float) -> None:
    by_rank = [Partials(vector(NAN if i == rank else 1.0, 2.0)) for i in range(3)]
    for totals in reduced(by_rank, NormSpec(norm_type)):
        assert totals.powers[0].isnan()
        assert totals.powers[1].isfinite()
        assert not totals.finite.read()


def test_number_of_ranks_has_no_limit_from_the_encoding() -> None:
    """Reduce facts of 300 ranks, none of which overflows into another."""
    flags = {fact.name: True for fact in FACTS}
    by_rank = [Partials(vector(1.0), **flags) for _ in range(300)]
    (totals, *_) = reduced(by_rank, NormSpec())
    assert float(totals.powers) == 300
    assert all(getattr(totals, fact.name).read() for fact in FACTS)
