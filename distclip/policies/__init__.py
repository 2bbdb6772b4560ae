"""Totals → Verdict: what to do about a gradient, decided from numbers that every rank has alike.

A norm-clipping policy is a granularity (`per`: what has a norm of its own) times a threshold (which norm is allowed);
the well-known names are presets of `NormPolicy`. A policy is a frozen dataclass of pure functions: it knows nothing of
ranks, process groups or gradients, keeps its memory in tensors that are passed in and out, and never waits for a
device.
"""

from .adagc import AdaGC
from .adaptive import adagc, autoclip, ema, median_mad, zclip
from .agc import RelativeToWeight
from .autoclip import Percentile
from .ema import EMA
from .fixed import Fixed
from .median_mad import MedianMAD
from .norm_policy import NormPolicy, coefficient
from .policy import Clamp, Per, Policy, Scale, State, Threshold, Verdict
from .presets import agc, global_norm, group_norm, per_tensor_norm
from .value import Value, value
from .zclip import ZScore

__all__ = [
    "EMA",
    "AdaGC",
    "Clamp",
    "Fixed",
    "MedianMAD",
    "NormPolicy",
    "Per",
    "Percentile",
    "Policy",
    "RelativeToWeight",
    "Scale",
    "State",
    "Threshold",
    "Value",
    "Verdict",
    "ZScore",
    "adagc",
    "agc",
    "autoclip",
    "coefficient",
    "ema",
    "global_norm",
    "group_norm",
    "median_mad",
    "per_tensor_norm",
    "value",
    "zclip",
]
