"""Numbers that the precision cannot hold: a loss scale that collapses, gradients that are suddenly not finite."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .case import BEFORE, FIRST, Case, Finding
from .excess import SPIKE
from .log import Log
from .phrases import listed

__all__ = ["numerics"]


IN_FP16 = (
    "Train in bf16, which has the range of fp32 and needs no loss scale; or begin with a lower one "
    "(torch.amp.GradScaler(init_scale=1024)) and look for what overflows."
)

IN_ANY = (
    "Look at the batch's inputs and at the operations of the culprits (a division, log or sqrt near 0, a mask of "
    "-inf), with torch.autograd.set_detect_anomaly(True); in fp16, train in bf16."
)


def numerics(case: Case) -> Iterator[Finding]:
    """A loss scale that cannot hold, or gradients that are not finite out of nothing."""
    log, precision = case.log, case.log.header.get("precision")
    of = "" if precision is None else f"; precision {precision}"
    if (fall := _collapse(log)) is not None:
        high, low, falls = fall
        scale = log.columns["scale"]
        yield Finding(
            "numerics",
            "The loss scale collapses",
            f"The loss scale fell from {scale[high]:g} at step {log.steps[high]} to {scale[low]:g} at step "
            f"{log.steps[low]}, in {falls} falls{of}.",
            IN_FP16,
        )
    elif sudden := _sudden(case):
        found = {int(log.steps[index]) for index in sudden}
        names = list(dict.fromkeys(each.name for each in log.culprits if each.step in found))
        whose = f"; not finite there: {listed(names)}" if names else ""
        yield Finding(
            "numerics",
            "Gradients are not finite out of nothing",
            f"{np.count_nonzero(~log.finite):,} of {len(log.steps):,} steps are not finite, and the {BEFORE} steps "
            f"before step{'s' * (len(found) > 1)} {listed(sorted(found))} have no norm {SPIKE:g} times those around "
            f"it{whose}{of}.",
            IN_FP16 if _is_fp16(log) else IN_ANY,
        )


def _is_fp16(log: Log) -> bool:
    precision = str(log.header.get("precision", "")).lower()
    return "scale" in log.columns if not precision else "bf" not in precision and "16" in precision


def _sudden(case: Case) -> list[int]:
    """Indices of steps that are not finite without a spike before them, and neither a scaler's nor a bad sample's."""
    suspects = {each.id for each in case.blame.suspects}
    explained = {spike.step for spike in case.blame.spikes if not suspects.isdisjoint(spike.ids)}
    return [
        index
        for index in case.broken.tolist()
        if not (case.announced(index) or _searched(case.log, index) or int(case.log.steps[index]) in explained)
    ]


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
    """Whether a step was how a scaler finds that its scale is too high: it falls there, or right after."""
    scale = log.columns.get("scale")
    if scale is None:
        return False
    around = scale[max(0, index - 1) : index + 2]
    return len(around) < 3 or bool((np.diff(around) < 0).any())
