r"""The file that a recorder leaves: JSON, a line a step, appended to and never rewritten.

NaN and infinity, which JSON does not know, are null. A line has the key "distclip", or the key "step".

The first kind says what follows; it comes whenever a recorder opens the file:

- `distclip`, `format`: versions; `time`: seconds since 1970
- `policy`: as Python writes it, without what is as it is by default; `per`: what has a norm of its own; `slots`: names
  in the order of `norms`
- `tensors`: names in the order of `tensor_norms`, where those are recorded
- `every`: steps between two writes; `world_size`: ranks; and whatever facts the recorder was given. What is made of a
  run knows `batch` (samples of a step), `precision` ("fp16", "float16") and `dataset_size` (samples of a pass)

The second kind is a step. Where a run went on from a checkpoint, numbers come again: what was written later holds, and
what had been written of this and later steps does not.

- `step`, `time`
- `norm`: of the whole gradient before clipping, free of a loss scale; `coef`: by what clipping shortened it
- `bound`: the norm that the policy allowed; only where it has one bound, and there is one
- `clipped`, `finite`, `skipped`: true or false
- `scale`: the loss scale, where there is one
- `loss`, `lr` and whatever else was noted; a loss is the mean over the ranks that have one
- `norms`: by slot, where there are several, except rows; `tensor_norms`: by tensor
- `nonfinite`: how many elements were NaN or infinite, and `culprits`: in which parameters on which ranks
- `spike`: where the norm stood out or was not finite: how many medians of the 128 norms before it; with it `ids` of the
  samples, of all ranks, and `worst`: the `rank` with the largest part of the norm (null where all have the same), the
  `tensor` with the largest part there, and its `share` of the whole, of powers
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["FORMAT", "Lines", "finite"]

FORMAT = 1
"""Rises when a reader of old lines would misread new ones."""


class Lines:
    """A file of lines to append to.

    Args:
        path: created with its directory if it is not there; one that a crash left in the middle of a line is gone on
            with on a new one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write whole lines, and let go of the file."""
        text = "".join(json.dumps(finite(row), allow_nan=False, default=str) + "\n" for row in rows)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)


def finite(value: Any) -> Any:
    """What JSON can say of a number, or of what holds numbers: null for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
