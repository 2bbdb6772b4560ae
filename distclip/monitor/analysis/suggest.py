"""Suggest a bound for the next run from the norms of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .change_points import Regimes, Segment, find_regimes
from .diagnosis.dominant_tensor import find_dominant_tensor
from .errors import RunError
from .formatting import format_percent
from .log import Log
from .outcome import Outcome, find_outcome
from .statistics import Numbers

__all__ = ["Candidate", "Suggestion", "suggest"]

MIN_STEPS = 200
"""Minimum number of steps. With fewer, less than 20 norms exceed the 90th percentile."""

LEVELS = {"p50": 50, "p75": 75, "p90": 90, "p95": 95, "p99": 99, "max": 100}
"""Percentiles that are compared as bounds, by name."""

MAX_DRIFT = 2.0
"""Maximum factor between medians. Above it, a fixed bound does not clip at the same rate during the whole run."""

MAX_CLIP_RATE = 0.05
"""Maximum share of clipped steps. Above it, clipping itself has changed the norms noticeably."""

NUM_RESAMPLES = 500
"""Number of bootstrap resamples."""

MAX_SAMPLE = 20_000
"""Maximum number of steps that are resampled, evenly spaced."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A bound, and its effect on the norms of a run.

    Args:
        name: name such as "p90".
        bound: the bound; NaN for a policy without a single bound.
        clip_rate: share of the steps that it clips, 0 to 1.
        mean_coef: mean coefficient of all steps, 1 for steps that are not clipped.
        longest_streak: maximum number of consecutive clipped steps.
    """

    name: str
    bound: float
    clip_rate: float
    mean_coef: float
    longest_streak: int

    @property
    def role(self) -> str:
        """Name of the role of a bound that clips this often."""
        return classify_clip_rate(self.clip_rate)


@dataclass(frozen=True)
class Suggestion:
    """A suggested bound with its evidence.

    Args:
        max_norm: 90th percentile of the last regime, rounded to two or three digits.
        low: 75th percentile.
        high: 95th percentile.
        interval: 95 % confidence interval of the 90th percentile.
        segment: the last regime.
        num_steps: number of finite norms in it.
        num_nonfinite: number of steps of the whole run whose norm is not finite.
        candidates: each percentile as a bound.
        current: bound that the run was made with; None if it had none.
        drift: factor by which the median moves after the warm-up.
        cap: cap of an adaptive policy, if the drift makes one preferable; otherwise None.
        text: the suggestion in a sentence.
        notes: further facts about the log, one sentence each.
        cautions: reasons to doubt the bound, one sentence each.
    """

    max_norm: float
    low: float
    high: float
    interval: tuple[float, float]
    segment: Segment
    num_steps: int
    num_nonfinite: int
    candidates: tuple[Candidate, ...]
    current: Candidate | None
    drift: float
    cap: float | None
    text: str
    notes: tuple[str, ...]
    cautions: tuple[str, ...]

    @property
    def override(self) -> str:
        """Hydra override of the launcher that applies the suggestion."""
        if self.cap is not None:
            return f"clip=median_mad clip.cap={self.cap:g}"
        return f"clip=global_norm clip.max_norm={self.max_norm:g}"

    @property
    def python(self) -> str:
        """Python expression that applies the suggestion."""
        if self.cap is not None:
            return f"distclip.GradClipper(model, distclip.median_mad(3, cap={self.cap:g}))"
        return f"distclip.GradClipper(model, distclip.global_norm({self.max_norm:g}))"


def suggest(log: Log, batch: int | None = None) -> Suggestion:
    """Suggest the 90th percentile of the last regime after the warm-up.

    The choice was measured: norms were recorded at a safe learning rate, and their percentiles were used as bounds of
    runs at four to five times that rate, with three seeds each. With p90, the held-out losses are 1.96 (a tanh RNN),
    1.75 (an LSTM; 1.97 on one seed) and 2.49 (a GPT with SGD), as good as with any other bound. p75 gives 2.00, 1.74
    and 2.48. p95 gives 1.98, 1.73 … 1.88 and 2.50. p50 raises the RNN's loss by 0.1. With p99 and with the maximum, the
    LSTM fails (3.3 … 4.2 and 4.4 … 7.9). These two are too loose for a raised learning rate, and only a safety net at
    the learning rate of the log.

    The interval comes from a block bootstrap, because the norms of neighbouring steps are correlated. A regime of more
    than 20,000 steps is subsampled first, which makes the interval wider than necessary.

    Args:
        log: log of the run.
        batch: number of samples per step in the next run, for a caution if the log has another batch size.

    Raises:
        RunError: the run diverged, no norm is finite, or the last regime has fewer than 200 finite norms.
    """
    regimes = find_regimes(log)
    num_nonfinite = len(log.steps) - len(regimes.norms)
    if not len(regimes.norms):
        raise RunError(f"{log.name}: none of {len(log.steps)} norms is finite, so no bound can be suggested")
    last = regimes.last
    if len(last) < MIN_STEPS:
        changed = " (since the level of the norms changed)" if last.start else ""
        excluded = f" ({num_nonfinite:,} norms of the run are not finite)" if num_nonfinite else ""
        finite = "" if log.finite[-1] else " that stays finite, at a lower learning rate"
        raise RunError(
            f"{log.name}: steps {last.first} to {last.last}{changed} have {len(last)} finite norms{excluded}, and a "
            f"bound needs {MIN_STEPS}. Record a longer run{finite}."
        )
    outcome = find_outcome(log)
    if outcome.verdict == "diverged":
        raise RunError(
            f"{log.name}: training diverged, and its norms give no bound for a run that learns. {outcome.text} Start "
            "with distclip.global_norm(1.0), or with a lower learning rate, and take the bound from that run"
        )
    norms = regimes.norms_of(last)
    percentiles = dict(zip(LEVELS, np.percentile(norms, list(LEVELS.values())).tolist(), strict=True))
    if percentiles["p90"] <= 0:
        raise RunError(
            f"{log.name}: at least 90 % of the norms are 0 from step {last.first} on. Check that the gradients are "
            "computed."
        )
    max_norm, interval = round_bound(percentiles["p90"]), _bootstrap_interval(norms)
    drift, highest = _drift(regimes)
    start = f" after the warm-up of {last.start:,} steps" if regimes.warm_up and len(regimes.steady) == 1 else ""
    scope = "the last regime, steps" if len(regimes.steady) > 1 else "steps"
    text = (
        f"Clip at {max_norm:g}, the 90th percentile of {scope} {last.first} to {last.last}{start} (95 % interval "
        f"{interval[0]:.3g} to {interval[1]:.3g}). Any bound from {percentiles['p75']:.3g} to {percentiles['p95']:.3g} "
        "(p75 to p95) works."
    )
    return Suggestion(
        max_norm=max_norm,
        low=percentiles["p75"],
        high=percentiles["p95"],
        interval=interval,
        segment=last,
        num_steps=len(last),
        num_nonfinite=num_nonfinite,
        candidates=tuple(_candidate(name, bound, norms) for name, bound in percentiles.items()),
        current=_current_bound(log, regimes.indices[last.start : last.stop]),
        drift=drift,
        cap=round_bound(highest) if drift > MAX_DRIFT else None,
        text=text,
        notes=tuple(_notes(log, regimes, num_nonfinite)),
        cautions=tuple(_cautions(log, regimes, drift, batch, outcome)),
    )


def classify_clip_rate(clip_rate: float) -> str:
    """Name the role of a bound that clips this share of the steps.

    >>> [classify_clip_rate(rate) for rate in (0.0, 0.01, 0.2, 0.8)]
    ['inactive', 'safety net', 'limiter', 'normaliser']
    """
    if clip_rate <= 0:
        return "inactive"
    return "safety net" if clip_rate < 0.05 else "limiter" if clip_rate <= 0.5 else "normaliser"


def round_bound(value: float) -> float:
    """Round to two significant digits, or to three if the first is a 1. The error is at most 2.5 %.

    >>> round_bound(1.694), round_bound(2.34)
    (1.69, 2.3)
    """
    digits = -math.floor(math.log10(value))
    return round(value, digits + (2 if value * 10.0**digits < 2 else 1))


def _candidate(name: str, bound: float, norms: Numbers) -> Candidate:
    """Apply a bound to finite norms."""
    exceeding = norms > bound
    coef = float(np.minimum(bound / norms[exceeding], 1).sum() + np.count_nonzero(~exceeding)) / len(norms)
    return Candidate(name, bound, float(exceeding.mean()), coef, _longest_streak(exceeding))


def _current_bound(log: Log, indices: NDArray[np.int64]) -> Candidate | None:
    """Describe the bound that the run had at these steps, or its median if it moved."""
    clipped, coefs, bounds = log.clipped[indices], log.coefs[indices], log.bounds[indices]
    name = "in use"
    if np.isfinite(bounds).any():
        bound = float(np.nanmedian(bounds))
        if np.nanmin(bounds) < np.nanmax(bounds):
            name = "in use (median)"
    elif clipped.any():
        # The log has no bounds. If all clipped steps ended at the same norm, that norm was the bound.
        clipped_norms = (log.norms[indices] * coefs)[clipped]
        median = float(np.median(clipped_norms))
        bound = median if np.ptp(clipped_norms) < 0.01 * median else math.nan
    else:
        return None
    return Candidate(name, bound, float(clipped.mean()), float(coefs.mean()), _longest_streak(clipped))


def _longest_streak(flags: NDArray[np.bool_]) -> int:
    edges = np.diff(np.concatenate([[0], flags.astype(np.int8), [0]]))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return int((stops - starts).max()) if len(starts) else 0


def _bootstrap_interval(norms: Numbers) -> tuple[float, float]:
    norms = norms[:: math.ceil(len(norms) / MAX_SAMPLE)]
    generator = np.random.default_rng(0)
    size = math.ceil(len(norms) ** (1 / 2))
    # A block that exceeds the end continues at the beginning, so every step is drawn with the same probability.
    blocks = np.lib.stride_tricks.sliding_window_view(np.concatenate([norms, norms[: size - 1]]), size)
    estimates = []
    for _ in range(NUM_RESAMPLES):
        starts = generator.integers(len(norms), size=len(norms) // size)
        estimates.append(float(np.percentile(blocks[starts].ravel(), LEVELS["p90"], overwrite_input=True)))
    low, high = np.percentile(estimates, [2.5, 97.5]).tolist()
    return low, high


def _drift(regimes: Regimes) -> tuple[float, float]:
    """Return how much the norms move after the warm-up.

    Returns:
        The factor between the medians of the parts, and the highest 95th percentile of a part.
    """
    quarters = np.array_split(regimes.norms_of(regimes.last), 4)
    parts = [*(regimes.norms_of(segment) for segment in regimes.steady), *quarters]
    medians = [float(np.median(part)) for part in parts]
    drift = max(medians) / min(medians) if min(medians) > 0 else math.inf
    return drift, max(float(np.percentile(part, LEVELS["p95"])) for part in parts)


def _notes(log: Log, regimes: Regimes, num_nonfinite: int) -> Iterator[str]:
    if num_nonfinite:
        yield f"Ignored norms, because they are not finite: {num_nonfinite:,} of {len(log.steps):,}."
    if regimes.warm_up:
        first, last = regimes.warm_up[0], regimes.warm_up[-1]
        yield (
            f"Warm-up until step {last.last}: the median norm went from {first.median:.3g} to "
            f"{regimes.steady[0].median:.3g}."
        )
    for before, after in pairwise(regimes.steady):
        yield f"At step {after.first} the median norm went from {before.median:.3g} to {after.median:.3g}."
    if (dominant := find_dominant_tensor(log)) is not None:
        name, share = dominant
        yield (
            f"{name} has {format_percent(share)} of the squared norm (median), so a bound on the total norm is in "
            "effect a bound on this tensor. Use distclip.group_norm to give it a separate bound."
        )


def _cautions(log: Log, regimes: Regimes, drift: float, batch: int | None, outcome: Outcome) -> Iterator[str]:
    if outcome.verdict == "recovered":
        yield f"{outcome.text} A lower bound may avoid that."
    indices = regimes.indices[regimes.last.start : regimes.last.stop]
    clip_rate = float(np.mean(log.coefs[indices] < 1))
    if clip_rate > MAX_CLIP_RATE:
        yield (
            f"{format_percent(clip_rate)} of these steps were clipped, and without clipping the norms would have been "
            "different. Run once more with the new bound and check again."
        )
    if drift > MAX_DRIFT:
        yield (
            f"After the warm-up the median norm moves by a factor of {drift:.2g}, so a fixed bound is too tight or too "
            "loose for a part of the run. An adaptive policy follows the norms."
        )
    batches = [(session.start, session.header["batch"]) for session in log.sessions if "batch" in session.header]
    changes = [later for earlier, later in pairwise(batches) if earlier[1] != later[1]]
    if changes:
        steps = ", ".join(f"{size} from step {start} on" for start, size in changes)
        yield (
            f"The batch size changed within the log: {batches[0][1]}, then {steps}. The noise of the norms changes "
            "with it."
        )
    recorded = log.header.get("batch")
    if batch is None or recorded == batch:
        return
    if not isinstance(recorded, (int, float)) or recorded <= 0:
        yield f"The log does not have its batch size. If the batch size was not {batch}, record a run with {batch}."
        return
    factor = math.sqrt(recorded / batch)
    p90 = float(np.percentile(regimes.norms[regimes.last.start :], LEVELS["p90"]))
    low, high = sorted((p90, p90 * factor))
    yield (
        f"The log was made with batch size {recorded}, not {batch}. The noise of a norm is proportional to "
        f"1/sqrt(batch), here a factor of {factor:.2g}, so the bound is between {low:.3g} and {high:.3g}. Record a run "
        f"with {batch}."
    )
