"""Compare replicas: find the one that differs, apply the rule of `replicas=`, repair it, and scrub parameters."""

from .compare import ReplicaDifference
from .incidents import ReplicaIncident
from .rules import ReplicaRule, Replicas

__all__ = ["ReplicaDifference", "ReplicaIncident", "ReplicaRule", "Replicas"]
