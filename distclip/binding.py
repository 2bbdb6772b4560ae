"""From a clipper's arguments to its judge: who holds what, and what has a norm of its own, settled between ranks."""

from __future__ import annotations

import re
from typing import Any, get_args

import torch.distributed as dist
from torch import nn

from .call import Attempt, agree, check_same, meet
from .comm import Comm, ranks_of
from .errors import ArgumentError, DisagreementError
from .judge import Judge
from .nonfinite import OnNonFinite, Watch
from .policies import Policy
from .slots import Found, Slots, arrange, find
from .sources import Plan, parameter_plan, split_axes
from .sources.arguments import Parameters
from .sources.flat import flat_slices, marked_slices
from .sources.split import SplitOver

__all__ = ["bind"]


def bind(
    parameters: Parameters,
    policy: Policy,
    split_over: SplitOver,
    comm: Comm | None,
    on_nonfinite: OnNonFinite,
    watch: Watch,
    flat_grads: bool,
) -> Judge:
    """A judge over the gradients of some parameters; arguments and errors are `GradClipper`'s.

    Args:
        watch: counts and warns; it has `max_skips`.

    Collectives: one gather; without `comm` an exchange through the store of torch.distributed before it.
    """
    attempt = Attempt()
    attempt(_check, policy, on_nonfinite, watch.max_skips)
    axes = attempt(split_axes, split_over, comm) or ()
    plan = attempt(parameter_plan, parameters, axes) or Plan.empty(axes)
    everybody = agree(plan, comm, attempt)
    found = attempt(_find, parameters, plan, policy, everybody) or []
    # Where an object lies in memory says nothing.
    asked = re.sub(r" at 0x\w+", "", f"{policy!r}, on_nonfinite={on_nonfinite!r}, max_skips={watch.max_skips}")
    told = meet(everybody, attempt.failure or plan.failure, (asked, found, plan.axes))
    if len({other for other, _, _ in told}) > 1:
        raise DisagreementError(
            f"the ranks of one clipper were given different policies: {sorted({other for other, _, _ in told})}. "
            "Write the same on each."
        )
    check_same([axes for _, _, axes in told], everybody)
    slots = _arrange([said for _, said, _ in told], everybody.rank, policy)
    plan.arrangement.assign(slots.places)
    plan.flatten = flat_grads
    return Judge(plan, everybody, policy, slots, on_nonfinite, watch)


def _check(policy: Any, on_nonfinite: Any, max_skips: Any) -> None:
    if not isinstance(policy, Policy):
        raise ArgumentError(
            f"policy={policy!r:.80}: expected a policy. Write distclip.global_norm(1.0) or distclip.value(0.5)."
        )
    if not policy.norm_type > 0:
        raise ArgumentError(
            f"norm_type={policy.norm_type}: NaN and Inf would not show in such a norm. Write a p above 0, or inf."
        )
    if on_nonfinite not in get_args(OnNonFinite):
        raise ArgumentError(f"on_nonfinite={on_nonfinite!r}: write one of {', '.join(get_args(OnNonFinite))}.")
    if max_skips is not None and (not isinstance(max_skips, int) or max_skips < 1):
        raise ArgumentError(f"max_skips={max_skips!r}: write how many skipped steps in a row are too many, or None.")


def _find(parameters: Any, plan: Plan, policy: Policy, comm: Comm) -> list[Found]:
    """What the other ranks have to know of this one's parameters."""
    if policy.per == "model" and not getattr(policy, "exclude", ()):
        return []
    slices = marked_slices(plan.tensors)
    if policy.per in ("tensor", "row") and isinstance(parameters, nn.Module):
        slices |= flat_slices(parameters)
    here = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    rank = ranks_of(comm)[comm.rank] if hasattr(comm, "ranks") else here
    return find(plan, comm.size, rank, policy.per == "row", slices)


def _arrange(told: list[list[Found]], mine: int, policy: Policy) -> Slots:
    groups, exclude = getattr(policy, "groups", {}), getattr(policy, "exclude", ())
    return arrange(told, mine, policy.per, groups, exclude)
