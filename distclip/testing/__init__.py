"""Check random layouts against whole gradients in float64: `python -m distclip.testing --layouts 2000`.

A layout is a random set of meshes of one to three axes, over all ranks or some of them, in any order. Parameters on
them are DTensors, annotated or plain tensors, or have Megatron's attributes. Gradients are sharded, replicated, partial
or missing, of any dtype and magnitude. Every case makes one call, and compares norms and gradients with those of the
whole model, and the bits of all ranks with each other.

`check_case` runs one case in a process group of the caller. It is an example of how to check a layout by numbers: build
the shard of this rank, compute the whole gradient without communication, and compare with `distclip.reference`.
"""

from .cases import Case, MeshShape, ParamCase, random_case
from .check import Answer, check_case, find_failure
from .world import run_seeds

__all__ = ["Answer", "Case", "MeshShape", "ParamCase", "check_case", "find_failure", "random_case", "run_seeds"]
