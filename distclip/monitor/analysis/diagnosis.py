"""What is wrong with a run, by rules that show their evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .blame import Blame, blame
from .excess import SPIKE, spikes_of
from .log import Log
from .regimes import Regimes, find_regimes
from .shares import dominant

__all__ = ["Finding", "diagnose"]

OFTEN = 0.10
"""Of the steps clipped: "clipping more than 5 to 10 % of the steps is a signal, not a solution"."""

PARTS = 10
FEWEST = 50
"""Steps: nothing is said of how often in fewer."""

FIRST = 0.10
"""Of the run: its first steps."""

BEFORE = 10
"""Steps before one that is not finite, in which a spike would have announced it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Args:
        rule: its name: "clip rate", "warm-up", "bad data", "numerics", "divergence", "dominant tensor".
        title: in a few words.
        evidence: the numbers it rests on.
        advice: what to do about it.
    """

    rule: str
    title: str
    evidence: str
    advice: str


class Case:
    """A log, and what more than one rule asks about it."""

    def __init__(self, log: Log) -> None:
        self.log = log

    @cached_property
    def regimes(self) -> Regimes:
        return find_regimes(self.log)

    @cached_property
    def spikes(self) -> NDArray[np.int64]:
        """Indices of the steps that stand out."""
        return spikes_of(self.log)

    @cached_property
    def blame(self) -> Blame:
        return blame(self.log)

    @cached_property
    def broken(self) -> NDArray[np.int64]:
        """Indices of the steps that are not finite, of those in a row the first."""
        bad = ~self.log.finite
        return np.flatnonzero(bad & ~np.concatenate([[False], bad[:-1]]))

    def announced(self, index: int) -> bool:
        """Whether a spike came shortly before a step."""
        return bool(np.any((self.spikes < index) & (self.spikes >= index - BEFORE)))


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
    at = "" if lr is None or not np.isfinite(lr).any() else f", at learning rate {_span(lr)}"
    under = f" under a bound of {_span(bounds)}" if len(bounds) else ""
    after = f"steps after the warm-up (step {log.steps[since]} on)" if case.regimes.warm_up else "steps"
    yield Finding(
        "clip rate",
        "The learning rate is too high, or the bound too low",
        f"{rate:.0%} of {len(log.steps) - since:,} {after} were clipped{under}{at}; more than {OFTEN:.0%} in {often} of "
        f"{PARTS} parts of the run, {parts[-1]:.0%} in the last; mean coef {log.coefs[since:].mean():.2g}.",
        "Clipping that often is a smaller learning rate under another name: lower the rate, or take the bound that "
        "`distclip suggest` finds.",
    )


def warm_up(case: Case) -> Iterator[Finding]:
    """Spikes at the beginning, and none after it."""
    log, spikes = case.log, case.spikes
    first = max(BEFORE, int(FIRST * len(log.steps)))
    if len(log.steps) < FEWEST or len(spikes) < 3 or spikes[-1] >= first:
        return
    worst = int(spikes[log.norms[spikes].argmax()])
    yield Finding(
        "warm-up",
        "Spikes in the first steps only",
        f"{len(spikes)} steps stand out of those around them, all of them up to step {log.steps[spikes[-1]]} of "
        f"{log.steps[-1]}; the largest norm is {log.norms[worst]:.3g}, at step {log.steps[worst]}, and the median from "
        f"step {log.steps[first]} on {np.nanmedian(log.norms[first:]):.3g}.",
        f"Let the learning rate grow over the first {_about(int(log.steps[spikes[-1]]))} steps or more, and keep the bound "
        "on (an adaptive policy needs a cap there).",
    )


def bad_data(case: Case) -> Iterator[Finding]:
    """Spikes that share samples."""
    if not case.blame.suspects:
        return
    named = ", ".join(str(each.id) for each in case.blame.suspects[:8])
    yield Finding(
        "bad data",
        f"Spikes share sample{'s' * (len(case.blame.suspects) > 1)} {named}",
        case.blame.text,
        f"Look at {'it' if len(case.blame.suspects) == 1 else 'them'}, and whether the norm is the same once more: "
        f"{case.blame.replay}",
    )


def numerics(case: Case) -> Iterator[Finding]:
    """A loss scale that cannot hold, or gradients that are not finite out of nothing."""
    log = case.log
    precision = log.header.get("precision")
    in_16_bits = precision in ("fp16", "float16") or (precision is None and "scale" in log.columns)
    advice = (
        "Train in bf16, which has the range of fp32 and needs no loss scale; or begin with a lower scale "
        "(torch.amp.GradScaler(init_scale=1024)) and look for what overflows."
        if in_16_bits
        else "Look at the culprits' inputs and operations (a division, log or sqrt near 0; a mask of -inf), with "
        "torch.autograd.set_detect_anomaly(True) on a replay of the step."
    )
    collapse = _collapse(log)
    if collapse is not None:
        high, low, falls = collapse
        yield Finding(
            "numerics",
            "The loss scale collapses",
            f"The loss scale fell from {log.columns['scale'][high]:g} at step {log.steps[high]} to "
            f"{log.columns['scale'][low]:g} at step {log.steps[low]}, in {falls} falls"
            f"{'' if precision is None else f', in {precision}'}.",
            advice,
        )
        return
    sudden = [
        index for index in case.broken if index > 0 and not case.announced(int(index)) and not _searched(log, index)
    ]
    shared = {spike.step for spike in case.blame.spikes if set(spike.ids) & {each.id for each in case.blame.suspects}}
    sudden = [index for index in sudden if int(log.steps[index]) not in shared]
    if not sudden:
        return
    steps = ", ".join(str(log.steps[index]) for index in sudden[:5]) + (", …" if len(sudden) > 5 else "")
    names = dict.fromkeys(each.name for each in log.culprits if each.step in set(log.steps[sudden].tolist()))
    whose = f"; first in {', '.join(list(names)[:3])}" if names else ""
    yield Finding(
        "numerics",
        "Gradients are not finite out of nothing",
        f"{len(sudden)} time{'s' * (len(sudden) > 1)} the norm was not finite (step {steps}) and none of the {BEFORE} steps "
        f"before had {SPIKE:g} times the norm of those around it{whose}"
        f"{'' if precision is None else f'; precision {precision}'}.",
        advice,
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
        f"No norm from step {log.steps[end]} to the end, step {log.steps[-1]}, is finite; in the {len(recent)} steps before "
        f"they went up to {np.nanmax(recent):.3g}, from a median of {np.nanmedian(log.norms[:end]):.3g}.",
        "Clip (`distclip suggest` takes a bound from the steps before), lower the learning rate, and go on from a "
        "checkpoint before that step.",
    )


def dominant_tensor(case: Case) -> Iterator[Finding]:
    """One tensor that is most of the gradient."""
    if (found := dominant(case.log)) is None:
        return
    name, share = found
    yield Finding(
        "dominant tensor",
        f"{name} is most of the gradient",
        f"{name} carries {share:.0%} of the squared norm (median over {len(case.log.tensor_steps):,} steps), of "
        f"{len(case.log.tensors)} tensors.",
        "A bound on the whole norm is a bound on this one, and the others are cut with it: look at its initialisation and "
        f'learning rate, or give it a bound of its own: distclip.group_norm({{"own": ("^{name}$", …)}}, …).',
    )


RULES: Sequence[Callable[[Case], Iterator[Finding]]] = (
    divergence,
    bad_data,
    numerics,
    warm_up,
    clip_rate,
    dominant_tensor,
)


def _collapse(log: Log) -> tuple[int, int, int] | None:
    """From where to where the loss scale fell, and in how many falls.

    A scaler tries every so often twice the scale, and takes it back; at the beginning it looks for one that holds. A
    collapse is a fall by 16 after the first steps, or by 1024 at any time.
    """
    scale = log.columns.get("scale")
    there = np.flatnonzero(scale > 0) if scale is not None else np.zeros(0, np.int64)
    if scale is None or len(there) < 2:
        return None
    levels = np.log2(scale[there])
    first = int(FIRST * len(levels))
    for begin, least in ((first, 4.0), (0, 10.0)):
        later = levels[begin:]
        fallen = np.maximum.accumulate(later) - later
        low = int(fallen.argmax())
        if fallen[low] >= least:
            high = low - int(np.argmax(later[low::-1] == later[: low + 1].max()))
            falls = int(np.count_nonzero(np.diff(later[high : low + 1]) < 0))
            return int(there[begin + high]), int(there[begin + low]), falls
    return None


def _searched(log: Log, index: int) -> bool:
    """Whether a step was how a scaler finds that its scale is too high."""
    scale = log.columns.get("scale")
    return scale is not None and index + 1 < len(scale) and bool(scale[index + 1] < scale[index])


def _span(values: NDArray[np.float64]) -> str:
    low, high = np.nanmin(values), np.nanmax(values)
    return f"{high:.3g}" if high - low <= 1e-3 * abs(high) else f"{low:.3g} … {high:.3g}"


def _about(steps: int) -> int:
    """Rounded up to one digit."""
    power = 10 ** (len(str(steps)) - 1)
    return -(-steps // power) * power
