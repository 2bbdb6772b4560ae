"""Run the stages of a step with tensors alone, for `torch.compile` to trace instead of the engine.

No function here reads a number on the host, so the graph is the same for all numbers. The policy's state and the
counters are written in place, so that the next replay of the graph continues from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..apply.optimizers import as_list
from ..devices import Fact, accumulation_dtype, lacks_real_tensors
from ..engine import Engine
from ..norms.kernels.torch_ops import combine
from ..norms.reduce import Totals, root
from ..norms.watch import Watch, WatchedTotals
from ..outcome import Report, make_report
from ..sharding.dtensor import is_dtensor
from . import ops
from .optimizers import local_tensors, reason_against_optimizer
from .optimizers import step_ as step_optimizer_
from .plan import GraphPlan

__all__ = ["all_reduce", "clip", "maximum", "reason_against_clip", "reason_against_step", "step"]


@torch.no_grad()
def clip(engine: Engine, plan: GraphPlan, watch: Any) -> Report:
    """Clip in place, see `GradClipper.clip`. The gradients of a skipped step become 0.

    Args:
        engine, plan: of the clipper.
        watch: see `GradClipper.step`.
    """
    positions, grads = _gradients(plan)
    report, factors, skip, limits = _decide(engine, plan, positions, grads, watch)
    _write_(plan, grads, factors, limits)
    if plan.leaves_step_out:
        # The host cannot drop the gradients in a graph, and a step must not move parameters by NaN.
        ops.zero_where_(grads, skip)
    return report


@torch.no_grad()
def step(engine: Engine, plan: GraphPlan, optimizer: Optimizer | Iterable[Optimizer], watch: Any) -> Report:
    """Clip and step, or skip, see `GradClipper.step`.

    Args:
        engine, plan: of the clipper.
        optimizer, watch: see `GradClipper.step`.
    """
    positions, grads = _gradients(plan)
    report, factors, skip, limits = _decide(engine, plan, positions, grads, watch)
    _write_(plan, grads, factors, limits)
    found_inf = skip.to(torch.float32)
    for one in as_list(optimizer):
        step_optimizer_(one, found_inf)
    return report


def reason_against_clip(plan: GraphPlan | None, reasons: list[str]) -> str | None:
    """Return the reason why this call of `clip` or `step` cannot be in a graph, or None.

    Args:
        plan: of the clipper. None without one.
        reasons: reasons that apply to all calls of the clipper.
    """
    if plan is None or reasons:
        return f"it cannot be a graph, because {reasons[0]}"
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        return "torch.export with strict=False replaces the parameters that the clipper has: pass strict=True"
    if lacks_real_tensors():
        return (
            "the state of the clipper is in real tensors, and the graph is traced from fake ones: pass "
            'tracing_mode="real" to make_fx, or _allow_non_fake_inputs=True'
        )
    if all(param.grad is None for param in plan.params):
        return "no parameter has a gradient: call backward before"
    for i, param in enumerate(plan.params):
        grad: Any = param.grad
        # The layout of a gradient is a constant of the graph, and must be the one from which replicas were counted.
        if grad is not None and is_dtensor(grad) and not (is_dtensor(param) and grad.placements == param.placements):
            return f"the gradient of {plan.names[i]} has other placements than the parameter"
    return None


def reason_against_step(optimizer: Any, scaler: Any) -> str | None:
    """Return the reason why these arguments of `step` cannot be in a graph, or None."""
    if scaler is not None:
        return "the host reads the found_inf of a GradScaler: train in bfloat16 without one"
    for one in as_list(optimizer):
        if (reason := reason_against_optimizer(one)) is not None:
            return reason
    return None


def _gradients(plan: GraphPlan) -> tuple[list[int], list[Tensor]]:
    """Return the positions of the parameters with gradients, and their local gradients."""
    positions = [i for i, param in enumerate(plan.params) if param.grad is not None]
    return positions, local_tensors([plan.params[i].grad for i in positions])


def _decide(
    engine: Engine, plan: GraphPlan, positions: list[int], grads: list[Tensor], watch: Any
) -> tuple[Report, Tensor, Tensor, tuple[float, float] | None]:
    """Run stages 1 to 5.

    Returns:
        The report, a factor for each gradient or one for all, whether the step is skipped, and limits of elements.
    """
    device = grads[0].device
    # 2. The power sums of this rank, and 3. the sums over ranks.
    totals = _measure(plan, positions, grads, watch)
    finite = totals.finite.on(device)

    # 4. The policy.
    verdict, new_state = engine.policy.decide(totals, {key: value.to(device) for key, value in engine.state.items()})
    coefs = verdict.coefs
    if plan.excluded is not None:
        coefs = torch.where(plan.excluded, 1.0, coefs)

    # 5. A skipped step leaves no trace in the policy's state.
    skip = torch.zeros_like(finite)
    if plan.leaves_step_out:
        skip = ~finite
        new_state = {key: torch.where(finite, value, engine.state[key].to(device)) for key, value in new_state.items()}
    for key, value in new_state.items() if device.type != "meta" else ():
        engine.state[key].copy_(value)
    if verdict.skip is not None:
        skip = skip | (verdict.skip & finite)
    coefs = torch.where(skip, torch.ones_like(coefs), coefs)

    steps, skipped, in_a_row = plan.counts.unbind()
    number = skip.to(torch.int64)
    plan.counts.copy_(torch.stack([steps + 1, skipped + number, (in_a_row + 1) * number]))
    plan.has_run = True
    # The state to which an undo would return may be in these same tensors.
    engine.forget_undo()
    report = make_report(totals, coefs, verdict.bounds, skip, finite, has_fp64=plan.has_fp64)
    factors = coefs
    if len(coefs) > 1:
        factors = coefs[_at(plan.slot_index, positions)]
    return report, factors, skip, verdict.limits


def _measure(plan: GraphPlan, positions: list[int], grads: list[Tensor], watch: Any) -> Totals:
    """Run stages 1 to 3."""
    parts = [_sum_powers(plan, grads, positions)]
    if plan.needs_weights:
        weights = local_tensors([param.detach() for param in plan.params if param.requires_grad])
        trained = [i for i, param in enumerate(plan.params) if param.requires_grad]
        parts.append(_sum_powers(plan, weights, trained))
    vectors = torch.cat(parts) if len(parts) > 1 else parts[0]
    watched = Watch.checked(watch)
    numbers = watched.write(vectors, plan)
    beyond = None
    if plan.limits is not None:
        low, high = plan.limits
        beyond = torch.stack([_is_beyond(grad, low, high, plan.magnitudes).any() for grad in grads]).any()
    if plan.size > 1:
        vectors, numbers, beyond = _add_over_ranks(plan, vectors, numbers, beyond)
    scalars: WatchedTotals = watched.read(numbers, plan)
    powers = vectors[: plan.num_slots]
    # All arguments are passed, because torch.compile cannot trace a default that is an object.
    totals = Totals(
        powers,
        plan.norm_type,
        weight_powers=vectors[plan.num_slots :] if plan.needs_weights else None,
        loss_scale=None,
        watch=scalars,
        **plan.facts,
    )
    if beyond is not None:
        totals.out_of_limits = Fact(beyond.to(grads[0].device))
    # torch.compile cannot trace cached properties either, so they are set here.
    totals.norms = root(powers, plan.norm_type)
    totals.norm = totals.norms[0] if plan.num_slots == 1 else root(combine(powers, plan.norm_type), plan.norm_type)
    if totals.weight_powers is not None:
        totals.weight_norms = root(totals.weight_powers, plan.norm_type)
    totals.powers_finite = Fact(powers.isfinite().all())
    totals.finite = totals.powers_finite & scalars.finite
    return totals


def _is_beyond(grad: Tensor, low: float, high: float, magnitudes: bool) -> Tensor:
    if magnitudes:
        size = grad.abs()
        return ((size < low) & (grad != 0)) | (size > high)
    return (grad < low) | (grad > high)


def _at(constants: Tensor, positions: list[int]) -> Tensor:
    """Return the elements of a constant at some positions."""
    return constants if len(positions) == len(constants) else torch.stack([constants[i] for i in positions])


def _sum_powers(plan: GraphPlan, tensors: list[Tensor], positions: list[int]) -> Tensor:
    """Return the power sums of this rank by slot, see `norms.measure`."""
    norm_type, num_slots = plan.norm_type, plan.num_slots
    sums: Tensor = ops.power_sums(tensors, norm_type)
    is_maximum = norm_type in (math.inf, -math.inf)
    if not is_maximum and any(plan.num_replicas[i] != 1 for i in positions):
        sums = sums / _at(plan.replica_counts, positions)
    if num_slots == 1:
        return sums.amax(0, keepdim=True) if is_maximum else sums.sum(0, keepdim=True)
    # Slot by slot, so that the order of each sum is always the same.
    by_slot = []
    for slot in range(num_slots):
        members = [sums[i] for i, position in enumerate(positions) if plan.slots[position] == slot]
        if not members:
            by_slot.append(sums.new_full((), -math.inf if norm_type == -math.inf else 0.0))
            continue
        total = members[0]
        for member in members[1:]:
            total = torch.maximum(total, member) if is_maximum else total + member
        by_slot.append(total)
    return torch.stack(by_slot)


def _add_over_ranks(
    plan: GraphPlan, vectors: Tensor, numbers: Tensor | None, beyond: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Add up the message of all ranks: one all-reduce, and another one for p = ±inf."""
    is_maximum = plan.norm_type in (math.inf, -math.inf)
    parts = [] if is_maximum else [vectors]
    parts += [] if numbers is None else [numbers]
    parts += [] if beyond is None else [beyond.to(vectors).view(1)]
    if parts:
        buffer = all_reduce(torch.cat(parts), "sum", plan.group_name)
        first = 0 if is_maximum else len(vectors)
        if not is_maximum:
            vectors = buffer[:first]
        if numbers is not None:
            numbers = buffer[first : first + len(numbers)]
        if beyond is not None:
            beyond = buffer[-1] > 0
    if is_maximum:
        vectors = maximum(vectors, [plan.group_name])
    return vectors, numbers, beyond


