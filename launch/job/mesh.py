"""Map ranks to a mesh: its axes, the rank's share of a batch, and its shard of a carried state."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from distclip.comm.mpi import MPIComm

from .processes import mpi_world

# Ranks along these axes train on the same rows of a batch. Ranks along all other axes train on different rows.
MODEL_AXES = ("tp", "pp")


class Ranks(Protocol):
    """Ranks of one run, as data parallelism uses them."""

    handle: Any
    """Argument of the function that distributes a model: a DeviceMesh, an MPIComm, or None."""
    rank_0_saves: bool
    """True if rank 0 holds all state and saves a checkpoint without the other ranks."""

    def local_rows(self, batch: Tensor) -> Tensor:
        """Return this rank's rows of a global batch."""

    def global_state(self, state: Tensor) -> Tensor:
        """Return the state of the global batch, given this rank's rows of it along dim 1."""

    def local_state(self, state: Tensor) -> Tensor:
        """Return this rank's rows of a result of `global_state`."""


class OneProcess:
    """One process without a process group."""

    handle = None
    rank_0_saves = False

    def local_rows(self, batch: Tensor) -> Tensor:
        return batch

    def global_state(self, state: Tensor) -> Tensor:
        return state

    def local_state(self, state: Tensor) -> Tensor:
        return state


class MeshRanks:
    """Ranks of a DeviceMesh."""

    rank_0_saves = False

    def __init__(self, mesh: DeviceMesh) -> None:
        self.handle = mesh
        self._data_axes = tuple(axis for axis in mesh.mesh_dim_names or () if axis not in MODEL_AXES)

    def local_rows(self, batch: Tensor) -> Tensor:
        for axis in self._data_axes:
            batch = batch.chunk(self.handle[axis].size())[self.handle.get_local_rank(axis)]
        return batch

    def global_state(self, state: Tensor) -> Tensor:
        if not self._data_axes:
            return state
        placements = [Shard(1)] * len(self._data_axes)
        return DTensor.from_local(state, self.handle[self._data_axes], placements, run_check=False)

    def local_state(self, state: Tensor) -> Tensor:
        return to_local(state)


class MPIRanks:
    """Ranks of an MPI job, each with a replica of the model."""

    rank_0_saves = True

    def __init__(self, comm: MPIComm) -> None:
        self.handle = comm

    def local_rows(self, batch: Tensor) -> Tensor:
        return batch.chunk(self.handle.size)[self.handle.rank]

    def global_state(self, state: Tensor) -> Tensor:
        return torch.cat(self.handle.gather_objects(state), dim=1)

    def local_state(self, state: Tensor) -> Tensor:
        return state.chunk(self.handle.size, dim=1)[self.handle.rank]


def to_local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor. A plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Parallelism:
    """A way to distribute a model: the config group `parallel`.

    Args:
        mesh: size of each axis. One size may be -1, for all remaining ranks.
        place: function that distributes a model over that mesh and returns a `ParallelModel`.
        autocast: whether autocast provides a lower precision. False if the parameters have that precision.
        whole_gradients: whether every rank holds whole parameters with whole gradients.
    """

    mesh: Mapping[str, int]
    place: Callable[..., Any]
    autocast: bool = True
    whole_gradients: bool = False

    mpi_only = False
    """True if the ranks communicate through mpi4py alone."""

    def axis_sizes(self, world_size: int) -> dict[str, int]:
        """Return the size of each axis, or exit with a mesh or a number of ranks that fits."""
        if not self.mesh:
            if world_size != 1:
                raise SystemExit(
                    f"parallel=single: trains in one process, but {world_size} were started. "
                    "Start one (NPROC=1), or use parallel=ddp"
                )
            return {}
        sizes = list(self.mesh.values())
        fixed = math.prod(n for n in sizes if n != -1)
        if fixed < 1 or sizes.count(-1) > 1:
            raise SystemExit(
                f"parallel.mesh={dict(self.mesh)}: not a mesh. Use sizes of 1 or more, one of which may be -1 "
                "(all remaining ranks)"
            )
        if world_size % fixed or (-1 not in sizes and fixed != world_size):
            axis, n = next((axis, n) for axis, n in self.mesh.items() if n != -1)
            raise SystemExit(
                f"parallel.mesh={dict(self.mesh)}: does not fit on {world_size} rank(s). "
                f"Start {fixed} (NPROC={fixed}), or use another parallel.mesh.{axis} than {n}"
            )
        return {axis: world_size // fixed if n == -1 else n for axis, n in self.mesh.items()}

    def num_data_shares(self, world_size: int) -> int:
        """Return the number of shares that the global batch is split into."""
        return math.prod(n for axis, n in self.axis_sizes(world_size).items() if axis not in MODEL_AXES)

    def build(self, device_type: str, world_size: int) -> Ranks:
        """Create the mesh. Every rank must call it."""
        sizes = self.axis_sizes(world_size)
        if not sizes:
            return OneProcess()
        return MeshRanks(init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)))


class MPIParallelism(Parallelism):
    """Replicas of the model on MPI ranks, without torch.distributed."""

    mpi_only = True

    def build(self, device_type: str, world_size: int) -> Ranks:
        return MPIRanks(mpi_world())
