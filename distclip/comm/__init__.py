"""Who can add numbers together.

A communicator is five names, so that anything which can sum a few numbers over ranks carries distclip:
torch.distributed (`c10d`), MPI (`mpi`), one process (`LocalComm`), threads of one process (`threads`, the public test
double).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from .local import LocalComm, threads
from .mpi import MPIComm
from .process_group import ProcessGroupComm

__all__ = ["Comm", "LocalComm", "MPIComm", "ProcessGroupComm", "ranks_of", "threads"]


@runtime_checkable
class Comm(Protocol):
    """What distclip asks of whoever adds numbers up over ranks; nothing else is ever asked."""

    @property
    def rank(self) -> int:
        """This rank within the communicator, 0 ≤ rank < size."""
        ...

    @property
    def size(self) -> int:
        """How many ranks take part."""
        ...

    def sum_(self, tensor: Tensor) -> None:
        """Replace `tensor` (a small float64 vector, any device) by its sum over ranks, the same bits on each."""
        ...

    def max_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its element-wise maximum over ranks. NaN is never passed."""
        ...

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, in the order of the ranks. Only on paths that end in an error or are rare."""
        ...


def ranks_of(comm: Comm) -> Sequence[int]:
    """The world ranks of a communicator's members, in order; where it does not say, those within itself.

    >>> ranks_of(LocalComm())
    range(0, 1)
    """
    ranks: Sequence[int] = getattr(comm, "ranks", range(comm.size))
    return ranks
