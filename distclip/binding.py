"""From a clipper's arguments to its judge: who holds what, and what has a norm of its own, settled between ranks."""

from __future__ import annotations

import re
from typing import Any, get_args

from torch import nn

from .call import agree
from .comm import Comm
from .comm.consensus import FirstError, check_same_axes, gather_or_raise
from .comm.discovery import global_rank
from .errors import ArgumentError, DisagreementError
from .judge import Judge
from .nonfinite.culprits import OnNonFinite, SkipCounter
from .norms.by_tensor import ByTensor
from .policies import Policy
from .sharding import Plan, parameter_plan, split_axes
from .sharding.fsdp1 import flat_slices, marked_slices
from .sharding.parameters import Parameters
from .sharding.slots import Found, Slots, arrange, find, within
from .sharding.split_over import SplitOver

__all__ = ["bind", "measure_tensors"]


def bind(
    parameters: Parameters,
    policy: Policy,
    split_over: SplitOver,
    comm: Comm | None,
    on_nonfinite: OnNonFinite,
    watch: SkipCounter,
    flat_grads: bool,
) -> Judge:
    """A judge over the gradients of some parameters; arguments and errors are `GradClipper`'s.

    Args:
        watch: counts and warns; it has `max_skips`.

    Collectives: one gather; without `comm` an exchange through the store of torch.distributed before it.
    """
    attempt = FirstError()
    attempt.run(_check, policy, on_nonfinite, watch.max_skips)
    axes = attempt.run(split_axes, split_over, comm) or ()
    plan = attempt.run(parameter_plan, parameters, axes) or Plan.empty(axes)
    everybody = agree(plan, comm, attempt)
    found = attempt.run(_find, parameters, plan, policy, everybody) or []
    # Where an object lies in memory says nothing.
    asked = re.sub(r" at 0x\w+", "", f"{policy!r}, on_nonfinite={on_nonfinite!r}, max_skips={watch.max_skips}")
    told = gather_or_raise(everybody, attempt.error or plan.failure, (asked, found, plan.axes))
    if len({other for other, _, _ in told}) > 1:
        raise DisagreementError(
            f"the ranks of one clipper were given different policies: {sorted({other for other, _, _ in told})}. "
            "Write the same on each."
        )
    check_same_axes([axes for _, _, axes in told], everybody)
    slots = _arrange([said for _, said, _ in told], everybody.rank, policy)
    plan.arrangement.assign(slots.places)
    plan.flatten = flat_grads
    return Judge(plan, everybody, policy, slots, on_nonfinite, watch)


def measure_tensors(judge: Judge) -> None:
    """From now on, have the norm of every parameter beside those that the policy asks for.

    Collectives: one gather, unless the policy asks for them anyway.
    """
    policy, slots = judge.policy, judge.slots
    if policy.spec.per in ("tensor", "row"):
        rows = [i for i, count in enumerate(slots.counts) for _ in range(count)]
        parameters = ByTensor.places(rows) if policy.spec.per == "row" else None
        judge.by_tensor = ByTensor(slots.names, None, parameters, slots.total, slots.total)
        return
    attempt = FirstError()
    found = attempt.run(find, judge.plan, judge.comm.size, global_rank(judge.comm), False, {}) or []
    told = gather_or_raise(judge.comm, attempt.error or judge.plan.failure, found)
    fine = arrange(told, judge.comm.rank, "tensor", {}, ())
    part_of = within(told, policy.spec.groups, policy.spec.exclude)
    judge.plan.arrangement.assign(fine.places)
    judge.by_tensor = ByTensor(fine.names, ByTensor.places(part_of), None, fine.total, slots.total)


def _check(policy: Any, on_nonfinite: Any, max_skips: Any) -> None:
    if not isinstance(policy, Policy):
        raise ArgumentError(
            f"policy={policy!r:.80}: expected a policy. Write distclip.global_norm(1.0) or distclip.value(0.5)."
        )
    if not policy.spec.norm_type > 0:
        raise ArgumentError(
            f"norm_type={policy.spec.norm_type}: NaN and Inf would not show in such a norm. Write a p above 0, or inf."
        )
    if on_nonfinite not in get_args(OnNonFinite):
        raise ArgumentError(f"on_nonfinite={on_nonfinite!r}: write one of {', '.join(get_args(OnNonFinite))}.")
    if max_skips is not None and (not isinstance(max_skips, int) or max_skips < 1):
        raise ArgumentError(f"max_skips={max_skips!r}: write how many skipped steps in a row are too many, or None.")


def _find(parameters: Any, plan: Plan, policy: Policy, comm: Comm) -> list[Found]:
    """What the other ranks have to know of this one's parameters."""
    if policy.spec.per == "model" and not policy.spec.exclude:
        return []
    slices = marked_slices(plan.tensors)
    if policy.spec.per in ("tensor", "row") and isinstance(parameters, nn.Module):
        slices |= flat_slices(parameters)
    return find(plan, comm.size, global_rank(comm), policy.spec.per == "row", slices)


def _arrange(told: list[list[Found]], mine: int, policy: Policy) -> Slots:
    spec = policy.spec
    return arrange(told, mine, spec.per, spec.groups, spec.exclude)
