"""Communication backends: declare `Comm`, and re-export its implementations.

`Comm` is small on purpose, so that anything that sums a few numbers over ranks can be a backend of distclip:
torch.distributed (`process_group`), MPI (`mpi`), a single process (`LocalComm`), and threads of one process (`threads`,
a public test double).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..devices import host_reads_free
from .local import LocalComm, threads
from .mpi import MPIComm
from .process_group import ProcessGroupComm

__all__ = [
    "Comm",
    "LocalComm",
    "MPIComm",
    "ProcessGroupComm",
    "global_ranks",
    "missing_members",
    "start_sum",
    "threads",
]


@runtime_checkable
class Comm(Protocol):
    """Communication backend over a fixed list of ranks. distclip uses these members and no others.

    >>> isinstance(LocalComm(), Comm)
    True
    """

    @property
    def rank(self) -> int:
        """Index of this rank within the communicator, 0 ≤ rank < size."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks in the communicator."""
        ...

    @property
    def ranks(self) -> Sequence[int] | None:
        """Global ranks of the members, in order, or None for members within one process."""
        ...

    @property
    def device(self) -> torch.device | None:
        """Device on which the numbers travel, or None for the device of each tensor."""
        ...

    @property
    def covers_holders(self) -> bool:
        """True for a communicator derived from layouts, whose members all hold parameters in the same layouts."""
        ...

    def sum_(self, tensor: Tensor) -> None:
        """Replace `tensor`, a small float64 vector, by its sum over ranks, with the same bits on each."""
        ...

    def max_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its element-wise maximum over ranks. Callers never pass NaN."""
        ...

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's `value`, in the order of the ranks. Called only on rare paths, such as errors."""
        ...


_MEMBERS = ("rank", "size", "ranks", "device", "covers_holders", "sum_", "max_", "gather_objects")


def missing_members(comm: object) -> list[str]:
    """Return the members of `Comm` that a caller's object lacks.

    >>> missing_members(LocalComm()), missing_members("tp")[:2]
    ([], ['rank', 'size'])
    """
    return [name for name in _MEMBERS if not hasattr(comm, name)]


def global_ranks(comm: Comm) -> Sequence[int]:
    """Return the global ranks of a communicator's members, or their indices within one process.

    >>> global_ranks(LocalComm())
    range(0, 1)
    """
    return range(comm.size) if comm.ranks is None else comm.ranks


def start_sum(comm: Comm, tensor: Tensor, *, in_thread: bool = False) -> tuple[Callable[[], bool], Callable[[], None]]:
    """Begin to replace `tensor` by its sum over ranks.

    It returns before the sum is complete, if the backend can do so. All ranks must begin their sums in the same order.

    Args:
        comm: the ranks that take part.
        tensor: float64 vector, which must not be touched until the sum is complete.
        in_thread: if the backend cannot return before the sum is complete, let a thread wait for the sum. No other
            method of the communicator may be called until the sum is complete.

    Returns:
        A function that returns whether the sum is complete, and one that waits for it.

    >>> is_complete, wait = start_sum(LocalComm(), torch.ones(2))
    >>> is_complete()
    True
    """
    # A caller's communicator may have no such method, or may override only `sum_`.
    start = getattr(comm, "start_sum", None)
    classes = type(comm).__mro__
    replaced = next((cls for cls in classes if {"sum_", "start_sum"} & vars(cls).keys()), None)
    if start is not None and (replaced is None or "start_sum" in vars(replaced)):
        begun: tuple[Callable[[], bool], Callable[[], None]] = start(tensor)
        return begun
    if in_thread and comm.size > 1 and host_reads_free(tensor.device):
        return _sum_in_thread(comm, tensor)
    comm.sum_(tensor)
    return (lambda: True), (lambda: None)


def _sum_in_thread(comm: Comm, tensor: Tensor) -> tuple[Callable[[], bool], Callable[[], None]]:
    """Sum in another thread, see `start_sum`."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            comm.sum_(tensor)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="distclip sum", daemon=True)
    thread.start()

    def wait() -> None:
        thread.join()
        if errors:
            raise errors[0]

    return (lambda: not thread.is_alive()), wait
