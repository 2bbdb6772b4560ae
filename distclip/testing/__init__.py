"""Test distclip, and programs that use it, without processes: simulated worlds, random layouts, explored schedules.

`World` runs a training loop on several ranks within one process, on virtual time, in an order that follows from a seed.
Ranks can fail, be late, or be killed at any stage of a step.

Command line::

    python -m distclip.testing --layouts 2000
    python -m distclip.testing --schedules 1000000
    python -m distclip.testing --exhaustive

A layout is a random set of meshes of one to three axes, over all ranks or some of them, in any order. Parameters on
them are DTensors, annotated or plain tensors, or have Megatron's attributes. Gradients are sharded, replicated, partial
or missing, of any dtype and magnitude. Every case makes one call, and compares norms and gradients with those of the
whole model, and the bits of all ranks with each other.

`check_case` runs one case in a process group of the caller. It is an example of how to check a layout by numbers: build
the shard of this rank, compute the whole gradient without communication, and compare with `distclip.reference`.
"""

from .cases import Case, MeshShape, ParamCase, random_case
from .check import Answer, check_case, find_failure
from .faults import STAGES, InjectedFault
from .processes import run_seeds
from .simulation import Run, World, WorldHangs

__all__ = [
    "STAGES",
    "Answer",
    "Case",
    "InjectedFault",
    "MeshShape",
    "ParamCase",
    "Run",
    "World",
    "WorldHangs",
    "check_case",
    "find_failure",
    "random_case",
    "run_seeds",
]
