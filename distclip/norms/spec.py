"""`NormSpec`: the norms that a policy needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

from ..errors import ArgumentError
from ..sharding.members import members_of, name_groups

__all__ = ["NormSpec", "Per", "check_groups", "check_patterns"]

Per: TypeAlias = Literal["model", "group", "tensor", "row"]
"""Granularity of a norm.

The units are the whole model, each named group of parameters, each parameter, or each row (index along dim 0) of each
parameter. A parameter with a single dim counts as one row.
"""


@dataclass(frozen=True)
class NormSpec:
    """Norms that a policy needs.

    The spec must be equal on every rank, because it determines the all-reduce.

    Args:
        norm_type: p of the norm, any number: `inf` for the largest element, `-inf` for the smallest, 0 for the number
            of elements that are not 0.
        per: granularity. Each unit has a slot in the vector of norms.
        groups: for per="group", {group name: regular expression that is searched in parameter names}. Instead of an
            expression, a group can be a reference: an optimizer, one of its parameter groups, a module or a list of
            tensors.
        exclude: a regular expression, or several. Parameters with a matching name are measured but never clipped.
        needs_weights: whether the norms of the parameters are measured as well.
        moment_eps: ε of the sum Σ g² / max(v, ε²) with the second moments v of the optimizer, see
            `distclip.norms.moments`. None if the sum is not measured.
        limits: (low, high) of an element. Gradients are searched for elements outside of them. None for no search.
        groups_are_prefixes: whether the group of a parameter is its name up to the first "/". The patterns are not used
            then.
        limits_magnitudes: whether `limits` bound the magnitudes of elements, except those of zeros.

    Raises:
        ArgumentError: `groups` or `exclude` is invalid, see `check_groups` and `check_patterns`.

    >>> NormSpec(per="tensor").norm_type
    2.0
    """

    norm_type: float = 2.0
    per: Per = "model"
    groups: Mapping[str, str] = field(default_factory=dict)
    exclude: str | Sequence[str] = ()
    needs_weights: bool = False
    limits: tuple[float, float] | None = None
    limits_magnitudes: bool = False
    groups_are_prefixes: bool = False
    moment_eps: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", check_groups(self.groups))
        object.__setattr__(self, "exclude", check_patterns("exclude", self.exclude))

    @cached_property
    def measured(self) -> frozenset[str]:
        """Names of what is measured, as attributes of `Partials` and `Totals`."""
        measured = {"powers"}
        if self.needs_weights:
            measured |= {"weight_powers"}
        if self.moment_eps is not None:
            measured |= {"update_powers", "update_counts", "update_rates"}
        if self.limits is not None:
            measured |= {"out_of_limits"}
        return frozenset(measured)

    @property
    def has_only_tensor_norms(self) -> bool:
        """True if Euclidean norms of whole gradients are all that is measured."""
        is_euclidean = self.norm_type == 2 and self.per != "row" and self.limits is None
        return is_euclidean and not self.needs_weights and self.moment_eps is None


def check_patterns(argument: str, patterns: Any) -> tuple[str, ...]:
    """Return one regular expression, or several, as a tuple.

    Args:
        argument: name of the caller's argument.
        patterns: text, or an iterable of texts. Sets are sorted, because their order differs between ranks.

    Raises:
        ArgumentError: a pattern is not text, not a regular expression, or empty, so that every name would match it.

    >>> check_patterns("exclude", "head"), check_patterns("exclude", ["head", "bias"])
    (('head',), ('head', 'bias'))
    """
    several = isinstance(patterns, Iterable) and not isinstance(patterns, str | bytes | Mapping)
    listed = tuple(patterns) if several else (patterns,)
    for pattern in listed:
        if not (isinstance(pattern, str) and pattern and _is_pattern(pattern)):
            raise ArgumentError(
                f"{argument}={patterns!r:.120}: {pattern!r:.60} is not a regular expression, or an empty one. Use "
                f'{argument}="head", or {argument}=["head", "bias$"].'
            )
    return tuple(sorted(listed)) if isinstance(patterns, Set) else listed


def check_groups(groups: Any) -> dict[str, str]:
    """Return {group name: regular expression, or members by reference} as a dictionary.

    Args:
        groups: a mapping, or a list of optimizers or of parameter groups, which get names.

    Raises:
        ArgumentError: `groups` is something else.

    >>> check_groups({"embedding": "embed"})
    {'embedding': 'embed'}
    """
    named: dict[Any, Any] = {None: None}
    if isinstance(groups, Mapping):
        named = dict(groups)
    elif isinstance(groups, Sequence) and not any(isinstance(one, str | bytes) for one in (groups, *groups)):
        named = name_groups(groups)
    named = {name: pattern if isinstance(pattern, str) else members_of(pattern) for name, pattern in named.items()}
    for name, pattern in named.items():
        if not (isinstance(name, str) and isinstance(pattern, str) and _is_pattern(pattern)):
            raise ArgumentError(
                f"groups={groups!r:.120}: expected names of groups with regular expressions or optimizers. Use "
                'groups={"embedding": "embed"}, or groups={"adamw": adamw, "muon": muon}.'
            )
    return named


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
