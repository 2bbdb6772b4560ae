"""Decide about isolated groups, each of which has its own policy, state and verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..devices import device_constant
from ..errors import ArgumentError
from ..norms.reduce import Totals
from ..norms.spec import NormSpec
from .description import describe
from .fixed import Fixed
from .norm_policy import NormPolicy
from .policy import Policy, State, Verdict
from .restart import where_slot

__all__ = ["REST", "SEPARATOR", "Isolated", "check_group_policy", "split_policy"]

REST = "rest"
"""Group of all parameters that are in no other group. It is the last one."""

SEPARATOR = "/"
"""Character between the name of a group and that of a parameter."""


@dataclass(frozen=True)
class _Batch:
    """Groups with equal policies, which are evaluated together.

    Args:
        policy: with per="model", applied to each slot.
        slots: of the groups.
        is_own: whether the policy is one of distclip's, which decides about each slot independently.
    """

    policy: Any
    slots: tuple[int, ...]
    is_own: bool


@dataclass(frozen=True)
class GroupVerdicts:
    """Decisions about all groups.

    Args:
        coefs: (slots,), coefficients.
        bounds: (slots,), the largest norm allowed for each group, inf for no bound.
        skips: (slots,) bool, true for a group whose policy skips the step.
    """

    coefs: Tensor
    bounds: Tensor
    skips: Tensor


class Isolated:
    """Policy of several groups, each with a policy for one norm.

    Args:
        policies: {name of the group: policy}. The last one is that of `REST`.
        as_checked: wraps a user's policy into one that checks its verdicts.
    """

    def __init__(self, policies: Mapping[str, Policy], as_checked: Any) -> None:
        self.policies = dict(policies)
        self._batches: list[_Batch] = []
        slots_of: dict[tuple[bool, Any], list[int]] = {}
        checked: dict[tuple[bool, Any], Any] = {}
        for slot, policy in enumerate(self.policies.values()):
            is_own = type(policy) is NormPolicy and policy.has_own_rule
            key = (is_own, repr(policy) if is_own else slot)
            slots_of.setdefault(key, []).append(slot)
            checked.setdefault(key, as_checked(policy))
        for key, slots in slots_of.items():
            self._batches.append(_Batch(checked[key], tuple(slots), key[0]))

    def __repr__(self) -> str:
        policies = ", ".join(f"{name!r}: {describe(policy)}" for name, policy in self.policies.items())
        return f"{{{policies}}}"

    @cached_property
    def spec(self) -> NormSpec:
        """Norms that the policy needs: one for each group."""
        specs = [policy.spec for policy in self.policies.values()]
        groups = dict.fromkeys((name for name in self.policies if name != REST), "")
        per: Any = "group" if groups else "model"
        needs_weights = any(spec.needs_weights for spec in specs)
        return NormSpec(specs[0].norm_type, per, groups, needs_weights=needs_weights, groups_are_prefixes=True)

    def init(self, slots: int, device: torch.device) -> State:
        """Return the states of all groups before the first step, by batch and key."""
        state: State = {}
        for i, batch in enumerate(self._batches):
            parts = batch.policy.init(len(batch.slots), device)
            state |= {f"{i}.{key}": value for key, value in parts.items()}
        return state

    def decide(self, totals: Totals, state: State) -> tuple[Verdict, State]:
        """Return a verdict for all groups together, and the state after this step."""
        finite = totals.powers.isfinite()
        verdicts, new_state = self.decide_each(totals, state, finite, finite)
        return Verdict(verdicts.coefs, bounds=verdicts.bounds, max_coef=float("inf")), new_state

    def decide_each(self, totals: Totals, state: State, finite: Tensor, usable: Tensor) -> tuple[GroupVerdicts, State]:
        """Return the verdict on each group, and the state after this step.

        Args:
            totals: with a norm for each group.
            state: before this step.
            finite: (slots,) bool, true for a group whose norm is finite.
            usable: (slots,) bool, true for a group whose state may change.

        Collectives: none. Host syncs: none for distclip's own policies.
        """
        norms = totals.norms
        coefs, bounds = torch.ones_like(norms), torch.full_like(norms, float("inf"))
        skips = torch.zeros_like(finite)
        new_state = dict(state)
        for i, batch in enumerate(self._batches):
            everything = len(batch.slots) == len(norms)
            index = device_constant(batch.slots, norms.device, torch.int64)
            part = totals if everything else _select(totals, index)
            part = replace(part, norm_type=part.norm_type)
            own_finite = finite if everything else finite[index]
            own_usable = usable if everything else usable[index]
            own = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{i}.")}
            if batch.is_own:
                # A rule that reads the norm of the whole model must get that of its group.
                vars(part)["norm"] = part.norms
                verdict, after = batch.policy.decide_each(part, own, own_finite)
            else:
                verdict, after = batch.policy.decide(part, own)
            if verdict.skip is not None:
                skips[index] = verdict.skip if isinstance(verdict.skip, Tensor) else bool(verdict.skip)
            if everything:
                # Usually all groups have equal policies, and there is nothing to scatter.
                coefs = verdict.coefs.expand(norms.shape)
                bounds = bounds if verdict.bounds is None else verdict.bounds.expand(norms.shape)
            else:
                coefs[index] = verdict.coefs
                if verdict.bounds is not None:
                    bounds[index] = verdict.bounds
            new_state |= {f"{i}.{key}": where_slot(own_usable, value, own[key]) for key, value in after.items()}
        return GroupVerdicts(coefs, bounds, skips), new_state

    def mask_valid(self, state: State) -> dict[str, Tensor]:
        """Return masks of the valid values of a loaded state, see `Rule.mask_valid`."""
        masks: dict[str, Tensor] = {}
        for i, batch in enumerate(self._batches):
            own = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{i}.")}
            masks |= {f"{i}.{key}": mask for key, mask in batch.policy.mask_valid(own).items()}
        return masks

    def policy_of(self, name: str) -> Any:
        """Return the policy of a group, wrapped so that its verdicts are checked."""
        slot = list(self.policies).index(name)
        return next(batch.policy for batch in self._batches if slot in batch.slots)

    def state_of(self, name: str, state: State) -> State:
        """Return one group's part of a state, as a state with one slot."""
        i, row = self._row_of(name)
        keys = [key for key in state if key.startswith(f"{i}.")]
        return {key.partition(".")[2]: state[key][row : row + 1] for key in keys}

    def with_state_of(self, name: str, state: State, values: State) -> State:
        """Return a copy of a state in which one group has new values."""
        i, row = self._row_of(name)
        new_state = dict(state)
        for key, value in values.items():
            column = state[f"{i}.{key}"].clone()
            column[row : row + 1] = value
            new_state[f"{i}.{key}"] = column
        return new_state

    def _row_of(self, name: str) -> tuple[int, int]:
        slot = list(self.policies).index(name)
        return next((i, batch.slots.index(slot)) for i, batch in enumerate(self._batches) if slot in batch.slots)


