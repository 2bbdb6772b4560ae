"""Find numbers that the precision cannot represent."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..formatting import format_list
from ..log import Log
from ..spikes import SPIKE_FACTOR
from .context import START, WARNING_STEPS, Context, Finding

__all__ = ["check_numerics"]

FP16_ADVICE = (
    "Train in bf16, which has the range of fp32 and needs no loss scale. Or start with a lower loss scale "
    "(torch.amp.GradScaler(init_scale=1024)) and find the operation that overflows."
)

GENERAL_ADVICE = (
    "Check the batch's inputs and the culprits' operations (a division, log or sqrt near 0, a mask of -inf) with "
    "torch.autograd.set_detect_anomaly(True). In fp16, switch to bf16."
)


def check_numerics(context: Context) -> Iterator[Finding]:
    """Find a loss scale that collapses, or gradients that become non-finite without a spike before."""
    log, precision = context.log, context.log.header.get("precision")
    suffix = "" if precision is None else f" The precision is {precision}."
    if (collapse := _find_collapse(log)) is not None:
        high, low, num_falls = collapse
        scale = log.columns["scale"]
        yield Finding(
            "numerics",
            "The loss scale collapses",
            f"The loss scale fell from {scale[high]:g} at step {log.steps[high]} to {scale[low]:g} at step "
            f"{log.steps[low]}, in {num_falls} reductions.{suffix}",
            FP16_ADVICE,
        )
    elif unexplained := _unexplained_steps(context):
        steps = {int(log.steps[index]) for index in unexplained}
        num_nonfinite = np.count_nonzero(~log.finite)
        names = list(dict.fromkeys(culprit.name for culprit in log.culprits if culprit.step in steps))
        culprits = f" The non-finite gradients are {format_list(names)}." if names else ""
        yield Finding(
            "numerics",
            "Gradients become non-finite without warning",
            f"Non-finite steps: {num_nonfinite:,} of {len(log.steps):,}. None of the {WARNING_STEPS} steps "
            f"before step{'s' * (len(steps) > 1)} {format_list(sorted(steps))} has a norm of at least {SPIKE_FACTOR:g} "
            f"times the norms around it.{culprits}{suffix}",
            FP16_ADVICE if context.is_fp16 else GENERAL_ADVICE,
        )


def _unexplained_steps(context: Context) -> list[int]:
    """Return the indices of non-finite steps without an explanation.

    A spike before the step, a search for a loss scale, or a bad sample explains it.
    """
    suspects = {suspect.id for suspect in context.blame.suspects}
    explained = {spike.step for spike in context.blame.spikes if not suspects.isdisjoint(spike.ids)}
    return [
        index
        for index in context.nonfinite_starts.tolist()
        if not (
            context.has_spike_before(index)
            or _is_scale_search(context.log, index)
            or int(context.log.steps[index]) in explained
        )
    ]


def _find_collapse(log: Log) -> tuple[int, int, int] | None:
    """Find the largest fall of the loss scale.

    A scaler occasionally doubles the scale and undoes the change. At the start it searches for a scale that works. So a
    collapse is a fall by a factor of 16 after the start of the run, or of 1024 at any time.

    Returns:
        Indices of the steps between which the scale fell, and the number of reductions; None without a collapse.
    """
    scale = log.columns.get("scale")
    indices = np.flatnonzero(scale > 0) if scale is not None else np.zeros(0, np.int64)
    if scale is None or len(indices) < 2:
        return None
    levels = np.log2(scale[indices])
    start = int(START * len(levels))
    for begin, min_fall in ((start, 4.0), (0, 10.0)):
        part = levels[begin:]
        falls = np.maximum.accumulate(part) - part
        low = int(falls.argmax())
        if falls[low] >= min_fall:
            high = low - int(np.argmax(part[low::-1] == part[: low + 1].max()))
            num_falls = int(np.count_nonzero(np.diff(part[high : low + 1]) < 0))
            return int(indices[begin + high]), int(indices[begin + low]), num_falls
    return None


def _is_scale_search(log: Log, index: int) -> bool:
    """Return whether the scaler reduces the loss scale because of this step."""
    scale = log.columns.get("scale")
    if scale is None:
        return False
    around = scale[max(0, index - 1) : index + 2]
    return len(around) < 3 or bool((np.diff(around) < 0).any())
