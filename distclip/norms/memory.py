"""Read gradients that are safe to measure and to write, because no two elements have the same address.

torch accepts gradients that share memory with each other, repeat one element (stride 0), or carry a lazy sign. Scaling
such a gradient in place would scale it twice, or not at all. So it is replaced by a copy before it is measured. A
gradient that the operators cannot scale, or that is in the memory of a parameter, raises an error with its name before
any gradient is written.

In an ordinary step, the only cost is a comparison of the addresses with those of the step before.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm import Comm
from ..comm.discovery import is_dry_run
from ..comm.ranks import Ranks
from ..devices import has_addresses, is_fake
from ..errors import LayoutError
from ..sharding.local_tensors import has_local_tensors, on_all_ranks
from ..sharding.shard import Shard, Shards, stored_values
from ..sharding.table import ShardTable
from .kernels.tensor_table import DTYPES, KERNEL_DEVICES, TensorTable, describe_tensors
from .kernels.torch_ops import is_dense, power_sum

__all__ = ["read_gradients", "read_weights"]

_PLAIN = {Tensor, torch.nn.Parameter}

_LAYOUTS = {torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}

_ROW_LAYOUTS = {torch.strided, torch.sparse_coo, torch.sparse_csr}
"""Layouts whose stored values can be assigned to rows."""

_DTYPES = {*DTYPES, torch.complex64, torch.complex128}
"""Dtypes that every operator supports."""

_SIZES = [dtype.itemsize for dtype in DTYPES]


@dataclass(slots=True)
class _Known:
    """Facts about the memory of some shards, from an earlier step.

    Args:
        separate: addresses, lengths and dtypes of gradients that do not overlap.
        parts: positions of the gradients that a kernel can read, by device type.
        odd: positions of all others. None if the gradients have never been sorted into these parts.
        apart: memory of gradients that have been sorted into these parts, and overlap no parameter.
    """

    separate: tuple[bytes, ...] = ()
    apart: Any = None
    parts: dict[str, list[int]] = field(default_factory=dict)
    odd: list[int] | None = None


@dataclass(frozen=True, slots=True)
class _Extent:
    """Memory of one gradient.

    Args:
        start: address of the first element.
        end: address after the last element.
        strides: (size, stride in bytes) of each dim, or None if the elements fill the range.
        itemsize: bytes of an element.
    """

    start: int
    end: int
    strides: tuple[tuple[int, int], ...] | None
    itemsize: int


def read_gradients(table: ShardTable, comm: Comm | None = None) -> Shards:
    """Return this rank's shards of the gradients that exist now, after repairing them where necessary.

    A gradient that shares memory is replaced by a copy (`.grad` is another tensor then). Nothing else changes: views of
    one storage that do not overlap, such as DDP's buckets, stay where they are.

    Args:
        table: of this rank.
        comm: all ranks concerned. None for this rank alone.

    Returns:
        The shards. There are none under FakeTensorMode, because its tensors have no elements.

    Raises:
        LayoutError: a gradient cannot be measured or scaled. The message names it, and no gradient has been written
            yet.

    Collectives: none. Host syncs: none, except one the first time that a gradient is of an unknown class.
    """
    shards = table.gradients()
    # Views of a flat storage do not overlap, and the storage is what will be read.
    read = shards if shards.merged is None else shards.merged
    if not read.grads or _describe(read, table):
        return shards
    return _repair(table, shards, comm)


def read_weights(table: ShardTable, comm: Comm | None = None) -> Shards:
    """Return this rank's shards of the parameters that train.

    Args:
        table, comm: see `read_gradients`.

    Raises:
        LayoutError: the elements of a parameter cannot be read. The message names it.

    Collectives: none. Host syncs: see `read_gradients`.
    """
    weights = table.weights()
    if not _PLAIN.issuperset(map(type, weights.grads)) or any(map(_is_meta, weights.grads)):
        if (nothing := _without_elements(weights, comm)) is not None:
            return nothing
        if has_local_tensors(weights.grads):
            weights = on_all_ranks(weights, table.training_tensors(), _component(comm))
        for i, weight in enumerate(weights):
            weights.grads[i] = _as_plain(weight, "parameter", writable=False)
    return weights


def _component(comm: Comm | None) -> Ranks | None:
    """Return the simulated ranks whose shards a call adds up, or None for each rank alone."""
    if comm is None:
        return None
    return (dist.get_rank(),) if comm.ranks is None else tuple(comm.ranks)


_is_meta = attrgetter("is_meta")


def _without_elements(shards: Shards, comm: Comm | None) -> Shards | None:
    """Return the shards to measure if no tensor has elements, or None if some have or must have."""
    if any(map(is_fake, shards.grads)):
        return _NO_SHARDS
    if not all(map(_is_meta, shards.grads)):
        return None
    if is_dry_run():
        return _NO_SHARDS
    # Where the ranks add up numbers, a rank without numbers is a mistake.
    if comm is None or comm.size == 1 or comm.device == torch.device("meta"):
        return shards
    return None


_NO_SHARDS = Shards.of(())


# ---- The ordinary step ----


def _describe(shards: Shards, table: ShardTable) -> bool:
    """Describe gradients that are all ordinary and separate. Return False if they are not."""
    known: _Known | None = shards.infos.in_memory
    kind = shards.grads[0].device.type
    # The gradients are known to be mixed, so another attempt to describe them would fail too.
    if (known is not None and known.odd is not None) or kind not in KERNEL_DEVICES:
        return False
    description = describe_tensors(shards.grads, kind)
    if description is None:
        return False
    if known is None:
        known = shards.infos.in_memory = _Known()
    key = (bytes(description.addresses), bytes(description.lengths), bytes(description.dtypes))
    if known.separate != key:
        starts, ends = _ends_of(description)
        if _overlap(starts, ends):
            return False
        if _touches_parameters(table, kind, starts, ends):
            _refuse_memory_of_parameters(table, kind, dict(enumerate(shards.grads)), shards.infos.names)
        known.separate = key
    shards.description = description
    return True


def _ends_of(description: TensorTable) -> tuple[Tensor, Tensor]:
    """Return the first address of each tensor and the one after its last, without empty tensors."""
    if not description.addresses:
        return torch.empty(0, dtype=torch.int64, device="cpu"), torch.empty(0, dtype=torch.int64, device="cpu")
    starts = torch.frombuffer(description.addresses, dtype=torch.int64)
    lengths = torch.frombuffer(description.lengths, dtype=torch.int64)
    dtypes = torch.frombuffer(description.dtypes, dtype=torch.int32)
    ends = starts + lengths * torch.tensor(_SIZES, device="cpu")[dtypes]
    has_elements = lengths > 0
    return starts[has_elements], ends[has_elements]


def _overlap(starts: Tensor, ends: Tensor) -> bool:
    """Return whether any two ranges of addresses overlap."""
    starts, order = starts.sort()
    # If any two ranges overlap, two neighbours in this order do.
    return bool((ends[order][:-1] > starts[1:]).any())


def _touches_parameters(table: ShardTable, kind: str, starts: Tensor, ends: Tensor) -> bool:
    """Return whether a range of addresses of gradients overlaps that of a parameter.

    Args:
        table: of the gradients.
        kind: type of their device.
        starts, ends: of each gradient.
    """
    if table.are_gradients or not len(starts):
        return False
    description = None
    if kind in KERNEL_DEVICES:
        # Most parameters are plain tensors, which are their own local tensors.
        description = describe_tensors(table.tensors, kind)
        if description is None:
            description = describe_tensors(table.local_weights(range(len(table.tensors))), kind)
    if description is None:
        weight_starts, weight_ends = _bounds(list(map(_extent_of, _weights_on(table, kind))))
    else:
        weight_starts, weight_ends = _ends_of(description)
    starts, order = starts.sort()
    # Of the gradients that begin before the end of a parameter, does the one with the last end reach its start?
    num_before = torch.searchsorted(starts, weight_ends)
    last_ends = ends[order].cummax(0).values[(num_before - 1).clamp_(min=0)]
    return bool(((num_before > 0) & (last_ends > weight_starts)).any())


def _weights_on(table: ShardTable, kind: str) -> list[Tensor]:
    """Return the local parameters of a table that have elements on a type of device."""
    local = table.local_weights(range(len(table.tensors)))
    plain = [one for one in local if type(one) in _PLAIN and one.layout is torch.strided and not one.is_nested]
    return [one for one in plain if one.device.type == kind and one.numel()]


def _bounds(extents: Collection[_Extent]) -> tuple[Tensor, Tensor]:
    """Return the start and the end of each extent."""
    starts, ends = array("q"), array("q")
    for extent in extents:
        starts.append(extent.start)
        ends.append(extent.end)
    if not extents:
        return torch.empty(0, dtype=torch.int64, device="cpu"), torch.empty(0, dtype=torch.int64, device="cpu")
    return torch.frombuffer(starts, dtype=torch.int64), torch.frombuffer(ends, dtype=torch.int64)


# ---- Any other step ----


def _repair(table: ShardTable, shards: Shards, comm: Comm | None) -> Shards:
    """Copy gradients that share memory, and raise for those that cannot be clipped."""
    if (nothing := _without_elements(shards, comm)) is not None:
        return nothing
    is_simulated = has_local_tensors(shards.grads)
    if is_simulated:
        tensors = table.tensors if table.are_gradients else table.tensors_with_gradient()
        shards = on_all_ranks(shards, tensors, _component(comm))
        if _describe(shards, table):
            return shards
    descriptions, odd = _sort_by_kind(shards)
    plain = {i: _as_plain(shards[i], "gradient", writable=not table.are_gradients) for i in odd}
    # The gradient of one simulated rank cannot be replaced.
    if not table.are_gradients and not is_simulated and (copies := _copies(table, shards, descriptions, plain)):
        table.replace_gradients(copies)
        # Read again, because the table may keep a gradient elsewhere. The copies are ordinary.
        shards = table.gradients()
        plain = {i: grad for i, grad in plain.items() if i not in copies}
        if _describe(shards, table):
            return shards
    for i, grad in plain.items():
        shards.grads[i] = grad
    return shards


def _sort_by_kind(shards: Shards) -> tuple[list[tuple[list[int], TensorTable]], list[int]]:
    """Describe the ordinary gradients, and return the positions of all others.

    Returns:
        (positions, description) for each type of device, and the other positions.
    """
    known: _Known = shards.infos.in_memory or _Known()
    shards.infos.in_memory = known
    # Usually the same gradients are odd in every step, and one call describes all others.
    for is_new in (known.odd is None, True):
        if is_new:
            known.parts, known.odd = defaultdict(list), []
            for i, grad in enumerate(shards.grads):
                device = grad.device.type
                ordinary = device in KERNEL_DEVICES and describe_tensors([grad], device) is not None
                (known.parts[device] if ordinary else known.odd).append(i)
            if not known.odd and len(known.parts) == 1:
                known.odd = None
        described = [
            (positions, describe_tensors([shards.grads[i] for i in positions], device))
            for device, positions in known.parts.items()
        ]
        complete = [(positions, table) for positions, table in described if table is not None]
        if len(complete) == len(described):
            return complete, known.odd or []
    raise AssertionError("gradients that a kernel reads one by one can be read together")


def _as_plain(shard: Shard, what: str, *, writable: bool) -> Tensor:
    """Return a local tensor without the class around it, sharing its memory.

    Args:
        shard: of this rank.
        what: the word for it in an error.
        writable: whether it must be possible to scale the tensor.

    Raises:
        LayoutError: it cannot be measured, or scaled.
    """
    tensor, cls = shard.grad, type(shard.grad)
    if cls not in _PLAIN:
        if cls.__torch_dispatch__ is Tensor.__torch_dispatch__:
            # The class only overrides functions of torch, and the elements are its own.
            tensor = tensor.as_subclass(Tensor)
        elif cls.__name__ == "AsyncCollectiveTensor":
            foreign: Any = tensor
            tensor = foreign.trigger_wait()
    reason = ""
    if tensor.is_meta:
        reason = "is on the meta device and has no elements. Materialize the parameter: model.to_empty(device=device)"
    elif tensor.is_nested or tensor.layout not in _LAYOUTS:
        reason = f"is a {cls.__name__} of layout {tensor.layout}, whose elements cannot be scaled in place. Use a "
        reason += "dense tensor"
    elif shard.rows is not None and tensor.layout not in _ROW_LAYOUTS:
        reason = f"has layout {tensor.layout}, which has no rows. Convert it with grad.to_sparse_csr()"
    elif type(tensor) not in _PLAIN or (what == "gradient" and tensor.dtype not in _DTYPES):
        key = (cls, tensor.dtype, tensor.layout, tensor.device.type, writable)
        if key not in _tried:
            _tried[key] = _operators_work(tensor, writable)
        if not _tried[key]:
            reason = (
                f"is a {cls.__name__} of dtype {tensor.dtype}, and torch's operators cannot "
                f"{'scale' if writable else 'measure'} it. Assign a plain tensor of float32, or freeze the parameter"
            )
    if reason:
        raise LayoutError(f"the {what} of {shard.name} {reason}." if what == "gradient" else f"{shard.name} {reason}.")
    return tensor


_tried: dict[tuple[Any, ...], bool] = {}
"""Result of `_operators_work` by class, dtype, layout, device type and use."""


def _operators_work(tensor: Tensor, writable: bool) -> bool:
    """Return whether the operators of an unknown class measure a tensor, and scale a copy of it."""
    try:
        before, half = power_sum(tensor, 2.0), tensor
        if writable:
            half = _clone(tensor)
            if type(half) is not type(tensor):
                return False
            half.mul_(0.5)
        # A power sum of the class itself must convert to a number.
        whole, quarter = torch.zeros(2, dtype=before.dtype, device=before.device)
        whole.copy_(before)
        quarter.copy_(power_sum(half, 2.0))
        return bool(torch.isclose(quarter * (4 if writable else 1), whole, rtol=1e-3, equal_nan=True))
    except Exception:
        # Whatever the class raises, it does not have the operators.
        return False


def _clone(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor of an unknown class, in other memory.

    A class may compute with a tensor that it derives from its inner tensors. Its `clone` then returns a plain tensor,
    and what is written to such a result is lost.
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.clone()
    odd: Any = tensor
    names, context = odd.__tensor_flatten__()
    inner = {name: _clone(getattr(tensor, name)) for name in names}
    copy: Tensor = odd.__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
    return copy


def _copies(
    table: ShardTable,
    shards: Shards,
    descriptions: Sequence[tuple[list[int], TensorTable]],
    odd: dict[int, Tensor],
) -> dict[int, Tensor]:
    """Copy gradients in which two elements, or an element of an earlier gradient, share an address.

    Raises:
        LayoutError: a gradient that was not copied is in the memory of a parameter.
    """
    copies: dict[int, Tensor] = {}
    extents: defaultdict[str, dict[int, _Extent]] = defaultdict(dict)
    for i, grad in odd.items():
        values = stored_values(grad)
        if values.is_neg() or values.is_conj() or _repeats_elements(values):
            copies[i] = _copy(grad)
        elif type(values) in _PLAIN and has_addresses(values.device) and values.numel():
            extents[values.device.type][i] = _extent_of(values)
    alone = {kind: dict(by_position) for kind, by_position in extents.items()}
    for positions, description in descriptions:
        if positions and (extents or _overlap(*_ends_of(description))):
            kind = shards.grads[positions[0]].device.type
            columns = zip(positions, description.addresses, description.lengths, description.dtypes, strict=True)
            for i, start, length, dtype in columns:
                if length:
                    extents[kind][i] = _Extent(start, start + length * _SIZES[dtype], None, _SIZES[dtype])
    for by_position in extents.values():
        # In the order of the table, so that the first of several gradients keeps the memory.
        copies |= {i: _copy(odd.get(i, shards.grads[i])) for i in _without_memory(dict(sorted(by_position.items())))}
    memory = (
        [(bytes(one.addresses), bytes(one.lengths), bytes(one.dtypes)) for _, one in descriptions],
        [extent for kind in alone for extent in alone[kind].values()],
    )
    known: _Known = shards.infos.in_memory
    if known.apart != memory:
        bounds = [
            (shards.grads[positions[0]].device.type, _ends_of(one)) for positions, one in descriptions if positions
        ]
        bounds += [(kind, _bounds(by_position.values())) for kind, by_position in alone.items()]
        for kind, (starts, ends) in bounds:
            if _touches_parameters(table, kind, starts, ends):
                kept = {i: stored_values(odd.get(i, grad)) for i, grad in enumerate(shards.grads) if i not in copies}
                on_device = {i: grad for i, grad in kept.items() if type(grad) in _PLAIN and grad.device.type == kind}
                _refuse_memory_of_parameters(table, kind, on_device, shards.infos.names)
        known.apart = memory
    return copies


def _refuse_memory_of_parameters(
    table: ShardTable, kind: str, grads: Mapping[int, Tensor], names: Sequence[str]
) -> None:
    """Raise if a gradient has an element at the address of a parameter's element.

    Args:
        table: of the gradients.
        kind: type of their device.
        grads: gradients on this device, by position.
        names: name of the parameter of each position.

    Raises:
        LayoutError: see above.
    """
    owners = dict(zip(map(id, table.local_weights(range(len(table.tensors)))), table.names, strict=True))
    for weight in _weights_on(table, kind):
        for i, grad in grads.items():
            extents = {0: _extent_of(weight), 1: _extent_of(grad)} if weight.numel() and grad.numel() else {}
            if _without_memory(extents):
                owner = owners[id(weight)]
                raise LayoutError(
                    f"the gradient of {names[i]} is in the memory of the parameter {owner}, so that scaling the "
                    "gradient would change the parameter. Assign a copy: param.grad = param.grad.clone()."
                )


def _copy(grad: Tensor) -> Tensor:
    """Copy a gradient to new memory, without lazy signs."""
    if grad.layout is not torch.strided:
        return grad.clone()
    return grad.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def _repeats_elements(values: Tensor) -> bool:
    """Return whether two elements may have one address."""
    if values.layout is not torch.strided or values.numel() == 0 or type(values) not in _PLAIN:
        return False
    reach = 1
    for stride, size in sorted(zip(values.stride(), values.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach += stride * (size - 1)
    return False


def _extent_of(values: Tensor) -> _Extent:
    """Return the memory of a tensor that is not empty, and has no two elements at one address."""
    size = values.itemsize
    strides = tuple((n, stride * size) for n, stride in zip(values.shape, values.stride(), strict=True))
    end = values.data_ptr() + sum((n - 1) * stride for n, stride in strides) + size
    return _Extent(values.data_ptr(), end, None if is_dense(values) else strides, size)


def _without_memory(extents: dict[int, _Extent]) -> list[int]:
    """Return the positions of gradients that share memory with an earlier gradient, in whole or in part."""
    if len(extents) < 2 or not _overlap(*_bounds(extents.values())):
        return []
    # Gradients whose ranges touch each other, directly or through others, form a cluster.
    clusters: list[list[int]] = []
    end = 0
    for i in sorted(extents, key=lambda i: extents[i].start):
        if clusters and extents[i].start < end:
            clusters[-1].append(i)
        else:
            clusters.append([i])
        end = max(end, extents[i].end) if len(clusters[-1]) > 1 else extents[i].end
    positions = []
    for cluster in map(sorted, clusters):
        if len(cluster) > 1:
            base = min(extents[i].start for i in cluster)
            # Relative addresses, which stay the same if the memory moves as a whole.
            shape = tuple(
                _Extent(extents[i].start - base, extents[i].end - base, extents[i].strides, extents[i].itemsize)
                for i in cluster
            )
            positions += [cluster[j] for j in _late_claims(shape)]
    return positions


@lru_cache(maxsize=256)
def _late_claims(extents: tuple[_Extent, ...]) -> tuple[int, ...]:
    """Return which of several gradients have an element at the address of an earlier gradient's element."""
    late = []
    if all(extent.strides is None for extent in extents):
        claimed: list[_Extent] = []
        for i, extent in enumerate(extents):
            if any(extent.start < other.end and other.start < extent.end for other in claimed):
                late.append(i)
            else:
                claimed.append(extent)
        return tuple(late)
    # The ranges of strided gradients can overlap although their elements do not, such as columns of one matrix. So
    # every byte is marked.
    used = torch.zeros(max(extent.end for extent in extents), dtype=torch.bool, device="cpu")
    for i, extent in enumerate(extents):
        dims = extent.strides
        if dims is None:
            own = used[extent.start : extent.end]
        else:
            sizes, strides = (*(n for n, _ in dims), extent.itemsize), (*(stride for _, stride in dims), 1)
            own = used.as_strided(sizes, strides, extent.start)
        if bool(own.any()):
            late.append(i)
        else:
            own.fill_(True)
    return tuple(late)
