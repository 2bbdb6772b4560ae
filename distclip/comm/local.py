"""Communicators within one process: `LocalComm` for a single rank, `threads` for several."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

__all__ = ["LocalComm", "threads"]


class LocalComm:
    """A communicator of one rank: nothing is ever sent.

    >>> comm = LocalComm()
    >>> comm.rank, comm.size, comm.gather_objects("a")
    (0, 1, ['a'])
    """

    rank = 0
    size = 1

    def sum_(self, tensor: Tensor) -> None:
        """The sum over one rank is what it has."""

    def max_(self, tensor: Tensor) -> None:
        """The maximum over one rank is what it has."""

    def gather_objects(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]


class _Meeting:
    """Where the threads of one world lay down what they bring; the barrier breaks rather than hangs."""

    def __init__(self, size: int, timeout: float) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout)


class _ThreadComm:
    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.size = len(meeting.slots)
        self._meeting = meeting

    def gather_objects(self, value: Any) -> list[Any]:
        self._meeting.slots[self.rank] = value
        self._meeting.barrier.wait()
        values = list(self._meeting.slots)
        self._meeting.barrier.wait()
        return values

    def sum_(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self.gather_objects(tensor.clone())).sum(0))

    def max_(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self.gather_objects(tensor.clone())).amax(0))


def threads(size: int, *, timeout: float = 30.0) -> list[_ThreadComm]:
    """Communicators for `size` threads of this process: a world for tests without any process group.

    Args:
        size: how many threads take part; give each one communicator of the list.
        timeout: seconds after which a missing thread breaks the others' wait (`threading.BrokenBarrierError`).

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
    meeting = _Meeting(size, timeout)
    return [_ThreadComm(rank, meeting) for rank in range(size)]
