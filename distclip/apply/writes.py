"""Detect gradients that are written between their measurement and the step that uses them."""

from __future__ import annotations

from operator import is_

from ..errors import ArgumentError
from ..sharding.shard import Shards
from ..sharding.table import ShardTable

__all__ = ["GradientWrites"]


class GradientWrites:
    """Versions of the gradients of a rank at one moment.

    The version of a torch tensor counts how often the tensor was written, in place or through a view.

    Args:
        table: this rank's table.
        shards: shards of the gradients.

    >>> import torch
    >>> from distclip.sharding.table import parameter_table
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.ones(2)
    >>> table = parameter_table([("weight", weight)], ())
    >>> writes = GradientWrites(table, table.gradients())
    >>> writes.check()
    >>> weight.grad.mul_(2)
    tensor([2., 2.])
    >>> writes.check()
    Traceback (most recent call last):
    distclip.errors.ArgumentError: finish: the gradient of weight was written after start, ...
    """

    def __init__(self, table: ShardTable, shards: Shards) -> None:
        self._table, self._shards = table, shards
        self._grads, self._versions = table.grad_tensors(), self._read_versions()

    def check(self) -> None:
        """Raise if a gradient was written, replaced or dropped.

        Raises:
            ArgumentError: see above.

        Collectives: none. Host syncs: none.
        """
        grads, versions = self._table.grad_tensors(), self._read_versions()
        is_same = len(grads) == len(self._grads) and all(map(is_, grads, self._grads))
        if is_same and versions == self._versions:
            return
        names = zip(self._shards.infos.names, self._versions, versions, strict=True)
        name = next((name for name, old, new in names if old != new), None)
        what = "a gradient was replaced or dropped" if name is None else f"the gradient of {name} was written"
        raise ArgumentError(
            f"finish: {what} after start, so that the norm is not that of what the optimizer would step. Call "
            "clipper.start() after the last write, and zero_grad() after finish."
        )

    def _read_versions(self) -> list[int]:
        # Tensors of inference mode have no version.
        return [-1 if grad.is_inference() else grad._version for grad in self._shards.grads]
