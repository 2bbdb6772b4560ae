"""Clip gradients correctly when a model is spread over many processes.

::

    gradients ─▶ sharding ────▶ norms ────────────────────────▶ policies ─▶ nonfinite ──▶ apply
                 Shards         Partials       Totals           Verdict     Outcome       gradients
                 which rank     Σ|g|^p of the  ONE all-reduce,  norms to    skip, zero,   scale, step
                 has what       local shards   same bits        coefs       or raise      or skip

    comm          torch.distributed, MPI, one process       devices    differences between devices
    engine        one step, all stages in order             outcome    Outcome, and Report for the user
    functional    torch's four functions                    clipper    GradClipper: step, clip, attach
    recipes       published recipes, as policies
    checkpoint    state of a policy by slot name            extend     building blocks for integrations
    auditing      audit: prove that a layout counts right   monitor    record and explain runs
    integrations  DeepSpeed, Megatron, Lightning, …         bench      speed against torch
    reference     the oracle of the tests

A gradient of the model is spread over many processes. Some have different shards of it, some have replicas of the same
shard. Clipping is right only if every element counts exactly once and every process applies the same coefficient. A
package imports only from packages to its left, and `engine` is the only module that knows all stages.

Glossary:

- **rank**, **mesh**, **placements**, **world size**: as in torch.distributed. An *axis* belongs to a mesh, a *dim* to a
  tensor.
- **shard**: one rank's part of a gradient. **Replicas** are the ranks that have the same shard.
- **layout**: the ranks that a parameter spans, and the number of its shards on them.
- **partial gradient**: a gradient in Partial placement, which must be summed over a mesh axis first.
- **power sum**: Σ|g|^p, which can be added over ranks. A **norm** is its p-th root.
- **slot**: an element of the vector of norms: the model, a group of parameters, a parameter, or a row.
- **bound**: the largest norm that a policy allows, `max_norm` if it is fixed. **Limits** bound elements instead.
- **coefficient** (`coef`): factor of a gradient, ≤ 1 unless a policy scales small norms up.
- **verdict**: what a policy decides about the totals. **Outcome**: what happens to the gradients of a step.
- **skip**: leave parameters, optimizer and policy state unchanged in a step.
- **non-finite**: NaN or Inf. **found_inf** is GradScaler's flag for it, **loss scale** the factor of its gradients.
- **all-reduce**, **gather**: collectives that every rank of a communicator enters.
- **host sync**: a wait of the host for the accelerator.
- **fact**: a bool that all ranks share, and that the host may not have read yet.
- **rendezvous**: how ranks find each other through the store of torch.distributed before the first collective.
- A trailing underscore marks a function that changes its argument.
"""

from . import policies
from . import recipes as recipes  # a module, and so not in __all__
from ._version import __version__
from .auditing import audit
from .clipper import GradClipper
from .comm import Comm, LocalComm, ProcessGroupComm
from .errors import (
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
from .functional import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from .nonfinite import Culprit, Incident
from .outcome import Report
from .policies import *  # noqa: F403
from .replicas import ReplicaDifference, ReplicaIncident
from .sharding import annotate_

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
