"""Measure this rank's shards: Shards -> Partials, in float64, regardless of the gradient's own dtype.

Squares of float16, bfloat16 and float32 numbers are exact in float64 and cannot overflow there. So a norm is neither
rounded to the gradient's dtype nor lost to overflow at 300 (float16) or 1e25 (float32), and a non-finite power sum
means that an element is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import devices
from ..comm.agreement import Call, CallCounter
from ..comm.ranks import Ranks
from ..devices import device_constant, on_one_thread
from ..sharding.shard import ShardInfos, Shards
from .kernels import checksums, power_sums, powers_by_row
from .kernels.torch_ops import identity
from .limits import any_out_of_limits
from .moments import SecondMoments, sum_ratios
from .per_tensor import PerTensorChecksums, PerTensorPowers
from .replica_sums import ReplicaSums, add_sums, sum_by_group
from .spec import NormSpec
from .watch import NO_WATCH, Watch

__all__ = ["Partials", "measure", "measure_updates", "sum_by_slot"]

_FLOAT64 = (torch.float64, torch.complex128)

_NO_CALL = Call("", CallCounter())


# Not frozen, because one is created in every step, which takes three times as long for a frozen dataclass.
@dataclass(slots=True)
class Partials:
    """One rank's contribution to the totals.

    Args:
        powers: (slots,) float64 on the gradients' device, Σ|g|^p / num_replicas, or max|g| for p = inf (−min|g| for
            −inf).
        weight_powers: (slots,), the same for the parameters. None unless the policy needs it.
        update_powers: (slots,), Σ g² / max(v, ε²) / num_replicas, see `moments`. None unless the spec has `moment_eps`.
        update_counts: (slots,), number of elements with second moments, each divided by its number of replicas.
        update_rates: (slots,), Σ (1 − β2) over these elements, with the same division.
        out_of_limits: whether some element is outside of the policy's limits; a 0-d bool on an accelerator.
        has_partial_grads: whether some gradient is partial, and therefore missing from `powers`.
        has_fp64: whether some gradient is float64 or complex128.
        fp64_anywhere: whether `has_fp64` is true on any rank. None unless an earlier call with the same `has_fp64` on
            this rank has gathered it.
        failed: whether this rank has an error that all ranks must raise.
        uncovered: whether parameters of this rank are on ranks that the communicator does not reach.
        widens_anew: whether this rank's meshes outside of the communicator have changed since it was widened last.
        new_layouts: whether this rank has layouts that the ranks have not exchanged yet.
        per_tensor_powers: the power sums of every gradient on this rank alone, to find the non-finite ones.
        call: the call that the ranks make.
        replica_sums: checksums of the gradients on this rank that other ranks hold too, by replica group.
        per_tensor_checksums: checksums of these gradients, to find the one that differs.
        watch: scalars of the user.
    """

    powers: Tensor
    weight_powers: Tensor | None = None
    update_powers: Tensor | None = None
    update_counts: Tensor | None = None
    update_rates: Tensor | None = None
    out_of_limits: Tensor | bool = False
    has_partial_grads: bool = False
    has_fp64: bool = False
    fp64_anywhere: bool | None = None
    failed: bool = False
    uncovered: bool = False
    widens_anew: bool = False
    new_layouts: bool = False
    per_tensor_powers: tuple[PerTensorPowers, ...] = ()
    call: Call = _NO_CALL
    replica_sums: ReplicaSums = field(default_factory=dict)
    per_tensor_checksums: tuple[PerTensorChecksums, ...] = ()
    watch: Watch = NO_WATCH

    @classmethod
    def empty(cls, spec: NormSpec, device: torch.device, num_slots: int = 1) -> Partials:
        """Return the contribution of a rank that has no gradient, or that has failed."""
        nothing = identity(spec.norm_type, device).repeat(num_slots)
        none = identity(2.0, device).repeat(num_slots) if spec.moment_eps is not None else None
        return cls(nothing, nothing if spec.needs_weights else None, none, none, none)


def measure_updates(
    partials: Partials, shards: Shards, tensors: Sequence[Tensor], moments: SecondMoments, device: torch.device
) -> None:
    """Add this rank's comparison with second moments to its partials.

    Args:
        partials: of this rank.
        shards: the gradients of this rank.
        tensors: the parameter of each.
        moments: of the optimizers that are about to step.
        device: of the partials.

    Raises, Collectives, Host syncs: see `sum_ratios`.
    """
    # These are set before anything can fail, because every rank's message must contain them.
    num_slots = len(partials.powers)
    partials.update_powers = partials.update_counts = partials.update_rates = identity(2.0, device).repeat(num_slots)
    sums, numels, rates = sum_ratios(shards, tensors, moments)
    if not sums:
        return
    infos, pairs = shards.infos, torch.stack([one.to(device) for one in sums])
    counts = device_constant(tuple(numels), device, pairs.dtype)
    totals = device_constant(tuple(rates), device, pairs.dtype)
    # Sums and counts are both divided, so that it does not matter which of the replicas have moments.
    if infos.num_replicas:
        replicas = device_constant(infos.num_replicas, device, pairs.dtype)
        pairs, counts, totals = pairs / replicas, counts / replicas, totals / replicas
    partials.update_powers = sum_by_slot(pairs, infos, 2.0, num_slots)
    partials.update_counts = sum_by_slot(counts, infos, 2.0, num_slots)
    partials.update_rates = sum_by_slot(totals, infos, 2.0, num_slots)


def measure(
    shards: Shards,
    spec: NormSpec,
    device: torch.device,
    num_slots: int = 1,
    weights: Shards | None = None,
    rounded: Collection[Ranks] | None = None,
) -> Partials:
    r"""Sum the powers of this rank's gradients by slot, or take the maximum for p = ±inf.

    .. math:: \sum_s \frac{1}{replicas_s} \sum_i |g_{s,i}|^p

    Args:
        shards: the gradients of this rank. Partial gradients are detected but not measured.
        spec: the norm to measure.
        device: where the result goes.
        num_slots: number of norms. Each shard has the index of the slot that it counts in.
        weights: this rank's shards of the parameters, measured if `spec.needs_weights`.
        rounded: replica groups that are compared by rounded power sums, see `replica_sums`. None compares no replicas.

    Returns:
        `Partials`.

    Raises:
        LayoutError: `spec.limits` are set, and a gradient cannot be compared with them.

    Collectives: none. Host syncs: none on the gradients' own device.

    >>> from distclip.sharding.shard import Shard
    >>> shards = [Shard("w", torch.tensor([3.0, 4.0])), Shard("b", torch.tensor([2.0]), num_replicas=2.0)]
    >>> measure(Shards.of(shards), NormSpec(), torch.device("cpu")).powers
    tensor([27.], dtype=torch.float64)
    """
    out_of_limits: Tensor | bool = False
    if spec.limits is not None:
        beyond = torch.zeros((), dtype=torch.bool, device=device)
        for shard in shards:
            beyond |= any_out_of_limits(shard, *spec.limits, magnitudes=spec.limits_magnitudes).to(device)
        out_of_limits = bool(beyond) if devices.host_reads_free(device) else beyond
    weights = weights if spec.needs_weights else None
    compares = rounded is not None and bool(shards.infos.by_replica_group)
    weight_powers = None
    if weights is not None and not compares and devices.host_reads_free(device):
        powers, weight_powers, has_fp64, per_tensor = _powers_of_both(
            shards, weights, spec.norm_type, device, num_slots
        )
        replicas: tuple[PerTensorChecksums, ...] = ()
    else:
        powers, has_fp64, per_tensor, replicas = _powers_by_slot(shards, spec.norm_type, device, num_slots, rounded)
        if weights is not None:
            weight_powers = _powers_by_slot(weights, spec.norm_type, device, num_slots, None)[0]
    # A shard that is measured neither as a whole tensor nor by row is partial.
    has_partial_grads = len(shards.infos.by_row[1]) < len(shards.infos.whole[2])
    partials = Partials(
        powers,
        weight_powers,
        out_of_limits=out_of_limits,
        has_partial_grads=has_partial_grads,
        has_fp64=has_fp64,
        per_tensor_powers=per_tensor,
    )
    for infos, sums, words in replicas:
        partials.replica_sums = add_sums(partials.replica_sums, sum_by_group(words, infos, sums, rounded or ()))
    partials.per_tensor_checksums = replicas
    return partials


def _powers_of_both(
    shards: Shards, weights: Shards, norm_type: float, device: torch.device, num_slots: int
) -> tuple[Tensor, Tensor, bool, tuple[PerTensorPowers, ...]]:
    """Return power sums of gradients and parameters by slot, measured in one call of each kernel.

    Args:
        shards, weights, norm_type, device, num_slots: see `measure`.

    Returns:
        Power sums of the gradients, those of the parameters, whether any gradient is float64, and the power sums of
        each gradient.
    """
    both = shards.followed_by(weights, num_slots)
    powers, has_fp64, per_tensor, _ = _powers_by_slot(both, norm_type, device, 2 * num_slots, None)
    if has_fp64:
        has_fp64 = any(grad.dtype in _FLOAT64 for grad in shards.grads)
    (whole, _, _), (by_row, _) = shards.infos.whole, shards.infos.by_row
    # The gradients come first, either in one order for all of them or in one for each kind.
    counts = [len(whole), len(by_row)] if len(per_tensor) == 2 else [len(whole) + len(by_row)] * len(per_tensor)
    of_gradients = tuple(one.first(count) for one, count in zip(per_tensor, counts, strict=True) if count)
    return powers[:num_slots], powers[num_slots:], has_fp64, of_gradients


def _powers_by_slot(
    shards: Shards, norm_type: float, device: torch.device, num_slots: int, rounded: Collection[Ranks] | None
) -> tuple[Tensor, bool, tuple[PerTensorPowers, ...], tuple[PerTensorChecksums, ...]]:
    """Return power sums by slot, whether any gradient is float64, power sums and checksums by gradient."""
    # With one slot it does not matter where a tensor ends, so gradients in one storage are read as one tensor.
    if num_slots == 1 and shards.merged is not None and devices.host_reads_free(device):
        shards = shards.merged
    # Metadata and gradients are kept in columns, because making a `Shard` takes longer than measuring its norm.
    (infos, whole, others), (row_infos, by_row) = shards.infos.whole, shards.infos.by_row
    has_fp64 = any(shards.grads[i].dtype in _FLOAT64 for i in others)
    per_tensor: list[PerTensorPowers] = []
    replicas: list[PerTensorChecksums] = []

    # 1. All shards that count in one slot each, in one kernel.
    sums: Tensor | None = None
    grads = [shards.grads[i] for i in whole] if others else shards.grads
    if grads:
        compares = rounded is not None and bool(infos.by_replica_group)
        description = None if others else shards.description
        sums, some_fp64, words = power_sums(grads, norm_type, device, description, with_checksums=compares)
        has_fp64 = has_fp64 or some_fp64
        if words is not None:
            replicas.append((infos, sums, words))
        per_tensor.append(PerTensorPowers(infos.names, sums))
        # Every replica contributes its share, so that no rank has to own the shard, and a NaN in any replica is
        # detected.
        if infos.num_replicas and not math.isinf(norm_type):
            sums = sums / device_constant(infos.num_replicas, sums.device, sums.dtype)

    # 2. All shards whose rows have a slot each, in one kernel.
    if by_row:
        row_grads, counts = [shards.grads[i] for i in by_row], row_infos.row_counts
        compares_rows = rounded is not None and bool(row_infos.by_replica_group)
        has_replicas = compares_rows or bool(infos.num_replicas or row_infos.num_replicas)
        is_plain = devices.host_reads_free(device) and not has_replicas
        order = shards.infos.slot_order(num_slots) if is_plain else None
        if order is not None:
            # Every slot has one summand: there is nothing to add, and the kernel writes to the slots.
            total = torch.empty(num_slots, dtype=torch.float64)
            if sums is not None:
                total.index_copy_(0, device_constant(infos.slots, device, torch.int64), sums)
            powers = powers_by_row(row_grads, row_infos.rows, norm_type, device, (total, order.first_slots))
            if powers is not total:
                total.index_copy_(0, row_infos.row_slots, powers)
            return total, has_fp64, (PerTensorPowers(order.names, total, order.counts),), tuple(replicas)
        powers = powers_by_row(row_grads, row_infos.rows, norm_type, device)
        per_tensor.append(PerTensorPowers(row_infos.names, powers, counts))
        if compares_rows:
            for info, grad, piece in zip(row_infos, row_grads, torch.split(powers, list(counts)), strict=True):
                if info.replicas:
                    # The kernel for rows computes no checksums.
                    replicas.append((ShardInfos((info,)), piece.sum(0, keepdim=True), checksums([grad], device)))

    # 3. The sums of all slots.
    if sums is None:
        total = identity(norm_type, device).repeat(num_slots)
    else:
        total = sum_by_slot(sums, infos, norm_type, num_slots)
    if by_row:
        with on_one_thread(num_slots, device):
            _add_rows(total, row_infos, powers, norm_type)
    return total, has_fp64, tuple(per_tensor), tuple(replicas)


def _add_rows(total: Tensor, infos: ShardInfos, powers: Tensor, norm_type: float) -> None:
    """Add the power sums of rows to those of their slots, or take the maximum, in place."""
    if devices.host_reads_free(total.device) and not math.isinf(norm_type) and not infos.num_replicas:
        # One operator for all shards. On a GPU it would add in any order.
        total.index_add_(0, infos.row_slots, powers)
        return
    for info, rows, piece in zip(infos, infos.rows, torch.split(powers, list(infos.row_counts)), strict=True):
        first = info.slot + rows.first
        row_slots = total[first : first + rows.count]
        if math.isinf(norm_type):
            row_slots.copy_(torch.maximum(row_slots, piece))
        else:
            row_slots.add_(piece if info.num_replicas == 1 else piece / info.num_replicas)


def sum_by_slot(sums: Tensor, infos: ShardInfos, norm_type: float, num_slots: int) -> Tensor:
    """Add up the power sums of every slot.

    The order of the sum is the same every time, so that replicas get the same bits.

    Args:
        sums: (n,) power sums, or maxima for p = ±inf.
        infos: the slot of each.
        norm_type: p.
        num_slots: number of slots.

    Returns:
        (num_slots,), the identity of the reduction where a slot has no summand.

    Host syncs: none.
    """
    if num_slots == 1:
        return sums.amax(0, keepdim=True) if math.isinf(norm_type) else sums.sum(0, keepdim=True)
    if math.isinf(norm_type):
        index = device_constant(infos.slots, sums.device, torch.int64)
        return identity(norm_type, sums.device).repeat(num_slots).scatter_reduce_(0, index, sums, "amax")
    if sums.is_cpu:
        # On a CPU, index_add_ adds the summands in order.
        index = device_constant(infos.slots, sums.device, torch.int64)
        with on_one_thread(num_slots, sums.device):
            return torch.zeros(num_slots, dtype=sums.dtype).index_add_(0, index, sums)
    # segment_reduce, because index_add_ on a GPU adds in any order.
    order, lengths = infos.by_slot(num_slots)
    sums = sums[device_constant(order, sums.device, torch.int64)]
    return torch.segment_reduce(sums, "sum", lengths=device_constant(lengths, sums.device, torch.int64))
