"""Test distclip and programs that use it: simulated worlds without processes, random layouts and explored schedules.

`World` runs a training loop on several ranks within one process, in virtual time. The order of the ranks follows from a
seed. Ranks can fail, be late, or be killed at any stage of a step.

Command line::

    python -m distclip.testing --layouts 2000
    python -m distclip.testing --schedules 1000000
    python -m distclip.testing --exhaustive

A layout is a random set of meshes with one to three axes, over all ranks or some of them, in any order. Parameters on
these meshes are DTensors, annotated tensors, plain tensors, or tensors with Megatron's attributes. Gradients are
sharded, replicated, partial or missing, of any dtype and magnitude. Each case makes one call. It compares norms and
gradients with those of the whole model, and checks that all ranks have the same bits.

`check_case` runs one case in the caller's process group. It shows how to check a layout numerically: build the shard of
this rank, compute the whole gradient without communication, and compare with `distclip.reference`.
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
