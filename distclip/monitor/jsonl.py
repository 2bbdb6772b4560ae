r"""Append the lines of a run to a file: one JSON object per step, never rewritten.

JSON has no NaN and no infinity, so both are written as null. A line has either the key "distclip" or the key "step".

A line with "distclip" is a header. A recorder writes it whenever it opens the file:

- `distclip`, `format`: versions. `time`: seconds since 1970.
- `policy`: the policy as a Python expression, without arguments that have their default. `per`: its granularity.
  `slots`: names of the entries of `norms`.
- `tensors`: names of the entries of `tensor_norms`, if those are recorded.
- `every`: number of steps between two writes. `world_size`: number of ranks.
- The facts passed to the recorder. The analysis uses `batch` (samples per step), `precision` ("fp16", "float16") and
  `dataset_size` (samples per epoch).

A line with "step" is a step. If a run resumes from a checkpoint, step numbers may repeat. The later line counts, and
invalidates all earlier lines with the same or a larger step.

- `step`, `time`
- `norm`: norm of the whole gradient before clipping, without the loss scale. `coef`: factor by which clipping changed
  the norm.
- `bound`: norm that the policy allowed, if it has exactly one bound.
- `clipped`, `finite`, `skipped`: true or false.
- `scale`: loss scale, if there is one.
- `loss`, `lr` and other noted numbers. A loss is the mean over the ranks that noted one.
- `update_rms`: with `Recorder(updates=True)`, the largest root mean square of g / √v with Adam's second moments v.
  `update_slot`: index of its slot, or of its tensor if `tensor_norms` are recorded.
- `norms`: norm by slot, if there are several slots and they are not rows. `tensor_norms`: norm by tensor.
- `nonfinite`: number of elements that were NaN or infinite. `culprits`: the parameters and ranks that hold them.
- `replicas`: tensors whose replicas differed between ranks, if any did. Each has the `kind` ("gradient" or
  "parameter"), the `name`, the `ranks` that differ from the majority of the ranks in `group`, the relative difference
  of their `norm`, and the index of the `bit`, if a single bit differs.
- `spike`: only for an outlier or a norm that is not finite, the ratio of the norm to the median of the 128 norms
  before.
- `ids`: with `spike`, the ids of the samples of all ranks.
- `worst`: with `spike`, the `rank` with the largest part of the norm (null if all parts are equal), the `tensor` with
  the largest part on that rank, and the `share` of that part in the whole power sum.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["COLUMNS", "FORMAT", "MIN_BETWEEN_UPDATES", "UPDATE_RMS_ALARM", "JsonLines", "finite"]

COLUMNS = "metrics.columns"
"""Name of the directory of a columnar log, next to its file of lines."""

FORMAT = 1
"""Version of the format. It increases if a reader of old lines would misread new ones."""

UPDATE_RMS_ALARM = 3.0
"""Minimum `update_rms` for an alarm that Adam's second moments are too old."""

MIN_BETWEEN_UPDATES = 50
"""Minimum number of steps without such an `update_rms` before the next alarm about it."""

_BLOCK = 1 << 16
"""Number of bytes to read at once when looking for the last line break."""


class JsonLines:
    """A file of JSON lines to append to.

    Args:
        path: path of the file. It is created with its directory if it does not exist. If a crash left it in the middle
            of a line, that line is removed first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            _repair_end(file)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write one line per row, and close the file."""
        text = "".join(json.dumps(finite(row), allow_nan=False, default=str) + "\n" for row in rows)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)

    def convert_vector(self, values: Any) -> Any:
        """Return a vector as it is in a line: a list of numbers with six digits."""
        return [float(f"{x:.6g}") for x in values.tolist()]


def _repair_end(file: BinaryIO) -> None:
    """Remove the last line of a file if it is torn. Add its line break if only that is missing."""
    end = begin = file.seek(0, 2)
    tail = b""
    while begin and b"\n" not in tail:
        after, begin = begin, file.seek(max(0, begin - _BLOCK))
        tail = file.read(after - begin) + tail
    last = tail.rpartition(b"\n")[2]
    if last and _is_torn(last):
        file.truncate(end - len(last))
    elif last:
        file.write(b"\n")


def _is_torn(line: bytes) -> bool:
    """Return whether a line is an incomplete object. Text of another program is not one."""
    try:
        json.loads(line)
    except ValueError:
        return line.startswith(b"{")
    return False


def finite(value: Any) -> Any:
    """Replace NaN and infinity by None in a number, or in nested mappings, lists and tuples of numbers.

    Numbers and arrays of NumPy become those of Python.

    >>> finite({"norms": (1.0, float("inf"))})
    {'norms': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    try:
        plain = value.tolist()
    except Exception:
        return value
    # NumPy's text has a tolist, too.
    return plain if isinstance(plain, str | int) or plain is value else finite(plain)
