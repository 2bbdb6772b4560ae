"""Draw norms step by step, and make the totals that a policy gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import inf, nan

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from distclip.norms.reduce import Totals

__all__ = ["many", "totals", "traces"]

many = settings(max_examples=25)

EVENTS = {"spike": 50.0, "dip": 0.01, "zero": 0.0, "level": 5.0, "late": 0.0, "nan": nan, "inf": inf}
"""Factors of a norm, or the norm itself if it is not finite. Those are last, so that nothing changes them."""


def totals(norms: Sequence[float] | Tensor, weight_norms: Sequence[float] | None = None) -> Totals:
    """Return the totals of a step with these norms."""
    weight = None if weight_norms is None else torch.tensor(weight_norms, dtype=torch.float64) ** 2
    return Totals(torch.as_tensor(norms, dtype=torch.float64) ** 2, weight_powers=weight)


@st.composite
def traces(draw: st.DrawFn) -> list[list[float]]:
    """Draw norms by step and slot: scatter around levels, new levels, spikes, zeros and non-finite steps."""
    steps, slots = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    norms = np.exp(draw(st.sampled_from([0.0, 0.05, 0.25, 1.0])) * rng.standard_normal((steps, slots)))
    if draw(st.booleans()):
        norms *= 10.0 ** rng.uniform(-3, 3, slots)
    events = st.tuples(st.sampled_from(list(EVENTS)), st.integers(0, steps - 1), st.integers(0, slots - 1))
    for what, t, slot in sorted(draw(st.lists(events, max_size=8)), key=lambda event: list(EVENTS).index(event[0])):
        if what in ("level", "late"):
            norms[slice(t, None) if what == "level" else slice(t), slot] *= EVENTS[what]
        elif math.isfinite(EVENTS[what]):
            norms[t, slot] *= EVENTS[what]
        else:
            norms[t, slot] = EVENTS[what]
    return norms.tolist()  # type: ignore[no-any-return]
