"""Compute the allowed norms from the measured ones, which are equal on every rank: Totals → Verdict.

A policy that clips by norm combines a granularity (`per`: the unit that has a norm) with a threshold (the largest norm
allowed). Each well-known rule has a function that returns a `NormPolicy`. Each module contains one rule and the
function that documents it. A policy is a frozen dataclass of pure functions: it uses no ranks, process groups or
gradients, its state consists of tensors that are passed in and out, and it never waits for a device.
"""

from ..norms.spec import NormSpec
from .adagc import AdaGC, adagc
from .agc import RelativeToWeight, agc
from .aggc import Band, aggc
from .autoclip import Percentile, autoclip
from .bi2clip import BiClip, bi2clip
from .budget import Budget, budget
from .by_group import ByGroup
from .ema import EMA, ema
from .fixed import Fixed, global_norm, group_norm, per_tensor_norm
from .lagged import Lagged, lagged
from .mean_std import MeanStd
from .median_mad import MedianMAD, median_mad
from .norm_policy import NormPolicy
from .policy import Policy, Rule, Threshold, Verdict
from .policy import State as State  # the type of a state, which `distclip` does not export
from .update_clip import UpdateRule, update_clip
from .value import Value, value
from .zclip import ZScore, zclip

__all__ = [
    "EMA",
    "AdaGC",
    "Band",
    "BiClip",
    "Budget",
    "ByGroup",
    "Fixed",
    "Lagged",
    "MeanStd",
    "MedianMAD",
    "NormPolicy",
    "NormSpec",
    "Percentile",
    "Policy",
    "RelativeToWeight",
    "Rule",
    "Threshold",
    "UpdateRule",
    "Value",
    "Verdict",
    "ZScore",
    "adagc",
    "agc",
    "aggc",
    "autoclip",
    "bi2clip",
    "budget",
    "ema",
    "global_norm",
    "group_norm",
    "lagged",
    "median_mad",
    "per_tensor_norm",
    "update_clip",
    "value",
    "zclip",
]
