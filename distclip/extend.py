"""Re-export what integrations and third parties may build on; `distclip.integrations` imports nothing else.

These names are public: they change only with an entry in the changelog.
"""

from __future__ import annotations

from .apply.grad_scaler import ScalerState
from .apply.scale import scale_
from .clipper import GradClipper
from .comm import Comm, LocalComm
from .comm.consensus import FirstError, gather_or_raise
from .comm.discovery import world_comm
from .comm.mpi import abort_on_exception, started
from .decision import Outcome
from .errors import ArgumentError, LayoutError, PeerError
from .functional import clip_grad_norm_, get_total_norm
from .nonfinite.culprits import OnNonFinite
from .policies import Fixed, NormPolicy, Policy
from .report import Report
from .sharding.annotations import set_layout
from .sharding.dtensor import is_dtensor
from .sharding.layout import Layout
from .sharding.parameters import Parameters, named
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
    "gather_or_raise",
    "get_total_norm",
    "group_ranks",
    "is_dtensor",
    "named",
    "scale_",
    "set_layout",
    "started",
    "world_comm",
]
