r"""Clip by norm: a rule gives the bound of every slot, and a gradient with a larger norm is scaled down to it.

.. math:: coef_s = \min\left(1, \frac{bound_s}{norm_s + \varepsilon}\right)

Source: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", ICML 2013, algorithm 1.

A rule with a floor also scales smaller norms up to it. ε is 0 by default, so that a norm within its bound stays
unchanged, however small both are. A constant ε > 0 would shrink norms of about its size, and a mean of clipped norms
would follow them down to 0. Only `global_norm` has torch's ε, 1e-6.

`NormPolicy` protects every rule with state from four problems. A step with a non-finite norm leaves the state
unchanged. A norm of 0 leaves the state of its slot unchanged, because a tensor without a gradient gives no information
about later norms. A rule that has clipped more than half of its last steps restarts (see `restart.py`). A rule without
a cap whose norms explode during its warm-up restarts from the norms before the explosion (see `warmup.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import torch
from torch import Tensor

from ..devices import accumulation_dtype, host_reads_free, on_one_thread
from ..errors import ArgumentError
from ..norms.reduce import Totals
from ..norms.spec import NormSpec, Per, check_groups, check_patterns
from . import restart, warmup
from .custom import as_rule
from .policy import Rule, State, Threshold, Verdict
from .restart import init_window, mask_valid_window, restart_where_stuck, where_slot
from .validation import NOT_NEGATIVE, Range, convert_fields, to_float
from .warmup import LEAST_WARMUP, init_first_norms, mask_valid_first_norms, restart_where_exploded

__all__ = ["WATCH_PREFIX", "NormPolicy", "coefficient"]

WATCH_PREFIX = "watch_"
"""Beginning of the keys of a watched scalar in the state."""


@dataclass(frozen=True, slots=True)
class NormPolicy:
    """Scale the gradients of every slot down to a bound on their norm.

    Args:
        threshold: the rule that gives the bounds, an object with the two methods of `Threshold`.
        norm_type: p of the norm: any number > 0, `inf` for the largest element.
        per: granularity, "model", "group", "tensor" or "row" (see `Per`). Each unit has a slot.
        groups: for per="group", {name: regular expression that is searched in parameter names}. A parameter belongs to
            the first group that matches. All parameters without a match form the last group, "rest". Instead of an
            expression, a group can be a reference: an optimizer, one of its `param_groups`, a module or a list of
            tensors. For a list of optimizers or `param_groups`, the groups get names automatically. If all groups are
            references, every parameter must be in one of them, and there is no "rest".
        exclude: a regular expression, or several. Parameters with a matching name are measured but never clipped.
        eps: ε, ≥ 0. With 0, a norm within its bound is never scaled down. torch uses 1e-6.
        restart_after: number of steps after which the rule restarts if it has clipped more than half of them. 0 for
            never. Only a rule with `can_restart` restarts.
        skip: skip a step with a norm above the rule's bound instead of scaling it down. A norm that exceeds only the
            threshold's `cap` is scaled down in any case, because a cap that is too low must not stop training.
        isolate: for per="group", treat each group as if it were trained alone: its bound and state are separate, and a
            skip or a non-finite norm affects that group alone (see `GradClipper`). Otherwise a skip or a non-finite
            norm affects the whole step.
        watch: with skip=True, name of a watched scalar > 0, such as the loss (see `GradClipper.step`). The same rule
            keeps a second history, for this scalar, and a step whose value is above the resulting bound is skipped too.

    Raises:
        ArgumentError: an argument outside of its range, an invalid regular expression, or a threshold without the two
            methods.

    >>> NormPolicy(per="tensor")  # doctest: +ELLIPSIS
    NormPolicy(threshold=Fixed(max_norm=1.0), norm_type=2.0, per='tensor', ...)
    """

    threshold: Threshold = field(default_factory=lambda: _default_threshold())
    norm_type: float = 2.0
    per: Per = "model"
    groups: Mapping[str, str] = field(default_factory=dict)
    exclude: str | Sequence[str] = ()
    eps: float = 0.0
    restart_after: int = 128
    skip: bool = False
    isolate: bool = False
    watch: str | None = None
    _rule: Rule = field(init=False, repr=False, compare=False)
    _witness: NormPolicy | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        p = to_float(self.norm_type)
        if math.isnan(p):
            raise ArgumentError(
                f'norm_type={self.norm_type!r}: expected the p of a p-norm. Use norm_type=2.0, or norm_type="inf".'
            )
        object.__setattr__(self, "norm_type", p)
        convert_fields(self, eps=NOT_NEGATIVE, restart_after=Range(0, whole=True))
        object.__setattr__(self, "groups", check_groups(self.groups))
        object.__setattr__(self, "exclude", check_patterns("exclude", self.exclude))
        if self.skip not in (True, False):
            # Text from a configuration file, "false" for example, would be true.
            raise ArgumentError(f"skip={self.skip!r}: expected True or False. Use skip=False.")
        if self.isolate not in (True, False):
            raise ArgumentError(f"isolate={self.isolate!r}: expected True or False. Use isolate=True.")
        if self.isolate and self.per != "group":
            raise ArgumentError(
                f'isolate={self.isolate}: only groups can be isolated, and per={self.per!r}. Use per="group", or pass '
                "isolate=True to GradClipper and add groups."
            )
        if self.per not in get_args(Per):
            raise ArgumentError(f"per={self.per!r}: unknown granularity. Use {' or '.join(map(repr, get_args(Per)))}.")
        if (self.per == "group") != bool(self.groups):
            raise ArgumentError(
                f"groups={self.groups!r}: groups and per='group' need each other, and per={self.per!r}. "
                'Pass per="group", groups={"embedding": "embed"}, or neither.'
            )
        if self.watch is not None and not (isinstance(self.watch, str) and self.watch and self.skip):
            raise ArgumentError(
                f"watch={self.watch!r:.60} with skip={self.skip}: a spike of a scalar can only skip a step. Pass its "
                'name with skip=True: watch="loss", skip=True.'
            )
        if "rest" in self.groups:
            raise ArgumentError(
                f'groups={self.groups!r}: "rest" is the group of all parameters without a match. Use another name.'
            )
        object.__setattr__(self, "_rule", as_rule(self.threshold))
        if self.watch is not None and (self._rule.needs_weights or self._rule.moment_eps is not None):
            raise ArgumentError(
                f"watch={self.watch!r}: a scalar has no weights and moments, which {self.threshold!r:.80} needs. "
                "Use median_mad."
            )
        witness = (
            None if self.watch is None else NormPolicy(self.threshold, restart_after=self.restart_after, skip=True)
        )
        object.__setattr__(self, "_witness", witness)

    @property
    def spec(self) -> NormSpec:
        """Norms that the policy needs."""
        rule = self._rule
        return NormSpec(
            self.norm_type, self.per, self.groups, self.exclude, rule.needs_weights, moment_eps=rule.moment_eps
        )

    @property
    def has_own_rule(self) -> bool:
        """True if the rule is one of distclip's, whose results need no check."""
        return self._rule is self.threshold

    def init(self, slots: int, device: torch.device) -> State:
        """Return the state before the first step, empty for a rule without state."""
        state = dict(self._rule.init(slots, device))
        if state and self._rule.can_restart and self.restart_after:
            state |= init_window(slots, self.restart_after, device)
        if state and self._watches_warmup:
            state |= init_first_norms(slots, self._rule.unbounded_steps, device)
        if self._witness is not None:
            # Each slot has a copy, so that a checkpoint of any layout has the scalar's state under every name.
            state |= {WATCH_PREFIX + key: value for key, value in self._witness.init(slots, device).items()}
        return state

    def decide(self, totals: Totals, state: State) -> tuple[Verdict, State]:
        """Return the coefficient and the bound of every slot, and the state after this step.

        Collectives: none. Host syncs: none.
        """
        verdict, new_state = self.decide_each(totals, state)
        return (verdict if verdict.skip is None else replace(verdict, skip=verdict.skip.any())), new_state

    def decide_each(self, totals: Totals, state: State, finite: Tensor | None = None) -> tuple[Verdict, State]:
        """Return the verdict, whose `skip` is (slots,), and the state after this step.

        Args:
            totals: of the step.
            state: before this step.
            finite: 0-d or (slots,) bool. Where it is false, the state stays as it is. None for `totals.finite`.
        """
        with on_one_thread(totals.powers.numel(), totals.powers.device):
            if finite is None and state:
                finite = totals.finite.on(totals.powers.device)
            if self._witness is None:
                return self._decide(totals, state, finite)
            own = {key: value for key, value in state.items() if not key.startswith(WATCH_PREFIX)}
            witness_state = {key[len(WATCH_PREFIX) :]: state[key] for key in state if key not in own}
            verdict, new_state = self._decide(totals, own, finite)
            second, new_witness_state = self._witness._decide(self._watched_totals(totals), witness_state, finite)
            assert verdict.skip is not None
            assert second.skip is not None
            new_state = new_state | {WATCH_PREFIX + key: value for key, value in new_witness_state.items()}
            return replace(verdict, skip=verdict.skip | second.skip), new_state

    def _watched_totals(self, totals: Totals) -> Totals:
        """Return the value of the watched scalar as the norm of each slot.

        Raises:
            ArgumentError: the step has no such scalar. All ranks watch the same scalars, so all of them raise.
        """
        value = None if self.watch is None else totals.watch.values.get(self.watch)
        if value is None:
            raise ArgumentError(
                f"watch={self.watch!r}: the policy skips steps by this scalar, and the step has none of this name. "
                f"Pass clipper.step(optimizer, watch={{{self.watch!r}: loss}})."
            )
        watched = replace(
            totals, powers=value.to(totals.powers).expand(len(totals.powers)), norm_type=1.0, loss_scale=None
        )
        # Rules read `norms` or `norm`, so both must have the value.
        watched.norms, watched.norm = watched.powers, watched.powers[0]
        return watched

    def _decide(self, totals: Totals, state: State, finite: Tensor | None) -> tuple[Verdict, State]:
        norms, cap = totals.norms, self._rule.cap
        rule_state = _select_rule_state(state) if state else state
        rule_bounds, new_state = self._rule(totals, rule_state)
        bounds = rule_bounds if cap == math.inf else rule_bounds.clamp(max=cap)
        skip = norms > rule_bounds if self.skip else None
        coefs = coefficient(norms, bounds, self.eps)
        if self._rule.max_coef > 1:
            floors = torch.minimum(self._rule.floors(totals, rule_state), bounds)
            raised = (floors / norms).clamp(max=self._rule.max_coef)
            coefs = torch.where((norms < floors) & (norms > 0), raised, coefs)
        ceilings = self._rule.ceilings(totals, new_state)
        if ceilings is not None:
            coefs = torch.minimum(coefs, ceilings)
            # Report the norms that these coefficients result in.
            bounds = torch.where(coefs < 1, norms * coefs, bounds)
        verdict = Verdict(coefs, skip, bounds, max_coef=self._rule.max_coef)
        if not state:
            return verdict, state
        if "restarts" in state:
            clipped_by_rule = (norms > rule_bounds) & (rule_bounds < cap)
            new_state = restart_where_stuck(self._rule, norms, clipped_by_rule, new_state, state)
        if "first_norms" in state:
            new_state |= restart_where_exploded(self._rule, norms, {k: new_state[k] for k in rule_state}, state)
        assert finite is not None
        usable = finite & (norms > 0)
        return verdict, {key: where_slot(usable, new_state[key], old) for key, old in state.items()}

    def mask_valid(self, state: State) -> dict[str, Tensor]:
        """Return masks of the valid values of a loaded state, see `Rule.mask_valid`."""
        if self._witness is not None:
            own = {key: value for key, value in state.items() if not key.startswith(WATCH_PREFIX)}
            witness_state = {key[len(WATCH_PREFIX) :]: state[key] for key in state if key not in own}
            masks = {WATCH_PREFIX + key: mask for key, mask in self._witness.mask_valid(witness_state).items()}
            return masks | replace(self, watch=None).mask_valid(own)
        window_state = {key: state[key] for key in restart.KEYS if key in state}
        first_norms = {key: state[key] for key in warmup.KEYS if key in state}
        masks = self._rule.mask_valid(_select_rule_state(state))
        return masks | mask_valid_window(window_state) | mask_valid_first_norms(first_norms)

    @property
    def _watches_warmup(self) -> bool:
        """True if nothing bounds the norms of the warm-up, and each norm covers more than one tensor."""
        rule = self._rule
        unlimited = rule.cap == math.inf and rule.unbounded_steps >= LEAST_WARMUP
        return unlimited and self.per in ("model", "group")


