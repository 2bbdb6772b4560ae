"""Totals → Verdict: what to do about a gradient, decided from numbers that every rank has alike.

A policy is a frozen dataclass that knows nothing of ranks, process groups or gradients, and never waits for a device.
"""

from .norm import Fixed, NormPolicy, global_norm
from .value import Value, value
from .verdict import Clamp, Policy, Scale, Verdict

__all__ = ["Clamp", "Fixed", "NormPolicy", "Policy", "Scale", "Value", "Verdict", "global_norm", "value"]
