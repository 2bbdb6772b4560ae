"""Create each mesh and each process group once per world.

A gloo group costs a rank three threads for as long as it lives, and a world runs many hundreds of tests. Every rank
must call these functions with the same arguments in the same order, as with those of torch.
"""

from __future__ import annotations

from functools import cache

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__all__ = ["group_of", "mesh_of", "world_mesh"]


@cache
def world_mesh(*names: str, shape: tuple[int, ...] = ()) -> DeviceMesh:
    """Return the mesh over the world with these axes, by default of size 2 except for the last."""
    size = dist.get_world_size()
    shape = shape or {1: (size,), 2: (2, size // 2), 3: (2, 2, size // 4)}[len(names)]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


@cache
def mesh_of(*ranks: int) -> DeviceMesh:
    """Return the mesh of one axis over some ranks of the world."""
    return DeviceMesh("cpu", list(ranks))


@cache
def group_of(*ranks: int) -> dist.ProcessGroup:
    """Return the process group of some ranks of the world, not a group at all on other ranks."""
    return dist.new_group(list(ranks))
