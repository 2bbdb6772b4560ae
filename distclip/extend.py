"""Re-export the building blocks of integrations, for use by third parties as well.

`distclip.integrations` imports nothing else from the core. These names are public: they change only with an entry in
the changelog.
"""

from __future__ import annotations

from .apply.grad_scaler import ScalerState
from .apply.scale import scale_
from .clipper import GradClipper
from .comm import Comm, LocalComm
from .comm.consensus import FirstError, gather_or_raise
from .comm.discovery import world_comm
from .comm.mpi import abort_on_exception, started
from .errors import ArgumentError, LayoutError, PeerError
from .functional import clip_grad_norm_, get_total_norm
from .nonfinite.rules import OnNonFinite
from .outcome import Outcome, Report
from .policies import Fixed, NormPolicy, Policy
from .policies.description import describe
from .sharding.annotations import set_layout
from .sharding.dtensor import is_dtensor
from .sharding.layout import Layout
from .sharding.parameters import Parameters, name_tensors
from .sharding.replicas import replica_group
from .sharding.shard import Shard, Shards
from .sharding.split_over import SplitOver, group_ranks

__all__ = [
    "ArgumentError",
    "Comm",
    "FirstError",
    "Fixed",
    "GradClipper",
    "Layout",
    "LayoutError",
    "LocalComm",
    "NormPolicy",
    "OnNonFinite",
    "Outcome",
    "Parameters",
    "PeerError",
    "Policy",
    "Report",
    "ScalerState",
    "Shard",
    "Shards",
    "SplitOver",
    "abort_on_exception",
    "clip_grad_norm_",
    "describe",
    "gather_or_raise",
    "get_total_norm",
    "group_ranks",
    "is_dtensor",
    "name_tensors",
    "replica_group",
    "scale_",
    "set_layout",
    "started",
    "world_comm",
]