def _select(totals: Totals, index: Tensor) -> Totals:
    weight_powers = None if totals.weight_powers is None else totals.weight_powers[index]
    return replace(totals, powers=totals.powers[index], weight_powers=weight_powers)


def split_policy(policy: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """Split a policy into the patterns of its groups and a policy for each.

    Args:
        policy: a `NormPolicy` with per="group", or the policy of all parameters.

    Returns:
        {group: regular expression}, and {group: policy for one norm}, with that of `REST` last.

    >>> patterns, policies = split_policy(NormPolicy(Fixed((1.0, 2.0)), per="group", groups={"a": "x"}))
    >>> patterns, policies["rest"].threshold
    ({'a': 'x'}, Fixed(max_norm=2.0))
    """
    if type(policy) is not NormPolicy or policy.per != "group":
        return {}, {REST: policy}
    threshold, names = policy.threshold, (*policy.groups, REST)
    many = type(threshold) is Fixed and isinstance(threshold.max_norm, Sequence)
    bounds: Any = threshold.max_norm if type(threshold) is Fixed else ()
    if many and len(bounds) not in (1, len(names)):
        raise ArgumentError(
            f"max_norm={bounds!r:.80}: {len(bounds)} bounds for {len(names)} groups. Use one number for all of them, "
            "or one for each."
        )
    thresholds = [Fixed(bounds[i if len(bounds) > 1 else 0]) if many else threshold for i in range(len(names))]
    single = [replace(policy, threshold=one, per="model", groups={}, isolate=False) for one in thresholds]
    return dict(policy.groups), dict(zip(names, single, strict=True))


def check_group_policy(name: str, policy: Any, norm_type: float | None) -> None:
    """Raise unless a policy can decide about the norm of one group.

    Args:
        name: of the group.
        policy: any object.
        norm_type: p of the other groups. None for any.

    Raises:
        ArgumentError: see above.
    """
    if isinstance(policy, type) or not isinstance(policy, Policy) or type(policy.spec) is not NormSpec:
        raise ArgumentError(
            f"policy={policy!r:.80}: not a policy for the group {name!r}. Pass distclip.global_norm(1.0), for example."
        )
    spec = policy.spec
    if spec.moment_eps is not None:
        raise ArgumentError(
            f"policy={describe(policy)}: the group {name!r} is decided about alone, and the policy reads the "
            "optimizer. Use update_clip without isolate=True."
        )
    if spec.per != "model" or spec.exclude or spec.limits is not None:
        kind = f"per={spec.per!r}" if spec.per != "model" else "exclude=" if spec.exclude else "limits of elements"
        raise ArgumentError(
            f"policy={describe(policy)}: the group {name!r} has one norm with isolate=True, and the policy has {kind}. "
            'Use per="model", without exclude=.'
        )
    if norm_type is not None and spec.norm_type != norm_type:
        raise ArgumentError(
            f"policy={describe(policy)}: the group {name!r} has norm_type={spec.norm_type}, and the others have "
            f"{norm_type}. Use one norm_type, because one all-reduce measures all groups."
        )
