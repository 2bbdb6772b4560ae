r"""Clipping by norm: a threshold rule says which norm is allowed, and what is longer is shortened to it, slot by slot.

.. math:: coef_s = \min\left(1, \frac{bound_s}{norm_s + \varepsilon}\right)

Source: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", ICML 2013, algorithm 1;
ε = 1e-6 is torch.nn.utils.clip_grad_norm_'s.

Every threshold that follows the norms is kept from three traps here. A step with a norm that is not finite leaves the
state as it was; so does, for its slot, a norm of zero (a tensor without gradient tells nothing). And a rule that has
clipped more than half of its last `window` steps has lost the norms it should follow: it starts anew from those norms
as they were before clipping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor

from ..devices import accumulation_dtype
from ..errors import ArgumentError
from ..norms.reduce import Totals
from .fixed import Fixed
from .history import append, numbers
from .policy import Per, Scale, State, Threshold, as_number
from .validation import NOT_NEGATIVE, Range, take

__all__ = ["NormPolicy", "coefficient"]

_OWN = ("recent", "over", "seen", "restarts")
"""What a policy remembers itself, beside its threshold: the last raw norms, (slots, window); whether the rule was below
them; how many entered since the last new start; how often that happened."""


@dataclass(frozen=True, slots=True)
class NormPolicy:
    """Shorten every slot of the gradient to a bound on its norm.

    Args:
        threshold: the rule that gives the bound.
        norm_type: p of the norm: any number > 0, `inf` for the largest element.
        per: what has a norm of its own: "model", "group", "tensor" or "row" (see `Per`).
        groups: for per="group": {name: regular expression that is searched in parameter names}; the first that matches
            takes a parameter, what none matches forms the last group, "rest".
        exclude: regular expressions; parameters whose name one matches are measured and never clipped.
        eps: ε, ≥ 0.
        window: after how many steps, more than half of them clipped by the rule, it starts anew; 0 for never.
        skip: leave out the whole step where a norm is beyond the rule's bound, rather than shorten it. What is only
            beyond the threshold's `cap` is shortened all the same: a cap that is too low must not stop training.
    """

    threshold: Threshold = field(default_factory=Fixed)
    norm_type: float = 2.0
    per: Per = "model"
    groups: Mapping[str, str] = field(default_factory=dict)
    exclude: Sequence[str] = ()
    eps: float = 1e-6
    window: int = 128
    skip: bool = False

    def __post_init__(self) -> None:
        p = as_number(self.norm_type)
        if math.isnan(p):
            raise ArgumentError(
                f'norm_type={self.norm_type!r}: expected the p of a p-norm. Write norm_type=2.0, or "inf".'
            )
        object.__setattr__(self, "norm_type", p)
        take(self, eps=NOT_NEGATIVE, window=Range(0, whole=True))
        object.__setattr__(self, "groups", dict(self.groups))
        object.__setattr__(self, "exclude", tuple(self.exclude))
        if self.per not in get_args(Per):
            raise ArgumentError(f"per={self.per!r}: write one of {', '.join(map(repr, get_args(Per)))}.")
        if (self.per == "group") != bool(self.groups):
            raise ArgumentError(
                f"per={self.per!r} with groups={dict(self.groups)}: groups belong to per='group'. "
                'Write per="group", groups={"embedding": "embed"}, or neither.'
            )
        if "rest" in self.groups:
            raise ArgumentError('groups: "rest" is what no group takes. Write another name.')

    @property
    def needs_weights(self) -> bool:
        """Whether the parameters have to be measured beside their gradients."""
        return bool(getattr(self.threshold, "needs_weights", False))

    def init(self, slots: int, device: torch.device) -> State:
        """The state before the first step; empty where the threshold has none."""
        state = dict(self.threshold.init(slots, device))
        if state and self.window and hasattr(self.threshold, "seed"):
            state["recent"] = numbers(slots, self.window, device=device)
            state["over"] = torch.zeros(slots, self.window, dtype=torch.bool, device=device)
            state["seen"] = torch.zeros(slots, dtype=torch.int64, device=device)
            state["restarts"] = torch.zeros(slots, dtype=torch.int64, device=device)
        return state

    def decide(self, totals: Totals, state: State) -> tuple[Scale, State]:
        """The coefficient of every slot, and the state after this step."""
        norms = totals.norms
        rule = {key: value for key, value in state.items() if key not in _OWN}
        bound, moved = self.threshold(totals, rule)
        skip = self._leaves_out(totals, rule) if self.skip else None
        verdict = Scale(coefficient(norms, bound, self.eps), skip, bound)
        if not state:
            return verdict, state
        if "seen" in state:
            moved |= self._watched(norms, bound, moved, state)
        entered = totals.finite & (norms > 0)
        return verdict, {key: _where(entered, moved[key], old) for key, old in state.items()}

    def _leaves_out(self, totals: Totals, rule: State) -> Tensor:
        """Whether some norm is beyond what the rule would allow without a cap."""
        threshold: Any = self.threshold
        if hasattr(threshold, "cap"):
            threshold = replace(threshold, cap=math.inf)
        bound: Tensor = threshold(totals, rule)[0]
        return (totals.norms > bound).any()

    def _watched(self, norms: Tensor, bound: Tensor, moved: State, state: State) -> State:
        """What this policy remembers, after this step; with it the threshold's state, where it starts anew."""
        # Where the cap did it, the rule itself has lost nothing.
        by_rule = (norms > bound) & (bound < getattr(self.threshold, "cap", math.inf))
        recent = append(state["recent"], state["seen"], norms)
        over = append(state["over"], state["seen"], by_rule)
        seen = state["seen"] + 1
        lost = (seen >= self.window) & (2 * over.sum(1) > self.window)
        seeded = self.threshold.seed(recent, moved)  # type: ignore[attr-defined]
        watched = {"recent": recent, "over": over, "seen": torch.where(lost, 0, seen)}
        watched["restarts"] = state["restarts"] + lost
        return watched | {key: _where(lost, seeded[key], value) for key, value in moved.items()}


def coefficient(norm: Tensor, bound: Tensor | float, eps: float = 1e-6) -> Tensor:
    """min(1, bound / (norm + eps)) in float64; NaN for a norm of NaN.

    Exactly 1 for an infinite bound, whatever the norm, and for a norm of 0, which nothing can shorten.

    >>> coefficient(torch.tensor(4.0), 1.0)
    tensor(0.2500, dtype=torch.float64)
    """
    if norm.device.type == "cpu" and norm.numel() == 1:
        # The same without a tensor for each step of it.
        one, most = float(norm), float(bound)
        coef = 1.0 if one + eps <= most or most == math.inf or one == 0 else most / (one + eps)
        return torch.full(norm.shape, coef, dtype=torch.float64)
    dtype = accumulation_dtype(norm.device)
    length, bound = norm.to(dtype) + eps, torch.as_tensor(bound, dtype=dtype, device=norm.device)
    # Written so that NaN is not "short enough".
    return torch.where((length <= bound) | bound.isposinf() | (norm == 0), 1.0, bound / length)


def _where(condition: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """By slot, the first dim of all three."""
    return torch.where(condition.view(-1, *(1,) * (new.ndim - 1)), new, old)
