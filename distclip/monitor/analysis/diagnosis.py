"""What is wrong with a run, by rules that show their evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .case import BEFORE, FIRST, Case, Finding
from .log import Log
from .numerics import numerics
from .phrases import listed, percent, span
from .shares import dominant

__all__ = ["Finding", "diagnose"]

OFTEN = 0.10
"""Of the steps clipped: "clipping more than 5 to 10 % of the steps is a signal, not a solution"."""

GRADUAL = 1.5
"""Times the usual norm, right after the large ones at the start."""

PARTS = 10
FEWEST = 50
"""Steps: nothing is said of how often in fewer."""


def diagnose(log: Log) -> list[Finding]:
    """What is wrong with a run; empty where nothing is.

    Args:
        log: of any length.
    """
    case = Case(log)
    return [finding for rule in RULES for finding in rule(case)]


def clip_rate(case: Case) -> Iterator[Finding]:
    """Clipped too often for a bound that is there for the exceptions, and not only at the beginning."""
    log, settled = case.log, case.regimes.settled
    if len(log.steps) < FEWEST or not settled:
        return
    since = int(case.regimes.where[settled[0].start])
    rate = float(log.clipped[since:].mean())
    parts = [float(part.mean()) for part in np.array_split(log.clipped[since:], PARTS)]
    often = sum(part > OFTEN for part in parts)
    if rate <= OFTEN or often <= PARTS / 2:
        return
    lr, bounds = log.columns.get("lr"), log.bounds[np.isfinite(log.bounds)]
    at = "" if lr is None or not np.isfinite(lr).any() else f", at learning rate {span(lr)}"
    under = f" under a bound of {span(bounds)}" if len(bounds) else ""
    after = f"steps after the warm-up (step {log.steps[since]} on)" if case.regimes.warm_up else "steps"
    yield Finding(
        "clip rate",
        "The learning rate is too high, or the bound too low",
        f"{percent(rate)} of {len(log.steps) - since:,} {after} were clipped{under}{at}; more than {percent(OFTEN)} in "
        f"{often} of {PARTS} parts of the run, {percent(parts[-1])} in the last; mean coef "
        f"{log.coefs[since:].mean():.2g}.",
        "Clipping that often is a smaller learning rate under another name: lower the rate, or take the bound that "
        "`distclip suggest` finds.",
    )


def warm_up(case: Case) -> Iterator[Finding]:
    """Spikes at the beginning, and none after it."""
    log, spikes = case.log, _after_the_start(case)
    first = max(BEFORE, int(FIRST * len(log.steps)))
    if len(log.steps) < FEWEST or len(spikes) < 3 or spikes[-1] >= first:
        return
    later = log.norms[first:]
    later = later[np.isfinite(later)]
    if not len(later):
        return
    worst = int(spikes[log.norms[spikes].argmax()])
    yield Finding(
        "warm-up",
        "Spikes in the first steps only",
        f"{len(spikes)} steps stand out of those around them, all of them up to step {log.steps[spikes[-1]]} of "
        f"{log.steps[-1]}; the largest norm is {log.norms[worst]:.3g}, at step {log.steps[worst]}, and the median from "
        f"step {log.steps[first]} on {np.median(later):.3g}.",
        f"Let the learning rate grow over the first {_about(int(log.steps[spikes[-1]]))} steps or more, and keep the "
        "bound on (an adaptive policy needs a cap there).",
    )


def bad_data(case: Case) -> Iterator[Finding]:
    """Spikes that share samples."""
    if not case.blame.suspects:
        return
    named = listed([each.id for each in case.blame.suspects], 8)
    yield Finding(
        "bad data",
        f"Spikes share sample{'s' * (len(case.blame.suspects) > 1)} {named}",
        case.blame.text,
        f"Look at {'it' if len(case.blame.suspects) == 1 else 'them'}, and whether the norm is the same once more: "
        f"{case.blame.replay}",
        case.blame.replay or "",
    )


def divergence(case: Case) -> Iterator[Finding]:
    """Norms that grow until they are not finite, and stay so."""
    log = case.log
    if not len(case.broken) or log.finite[-1]:
        return
    end = int(case.broken[-1])
    if len(log.steps) - end < BEFORE or end == 0 or not case.announced(end):
        return
    recent = log.norms[max(0, end - BEFORE) : end]
    yield Finding(
        "divergence",
        "Training diverged",
        f"No norm from step {log.steps[end]} to the end, step {log.steps[-1]}, is finite; in the {len(recent)} steps "
        f"before they went up to {np.nanmax(recent):.3g}, from a median of {np.nanmedian(log.norms[:end]):.3g}.",
        "Clip, or lower the learning rate, and go on from a checkpoint before that step; `distclip suggest` takes a "
        "bound from a run at a lower rate.",
    )


def dominant_tensor(case: Case) -> Iterator[Finding]:
    """One tensor that is most of the gradient."""
    if (found := dominant(case.log)) is None:
        return
    name, share = found
    yield Finding(
        "dominant tensor",
        f"{name} is most of the gradient",
        f"{name} carries {percent(share)} of the squared norm (median over {len(case.log.tensor_steps):,} steps), of "
        f"{len(case.log.tensors)} tensors.",
        "A bound on the whole norm is a bound on this one, and the others are cut with it: look at its initialisation "
        f'and learning rate, or give it a bound of its own: distclip.group_norm({{"own": ("^{name}$", …)}}, …).',
    )


RULES: Sequence[Callable[[Case], Iterator[Finding]]] = (
    divergence,
    bad_data,
    numerics,
    warm_up,
    clip_rate,
    dominant_tensor,
)


def _after_the_start(case: Case) -> NDArray[np.int64]:
    """The spikes, but for those which the run begins with if the norms go down from them little by little.

    At the initialisation many networks have large gradients, at any learning rate.
    """
    spikes, norms = case.spikes, case.log.norms
    # The last spike up to which at least every other step is one.
    dense = np.flatnonzero(2 * np.arange(1, len(spikes) + 1) > spikes)
    if not len(dense):
        return spikes
    last = int(spikes[dense[-1]])
    after = norms[last + 1 : last + 2 + max(3, last)]
    gradual = np.isfinite(after).any() and np.nanmedian(after) > GRADUAL * np.nanmedian(norms)
    return spikes[dense[-1] + 1 :] if gradual else spikes


def _about(steps: int) -> int:
    """Rounded up to one digit."""
    power: int = 10 ** (len(str(steps)) - 1)
    return -(-steps // power) * power
