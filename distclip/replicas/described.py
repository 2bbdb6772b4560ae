"""Compare `split_over=` with what shows in the first call: an axis of stages that it lacks, or an axis of replicas.

`distclip.audit` proves a layout. These two mistakes show without a collective. Parameters on a part of a mesh have the
names of its other axes, and one of them can be that of pipeline stages. Replicas have equal parameters and equal
gradients, which ranks with different parameters do not.
"""

from __future__ import annotations

import weakref
import zlib
from functools import partial

import torch

from .. import devices
from ..comm.postings import Posting
from ..comm.ranks import Axis, is_data_axis, is_stage_axis, rank_list, rank_set
from ..errors import ReplicaWarning, warn_user
from ..norms.kernels import checksums
from ..sharding.dtensor import is_dtensor
from ..sharding.shard import Shards
from ..sharding.split_over import axis_ranks
from ..sharding.table import ShardTable, TableMetadata
from .unlinked import compare

__all__ = ["compare_split", "warn_of_missing_stages"]

_checked: weakref.WeakSet[TableMetadata] = weakref.WeakSet()
"""Tables whose meshes have been looked at."""


def warn_of_missing_stages(function: str, table: ShardTable) -> bool:
    """Warn if the mesh of the parameters has an axis of stages that nothing describes.

    Args:
        function: that the user called, without `comm`.
        table: of this rank.

    Returns:
        Whether there was a warning.

    Collectives: none. Host syncs: none.
    """
    if table.metadata in _checked:
        return False
    _checked.add(table.metadata)
    sharded = [tensor for tensor in table.tensors if is_dtensor(tensor)]
    covered = [frozenset(axis.ranks) for axis in table.axes]
    covered += [layout.members for layout in {id(one): one for one in table.layouts}.values()]
    for mesh in {id(tensor.device_mesh): tensor.device_mesh for tensor in sharded}.values():
        root = mesh._get_root_mesh()
        for name, ranks in zip(root.mesh_dim_names or (), axis_ranks(root), strict=False):
            if not is_stage_axis(name) or len(ranks) == 1 or any(other.issuperset(ranks) for other in covered):
                continue
            warn_user(
                f"{function}: the parameters are on {mesh}, and neither their placements nor split_over= describe "
                f'mesh["{name}"], with stages on {rank_list(ranks)}, so that the stages clip by different norms. '
                f'Pass split_over=mesh["{name}"].',
                ReplicaWarning,
            )
            return True
    return False


def compare_split(function: str, table: ShardTable, gradients: Shards) -> bool:
    """Compare this rank with others along the axes of `split_over=` named as data parallelism.

    Args:
        function: that the user called; only calls of the same function are compared.
        table: of this rank.
        gradients: of this rank, as they were measured.

    Returns:
        Whether nothing is left to compare in later calls.

    Collectives: none. Host syncs: a few on an accelerator, in the first call.
    """
    named = [(i, axis) for i, axis in enumerate(table.axes) if is_data_axis(axis.name) and len(axis.ranks) > 1]
    if not named or devices.is_capturing():
        return not named
    settled = [
        compare(f"{function} along {axis.identity}", partial(_compare, table, gradients, i, axis), size=len(axis.ranks))
        for i, axis in named
    ]
    return all(settled)


def _compare(table: ShardTable, gradients: Shards, i: int, axis: Axis, posting: Posting) -> str | None:
    """Return a description of an axis whose ranks hold replicas, or None.

    Args:
        table, gradients: of this rank.
        i: position of the axis.
        axis: the axis.
        posting: of this axis.
    """
    if posting.num_calls:
        reads = posting.begin_call()
        return posting.read_difference() if reads else None
    if not gradients:
        return None
    posting.begin_call()
    layouts = dict(zip(table.names, table.layouts, strict=True))
    # Placements that span the axis count, and not `split_over=`.
    own = [at for at, info in enumerate(gradients.infos) if not layouts[info.name].members.issuperset(axis.ranks)]
    values = [gradients.grads[at] for at in own if gradients.grads[at].layout is torch.strided]
    # Gradients of ones are equal for other reasons.
    if not values or len(values) < len(own) or not any(bool((one != one.flatten()[:1]).any()) for one in values):
        posting.is_settled = True
        return None
    names = [gradients.infos[at].name for at in own]
    weights = table.local_weights([table.names.index(name) for name in names])
    device = values[0].device
    words = checksums([*weights, *values], device).tolist()
    posting.name = f"{posting.name}/{zlib.crc32(f'{names} {words}'.encode()):08x}"
    if posting.post("") is None or posting.other is None:
        return None
    axes = [f'mesh["{one.name}"]' if one.name else str(one) for j, one in enumerate(table.axes) if j != i]
    text = (
        f'split_over=: it contains mesh["{axis.name}"] over ranks {rank_set(axis.ranks)}, and ranks '
        f"{posting.other[0]} and {posting.rank} have equal parameters and equal gradients ({names[0]}"
        f"{' and all others' * (len(names) > 1)}), so that replicas count several times and the norm is too large. "
        f"{'Pass split_over=' + axes[0] if axes else 'Leave out split_over='}."
    )
    posting.settle_different(text)
    return text
