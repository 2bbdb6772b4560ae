"""Where gradients come from: what was passed in becomes `Plan`, and a plan yields this rank's `Shard`s.

One file per way a gradient can lie across ranks, never per vendor: `dtensor` (FSDP2, HSDP, TP, EP and products of
them), `flat` (1-D slices of flattened parameters: FSDP1, ZeRO), `replicated` (copies: DDP), `tagged` (plain tensors
with attributes: Megatron's, and `annotate_`'s); `rows` says which rows of its parameter a piece is. Whatever none of
them knows is a plain tensor, taken as replicated.
"""

from .annotations import annotate_
from .cache import recent_plan
from .parameters import Named, named
from .split_over import split_axes
from .table import Plan, gradient_plan, parameter_plan

__all__ = ["Named", "Plan", "annotate_", "gradient_plan", "named", "parameter_plan", "recent_plan", "split_axes"]
