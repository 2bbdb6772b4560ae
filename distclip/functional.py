"""The drop-ins for torch.nn.utils: composition, no algorithm of its own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from types import GeneratorType

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .apply.scale import clamp_, scale_
from .call import Measured, agree, total
from .comm import Comm
from .comm.consensus import FirstError
from .comm.ranks import Axis
from .errors import NonFiniteError
from .policies import Fixed, NormPolicy, coefficient, global_norm, value
from .sharding import Plan, gradient_plan, parameter_plan, recent_plan, split_axes
from .sharding.parameters import Parameters
from .sharding.shard import Shards
from .sharding.split_over import SplitOver

__all__ = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]


@_disable_dynamo
@torch.no_grad()
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
    r"""Clip the norm of the whole gradient of a model, wherever its pieces lie.

    .. math:: g \leftarrow g \cdot \min\left(1, \frac{max\_norm}{\lVert g \rVert_p + 10^{-6}}\right)

    where g is the one true gradient of the model: every element counted once, shards added up, copies not.

    Args:
        parameters: a module (FSDP1 needs the wrapped root), a tensor, or an iterable of tensors or (name, tensor)
            pairs; gradients of any floating or complex dtype, dense or sparse, on any mesh, also None.
        max_norm: ≥ 0; `inf` only measures and never writes.
        norm_type: p; any number, `inf` for the largest element.
        error_if_nonfinite: raise, on every rank, if the norm is NaN or infinite, and leave the gradients as they are.
            Otherwise they are multiplied by the coefficient that follows, NaN or 0, as torch does.
        foreach: use torch's multi-tensor operators to scale, or do not; None for what is fastest.
        split_over: axes along which ranks hold *different* parameters and no placement says so: mesh["pp"] for
            pipeline stages, the expert group for experts kept as plain tensors. A DeviceMesh, a ProcessGroup, an
            MPIComm, several, or {name: one of them}; every rank passes its own slice of the same axes.
        comm: add up over this communicator, for example `distclip.comm.mpi.MPIComm()`, instead of the one derived from
            meshes and `split_over`. Every rank of it makes the call, with the same p.

    Returns:
        The norm before clipping: a plain 0-d tensor on the gradients' device, float32 (float64 if any rank has a
        float64 gradient; on a CPU also where float32 cannot hold it), the same bits on every rank.

    Raises:
        ArgumentError: a negative or NaN bound, no p-norm, something that holds no tensors, a mesh without this rank.
        LayoutError: parameters that do not say where they lie (bare FSDP1 parameters).
        DisagreementError: ranks passed different `split_over`.
        NonFiniteError: see `error_if_nonfinite`.
        All of them on every rank that takes part; on an accelerator, where no host waits for the others (see host
        syncs), on the rank that failed, while the others leave their gradients as they are (and raise PeerError with
        `error_if_nonfinite`).

    Collectives: one all-reduce of two float64 numbers over everybody concerned, whatever the meshes; none where nothing
    is spread (one process, DDP). More only if a gradient is Partial: see `distclip.settle`. The first call with
    new meshes exchanges who they are through the store of torch.distributed.
    Host syncs: none on CUDA, except one with `error_if_nonfinite`, `split_over`, `comm` or tensor-parallel replicas.

    Source: Pascanu, Mikolov, Bengio 2013, algorithm 1; the signature and the 1e-6 are torch.nn.utils.clip_grad_norm_'s.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([weight], max_norm=1.0)
    tensor(5.)
    >>> weight.grad
    tensor([0.6000, 0.8000])
    """
    attempt = FirstError()
    # The p that was asked for also where max_norm is refused: it decides which collective the others are in.
    policy = (
        attempt.run(global_norm, max_norm, norm_type) or attempt.run(global_norm, math.inf, norm_type) or global_norm()
    )
    measured = _measured(attempt, recent_plan, parameters, policy, split_over, comm)
    if isinstance(parameters, GeneratorType) and not measured.passed:
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    _refuse_nonfinite(measured, policy.norm_type, error_if_nonfinite)
    verdict, _ = policy.decide(measured.totals, {})
    scale_(measured.shards, measured.guard(verdict.coefs), foreach)
    return measured.presented()


@_disable_dynamo
@torch.no_grad()
def get_total_norm(
    tensors: Parameters,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    split_over: SplitOver = None,
    comm: Comm | None = None,
) -> Tensor:
    r"""The norm of tensors taken together, :math:`(\sum |t|^p)^{1/p}`, wherever their pieces lie.

    Args:
        tensors: usually gradients: a tensor, or an iterable of tensors or (name, tensor) pairs. A DTensor is the one
            tensor that its placements mean; a plain one is replicated, or different along `split_over`.
        norm_type: p; any number, `inf` for the largest element.
        error_if_nonfinite: raise, on every rank, if the norm is NaN or infinite.
        foreach: accepted for the signature's sake; the sums are made one way.
        split_over: see `clip_grad_norm_`.
        comm: see `clip_grad_norm_`.

    Returns:
        The norm: see `clip_grad_norm_`.

    Raises, Collectives, Host syncs: see `clip_grad_norm_`. A rank that passes nothing at all still takes part if it
    passes `split_over`; without, it cannot know that others do: prefer passing parameters to `clip_grad_norm_`.

    >>> get_total_norm([torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.bfloat16)])
    tensor(5.)
    """
    attempt = FirstError()
    policy = attempt.run(global_norm, math.inf, norm_type) or global_norm()
    measured = _measured(attempt, gradient_plan, tensors, policy, split_over, comm)
    _refuse_nonfinite(measured, policy.norm_type, error_if_nonfinite)
    return measured.presented()


@_disable_dynamo
@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Parameters, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    r"""Scale gradients by :math:`\min(1, max\_norm / (total\_norm + 10^{-6}))`, a norm that is known already.

    Args:
        parameters: see `clip_grad_norm_`.
        max_norm: ≥ 0; `inf` never writes.
        total_norm: 0-d, as `get_total_norm` returns it, the same on every rank.
        foreach: see `clip_grad_norm_`.

    Raises:
        ArgumentError: a negative or NaN bound, something that holds no tensors.

    Collectives: none. Host syncs: none.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grads_with_norm_(weight, 1.0, torch.tensor(10.0))
    >>> weight.grad
    tensor([0.3000, 0.4000])
    """
    norm = torch.as_tensor(total_norm)
    bound = torch.tensor(Fixed(max_norm).max_norm, dtype=torch.float64)
    scale_(_local_shards(parameters), coefficient(norm, bound), foreach)


@_disable_dynamo
@torch.no_grad()
def clip_grad_value_(
    parameters: Parameters, clip_value: float | tuple[float, float], foreach: bool | None = None
) -> None:
    r"""Clamp every gradient element to [−clip_value, clip_value], or to [low, high].

    Args:
        parameters: see `clip_grad_norm_`. Every rank clamps the pieces it holds.
        clip_value: ≥ 0, or a pair (low, high).
        foreach: use torch's multi-tensor operators; None lets the device decide.

    Raises:
        ArgumentError: a negative or NaN bound, a lower bound above the upper one, something that holds no tensors.
        LayoutError: a gradient that cannot be clamped element by element (complex, or Partial).

    Collectives: none. Host syncs: none.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([-3.0, 4.0])
    >>> clip_grad_value_(weight, (-1.0, 2.0))
    >>> weight.grad
    tensor([-1.,  2.])
    """
    bounds = value(*clip_value) if isinstance(clip_value, tuple) else value(clip_value)
    clamp_(_local_shards(parameters), bounds.low, bounds.high, foreach)


def _measured(
    attempt: FirstError,
    make_plan: Callable[[Parameters, tuple[Axis, ...]], Plan],
    tensors: Parameters,
    policy: NormPolicy,
    split_over: SplitOver,
    comm: Comm | None,
) -> Measured:
    """One call of a functional drop-in up to its totals; everything found wrong is raised by all ranks together."""
    axes = attempt.run(split_axes, split_over, comm) or ()
    plan = attempt.run(make_plan, tensors, axes) or Plan.empty(axes)
    everybody = agree(plan, comm, attempt)
    return total(plan, policy.norm_type, everybody, attempt.error)


def _local_shards(parameters: Parameters) -> Shards:
    """This rank's pieces, for what needs no other rank."""
    plan = parameter_plan(parameters, None)
    return plan.shards(1)


def _refuse_nonfinite(measured: Measured, norm_type: float, error_if_nonfinite: bool) -> None:
    if error_if_nonfinite and not measured.learn(measured.norm.isfinite()):
        raise NonFiniteError(
            f"The total norm of order {norm_type} for gradients from `parameters` is {float(measured.norm)}, so it "
            "cannot be clipped; no gradient was changed. Pass error_if_nonfinite=False to scale by it all the same."
        )
