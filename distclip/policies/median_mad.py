"""Bound norms by a robust number of standard deviations above the median of the recent ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..norms.reduce import Totals
from ..norms.spec import Per
from .history import append, quantile, zeros
from .norm_policy import NormPolicy
from .policy import Rule, State
from .validation import NATURAL, NOT_NEGATIVE, convert_fields, is_count

__all__ = ["MedianMAD", "median_mad"]

_NORMAL = 1.4826
"""Ratio of the standard deviation to the median absolute deviation (MAD) of a normal distribution."""


def median_mad(
    k: float = 3.0,
    window: int = 128,
    warmup: int = 16,
    cap: float = math.inf,
    norm_type: float = 2.0,
    per: Per = "model",
    skip: bool = False,
    watch: str | None = None,
) -> NormPolicy:
    r"""Clip spikes to k robust standard deviations above the median of the last norms, in log space.

    .. math:: bound_t = \min\left(cap, \exp(m + k \max(1.4826 \, d, 0.1))\right)

    m is the median of the logarithms of the last norms, and d their median absolute deviation from m. The rule clips
    one healthy step in several hundred, keeps clipping through a burst of twenty steps, and follows a new level within
    half a window.

    Args:
        k: number of standard deviations that are not clipped, ≥ 0.
        window: number of norms in the history, ≥ 1.
        warmup: number of norms at the start to which only the cap applies, ≥ 1.
        cap: hard upper bound, ≥ 0, which also applies during warm-up: a max_norm of the usual size, such as 1.0.
            Without it, norms that explode during warm-up are not clipped. The rule then warns, and starts from the
            norms before the explosion.
        norm_type: p of the norm.
        per: granularity (see `NormPolicy`).
        skip: skip steps with a spike instead of scaling them down, for example for a bad sample that returns every
            epoch. Norms that exceed only the cap are scaled down, during warm-up and after it.
        watch: with skip=True, name of a watched scalar > 0, such as the loss (see `GradClipper.step`). A step in which
            it is more than k robust standard deviations above its median is skipped too.

    Raises:
        ArgumentError: a number outside of its range, or `watch` without skip=True.

    Source: the outlier rule of Hampel, "The influence curve and its role in robust estimation", JASA 69, 1974, on
    logarithms.

    >>> median_mad(6.0).threshold
    MedianMAD(k=6.0, window=128, warmup=16, floor=0.1, cap=inf)
    """
    return NormPolicy(MedianMAD(k, window, warmup, cap=cap), norm_type, per, skip=skip, watch=watch)


@dataclass(frozen=True, slots=True)
class MedianMAD(Rule):
    r"""Threshold of `median_mad`.

    .. math:: bound_t = \min\left(cap, \exp(m + k \max(1.4826 \, d, floor))\right), \quad
        m = \mathrm{median}(\log norm_i), \quad d = \mathrm{median}\,|\log norm_i - m|, \quad t - w \le i < t

    Norms scatter by factors, so the rule uses logarithms. A few spikes of any height hardly change a median, so the
    history can contain norms before clipping. The rule therefore follows a new level within half a window and does not
    restart. The norm of the current step is not in the history, because while the window fills, a spike would widen the
    very scatter that it is compared with.

    Args:
        k, window, warmup, cap: see `median_mad`.
        floor: smallest standard deviation to assume, ≥ 0. Even norms that hardly scatter can grow by a factor of
            exp(k · floor).

    Raises:
        ArgumentError: a number outside of its range.

    >>> MedianMAD(k=6)
    MedianMAD(k=6.0, window=128, warmup=16, floor=0.1, cap=inf)
    """

    k: float = 3.0
    window: int = 128
    warmup: int = 16
    floor: float = 0.1
    cap: float = math.inf

    def __post_init__(self) -> None:
        convert_fields(self, k=NOT_NEGATIVE, window=NATURAL, warmup=NATURAL, floor=NOT_NEGATIVE, cap=NOT_NEGATIVE)

    @property
    def unbounded_steps(self) -> int:
        """Number of norms in the warm-up."""
        return self.warmup

    def init(self, slots: int, device: torch.device) -> State:
        """Return an empty history of logarithms per slot."""
        count = torch.zeros(slots, dtype=torch.int64, device=device)
        return {"log_norms": zeros(slots, self.window, device=device), "count": count}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """Return the bound from the norms of the steps before, and the history with the norm of this step."""
        log_norms, count = state["log_norms"], state["count"]
        median = quantile(log_norms, count, 0.5)
        deviation = _NORMAL * quantile((log_norms - median.unsqueeze(1)).abs(), count, 0.5)
        bound = (median + self.k * deviation.clamp(min=self.floor)).exp()
        bound = torch.where(count < self.warmup, math.inf, bound)
        return bound, {"log_norms": append(log_norms, count, totals.norms.log()), "count": count + 1}

    def mask_valid(self, state: State) -> dict[str, Tensor]:
        """Return masks of the valid values of a loaded state, see `Rule.mask_valid`."""
        return {"log_norms": state["log_norms"].isfinite(), "count": is_count(state["count"])}

    def restart(self, norms: Tensor, state: State) -> State:
        """Return a history of these norms only, as after a warm-up with these norms."""
        # Each norm is repeated equally often, so that the medians are those of the norms.
        repeated = norms.log().repeat_interleave(-(-self.warmup // norms.shape[1]), dim=1)
        width = min(repeated.shape[1], self.window)
        log_norms = torch.cat([repeated[:, :width], state["log_norms"][:, width:]], dim=1)
        return {"log_norms": log_norms, "count": torch.full_like(state["count"], repeated.shape[1])}
