"""Find which rank holds which shard: the tensors that a caller passes become a `ShardTable`, which returns `Shards`.

Every kind of sharding is a `Source`, in a module that is named after the kind and not after a vendor: `annotations`
(plain tensors with `annotate_`), `dtensor` (FSDP2, HSDP, TP, EP and products of them), `fsdp1` (slices of flattened
parameters), `megatron` (plain tensors with Megatron's attributes), `ddp` (replicas). `rows` finds the rows that a shard
holds, and `slots` the norm that it counts in. A tensor that no source recognizes is a replica on every rank.
"""

from .annotations import annotate_
from .cache import cached_table
from .parameters import Named, name_tensors
from .split_over import split_axes
from .table import ShardTable, gradient_table, local_table, parameter_table

__all__ = [
    "Named",
    "ShardTable",
    "annotate_",
    "cached_table",
    "gradient_table",
    "local_table",
    "name_tensors",
    "parameter_table",
    "split_axes",
]
