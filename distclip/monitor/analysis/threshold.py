"""From the norms of a run to a bound for the next one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .candidates import Candidate, bound_in_use, candidate
from .errors import RunError
from .log import Log, Numbers
from .phrases import percent
from .regimes import Regimes, Segment, find_regimes
from .shares import dominant

__all__ = ["Suggestion", "suggest"]

FEWEST = 200
"""Steps: of fewer, less than 20 are beyond the 90th percentile."""

LEVELS = {"p50": 50, "p75": 75, "p90": 90, "p95": 95, "p99": 99, "max": 100}

DRIFT = 2.0
"""Between medians: beyond it no fixed bound clips alike all the time."""

CONDITIONAL = 0.05
"""Of the steps clipped: beyond it, the norms would have been others without."""

RESAMPLES = 500
SAMPLE = 20_000
"""Steps that are resampled at most, evenly spread."""


@dataclass(frozen=True)
class Suggestion:
    """A bound, and what speaks for and against it.

    Args:
        max_norm: the 90th percentile of the steady part, in two or three digits.
        low, high: the 75th and the 95th.
        interval: in which the 90th percentile lies with 95 % confidence.
        segment: the steady part.
        steps: how many there are in it whose norms are finite.
        dropped: steps of the whole run whose norms are not.
        candidates: each percentile as a bound.
        current: the bound that the run was made under; None where it had none.
        drift: by what factor the median moves after the warm-up.
        cap: for an adaptive policy, where that is better because of the drift; else None.
        text: all of it in a sentence.
        notes: what else to know of the log, a sentence each.
        cautions: what makes the bound doubtful, a sentence each.
    """

    max_norm: float
    low: float
    high: float
    interval: tuple[float, float]
    segment: Segment
    steps: int
    dropped: int
    candidates: tuple[Candidate, ...]
    current: Candidate | None
    drift: float
    cap: float | None
    text: str
    notes: tuple[str, ...]
    cautions: tuple[str, ...]

    @property
    def override(self) -> str:
        """For Hydra."""
        if self.cap is not None:
            return f"clip=median_mad clip.cap={self.cap:g}"
        return f"clip=global_norm clip.max_norm={self.max_norm:g}"

    @property
    def python(self) -> str:
        """The same in Python."""
        if self.cap is not None:
            return f"distclip.GradClipper(model, distclip.median_mad(3, cap={self.cap:g}))"
        return f"distclip.GradClipper(model, distclip.global_norm({self.max_norm:g}))"


def suggest(log: Log, batch: int | None = None) -> Suggestion:
    """The bound that a run's norms speak for: the 90th percentile of its last regime, after the warm-up.

    Measured: norms recorded at a safe learning rate, percentiles taken as the bound of runs at four to five times that
    rate, three seeds each. With p90 the held-out losses are 1.96 (a tanh RNN), 1.75 (an LSTM; 1.97 on one seed) and
    2.49 (a GPT, SGD), as good as with any other. p75 gives 2.00, 1.74 and 2.48, p95 1.98, 1.73 … 1.88 and 2.50; p50
    costs the RNN 0.1. With p99 and the maximum the LSTM fails (3.3 … 4.2 and 4.4 … 7.9): they are too loose when the
    learning rate is to be raised, and good only as a safety net at the rate of the log.

    The interval is a bootstrap's over blocks of steps, because norms of neighbouring steps are alike; of a regime of
    more than 20,000 steps as many are resampled, so that it is wider than it need be.

    Args:
        batch: samples of a step in the run to come, for a warning where the log was made with another number.

    Raises:
        RunError: no norm is finite, or the last regime has fewer than 200.
    """
    regimes = find_regimes(log)
    dropped = len(log.steps) - len(regimes.norms)
    if not len(regimes.norms):
        raise RunError(
            f"{log.name}: not one of {len(log.steps)} norms is finite: there is nothing to take a bound from"
        )
    last = regimes.last
    if len(last) < FEWEST:
        changed = " (since the level of the norms changed)" if last.start else ""
        left_out = f" ({dropped:,} of the run are not finite)" if dropped else ""
        finite = "" if log.finite[-1] else " that stays finite, at a lower rate"
        raise RunError(
            f"{log.name}: steps {last.first} to {last.last}{changed} have {len(last)} finite norms{left_out}, and a "
            f"bound needs {FEWEST}: record a longer run{finite}"
        )
    norms = regimes.of(last)
    percentiles = dict(zip(LEVELS, np.percentile(norms, list(LEVELS.values())).tolist(), strict=True))
    if percentiles["p90"] <= 0:
        raise RunError(f"{log.name}: nine of ten norms are 0 from step {last.first} on: no gradient arrives there")
    max_norm, interval = rounded(percentiles["p90"]), _interval(norms)
    drift, highest = _drift(regimes)
    begins = f" after the warm-up of {last.start:,}" if regimes.warm_up and len(regimes.settled) == 1 else ""
    of = "the last regime, steps" if len(regimes.settled) > 1 else "steps"
    text = (
        f"Clip at {max_norm:g}: the 90th percentile of {of} {last.first} to {last.last}{begins} (95 % interval "
        f"{interval[0]:.3g} to {interval[1]:.3g}); anything from {percentiles['p75']:.3g} to {percentiles['p95']:.3g} "
        "(p75 to p95) will do."
    )
    return Suggestion(
        max_norm=max_norm,
        low=percentiles["p75"],
        high=percentiles["p95"],
        interval=interval,
        segment=last,
        steps=len(last),
        dropped=dropped,
        candidates=tuple(candidate(name, bound, norms) for name, bound in percentiles.items()),
        current=bound_in_use(log, regimes.where[last.start : last.stop]),
        drift=drift,
        cap=rounded(highest) if drift > DRIFT else None,
        text=text,
        notes=tuple(_notes(log, regimes, dropped)),
        cautions=tuple(_cautions(log, regimes, drift, batch)),
    )


def rounded(value: float) -> float:
    """To two significant digits, or three where the first is a 1: at most 2.5 % off."""
    digits = -math.floor(math.log10(value))
    return round(value, digits + (2 if value * 10.0**digits < 2 else 1))


def _interval(norms: Numbers) -> tuple[float, float]:
    norms = norms[:: math.ceil(len(norms) / SAMPLE)]
    generator = np.random.default_rng(0)
    size = math.ceil(len(norms) ** (1 / 2))
    within = np.arange(size)
    found = []
    for _ in range(RESAMPLES):
        starts = generator.integers(len(norms), size=len(norms) // size)
        # Round the end to the beginning, so that every step is drawn as often.
        found.append(float(np.percentile(norms[(starts[:, None] + within).ravel() % len(norms)], LEVELS["p90"])))
    low, high = np.percentile(found, [2.5, 97.5]).tolist()
    return low, high


def _drift(regimes: Regimes) -> tuple[float, float]:
    """By what factor the median moves after the warm-up, and the highest 95th percentile of any part of it."""
    quarters = np.array_split(regimes.of(regimes.last), 4)
    parts = [*(regimes.of(segment) for segment in regimes.settled), *quarters]
    medians = [float(np.median(part)) for part in parts]
    drift = max(medians) / min(medians) if min(medians) > 0 else math.inf
    return drift, max(float(np.percentile(part, LEVELS["p95"])) for part in parts)


def _notes(log: Log, regimes: Regimes, dropped: int) -> Iterator[str]:
    if dropped:
        yield f"{dropped:,} of {len(log.steps):,} steps were left out because their norms are not finite."
    if regimes.warm_up:
        first, last = regimes.warm_up[0], regimes.warm_up[-1]
        yield (
            f"Warm-up to step {last.last}: the median norm went from {first.median:.3g} to "
            f"{regimes.settled[0].median:.3g}."
        )
    for before, after in pairwise(regimes.settled):
        yield f"At step {after.first} the median norm went from {before.median:.3g} to {after.median:.3g}."
    if (most := dominant(log)) is not None:
        yield (
            f"{most[0]} carries {percent(most[1])} of the squared norm (median): a bound on the whole is a bound on "
            "it. distclip.group_norm can give it one of its own."
        )


def _cautions(log: Log, regimes: Regimes, drift: float, batch: int | None) -> Iterator[str]:
    where = regimes.where[regimes.last.start : regimes.last.stop]
    clipped = float(np.mean(log.coefs[where] < 1))
    if clipped > CONDITIONAL:
        yield (
            f"{percent(clipped)} of these steps were clipped: the norms are those of a clipped run, and would have "
            "been others without. Run it once more with the new bound and look again."
        )
    if drift > DRIFT:
        yield (
            f"After the warm-up the median norm moves by a factor of {drift:.2g}: a fixed bound will be too tight or "
            "too loose for a part of the run; an adaptive policy goes with it."
        )
    batches = [(each.start, each.header["batch"]) for each in log.sessions if "batch" in each.header]
    changes = [later for earlier, later in pairwise(batches) if earlier[1] != later[1]]
    if changes:
        steps = ", ".join(f"{size} from step {start} on" for start, size in changes)
        yield f"The batch size changed within the log: {batches[0][1]}, then {steps}. The norms' noise changes with it."
    recorded = log.header.get("batch")
    if batch is None or recorded == batch:
        return
    if not isinstance(recorded, (int, float)) or recorded <= 0:
        yield f"The log does not say its batch size: if it was not {batch}, record a run with {batch}."
        return
    factor = math.sqrt(recorded / batch)
    ends = sorted(
        float(np.percentile(regimes.norms[regimes.last.start :], LEVELS["p90"])) * each for each in (1, factor)
    )
    yield (
        f"The log was made with batch {recorded}, not {batch}: the noise in a norm goes with 1/sqrt(batch), here x "
        f"{factor:.2g}, so that the bound would lie between {ends[0]:.3g} and {ends[1]:.3g}. Record a run with {batch}."
    )
