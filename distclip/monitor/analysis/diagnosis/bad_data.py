"""Find samples that cause spikes."""

from __future__ import annotations

from collections.abc import Iterator

from ..formatting import format_list
from .context import Context, Finding

__all__ = ["check_bad_data"]


def check_bad_data(context: Context) -> Iterator[Finding]:
    """Find spikes that have samples in common."""
    blame = context.blame
    if not blame.suspects:
        return
    one = len(blame.suspects) == 1
    ids = format_list([suspect.id for suspect in blame.suspects], 8)
    yield Finding(
        "bad data",
        f"Spikes share sample{'' if one else 's'} {ids}",
        blame.text,
        f"Inspect the sample{'' if one else 's'}, and check whether the norm is the same again. {blame.how_to_replay}"
        + (f" {blame.replay}" if blame.replay else ""),
        blame.replay or "",
    )
