"""Exchange texts that are equal on most ranks: each distinct text travels once, for any number of ranks.

A gather of descriptions grows with the number of ranks times the number of parameters, although all ranks of a
data-parallel group have the same description. Here the ranks exchange 48-bit digests by all-reduces (maximum) over
buckets, so that a vector of constant length finds all distinct digests. Then the lowest rank with each text sends it in
an all-reduce (sum). If all ranks have the same text, the first all-reduce shows it, and no other follows.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import from_wire, to_wire
from . import Comm, global_ranks

__all__ = ["Distinct", "any_rank", "exchange_texts"]

_BUCKETS = 64
"""Number of buckets of digests. Each finds up to two distinct digests in one maximum."""

_LIMIT = 1 << 48
"""Digests are less than this, so that float64 holds them."""

_BYTES = 6
"""Number of bytes of a text in one float64."""


@dataclass(frozen=True, slots=True)
class Distinct:
    """Texts of all ranks, without repetition.

    Args:
        texts: distinct texts, in the order of the lowest ranks that have them. The order is equal on all ranks.
        owners: for each text, the index of the lowest rank that has it.
        counts: for each text, the number of ranks that have it.
        own: index of the text of this rank.
        nonce: random text that is equal on all ranks.
    """

    texts: tuple[str, ...]
    owners: tuple[int, ...]
    counts: tuple[int, ...]
    own: int
    nonce: str


def exchange_texts(comm: Comm, error: BaseException | None, text: str) -> Distinct:
    """Exchange a text of every rank. If any rank has an error, raise on all of them.

    Args:
        comm: the ranks that take part.
        error: error of this rank, or None.
        text: this rank's text.

    Returns:
        The distinct texts.

    Raises:
        DistclipError: the error of the lowest rank that has one. A rank with an error raises its own.

    Collectives: one maximum of 131 numbers if all texts are equal. Otherwise at least one more maximum, and two sums.
    Host syncs: one for each on an accelerator.

    >>> from distclip import LocalComm
    >>> exchange_texts(LocalComm(), None, "ready").texts
    ('ready',)
    """
    if comm.size == 1:
        if error is not None:
            raise error
        return Distinct((text,), (0,), (1,), 0, secrets.token_hex(12))
    digest = int.from_bytes(hashlib.sha1(text.encode(), usedforsecurity=False).digest()[:_BYTES], "big")
    priority = comm.size - comm.rank  # Larger for a lower rank.
    nonce = [secrets.randbelow(_LIMIT) if comm.rank == 0 else 0 for _ in range(2)]
    head = [0.0 if error is None else float(priority), *map(float, nonce)]
    known: dict[int, int] = {}  # Digests that were found, with the priority of the lowest rank that has each.
    is_first = True
    while True:
        # Each rank sends its digest and the complement, so that their maxima give the largest and the smallest digest
        # of a bucket. A rank whose digest was found leaves its bucket to the other ranks.
        buckets = [0.0] * (2 * _BUCKETS)
        if digest not in known:
            bucket = digest % _BUCKETS
            buckets[bucket], buckets[_BUCKETS + bucket] = float(digest + 1), float(_LIMIT - digest)
        # These numbers find the lowest rank of each digest that was found before.
        mine = [float(priority) if one == digest else 0.0 for one in known]
        gathered = _reduced(comm, "max", [*head, *buckets, *mine])
        # An error travels in the first maximum, before any text does.
        if is_first and gathered[0]:
            _raise_together(comm, error, comm.size - int(gathered[0]))
        nonce = [int(value) for value in gathered[1:3]]
        found = gathered[3 : 3 + 2 * _BUCKETS]
        known = {one: int(value) for one, value in zip(known, gathered[3 + 2 * _BUCKETS :], strict=True)}
        new = {int(value) - 1 for value in found[:_BUCKETS] if value}
        new |= {_LIMIT - int(value) for value in found[_BUCKETS:] if value}
        if is_first and len(new) == 1:
            # The largest digest of all ranks is the smallest one.
            return Distinct((text,), (0,), (comm.size,), 0, _nonce_text(nonce))
        if not new:
            # The digests of all ranks were found before, and this maximum has found their owners.
            break
        known |= dict.fromkeys(sorted(new), 0)
        is_first = False
    owners = sorted(comm.size - value for value in known.values())
    order = sorted(known, key=lambda one: -known[one])
    own, is_owner = order.index(digest), comm.rank in owners
    # Names of parameters are repetitive, so compression makes them ten times shorter.
    payload = zlib.compress(text.encode(), 6) if is_owner else b""
    lengths = [float(len(payload)) if is_owner and i == own else 0.0 for i in range(len(order))]
    sums = _reduced(comm, "sum", [*(float(i == own) for i in range(len(order))), *lengths])
    counts, sizes = [int(value) for value in sums[: len(order)]], [int(value) for value in sums[len(order) :]]
    texts = _sum_texts(comm, sizes, own if is_owner else None, payload)
    return Distinct(tuple(texts), tuple(owners), tuple(counts), own, _nonce_text(nonce))


def any_rank(comm: Comm, is_true: bool) -> bool:
    """Return whether a fact holds on any rank. Collectives: one maximum of one number. Host syncs: one.

    >>> from distclip import LocalComm
    >>> any_rank(LocalComm(), True), any_rank(LocalComm(), False)
    (True, False)
    """
    return bool(_reduced(comm, "max", [float(is_true)])[0]) if comm.size > 1 else is_true


def _nonce_text(nonce: list[int]) -> str:
    return "".join(f"{number:012x}" for number in nonce)


def _raise_together(comm: Comm, error: BaseException | None, failed: int) -> None:
    """Raise the error of the rank with index `failed`, or the error of this rank."""
    payload = zlib.compress(json.dumps(to_wire(error)).encode()) if error is not None and comm.rank == failed else b""
    size = int(_reduced(comm, "sum", [float(len(payload))])[0])
    (text,) = _sum_texts(comm, [size], 0 if payload else None, payload)
    if error is not None:
        raise error
    raise from_wire(global_ranks(comm)[failed], *json.loads(text))


def _sum_texts(comm: Comm, sizes: list[int], own: int | None, payload: bytes) -> list[str]:
    """Sum a vector that has the compressed texts of several ranks at different positions.

    Args:
        comm: the ranks that take part.
        sizes: number of bytes of each text.
        own: index of the text that this rank sends, or None.
        payload: the compressed text of this rank.
    """
    # Every number is 0 on all ranks except one, so that the sum is exact.
    widths = [-(-size // _BYTES) for size in sizes]
    vector = torch.zeros(sum(widths), dtype=torch.float64)
    factors = 256 ** torch.arange(_BYTES, dtype=torch.int64)
    if own is not None:
        data = torch.frombuffer(bytearray(payload.ljust(widths[own] * _BYTES, b"\0")), dtype=torch.uint8)
        numbers = (data.view(-1, _BYTES).to(torch.int64) * factors).sum(1)
        begin = sum(widths[:own])
        vector[begin : begin + widths[own]] = numbers.to(torch.float64)
    vector = _on_comm(comm, vector)
    comm.sum_(vector)
    data = (vector.cpu().to(torch.int64).unsqueeze(1) // factors % 256).to(torch.uint8).reshape(-1)
    texts, begin = [], 0
    for size, width in zip(sizes, widths, strict=True):
        texts.append(zlib.decompress(bytes(data[begin * _BYTES :][:size].tolist())).decode())
        begin += width
    return texts


def _reduced(comm: Comm, operation: str, values: list[float]) -> list[float]:
    vector = _on_comm(comm, torch.tensor(values, dtype=torch.float64))
    (comm.max_ if operation == "max" else comm.sum_)(vector)
    reduced: list[float] = vector.tolist()
    return reduced


def _on_comm(comm: Comm, vector: Tensor) -> Tensor:
    return vector if comm.device is None else vector.to(comm.device)
