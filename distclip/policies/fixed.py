"""Bound the norm of the whole gradient, of every tensor, or of named groups of parameters by constants."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..devices import device_constant
from ..errors import ArgumentError, short_repr
from ..norms.reduce import Totals
from ..sharding.members import are_references, members_of
from .by_group import ByGroup
from .norm_policy import NormPolicy
from .policy import Policy, Rule, State
from .validation import to_float

__all__ = ["Fixed", "bounds_nothing", "global_norm", "group_norm", "per_tensor_norm"]


def global_norm(max_norm: float = 1.0, norm_type: float = 2.0) -> NormPolicy:
    r"""Clip the whole gradient to one constant bound, the usual choice.

    .. math:: coef = \min\left(1, \frac{max\_norm}{\lVert g \rVert_p + 10^{-6}}\right)

    Args:
        max_norm: bound, ≥ 0. `inf` measures and never clips.
        norm_type: p of the norm.

    Raises:
        ArgumentError: a negative or NaN bound, or a norm type that is not a number.

    Source: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", ICML 2013,
    algorithm 1, with the 1e-6 of torch.nn.utils.clip_grad_norm_.

    >>> global_norm(1.0).threshold
    Fixed(max_norm=1.0)
    """
    return NormPolicy(Fixed(max_norm), norm_type, eps=1e-6)


def per_tensor_norm(max_norm: float = 1.0, norm_type: float = 2.0) -> NormPolicy:
    r"""Clip the gradient of each parameter to one constant bound.

    .. math:: coef_i = \min\left(1, \frac{max\_norm}{\lVert g_i \rVert_p}\right)

    Args:
        max_norm: bound, ≥ 0.
        norm_type: p of the norm.

    Raises:
        ArgumentError: a negative or NaN bound, or a norm type that is not a number.

    Source: the `clipnorm` of Keras' optimizers.

    >>> per_tensor_norm(0.5).per
    'tensor'
    """
    return NormPolicy(Fixed(max_norm), norm_type, per="tensor")


def group_norm(
    groups: Mapping[str, Mapping[str, Any] | Sequence[Any]], max_norm: float = 1.0, norm_type: float = 2.0
) -> NormPolicy:
    r"""Clip each group of parameters to its own constant bound.

    .. math:: coef_k = \min\left(1, \frac{max\_norm_k}{\lVert g_k \rVert_p}\right)

    All parameters without a group form one more group, "rest".

    Args:
        groups: {name: {"pattern": regular expression, "max_norm": bound ≥ 0}}, or {name: (pattern, bound)}. The pattern
            is searched in parameter names, and a parameter belongs to the first group that matches. Instead of a
            pattern, pass a reference: an optimizer, one of its `param_groups`, a module or a list of tensors. If all
            groups are references, there is no "rest". With the bound `inf`, a group is measured but never clipped.
            Instead of a bound, pass a `NormPolicy`, such as `zclip(cap=1.0)`, to use its threshold for the group.
        max_norm: bound of the parameters without a group, ≥ 0.
        norm_type: p of the norm.

    Raises:
        ArgumentError: no group, a group without pattern or bound, a negative or NaN bound, or a norm type that is not a
            number.

    Source: the separately clipped parameter groups of Megatron-LM's optimizer (`grad_norm_group`), without the 1e-6
    that Megatron-LM adds to the norm.

    >>> group_norm({"embedding": ("embed", 0.1)}, max_norm=1.0).threshold
    Fixed(max_norm=(0.1, 1.0))
    """
    if not isinstance(groups, Mapping):
        raise ArgumentError(
            f'groups={groups!r:.80}: expected a dictionary. Use groups={{"embedding": ("embed", 0.1)}}, for example.'
        )
    patterns: dict[str, str] = {}
    bounds: list[Any] = []
    for name, group in groups.items():
        try:
            pattern, bound = (group["pattern"], group["max_norm"]) if isinstance(group, Mapping) else group
        except (KeyError, TypeError, ValueError):
            pattern = bound = None
        pattern = pattern if isinstance(pattern, str) or pattern is None else members_of(pattern)
        if pattern is None or isinstance(group, str):
            raise ArgumentError(
                f"groups[{name!r}]={group!r}: a group needs a regular expression and a bound. "
                f'Use groups={{{name!r}: {{"pattern": "embed", "max_norm": 1.0}}}}.'
            )
        patterns[name] = pattern
        bounds.append(bound)
    if not are_references(patterns):
        bounds.append(max_norm)
    if not any(isinstance(bound, NormPolicy) for bound in bounds):
        return NormPolicy(Fixed(tuple(bounds)), norm_type, per="group", groups=patterns)
    rules = tuple(bound.threshold if isinstance(bound, NormPolicy) else Fixed(bound) for bound in bounds)
    return NormPolicy(ByGroup(rules), norm_type, per="group", groups=patterns)


def bounds_nothing(policy: Policy) -> bool:
    """Return whether a policy only measures, because its bounds are constant and infinite.

    >>> bounds_nothing(global_norm(float("inf"))), bounds_nothing(global_norm(1.0))
    (True, False)
    """
    if type(policy) is not NormPolicy or type(policy.threshold) is not Fixed:
        return False
    bounds = policy.threshold.max_norm
    return min(bounds if isinstance(bounds, Sequence) else (bounds,)) == math.inf


@dataclass(frozen=True, slots=True)
class Fixed(Rule):
    """Threshold with a constant bound.

    Args:
        max_norm: bound, ≥ 0. `inf` measures and never clips. A sequence has the bound of each slot, in order.

    Raises:
        ArgumentError: a bound that is negative or not a number.
    """

    max_norm: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        many = isinstance(self.max_norm, Sequence) and not isinstance(self.max_norm, str | bytes)
        bounds = tuple(map(to_float, self.max_norm)) if many else (to_float(self.max_norm),)  # type: ignore[arg-type]
        if not all(bound >= 0 for bound in bounds) or not bounds:
            raise ArgumentError(
                f"max_norm={short_repr(self.max_norm)}: the bound must be a number ≥ 0. "
                "Use max_norm=1.0, or max_norm=inf to measure without clipping."
            )
        object.__setattr__(self, "max_norm", bounds if many else bounds[0])

    def init(self, slots: int, device: torch.device) -> State:
        """Return an empty state.

        Raises:
            ArgumentError: the number of bounds is neither 1 nor the number of slots.
        """
        if isinstance(self.max_norm, tuple) and len(self.max_norm) not in (1, slots):
            raise ArgumentError(
                f"max_norm={self.max_norm!r:.80}: {len(self.max_norm)} bounds for {slots} norms. Use one number for "
                "all of them, or one for each."
            )
        return {}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """Return the bounds, which do not depend on the norms."""
        bounds = self.max_norm if isinstance(self.max_norm, tuple) else (self.max_norm,)
        norms = totals.norms
        bound = device_constant(bounds, norms.device, norms.dtype)
        return bound if len(bounds) == len(norms) else bound.expand(norms.shape), state
