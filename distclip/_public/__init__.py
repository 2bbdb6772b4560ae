"""Import the public names of distclip, which the package `distclip` re-exports when one is first used."""

from .. import policies
from .. import recipes as recipes  # a module, and so not in __all__
from .._version import __version__
from ..auditing import audit
from ..clipper import GradClipper
from ..comm import Comm, LocalComm, ProcessGroupComm
from ..errors import (
    ArgumentError,
    DisagreementError,
    DistclipError,
    ExplodedWarmupWarning,
    FrequentClippingWarning,
    LayoutError,
    NonFiniteError,
    NonFiniteWarning,
    PeerError,
    ReplicaError,
    ReplicaWarning,
    TooManySkippedSteps,
    UnclippedStepWarning,
)
from ..functional import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from ..nonfinite import Culprit, Incident
from ..outcome import Report
from ..policies import *  # noqa: F403
from ..replicas import ReplicaDifference, ReplicaIncident
from ..sharding import annotate_

__all__ = [
    "ArgumentError",
    "Comm",
    "Culprit",
    "DisagreementError",
    "DistclipError",
    "ExplodedWarmupWarning",
    "FrequentClippingWarning",
    "GradClipper",
    "Incident",
    "LayoutError",
    "LocalComm",
    "NonFiniteError",
    "NonFiniteWarning",
    "PeerError",
    "ProcessGroupComm",
    "ReplicaDifference",
    "ReplicaError",
    "ReplicaIncident",
    "ReplicaWarning",
    "Report",
    "TooManySkippedSteps",
    "UnclippedStepWarning",
    "__version__",
    "annotate_",
    "audit",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
]
# A new policy is exported in distclip.policies only.
__all__ += policies.__all__
