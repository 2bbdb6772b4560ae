"""Show a running job in the terminal: norm, bound, clip rate, alarms."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from ..._console import Screen, cell
from ..analysis.alarms import Alarm, find_alarms
from ..analysis.formatting import MISSING, format_count, format_number, format_percent
from ..analysis.log import Log
from ..analysis.statistics import Numbers
from ..jsonl import finite
from .follow import Follower

__all__ = ["describe_status", "draw_sparkline", "watch"]

WINDOW = 128
"""Number of the last steps that the recent clip rate covers."""

STEPS_PER_COLUMN = 8
"""Number of steps that one character of the curve stands for."""

MAX_ALARMS = 5
"""Maximum number of alarms that the view shows, the last ones."""

BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-=+*#%"
"""Characters of the curve, from the smallest norm to the largest."""


def watch(
    follower: Follower,
    screen: Screen,
    *,
    once: bool = False,
    as_json: bool = False,
    interval: float = 2.0,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Follow a run until it ends.

    A terminal gets a view that changes in place. Other output gets a line for each change, and one for each alarm.

    Args:
        follower: reads the run.
        screen: output.
        once: show the run as it is now, and return.
        as_json: print a JSON object on a line for each change instead.
        interval: seconds between two checks of the files, > 0. It grows for a long run, so that reading takes at most a
            tenth of the time.
        wait: waits for a number of seconds.

    Raises:
        RunError: the run ended without a step.
    """
    if as_json or once or not screen.console.is_terminal:
        printed = _Lines(screen, as_json=as_json)
        for log, _ in _changes(follower, once, interval, wait):
            if once and not as_json:
                screen.console.print(make_view(log, screen, is_over=follower.is_over))
            elif log is not None:
                printed.print(log, is_over=follower.is_over)
        return
    with Live(console=screen.console, auto_refresh=False) as live:
        for log, is_over in _changes(follower, once, interval, wait):
            live.update(make_view(log, screen, is_over=is_over), refresh=True)


def _changes(follower: Follower, once: bool, interval: float, wait: Callable[[float], None]) -> Any:
    """Yield the run, and whether it is over, after each change and at the end."""
    while True:
        # This is read first, so that the last lines are read before the end.
        is_over = follower.is_over
        has_changed = follower.poll()
        if has_changed or is_over or once:
            yield follower.log, is_over
        if is_over or once:
            return
        wait(max(interval, 10 * follower.seconds))


class _Lines:
    """Output of a run to a pipe: each state and each alarm once."""

    def __init__(self, screen: Screen, *, as_json: bool) -> None:
        self._screen, self._as_json = screen, as_json
        self._last: tuple[int, bool] | None = None
        self._alarms: set[Alarm] = set()

    def print(self, log: Log, *, is_over: bool) -> None:
        """Print what is new."""
        state = int(log.steps[-1]), is_over
        alarms = [alarm for alarm in find_alarms(log) if alarm not in self._alarms]
        self._alarms.update(alarms)
        if self._as_json:
            if state != self._last or alarms:
                new = [{"step": one.step, "kind": one.kind, "text": one.text} for one in alarms]
                status = describe_status(log) | {"is_over": is_over, "new_alarms": new}
                print(json.dumps(finite(status), allow_nan=False, default=str), flush=True)
        else:
            for alarm in alarms:
                self._screen.line(f"step {alarm.step}: {alarm.text}")
            if self._last is None or state[0] != self._last[0]:
                self._screen.line(", ".join(f"{key} {value}" for key, value in _numbers(log)))
            if is_over:
                self._screen.line("the run has ended")
        sys.stdout.flush()
        self._last = state