def _select_rule_state(state: State) -> State:
    """Return the part of a state that is the rule's own."""
    return {key: value for key, value in state.items() if key not in restart.KEYS and key not in warmup.KEYS}


def _default_threshold() -> Threshold:
    from .fixed import Fixed  # that module imports this one, for its presets

    return Fixed()


def host_coefficient(norm: float, bound: float, eps: float = 1e-6) -> float:
    """Return what `coefficient` returns, for numbers on the host: this takes less time than an operator.

    >>> host_coefficient(4.0, 1.0)
    0.24999993750001562
    """
    fits = norm + eps <= bound or bound == math.inf or norm == 0
    return 1.0 if fits else bound / (norm + eps)


def coefficient(norm: Tensor, bound: Tensor | float, eps: float = 1e-6) -> Tensor:
    """Return min(1, bound / (norm + eps)) in float64. A norm of NaN gives NaN.

    Args:
        norm: of any shape, ≥ 0.
        bound: ≥ 0, a number or a tensor that broadcasts with `norm`.
        eps: ≥ 0.

    Returns:
        A tensor of the shape of `norm`. The coefficient is exactly 1 for a norm of 0, and for an infinite bound, even
        if the norm is NaN.

    >>> coefficient(torch.tensor(4.0), 1.0)
    tensor(0.2500, dtype=torch.float64)
    """
    if host_reads_free(norm.device) and norm.numel() == 1:
        return torch.full(norm.shape, host_coefficient(float(norm), float(bound), eps), dtype=torch.float64)
    dtype = accumulation_dtype(norm.device)
    length, bound = norm.to(dtype), torch.as_tensor(bound, dtype=dtype, device=norm.device)
    if eps:
        length = length + eps
    if host_reads_free(norm.device):
        # Three operators suffice instead of eight, unless the result is NaN, which may come from 0 / 0 or inf / inf.
        ratio = (bound / length).clamp_(max=1.0)
        if not math.isnan(ratio.sum().item()):
            return ratio
    # NaN <= bound is false, so a NaN norm gives a NaN coefficient.
    return torch.where((length <= bound) | bound.isposinf() | (norm == 0), 1.0, bound / length)
