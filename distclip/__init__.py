"""Gradient clipping that is right when the gradient is spread over many processes.

::

    gradients ─▶ sources ─▶ shards ─▶ measure ─▶ reduce ─▶ policies ─▶ apply ─▶ report
                 who holds   local     Σ|g|^p     ONE all-   norm →     in        norm, coef,
                 what        pieces    or max|g|  reduce     verdict    place     clipped …

A gradient of the model is spread over many processes. Some hold different pieces of it, some hold copies of the same
piece. Clipping is right only if every element is counted exactly once and every process applies the same factor.
A module imports only from stages to its left. `call` runs the stages up to the totals; `clip` has torch's functions on
top of it; `judge` adds a policy's memory and what to do about gradients that are not finite, and comes to a `decision`;
`stepper` adds the optimizers (`amp`: a loss scale; `fold`: factors that a fused optimizer applies itself), `binding`
makes a judge of arguments, and `clipper` is the one class over them. `slots` settles between the ranks what has a norm
of its own: the model, or every group, tensor or row; `by_tensor` has the norms of tensors beside those. `kernels` read
and multiply for `measure` and `apply`: in C on a CPU, in Triton on a GPU, with torch's operators anywhere. Nothing here
imports `monitor`, which records what a clipper sees and says what follows from it, or `integrations`, which takes a
clipper into DeepSpeed's engines, and torch.distributed into MPI jobs.

Words: a *norm* is a root, a *power sum* is Σ|g|^p without it; *max_norm* is the user's bound; *coef* ≤ 1 multiplies a
gradient; an *axis* belongs to a mesh, a *dim* to a tensor; a *shard* is one rank's piece of a gradient, and its
*copies* are the ranks that hold that same piece; a trailing underscore changes its argument. *mesh*, *placements*,
*rank*, *world size* are torch.distributed's.
"""

from ._version import __version__
from .clipper import GradClipper
from .comm import Comm, LocalComm, ProcessGroupComm
from .errors import (
    ArgumentError,
    DisagreementError,
    DistclipError,
    FrequentClippingWarning,
    LayoutError,
    NonFiniteError,
    NonFiniteWarning,
    PeerError,
    TooManySkippedSteps,
)
from .functional import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from .nonfinite.culprits import Culprit, Incident
from .policies import (
    EMA,
    AdaGC,
    Fixed,
    MedianMAD,
    NormPolicy,
    Percentile,
    Policy,
    RelativeToWeight,
    Threshold,
    Value,
    ZScore,
    adagc,
    agc,
    autoclip,
    ema,
    global_norm,
    group_norm,
    median_mad,
    per_tensor_norm,
    value,
    zclip,
)
from .report import Report
from .sharding import annotate_

__all__ = [
    "EMA",
    "AdaGC",
    "ArgumentError",
    "Comm",
    "Culprit",
    "DisagreementError",
    "DistclipError",
    "Fixed",
    "FrequentClippingWarning",
    "GradClipper",
    "Incident",
    "LayoutError",
    "LocalComm",
    "MedianMAD",
    "NonFiniteError",
    "NonFiniteWarning",
    "NormPolicy",
    "PeerError",
    "Percentile",
    "Policy",
    "ProcessGroupComm",
    "RelativeToWeight",
    "Report",
    "Threshold",
    "TooManySkippedSteps",
    "Value",
    "ZScore",
    "__version__",
    "adagc",
    "agc",
    "annotate_",
    "autoclip",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "ema",
    "get_total_norm",
    "global_norm",
    "group_norm",
    "median_mad",
    "per_tensor_norm",
    "value",
    "zclip",
]
