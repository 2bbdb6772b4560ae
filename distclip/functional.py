"""Clip with torch's own four functions: drop-ins for torch.nn.utils that are correct in any layout.

They run the stages of `distclip.engine` without a policy object and without state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .apply.consumed import find_stepped, mark_clipped, warn_of_late_clip
from .apply.elsewhere import warn_if_elsewhere
from .apply.scale import clamp_, scale_
from .apply.unstepped import await_steps, warn_if_unstepped
from .comm import Comm, global_ranks
from .comm.agreement import Call
from .comm.consensus import FirstError
from .comm.discovery import call_counter, resolve_comm
from .comm.ranks import Axis
from .devices import Fact, accumulation_dtype, device_constant, is_capturing, outside_modes
from .engine import measure_all_ranks, run
from .errors import ArgumentError, NonFiniteError, short_repr
from .graphs import functional as graph
from .graphs import in_graph
from .norms.memory import read_gradients
from .norms.reduce import Totals
from .norms.spec import NormSpec
from .policies.norm_policy import coefficient, host_coefficient
from .policies.validation import check_flags, to_float
from .policies.value import value
from .replicas.described import compare_split, undescribed_stages
from .replicas.guard import ReplicaGuard
from .replicas.incidents import ReplicaLog
from .replicas.rules import RULES as REPLICA_RULES
from .replicas.unlinked import compare_ddp_gradients, compare_tensors, is_unlinked
from .sharding.cache import cached_table
from .sharding.parameters import Parameters
from .sharding.replicas import assumed_without_axes
from .sharding.shard import Shards
from .sharding.split_over import SplitOver, split_axes
from .sharding.table import ShardTable, gradient_table, local_table, warn_if_nothing_trains

__all__ = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]

_EUCLIDEAN = NormSpec()

_REPLICA_LOG = ReplicaLog()


@in_graph(graph.clip_grad_norm_, graph.reason_against_clip)
@outside_modes
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    split_over: SplitOver = None,
    comm: Comm | None = None,
) -> Tensor:
    r"""Clip the norm of the whole gradient of a model, in any layout.

    .. math:: g \leftarrow g \cdot \min\left(1, \frac{max\_norm}{\lVert g \rVert_p + 10^{-6}}\right)

    where g is the true gradient of the model: every element counts once, so shards are summed and replicas are not.

    Args:
        parameters: a module (FSDP1 needs the wrapped root), a tensor, or an iterable of tensors or (name, tensor)
            pairs. Their gradients have any floating or complex dtype, are dense or sparse, on any mesh, or None.
        max_norm: bound on the norm, ≥ 0; `inf` only measures and never writes.
        norm_type: p of the norm, any number, `inf` for the largest element.
        error_if_nonfinite: raise, on every rank, if the norm is NaN or infinite, and leave the gradients unchanged.
            Otherwise the gradients are multiplied by the resulting coefficient, NaN or 0, as in torch.
        foreach: whether to scale with torch's multi-tensor operators. None for the fastest way.
        split_over: axes along which ranks hold *different* parameters although no placement shows it, such as
            mesh["pp"] for pipeline stages, or the expert group for experts kept as plain tensors. Pass a DeviceMesh, a
            ProcessGroup, an MPIComm, several of them, or {name: one of them}. Every rank passes its own slice of the
            same axes.
        comm: communicator to use, for example `distclip.comm.mpi.MPIComm()`, instead of the one derived from meshes and
            `split_over`. Every rank of the communicator makes the call, with the same p.

    Returns:
        The norm before clipping: a plain 0-d tensor on the gradients' device, float32 (float64 if any rank has a
        float64 gradient, and on a CPU if the norm overflows float32), the same bits on every rank.

    Raises:
        ArgumentError: a negative or NaN bound, a norm type that is not a number, an argument without tensors, a mesh
            without this rank.
        LayoutError: parameters of unknown layout (bare FSDP1 parameters).
        DisagreementError: the ranks passed different arguments, or called different functions.
        NonFiniteError: see `error_if_nonfinite`.

    Every rank that takes part raises the error, before any gradient changes. On an accelerator whose host does not wait
    for the other ranks (see "Host syncs"), only the failed rank raises it. The others leave their gradients unchanged,
    return NaN, and raise DisagreementError in their next call (with `error_if_nonfinite`, PeerError in this call).

    Collectives: one all-reduce of a few float64 numbers over all ranks that take part, for any number of meshes, and
    another one for p = ±inf. None if nothing is sharded (one process, DDP). More only if a gradient is partial, see
    `distclip.norms.partial_grads`. The first call with new meshes exchanges their ranks through the store of
    torch.distributed, and creates a process group. Ranks without a mesh compare their tensors, or under DDP their
    gradients, through the store in the first call, without waiting.
    Host syncs: none on CUDA, except one with `error_if_nonfinite`, `split_over`, `comm`, p = ±inf or tensor-parallel
    replicas, and one in the first call under DDP.

    Source: Pascanu, Mikolov, Bengio 2013, algorithm 1. The signature and the 1e-6 are those of
    torch.nn.utils.clip_grad_norm_.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([weight], max_norm=1.0)
    tensor(5.)
    >>> weight.grad
    tensor([0.6000, 0.8000])
    """
    errors, bound = FirstError(), math.inf
    with errors:
        bound = _checked_bound(max_norm)
        check_flags(error_if_nonfinite=error_if_nonfinite)
    arguments = (("max_norm", bound), ("error_if_nonfinite", bool(error_if_nonfinite)))
    call = "clip_grad_norm_", arguments
    clips = bound < math.inf
    table, shards, totals = _measure(cached_table, parameters, norm_type, split_over, comm, errors, call, clips=clips)
    _raise_if_nonfinite(totals, error_if_nonfinite)
    if (norm := totals.host_norm) is not None:
        scale_(shards, host_coefficient(norm, bound), foreach)
    else:
        norms = totals.norms
        coef = coefficient(norms, device_constant((bound,), norms.device, norms.dtype))
        scale_(shards, totals.mask_if_failed(coef), foreach)
    if clips:
        mark_clipped(table)
        await_steps(table)
    return totals.as_user_dtype()


@in_graph(graph.get_total_norm, graph.reason_against_norm)
@outside_modes
def get_total_norm(
    tensors: Parameters,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    split_over: SplitOver = None,
    comm: Comm | None = None,
) -> Tensor:
    r"""Return the norm of tensors taken together, :math:`(\sum |t|^p)^{1/p}`, in any layout.

    Args:
        tensors: usually gradients: a tensor, or an iterable of tensors or (name, tensor) pairs. A DTensor counts as the
            one tensor that its placements describe. A plain tensor is assumed to be replicated, or different along
            `split_over`.
        norm_type: p of the norm, any number, `inf` for the largest element.
        error_if_nonfinite: raise, on every rank, if the norm is NaN or infinite.
        foreach: ignored; it is part of torch's signature.
        split_over: see `clip_grad_norm_`.
        comm: see `clip_grad_norm_`.

    Returns:
        The norm, see `clip_grad_norm_`.

    Raises, Collectives, Host syncs: see `clip_grad_norm_`. A rank without any tensor can take part only if it passes
    `split_over`, because it has no mesh otherwise. Prefer `clip_grad_norm_` with parameters.

    >>> get_total_norm([torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.bfloat16)])
    tensor(5.)
    """
    errors = FirstError()
    with errors:
        check_flags(error_if_nonfinite=error_if_nonfinite)
    call = "get_total_norm", (("error_if_nonfinite", bool(error_if_nonfinite)),)
    _, _, totals = _measure(gradient_table, tensors, norm_type, split_over, comm, errors, call)
    _raise_if_nonfinite(totals, error_if_nonfinite)
    return totals.as_user_dtype()


@in_graph(graph.clip_grads_with_norm_, graph.reason_against_bound)
@outside_modes
def clip_grads_with_norm_(
    parameters: Parameters, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    r"""Clip gradients by a norm that is already known.

    .. math:: g \leftarrow g \cdot \min\left(1, \frac{max\_norm}{total\_norm + 10^{-6}}\right)

    Args:
        parameters: see `clip_grad_norm_`.
        max_norm: bound on the norm, ≥ 0; `inf` never writes.
        total_norm: 0-d, as `get_total_norm` returns it, the same on every rank.
        foreach: see `clip_grad_norm_`.

    Raises:
        ArgumentError: a negative or NaN bound, an argument without tensors.

    Collectives: none. Host syncs: none.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grads_with_norm_(weight, 1.0, torch.tensor(10.0))
    >>> weight.grad
    tensor([0.3000, 0.4000])
    """
    bound = _checked_bound(max_norm)
    clips = bound < math.inf
    table, shards = _local_shards(parameters, "clip_grads_with_norm_", clips=clips)
    norm = torch.as_tensor(total_norm)
    # In a dry run neither the norm nor the gradients have values.
    if shards:
        coef = coefficient(norm, device_constant((bound,), norm.device, accumulation_dtype(norm.device)))
        scale_(shards, coef, foreach)
    if clips:
        mark_clipped(table)


@in_graph(graph.clip_grad_value_, graph.reason_against_limits)
@outside_modes
def clip_grad_value_(
    parameters: Parameters, clip_value: float | tuple[float, float], foreach: bool | None = None
) -> None:
    r"""Clamp every gradient element to [−clip_value, clip_value], or to [low, high].

    Args:
        parameters: see `clip_grad_norm_`. Every rank clamps its own shards.
        clip_value: ≥ 0, or a pair (low, high).
        foreach: whether to use torch's multi-tensor operators. None for the fastest way.

    Raises:
        ArgumentError: a negative or NaN limit, a lower limit above the upper one, an argument without tensors.
        LayoutError: the elements of a gradient cannot be clamped one by one (complex, or partial).

    Collectives: none. Host syncs: none.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([-3.0, 4.0])
    >>> clip_grad_value_(weight, (-1.0, 2.0))
    >>> weight.grad
    tensor([-1.,  2.])
    """
    limits = value(*clip_value) if isinstance(clip_value, tuple) else value(clip_value)
    clips = limits.low > -math.inf or limits.high < math.inf
    table, shards = _local_shards(parameters, "clip_grad_value_", clips=clips)
    clamp_(shards, limits.low, limits.high, foreach)
    if clips:
        mark_clipped(table)


def _measure(
    make_table: Callable[[Parameters, tuple[Axis, ...]], ShardTable],
    tensors: Parameters,
    norm_type: float,
    split_over: SplitOver,
    comm: Comm | None,
    errors: FirstError,
    call: tuple[str, tuple[tuple[str, Any], ...]],
    *,
    clips: bool = False,
) -> tuple[ShardTable, Shards, Totals]:
    """Run a call up to its totals. All ranks raise the errors of any rank together.

    Args:
        make_table: makes the table of the tensors.
        tensors, norm_type, split_over, comm: arguments of the call.
        errors: this rank's errors so far.
        call: name of the function, and further arguments that must be equal on all ranks.
        clips: whether the function clips the gradients, and does not only measure them.

    Collectives, Host syncs: see `measure_all_ranks`.
    """
    spec, table = _EUCLIDEAN, None
    axes: tuple[Axis, ...] = ()
    with errors:
        spec = _spec(norm_type)
    with errors:
        axes = split_axes(split_over, comm)
    with errors:
        table = make_table(tensors, axes)
    # A rank without a table still takes part in the collectives.
    table, is_derived = table or ShardTable.empty(axes), comm is None
    # Under DDP a rank can measure alone, as torch's functions do. So a rank may call the function when the others do
    # not, for its log or because it has inputs left (`DDP.join`).
    groups = () if table.is_complete else table.groups
    comm = resolve_comm(groups, table.axes, comm, errors, table.num_reached)
    function, arguments = call
    if clips:
        with errors:
            warn_of_late_clip(function, table, find_stepped(table))
            warn_if_unstepped(function, table)
    facts = (("norm_type", spec.norm_type), *arguments)
    counter = call_counter(comm)
    if not is_capturing():
        # Errors of the last call that an accelerator's host has not read are raised now.
        counter.raise_due()
    counter.next()
    if not axes:
        # All ranks are assumed to hold the same plain tensors. With axes, only a gather could find out which ranks hold
        # them.
        ranks = tuple(global_ranks(comm))
        table.metadata.assume_replicas(assumed_without_axes(ranks, ranks[comm.rank]))
    # In the first call of these ranks, which is slow anyway, an accelerator's host reads the comparison.
    is_first = counter.count == 1 and comm.covers_holders and comm.ranks is not None
    guard = ReplicaGuard(
        table, REPLICA_RULES["warn"], _REPLICA_LOG, counter.rounded_replicas, at_once=True, reads_now=is_first
    )
    shards, _, totals = run(measure_all_ranks(table, spec, comm, errors, Call(function, counter, facts), guard))
    if totals.replicas_differ.host:
        guard.resolve(counter.count, shards, comm)
        counter.rounded_replicas = guard.rounded
    if is_derived and not table.metadata.was_compared:
        # No communicator connects this rank with all others. One comparison is enough, so later calls need none.
        if table.is_complete:
            table.metadata.was_compared = compare_ddp_gradients(function, table, shards)
        else:
            settled = not is_unlinked(table, comm) or compare_tensors(function, table, comm)
            if axes or undescribed_stages(table) is not None:
                settled = (clips and compare_split(function, table, shards)) and settled
            table.metadata.was_compared = settled
    if not shards:
        warn_if_nothing_trains(tensors, table)
        if clips:
            warn_if_elsewhere(function, table, is_alone=comm.size == 1 or table.is_complete)
    return table, shards, totals


def _checked_bound(max_norm: float) -> float:
    """Return the bound as a number ≥ 0."""
    bound = to_float(max_norm)
    if not bound >= 0:
        raise ArgumentError(
            f"max_norm={short_repr(max_norm)}: the bound must be a number ≥ 0. Pass max_norm=1.0, or max_norm=inf to "
            "measure without clipping."
        )
    return bound


def _spec(norm_type: float) -> NormSpec:
    """Return the spec of a total norm."""
    p = to_float(norm_type)
    if p == 2:
        return _EUCLIDEAN
    if math.isnan(p):
        raise ArgumentError(f'norm_type={norm_type!r}: not the p of a p-norm. Use norm_type=2.0, or "inf".')
    return NormSpec(p)


def _local_shards(parameters: Parameters, function: str, *, clips: bool) -> tuple[ShardTable, Shards]:
    """Return this rank's gradients for a function that needs neither other ranks nor layouts."""
    table = local_table(parameters)
    if clips:
        warn_of_late_clip(function, table, find_stepped(table))
    table.world_size = 1
    shards = read_gradients(table)
    if not shards:
        warn_if_nothing_trains(parameters, table)
        if clips:
            warn_if_elsewhere(function, table)
    return table, shards


def _raise_if_nonfinite(totals: Totals, error_if_nonfinite: bool) -> None:
    if error_if_nonfinite and not totals.read(Fact(totals.norm.isfinite())):
        raise NonFiniteError(
            f"The total norm of order {totals.norm_type} for gradients from `parameters` is {float(totals.norm)}, so "
            "it cannot be clipped. No gradient was changed. Pass error_if_nonfinite=False to scale by it all the same."
        )
