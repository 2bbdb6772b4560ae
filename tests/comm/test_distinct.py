"""Exchange texts between ranks, each distinct one once: threads as ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distclip import ArgumentError, PeerError, per_tensor_norm
from distclip.comm import Comm, threads
from distclip.comm.distinct import Distinct, any_rank, exchange_texts
from distclip.comm.ranks import Axis
from distclip.sharding.layout import Layout
from distclip.sharding.slots import SlotMap, assign_slots, describe_params, exchange_params
from distclip.sharding.table import ShardTable, TableMetadata


class CountingComm:
    """Communicator that counts the bytes that this rank sends. Every other rank sends the same number."""

    def __init__(self, comm: Comm) -> None:
        self._comm, self.num_bytes, self.num_gathers = comm, 0, 0
        self.rank, self.size, self.ranks, self.device = comm.rank, comm.size, comm.ranks, comm.device
        self.covers_holders = False

    def sum_(self, tensor: Tensor) -> None:
        self.num_bytes += tensor.nbytes
        self._comm.sum_(tensor)

    def max_(self, tensor: Tensor) -> None:
        self.num_bytes += tensor.nbytes
        self._comm.max_(tensor)

    def gather_objects(self, value: Any) -> list[Any]:
        self.num_gathers += 1
        return self._comm.gather_objects(value)


def on_threads(size: int, function: Callable[[Any], Any]) -> list[Any]:
    comms = [CountingComm(comm) for comm in threads(size)]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(function, comms))


@settings(max_examples=15)
@given(st.lists(st.text(max_size=9), min_size=1, max_size=4), st.lists(st.integers(0, 3), min_size=1, max_size=7))
def test_distinct_texts_of_all_ranks(choices: list[str], numbers: list[int]) -> None:
    texts = [choices[number % len(choices)] for number in numbers]
    results: list[Distinct] = on_threads(len(texts), lambda comm: exchange_texts(comm, None, texts[comm.rank]))
    expected = list(dict.fromkeys(texts))
    for result, text in zip(results, texts, strict=True):
        assert list(result.texts) == expected
        assert result.owners == tuple(map(texts.index, expected))
        assert result.counts == tuple(map(texts.count, expected))
        assert result.texts[result.own] == text
    assert len({result.nonce for result in results}) == 1


def test_many_texts_with_digests_in_one_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distclip.comm.distinct._BUCKETS", 1)
    results = on_threads(9, lambda comm: exchange_texts(comm, None, f"{comm.rank % 7} {'x' * 1000 * comm.rank}"))
    assert len({result.texts for result in results}) == 1
    assert results[0].owners == tuple(range(9))


def test_error_of_the_lowest_rank_is_raised_by_all() -> None:
    def call(comm: Comm) -> BaseException:
        error = ArgumentError(f"é{comm.rank}") if comm.rank in (1, 2) else None
        with pytest.raises((ArgumentError, PeerError)) as raised:
            exchange_texts(comm, error, str(comm.rank))
        return raised.value

    assert [str(error) for error in on_threads(4, call)] == ["rank 1: é1", "é1", "é2", "rank 1: é1"]


def test_fact_of_any_rank() -> None:
    assert on_threads(3, lambda comm: any_rank(comm, comm.rank == 2)) == [True] * 3
    assert on_threads(3, lambda comm: any_rank(comm, False)) == [False] * 3


# ---- Slots ----

SPEC = per_tensor_norm(1.0).spec


def make_slots(comm: Any, tables: Sequence[ShardTable]) -> tuple[SlotMap, int]:
    params = describe_params(tables[comm.rank], comm.rank, SPEC, None)
    slots = assign_slots(*exchange_params(comm, None, params), SPEC)
    assert not comm.num_gathers
    return slots, comm.num_bytes


def stage_table(rank: int, size: int, num_stages: int, num_params: int) -> ShardTable:
    """Return the table of a rank that holds the parameters of its stage, all of them on all ranks of the stage."""
    width = size // num_stages
    stage, axis = rank // width, Axis(tuple(range(rank % width, size, width)), "pp")
    layout = Layout(split=(True,), cut=(False,))
    tensors = [torch.nn.Parameter(torch.zeros(2)) for _ in range(num_params)]
    entries = [(f"layers.{stage}.{i}.weight", tensor, layout) for i, tensor in enumerate(tensors)]
    table = ShardTable([*tensors], TableMetadata(entries, (axis,)))
    table.world_size = size
    return table


@pytest.mark.parametrize("size", [64, 256])
def test_bytes_do_not_grow_with_the_number_of_ranks(size: int) -> None:
    # 120 parameters on 4 stages. Every rank of a stage describes the same.
    tables = [stage_table(rank, size, 4, 30) for rank in range(size)]
    results = on_threads(size, lambda comm: make_slots(comm, tables))
    names = [f"layers.{stage}.{i}.weight" for stage in range(4) for i in range(30)]
    assert {slots.names for slots, _ in results} == {tuple(names)}
    assert {slots.by_name["layers.3.7.weight"] for slots, _ in results[-3:]} == {(97, None)}
    assert max(num_bytes for _, num_bytes in results) < 8_000


def test_experts_differ_in_their_coordinates_only() -> None:
    def table(rank: int) -> ShardTable:
        axis = Axis(tuple(range(16)), "ep")
        layout = Layout(split=(True,), cut=(False,))
        tensors = [torch.nn.Parameter(torch.zeros(2)) for _ in range(100)]
        entries = [(f"experts.{i}.weight", tensor, layout) for i, tensor in enumerate(tensors)]
        made = ShardTable([*tensors], TableMetadata(entries, (axis,)))
        made.world_size = 16
        return made

    tables = [table(rank) for rank in range(16)]
    results = on_threads(16, lambda comm: make_slots(comm, tables))
    names = [f"experts.{i}.weight@ep={rank}" for rank in range(16) for i in range(100)]
    assert {slots.names for slots, _ in results} == {tuple(names)}
    # Names travel once: all of them are thousands of bytes.
    assert max(num_bytes for _, num_bytes in results) < 8_000 < len(json.dumps(names))
