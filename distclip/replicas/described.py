"""Check `split_over=` in the first calls: it may lack an axis of stages, or contain an axis of replicas.

`distclip.audit` proves a layout. These two mistakes can be detected without a collective. If parameters are on a part
of a mesh, its other axes have names, and one of them can be an axis of pipeline stages, which make the same call.
Replicas have equal parameters and equal gradients, and ranks with different parameters do not.
"""

from __future__ import annotations

import weakref
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch

from .. import devices
from ..comm.postings import Posting
from ..comm.ranks import Axis, Ranks, is_data_axis, is_stage_axis, rank_list, rank_set
from ..norms.kernels import checksums
from ..sharding.dtensor import is_dtensor
from ..sharding.shard import Shards
from ..sharding.split_over import axis_ranks
from ..sharding.table import ShardTable, TableMetadata
from .unlinked import compare

__all__ = ["compare_split", "undescribed_stages"]


@dataclass(frozen=True, slots=True)
class Stages:
    """Axis of pipeline stages that neither placements nor `split_over=` describe.

    Args:
        name: of the axis.
        ranks: ranks along the axis, this one included.
        mesh: description of the mesh that the parameters are on.
        number: number of tables with stages along these ranks so far. Only calls with the same number are compared.
    """

    name: str
    ranks: Ranks
    mesh: str
    number: int


_found: weakref.WeakKeyDictionary[TableMetadata, Stages | None] = weakref.WeakKeyDictionary()
_numbers: Counter[Ranks] = Counter()


def undescribed_stages(table: ShardTable) -> Stages | None:
    """Return the axis of stages in the parameters' meshes that nothing describes, or None.

    Equal meshes can be slices of different root meshes, and torch may return any of these roots. So the axis may belong
    to another model, and `compare_split` warns only if the other stages call too.

    Args:
        table: of this rank.
    """
    if table.metadata not in _found:
        _found[table.metadata] = _find_stages(table)
    return _found[table.metadata]


def _find_stages(table: ShardTable) -> Stages | None:
    sharded = [tensor for tensor in table.tensors if is_dtensor(tensor)]
    covered = [frozenset(axis.ranks) for axis in table.axes]
    covered += [layout.members for layout in {id(one): one for one in table.layouts}.values()]
    for mesh in {id(tensor.device_mesh): tensor.device_mesh for tensor in sharded}.values():
        root = mesh._get_root_mesh()
        for name, ranks in zip(root.mesh_dim_names or (), axis_ranks(root), strict=False):
            if is_stage_axis(name) and len(ranks) > 1 and not any(other.issuperset(ranks) for other in covered):
                _numbers[ranks] += 1
                return Stages(name, ranks, str(mesh), _numbers[ranks])
    return None


def compare_split(function: str, table: ShardTable, gradients: Shards) -> bool:
    """Compare this rank with others along undescribed stages, and along axes named as data parallelism.

    Args:
        function: function that the user called. Only calls of the same function are compared.
        table: of this rank.
        gradients: of this rank, as they were measured.

    Returns:
        Whether nothing is left to compare in later calls.

    Collectives: none. Host syncs: a few on an accelerator, in the first call.
    """
    stages = undescribed_stages(table)
    named = [(i, axis) for i, axis in enumerate(table.axes) if is_data_axis(axis.name) and len(axis.ranks) > 1]
    if devices.is_capturing():
        return stages is None and not named
    settled = [
        compare(f"{function} along {axis.identity}", partial(_compare, table, gradients, i, axis), size=len(axis.ranks))
        for i, axis in named
    ]
    if stages is not None:
        find = partial(_find_other_stage, function, stages)
        name = f"{function} on stages {stages.ranks} {stages.number}"
        settled.append(compare(name, find, size=len(stages.ranks)))
    return all(settled)


def _find_other_stage(function: str, stages: Stages, posting: Posting) -> str | None:
    """Return a text about stages whose norms do not include each other's gradients, or None."""
    reads = posting.begin_call()
    if posting.num_calls > 1:
        return posting.read_difference() if reads else None
    if posting.post("") is None:
        return None
    text = (
        f"{function}: the parameters are on {stages.mesh}, and neither their placements nor split_over= describe "
        f'mesh["{stages.name}"], with stages on {rank_list(stages.ranks)}, so that the stages clip by different norms. '
        f'Pass split_over=mesh["{stages.name}"].'
    )
    posting.settle_different(text)
    return text


def _compare(table: ShardTable, gradients: Shards, i: int, axis: Axis, posting: Posting) -> str | None:
    """Return a text about an axis whose ranks hold replicas, or None.

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
    # If a parameter's placements span the axis, they apply instead of `split_over=`.
    own = [at for at, info in enumerate(gradients.infos) if not layouts[info.name].members.issuperset(axis.ranks)]
    values = [gradients.grads[at] for at in own if gradients.grads[at].layout is torch.strided]
    # Constant gradients, such as ones, can be equal for other reasons.
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
