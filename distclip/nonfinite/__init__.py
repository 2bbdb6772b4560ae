"""Handle non-finite gradients: find them, apply the rule of `on_nonfinite`, and count skipped steps."""

from .culprits import Culprit, Incident
from .rules import NonFiniteRule, OnNonFinite

__all__ = ["Culprit", "Incident", "NonFiniteRule", "OnNonFinite"]