def maximum(values: Tensor, group_names: Sequence[str]) -> Tensor:
    """Return the maximum of values over the ranks of several groups, one after the other.

    Args:
        values: (n,), of this rank.
        group_names: of process groups.
    """
    # A maximum over ranks may drop a NaN, so a second half marks where NaN is, see `norms.message.maximum`.
    nan = values.isnan()
    halves = torch.cat([values.masked_fill(nan, -math.inf), nan.to(values.dtype)])
    for name in group_names:
        halves = all_reduce(halves, "max", name)
    n = len(values)
    return halves[:n].masked_fill(halves[n:] > 0, math.nan)


def all_reduce(tensor: Tensor, op: str, group_name: str) -> Tensor:
    """Reduce a tensor over the ranks of a group, by a collective that a graph can contain."""
    reduced: Tensor = torch.ops._c10d_functional.wait_tensor(
        torch.ops._c10d_functional.all_reduce(tensor, op, group_name)
    )
    return reduced


def _write_(plan: GraphPlan, grads: list[Tensor], factors: Tensor, limits: tuple[float, float] | None) -> None:
    """Scale gradients, and clamp their elements."""
    ops.scale_(grads, factors.to(accumulation_dtype(grads[0].device)))
    if limits is not None:
        ops.clamp_(grads, *limits, plan.magnitudes)
