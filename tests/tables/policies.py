"""List every policy once: `POLICIES[name]`. A new policy needs one new row here.

A row feeds the tests of rules against `distclip.reference`, of policies on layouts, of host syncs, of checkpoints, of
steps with non-finite gradients, and of loss scaling.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any

import distclip
from distclip import NormPolicy, Policy, reference
from distclip.policies import EMA, AdaGC, Band, MeanStd, MedianMAD, Percentile, ZScore

if TYPE_CHECKING:
    from tests.policies.oracle import Oracle

__all__ = ["ADAPTIVE", "POLICIES", "VARIANTS", "Bound", "PolicyRow", "Variant"]

Twin = Callable[[Sequence[float], Sequence[float]], list[float]]
"""Bounds of one slot by `distclip.reference`, from the norms of the slot and the total norms, step by step."""

Bound = Callable[[Sequence[float], Sequence[float], Any, float], float]
"""Bound of a step from the norms of the slot so far, the total norms so far, the slot and the norm of its weights."""


@dataclass(frozen=True)
class Variant:
    """A rule with small windows, and its twin with the same arguments."""

    threshold: Any
    twin: Twin


@dataclass(frozen=True)
class PolicyRow:
    """A row of the table.

    Args:
        make: makes the policy with arguments that a user may choose. It is used where any policy must pass.
        small: makes the policy with windows so small that it acts within a few steps. It takes arguments of
            `NormPolicy` such as `per=`.
        twin: the twin of `small` if the policy remembers norms.
        fit: makes a policy and its bound for the gradients of an oracle if bounds depend on their size.
        per: granularity on layouts.
        on_all_layouts: whether to run on every layout. One policy per granularity is enough, since a policy does not
            see the layout.
        variants: rules at the edges of their arguments.
        capped: makes the policy with cap=2.0 and arguments that clip no norm of 1.
        restarts: whether the rule restarts if it clips most steps.
        needs_optimizer: whether the policy reads the optimizer, so that `clip()` without one is refused.
    """

    make: Callable[[], Policy]
    small: Callable[..., NormPolicy] | None = None
    twin: Twin | None = None
    fit: Callable[[Oracle], tuple[NormPolicy, Bound]] | None = None
    per: str = "model"
    on_all_layouts: bool = False
    variants: dict[str, Variant] = field(default_factory=dict)
    capped: Callable[[], NormPolicy] | None = None
    restarts: bool = False
    needs_optimizer: bool = False

    def fitted(self, oracle: Oracle) -> tuple[NormPolicy, Bound]:
        """Return a policy that clips the gradients of the oracle, and its bound."""
        if self.fit is not None:
            return self.fit(oracle)
        assert self.small is not None
        assert self.twin is not None
        twin = self.twin
        return self.small(per=self.per), lambda norms, totals, slot, weight: twin(norms, totals)[-1]


def _fit_global_norm(oracle: Oracle) -> tuple[NormPolicy, Bound]:
    total = oracle.typical("model")
    return distclip.global_norm(total), lambda *_: total


def _fit_per_tensor_norm(oracle: Oracle) -> tuple[NormPolicy, Bound]:
    largest = oracle.typical("tensor", inf)
    return distclip.per_tensor_norm(largest, inf), lambda *_: largest


def _fit_group_norm(oracle: Oracle) -> tuple[NormPolicy, Bound]:
    total, first = oracle.typical("model", 1.0), oracle.first_pattern()
    policy = distclip.group_norm({"first": (first, total / 2)}, total / 3, 1.0)
    return policy, lambda norms, totals, slot, weight: total / (2 if slot == "first" else 3)


def _fit_agc(oracle: Oracle) -> tuple[NormPolicy, Bound]:
    ratio, first = oracle.typical_ratio(), oracle.first_pattern()
    # A model of one parameter has none left if the first is excluded.
    exclude = [first] if len(set().union(*oracle.names.values())) > 1 else []

    def bound(norms: Sequence[float], totals: Sequence[float], slot: Any, weight: float) -> float:
        excluded = exclude and any(re.search(first, name) for name in oracle.names[slot])
        return inf if excluded else float(reference.agc_bound(weight, ratio, 0.01))

    return distclip.agc(ratio, eps=0.01, exclude=exclude), bound


def _upper_ends(norms: Sequence[float], *band: Any, **schedule: Any) -> list[float]:
    """Return the bounds of bands, whose floors tests/policies/test_bands.py covers."""
    return [bound for _, bound in reference.aggc_bands(norms, *band, **schedule)]


POLICIES: dict[str, PolicyRow] = {
    "global_norm": PolicyRow(
        make=lambda: distclip.global_norm(1.0),
        small=lambda: distclip.global_norm(1.0),
        fit=_fit_global_norm,
    ),
    "per_tensor_norm": PolicyRow(
        make=lambda: distclip.per_tensor_norm(1.0),
        small=lambda: distclip.per_tensor_norm(0.5),
        fit=_fit_per_tensor_norm,
        per="tensor",
        on_all_layouts=True,
    ),
    "group_norm": PolicyRow(
        make=lambda: distclip.group_norm({"first": ("^0", 2.0)}),
        fit=_fit_group_norm,
        per="group",
        on_all_layouts=True,
    ),
    "budget": PolicyRow(make=lambda: distclip.budget(1.0)),
    "value": PolicyRow(make=lambda: distclip.value(0.1)),
    "bi2clip": PolicyRow(make=lambda: distclip.bi2clip(0.01, 0.1)),
    # It is the one rule that also measures weights, and so it runs on every layout too.
    "agc": PolicyRow(
        make=lambda: distclip.agc(0.01),
        small=lambda: distclip.agc(0.1),
        fit=_fit_agc,
        per="row",
        on_all_layouts=True,
    ),
    # tests/policies/test_update_clip.py runs it on layouts, because its oracle needs an optimizer.
    "update_clip": PolicyRow(make=lambda: distclip.update_clip(1.5), per="tensor", needs_optimizer=True),
    "autoclip": PolicyRow(
        make=lambda: distclip.autoclip(10),
        small=lambda **options: distclip.autoclip(40, window=4, **options),
        twin=lambda norms, _: reference.autoclip_bounds(norms, 40, 4),
        per="tensor",
        variants={
            "": Variant(Percentile(10, 7), lambda n, _: reference.autoclip_bounds(n, 10, 7)),
            "odd": Variant(Percentile(62.5, 30, 2.0), lambda n, _: reference.autoclip_bounds(n, 62.5, 30, 2.0)),
            "least": Variant(Percentile(0, 5), lambda n, _: reference.autoclip_bounds(n, 0, 5)),
            "largest": Variant(Percentile(100, 1), lambda n, _: reference.autoclip_bounds(n, 100, 1)),
        },
        capped=lambda: distclip.autoclip(100, cap=2.0),
    ),
    "zclip": PolicyRow(
        make=lambda: distclip.zclip(cap=1.0),
        small=lambda **options: distclip.zclip(1.5, 0.8, warmup=3, **options),
        twin=lambda norms, _: reference.zclip_bounds(norms, 1.5, 0.8, 3),
        on_all_layouts=True,
        variants={
            "": Variant(ZScore(2.5, 0.9, 6), lambda n, _: reference.zclip_bounds(n, 2.5, 0.9, 6)),
            "capped": Variant(
                ZScore(1.0, 0.5, 3, cap=1.5), lambda n, _: reference.zclip_bounds(n, 1.0, 0.5, 3, cap=1.5)
            ),
            "coarse": Variant(ZScore(2, 0, 1, 0.1), lambda n, _: reference.zclip_bounds(n, 2, 0, 1, 0.1)),
            "published": Variant(
                ZScore(1.0, 0.5, 3, cap=1.5, statistics="published"),
                lambda n, _: reference.zclip_bounds(n, 1.0, 0.5, 3, cap=1.5, published=True),
            ),
        },
        capped=lambda: distclip.zclip(cap=2.0),
        restarts=True,
    ),
    "adagc": PolicyRow(
        make=lambda: distclip.adagc(),
        small=lambda **options: distclip.adagc(1.2, 0.8, warmup=2, **options),
        twin=lambda norms, totals: reference.adagc_bounds(norms, totals, 1.2, 0.8, 2, 1.0),
        per="tensor",
        variants={
            "": Variant(AdaGC(1.04, 0.9, 5), lambda n, totals: reference.adagc_bounds(n, totals, 1.04, 0.9, 5)),
            "loose": Variant(
                AdaGC(2, 0.8, 1, inf), lambda n, totals: reference.adagc_bounds(n, totals, 2, 0.8, 1, inf)
            ),
            "capped": Variant(
                AdaGC(1.5, 0.9, 4, 3.0, cap=0.7),
                lambda n, totals: reference.adagc_bounds(n, totals, 1.5, 0.9, 4, 3.0, cap=0.7),
            ),
        },
        capped=lambda: distclip.adagc(warmup_norm=inf, cap=2.0),
        restarts=True,
    ),
    "ema": PolicyRow(
        make=lambda: distclip.ema(),
        small=lambda **options: distclip.ema(1.7, 1.1, 0.9, 0.6, warmup=2, **options),
        twin=lambda norms, _: reference.ema_bounds(norms, 1.7, 1.1, 0.9, 0.6, 2),
        per="row",
        variants={
            "": Variant(EMA(2.0, 1.1, 0.9, 0.7, 5), lambda n, _: reference.ema_bounds(n, 2.0, 1.1, 0.9, 0.7, 5)),
            "capped": Variant(
                EMA(1.2, 1.0, 0.99, 0.9, 1, 1.3), lambda n, _: reference.ema_bounds(n, 1.2, 1.0, warmup=1, cap=1.3)
            ),
            "immediate": Variant(
                EMA(1.5, 2.0, 0.5, 0.0, 2), lambda n, _: reference.ema_bounds(n, 1.5, 2.0, 0.5, 0.0, 2)
            ),
        },
        capped=lambda: distclip.ema(cap=2.0),
        restarts=True,
    ),
    "median_mad": PolicyRow(
        make=lambda: distclip.median_mad(3.0, cap=2.0),
        small=lambda **options: NormPolicy(MedianMAD(1.5, window=4, warmup=2), **options),
        twin=lambda norms, _: reference.median_mad_bounds(norms, 1.5, 4, 2),
        per="tensor",
        variants={
            "": Variant(MedianMAD(3, 8, 4), lambda n, _: reference.median_mad_bounds(n, 3, 8, 4)),
            "capped": Variant(
                MedianMAD(1, 31, 1, 0, 1.5), lambda n, _: reference.median_mad_bounds(n, 1, 31, 1, 0, 1.5)
            ),
            "odd": Variant(MedianMAD(0.5, 5, 9, 0.2), lambda n, _: reference.median_mad_bounds(n, 0.5, 5, 9, 0.2)),
        },
        capped=lambda: distclip.median_mad(cap=2.0),
    ),
    "aggc": PolicyRow(
        make=lambda: distclip.aggc(cap=1.0),
        # Without a floor it is a rule like the others.
        small=lambda **options: distclip.aggc(0.0, 1.3, decay=0.8, warmup=2, **options),
        twin=lambda norms, _: _upper_ends(norms, 0.0, 1.3, 0.8, 2),
        per="tensor",
        variants={
            "": Variant(Band(0, 1.5, 0.9, 4), lambda n, _: _upper_ends(n, 0, 1.5, 0.9, 4)),
            "late": Variant(
                Band(0, 2.0, 0.5, 1, None, 0.7, 5, 4, cap=1.5),
                lambda n, _: _upper_ends(n, 0, 2.0, 0.5, 1, None, 0.7, 5, 4, cap=1.5),
            ),
        },
        capped=lambda: distclip.aggc(cap=2.0),
        restarts=True,
    ),
}

ADAPTIVE: dict[str, PolicyRow] = {name: row for name, row in POLICIES.items() if row.twin is not None}
"""Rows of policies that remember norms."""

VARIANTS: dict[str, Variant] = {
    ", ".join(part for part in (name, label) if part): variant
    for name, row in POLICIES.items()
    for label, variant in row.variants.items()
} | {"mean_std": Variant(MeanStd(1.0, 6, 3, 1.5), lambda n, _: reference.mean_std_bounds(n, 1.0, 6, 3, 1.5))}
"""Rules of all rows against their twins."""
