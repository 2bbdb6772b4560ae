"""Communicate within one process: `LocalComm` for a single rank, `threads` for several, `DryRunComm` for none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

__all__ = ["DryRunComm", "LocalComm", "threads"]


class LocalComm:
    """Communicator of one rank, which sends nothing.

    >>> comm = LocalComm()
    >>> comm.rank, comm.size, comm.gather_objects("a")
    (0, 1, ['a'])
    """

    rank = 0
    size = 1
    ranks: None = None
    device: None = None
    covers_holders = False

    def sum_(self, tensor: Tensor) -> None:
        """Leave `tensor` as it is: it is the sum over one rank."""

    def max_(self, tensor: Tensor) -> None:
        """Leave `tensor` as it is: it is the maximum over one rank."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the one value."""
        return [value]


class DryRunComm:
    """Communicator of a rank whose other ranks do not exist, as in torch's fake process group.

    Sums are the values of this rank alone, and a gather assumes that every other rank has the value of this one.

    Args:
        rank: global rank of this process.
        ranks: global ranks that the call is planned for.

    >>> DryRunComm(0, range(3)).gather_objects("a")
    ['a', 'a', 'a']
    """

    device: None = None
    covers_holders = False

    def __init__(self, rank: int, ranks: Collection[int]) -> None:
        self.ranks = tuple(ranks)
        self.rank, self.size = self.ranks.index(rank), len(self.ranks)

    def sum_(self, tensor: Tensor) -> None:
        """Leave `tensor` as it is."""

    def start_sum(self, tensor: Tensor) -> tuple[Callable[[], bool], Callable[[], None]]:
        """Leave `tensor` as it is."""
        return (lambda: True), (lambda: None)

    def max_(self, tensor: Tensor) -> None:
        """Leave `tensor` as it is."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the value of this rank for every rank."""
        return [value] * self.size


class _Exchange:
    """Values that the threads of one world exchange, and a barrier that breaks after a timeout."""

    def __init__(self, size: int, timeout: float) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout)


class _ThreadComm:
    """Communicator of one thread among several."""

    # The threads of a process have the same global rank, so the members have no global ranks to distinguish them.
    ranks: None = None
    device = torch.device("cpu")
    covers_holders = False

    def __init__(self, rank: int, exchange: _Exchange) -> None:
        self.rank = rank
        self.size = len(exchange.values)
        self._exchange = exchange

    def gather_objects(self, value: Any) -> list[Any]:
        self._exchange.values[self.rank] = value
        self._exchange.barrier.wait()
        values = list(self._exchange.values)
        # Without a second barrier a fast thread would overwrite its value before a slow one has read it.
        self._exchange.barrier.wait()
        return values

    def sum_(self, tensor: Tensor) -> None:
        # Every thread adds in the order of the ranks, which gives the same bits on each.
        tensor.copy_(torch.stack(self.gather_objects(tensor.clone())).sum(0))

    def max_(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self.gather_objects(tensor.clone())).amax(0))


def threads(size: int, *, timeout: float = 30.0) -> list[_ThreadComm]:
    """Make communicators for `size` threads of this process, for tests without a process group.

    Args:
        size: number of threads that take part. Give each thread one communicator of the list.
        timeout: seconds after which a missing thread breaks the other threads' wait (`threading.BrokenBarrierError`).

    Returns:
        One communicator per rank, in order.

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> def add(comm):
    ...     total = torch.tensor([float(comm.rank)])
    ...     comm.sum_(total)
    ...     return total.item()
    >>> with ThreadPoolExecutor(3) as pool:
    ...     list(pool.map(add, threads(3)))
    [3.0, 3.0, 3.0]
    """
    exchange = _Exchange(size, timeout)
    return [_ThreadComm(rank, exchange) for rank in range(size)]