def describe_status(log: Log) -> dict[str, Any]:
    """Return the last step of a run and its clip rates, as numbers."""
    recent = slice(-WINDOW, None)
    columns = {key: float(log.columns[key][-1]) for key in ("loss", "lr", "update_rms") if key in log.columns}
    return {
        "name": log.name,
        "path": log.path,
        "step": int(log.steps[-1]),
        "norm": float(log.norms[-1]),
        "bound": float(log.bounds[-1]),
        "coef": float(log.coefs[-1]),
        **columns,
        "clip_rate": log.clip_rate,
        "recent_clip_rate": math.nan if log.unknown else float(log.clipped[recent].mean()),
        "nonfinite": int((~log.finite).sum()),
        "skipped": int(log.skipped.sum()),
    }


def _numbers(log: Log) -> list[tuple[str, str]]:
    """Return the numbers of the last step with their names."""
    status = describe_status(log)
    pairs = [("step", format_count(status["step"])), ("norm", format_number(status["norm"]))]
    if not math.isnan(status["bound"]):
        pairs.append(("bound", format_number(status["bound"])))
    pairs += [(key, format_number(status[key])) for key in ("loss", "lr", "update_rms") if key in status]
    if not log.unknown:
        pairs.append(
            ("clipped", f"{format_percent(status['recent_clip_rate'])} of the last {min(WINDOW, len(log.steps))}")
        )
    pairs += [(name, format_count(status[key])) for name, key in (("not finite", "nonfinite"), ("skipped", "skipped"))]
    return pairs


def make_view(log: Log | None, screen: Screen, *, is_over: bool) -> RenderableType:
    """Return the view of a run for a terminal.

    Args:
        log: log of the run, or None before its first step.
        screen: output, which has a width.
        is_over: whether the run has ended.
    """
    if log is None:
        return Text("waiting for the first steps")
    width = max(10, min(screen.console.width, 120) - 2)
    bars = BARS if (screen.console.encoding or "").lower().startswith("utf") else ASCII_BARS
    policy = log.header.get("policy")
    lines = [
        cell(log.name + (f": {policy}" if isinstance(policy, str) else ""), "bold"),
        Text(", ".join(f"{key} {value}" for key, value in _numbers(log))),
        Text(draw_sparkline(log.norms, width, bars), "cyan"),
        cell(_describe_curve(log, width), "dim"),
    ]
    alarms = find_alarms(log)
    lines += [cell(f"step {alarm.step:,}: {alarm.text}", "red") for alarm in alarms[-MAX_ALARMS:]]
    if len(alarms) > MAX_ALARMS:
        lines.append(Text(f"and {len(alarms) - MAX_ALARMS:,} earlier alarms", "dim"))
    elif not alarms:
        lines.append(Text("no alarms", "green"))
    lines.append(Text("the run has ended" if is_over else "running", "dim"))
    return Group(*lines)


def _describe_curve(log: Log, width: int) -> str:
    norms = log.norms[-STEPS_PER_COLUMN * width :]
    known = norms[np.isfinite(norms)]
    size = f"{format_number(known.min())} to {format_number(known.max())}" if len(known) else MISSING
    return f"largest norms of the last {len(norms):,} steps, {size}"


def draw_sparkline(norms: Numbers, width: int, bars: Sequence[str] = BARS) -> str:
    """Draw norms as one line of characters, on a logarithmic scale.

    An x stands for a norm that is not finite.

    Args:
        norms: (n,) in order, NaN where not finite. The last ones are drawn.
        width: number of characters.
        bars: characters from the smallest to the largest.

    >>> draw_sparkline(np.array([1.0, 2.0, 4.0, np.nan]), 4)
    '▁▅█x'
    """
    count = max(1, min(STEPS_PER_COLUMN, math.ceil(len(norms) / width)))
    last = norms[-count * width :]
    # The last column is complete, and the first one may have fewer steps.
    columns = [last[max(0, end - count) : end] for end in range(len(last), 0, -count)][::-1]
    known = np.log(np.clip(last[np.isfinite(last)], 1e-30, None))
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    text = ""
    for column in columns:
        if not np.isfinite(column).all():
            text += "x"
            continue
        position = (math.log(max(float(column.max()), 1e-30)) - low) / (high - low) if high > low else 0.0
        text += bars[round(position * (len(bars) - 1))]
    return text
