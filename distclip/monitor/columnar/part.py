"""Hold the steps of a part (`Part`), cut it where a run restarted, and merge several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .pyramid import Cells, Level, Norms, Steps, join_levels, select_cells, summarize

__all__ = ["FLAGS", "Part", "join_tables", "make_part", "merge", "trim"]

FLAGS = ("clipped", "finite", "skipped")
"""Names of the columns of bools."""

MAX_GENERATION = 2
"""Number of merges after which a part is final."""


@dataclass(frozen=True)
class Part:
    """Consecutive steps of a run.

    Args:
        steps: (n,) numbers of the steps, increasing.
        numbers: (n,) float64 each, by field of a line; NaN where a line lacks it.
        flags: (n,) bool each, by field of a line.
        details: other fields of a line, by step.
        sessions: (first step, header) of each recorder that began here.
        tensors: names of the columns of all norms.
        window_steps: (w,) steps with the norms of all tensors.
        window: (w, tensors) their norms.
        exact: norms around outliers.
        level: level 0 of the pyramid.
        generation: number of merges.
    """

    steps: Steps
    numbers: Mapping[str, NDArray[np.float64]]
    flags: Mapping[str, NDArray[np.bool_]]
    details: Mapping[int, Mapping[str, Any]]
    sessions: Sequence[tuple[int, Mapping[str, Any]]]
    tensors: tuple[str, ...]
    window_steps: Steps
    window: Norms
    exact: Cells
    level: Level
    generation: int = field(default=0)


def make_part(
    steps: Steps,
    numbers: Mapping[str, NDArray[np.float64]],
    flags: Mapping[str, NDArray[np.bool_]],
    details: Mapping[int, Mapping[str, Any]],
    sessions: Sequence[tuple[int, Mapping[str, Any]]],
    tensors: tuple[str, ...],
    window_steps: Steps,
    window: Norms,
) -> Part:
    """Make a part from steps whose norms are all known. The arguments are those of `Part`."""
    spikes = [step for step, fields in details.items() if "spike" in fields]
    exact, level = select_cells(window_steps, window, spikes), summarize(window_steps, window)
    return Part(steps, numbers, flags, details, sessions, tensors, window_steps, window, exact, level)


def trim(part: Part, step: int) -> Part:
    """Remove a step and all later ones.

    If the step divides a row of the pyramid, that row is computed again from the window. If the window lacks some of
    its steps, the row keeps its extremes.
    """
    num_rows, num_window = (int(np.searchsorted(steps, step)) for steps in (part.steps, part.window_steps))
    return replace(
        part,
        steps=part.steps[:num_rows],
        numbers={key: column[:num_rows] for key, column in part.numbers.items()},
        flags={key: column[:num_rows] for key, column in part.flags.items()},
        details={number: fields for number, fields in part.details.items() if number < step},
        sessions=[session for session in part.sessions if session[0] < step],
        window_steps=part.window_steps[:num_window],
        window=part.window[:num_window],
        exact=part.exact.take(part.exact.steps < step),
        level=_trim_level(part.level, step, part.window_steps[:num_window], part.window[:num_window]),
    )


def _trim_level(level: Level, step: int, window_steps: Steps, window: Norms) -> Level:
    num_whole = int(np.searchsorted(level.last, step))
    whole = level.take(slice(num_whole))
    if num_whole == len(level) or level.first[num_whole] >= step:
        return whole
    first = level.first[num_whole]
    if len(window_steps) and window_steps[0] <= first:
        inside = window_steps >= first
        divided = summarize(window_steps[inside], window[inside])
    else:
        divided = replace(level.take(slice(num_whole, num_whole + 1)), last=np.array([step - 1], np.int64))
    return join_levels([whole, divided])


def merge(parts: Sequence[Part], generation: int) -> Part:
    """Merge parts in the order in which they were recorded.

    A step that repeats an earlier number invalidates that step and all later ones in earlier parts.

    Args:
        parts: the parts, at least one.
        generation: generation of the result.
    """
    kept: list[Part] = []
    sessions: list[tuple[int, Mapping[str, Any]]] = []
    for part in parts:
        if len(part.steps):
            start = int(part.steps[0])
            kept = [trim(one, start) if one.steps[-1] >= start else one for one in kept if one.steps[0] < start]
        kept.append(part)
        for session in part.sessions:
            sessions = [one for one in sessions if one[0] < session[0]]
            sessions.append(session)
    tensors = tuple(dict.fromkeys(name for names in dict.fromkeys(part.tensors for part in kept) for name in names))
    kept = [_with_tensors(part, tensors) for part in kept]
    keys = dict.fromkeys(key for part in kept for key in part.numbers)
    return Part(
        steps=np.concatenate([part.steps for part in kept]),
        numbers={key: _join(part.numbers.get(key, np.full(len(part.steps), np.nan)) for part in kept) for key in keys},
        flags={key: _join(part.flags[key] for part in kept) for key in FLAGS},
        details={step: fields for part in kept for step, fields in part.details.items()},
        sessions=sessions,
        tensors=tensors,
        window_steps=_join(part.window_steps for part in kept),
        window=_join(part.window for part in kept),
        exact=Cells(*(_join(vars(part.exact)[field] for part in kept) for field in ("steps", "tensors", "norms"))),
        level=join_levels([part.level for part in kept]),
        generation=generation,
    )


def join_tables(parts: Sequence[tuple[tuple[str, ...], Sequence[Norms]]]) -> tuple[tuple[str, ...], list[Norms]]:
    """Join the rows of tables that may have columns for different tensors.

    Args:
        parts: names of the columns, and two tables of norms.
    """
    # Lines that no recorder wrote may contain a name twice.
    distinct = dict.fromkeys(columns for columns, _ in parts)
    names = tuple(dict.fromkeys(name for columns in distinct for name in columns))
    empty = np.zeros((0, len(names)), np.float32)
    return names, [_join([empty, *(_expand(tables[i], columns, names) for columns, tables in parts)]) for i in range(2)]


def _join(arrays: Iterable[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(list(arrays))


def _expand(norms: Norms, names: tuple[str, ...], all_names: tuple[str, ...]) -> Norms:
    """Return a table with a column for each of all names. Columns that were missing are NaN."""
    if names == all_names:
        return norms
    index = {name: i for i, name in enumerate(all_names)}
    table = np.full((len(norms), len(all_names)), np.nan, np.float32)
    table[:, [index[name] for name in names]] = norms
    return table


def _with_tensors(part: Part, tensors: tuple[str, ...]) -> Part:
    """Return the part with columns for these tensors, which include its current ones."""
    if part.tensors == tensors:
        return part
    index = {name: i for i, name in enumerate(tensors)}
    columns = np.array([index[name] for name in part.tensors], np.int32)
    level, exact = part.level, part.exact
    low, high, end = (_expand(norms, part.tensors, tensors) for norms in (level.low, level.high, level.end))
    return replace(
        part,
        tensors=tensors,
        window=_expand(part.window, part.tensors, tensors),
        level=Level(level.first, level.last, low, high, end),
        exact=replace(exact, tensors=columns[exact.tensors]),
    )
