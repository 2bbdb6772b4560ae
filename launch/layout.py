"""How the ranks are laid out: the axes of the mesh, and which of them share out the batch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from distclip.comm.mpi import MPIComm
from processes import mpi

if TYPE_CHECKING:
    from parallel import Placed

MODEL_AXES = ("tp", "pp")  # ranks along these see the same batch, along all others a share of it


@dataclass(frozen=True)
class Layout:
    """`place` puts a model on a mesh with these axis sizes; one of them may be -1, the rest.

    A lower precision is autocast's, unless the model is to be placed with parameters of that precision. `whole` says
    that every rank has whole parameters with whole gradients, as in one process.
    """

    mesh: Mapping[str, int]
    place: "Callable[..., Placed]"
    autocast: bool = True
    whole: bool = False

    def sizes(self, world: int) -> dict[str, int]:
        """The axis sizes on this many ranks, or exit saying how many ranks or what to write."""
        if not self.mesh:
            if world != 1:
                raise SystemExit(
                    f"parallel=single is one process, but {world} were started: "
                    f"start one (NPROC=1), or write parallel=ddp"
                )
            return {}
        given = list(self.mesh.values())
        fixed = math.prod(n for n in given if n != -1)
        if fixed < 1 or given.count(-1) > 1:
            raise SystemExit(
                f"parallel.mesh={dict(self.mesh)} is no mesh: write sizes of 1 or more, one of "
                f"which may be -1 (all the ranks that are left)"
            )
        if world % fixed or (-1 not in given and fixed != world):
            axis, n = next((axis, n) for axis, n in self.mesh.items() if n != -1)
            raise SystemExit(
                f"parallel.mesh={dict(self.mesh)} does not fit on {world} rank(s): "
                f"start {fixed} (NPROC={fixed}), or write another parallel.mesh.{axis} than {n}"
            )
        return {axis: world // fixed if n == -1 else n for axis, n in self.mesh.items()}

    def shares(self, world: int) -> int:
        """Into how many shares the global batch is split."""
        return math.prod(n for axis, n in self.sizes(world).items() if axis not in MODEL_AXES)

    def build(self, device: str, world: int) -> DeviceMesh | MPIComm | None:
        sizes = self.sizes(world)
        if not sizes:
            return None
        return init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


class Copies(Layout):
    """A copy of the model on every rank, with MPI between them and no torch.distributed."""

    def build(self, device: str, world: int) -> MPIComm:
        return mpi()


def data_axes(mesh: DeviceMesh) -> tuple[str, ...]:
    """The axes along which ranks see different rows of the batch."""
    return tuple(axis for axis in mesh.mesh_dim_names or () if axis not in MODEL_AXES)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share(batch: Tensor, mesh: DeviceMesh | MPIComm | None) -> Tensor:
    """This rank's rows of a global batch, on this rank's device."""
    if mesh is None:
        return batch
    if isinstance(mesh, MPIComm):
        return batch.chunk(mesh.size)[mesh.rank]
    for axis in data_axes(mesh):
        batch = batch.chunk(mesh[axis].size())[mesh.get_local_rank(axis)]
    return batch
