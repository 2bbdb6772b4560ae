"""Enter tensor, sequence and expert parallelism, several meshes, Partial gradients and three axes into the table."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from tests.tables.layouts import Case, row
from tests.tables.layouts.meshes import world_mesh
from tests.tables.layouts.tensors import dtensor_param, full_grads, random_grad


class Block(nn.Module):
    """A norm and a feed-forward pair of layers, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def block_backward(model: nn.Module, *, seed: int = 0) -> None:
    """Run backward on the batch of a data-parallel rank."""
    torch.manual_seed(100 + seed)
    (model(torch.randn(2, 4, 8)) * 5).square().sum().backward()


@row(2, 4, why="tensor parallel by parallelize_module; the norm stays plain among DTensors: torch raises")
def tp_plain_norm() -> Case:
    model = parallelize_module(Block(), world_mesh("tp"), PLAN)
    block_backward(model)
    return Case(model.parameters(), full_grads(model.parameters()))


@row(2, 4, why="sequence parallel: replicated norms whose gradients may be Partial")
def tp_sequence() -> Case:
    plan = {
        "norm": SequenceParallel(sequence_dim=1),
        "up": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1)),
        "down": RowwiseParallel(input_layouts=Shard(-1), output_layouts=Shard(1)),
    }
    model = parallelize_module(Block(), world_mesh("tp"), plan)
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    normed = model.norm(
        DTensor.from_local(x.chunk(dist.get_world_size(), 1)[dist.get_rank()], world_mesh("tp"), [Shard(1)])
    )
    out = model.down(torch.relu(model.up(normed)))
    (out * 5).square().sum().backward()
    # Both gradients of the norm are Partial: one collective reduces the two.
    return Case(model.parameters(), full_grads(model.parameters()), all_reduces=3, other_collectives=1)


@row(4, why="FSDP2 over tensor parallel: strided shards, whose class is not Shard; torch needs two collectives")
def fsdp2_tp() -> Case:
    mesh = world_mesh("dp", "tp")
    model = parallelize_module(Block(), mesh["tp"], {**PLAN, "norm": SequenceParallel()})
    model.norm = Block().norm
    parallelize_module(model.norm, mesh["tp"], _Replicated())
    for part in (model.norm, model.up, model.down):
        fully_shard(part, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    block_backward(model, seed=mesh.get_local_rank("dp"))
    return Case(model.parameters(), full_grads(model.parameters()))


class _Replicated(SequenceParallel):
    """A style of `parallelize_module`: replicated DTensors as parameters, plain activations."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, param in list(module.named_parameters(recurse=False)):
            replicated = distribute_tensor(param.data, device_mesh, [Replicate()])
            module.register_parameter(name, nn.Parameter(replicated))
        inner = module.forward

        def forward(x: Tensor) -> Tensor:
            return inner(DTensor.from_local(x, device_mesh, [Replicate()], run_check=False)).to_local()

        module.forward = forward  # type: ignore[method-assign]
        return module


@row(4, why="sharded over one axis, replicated over the other, and both, in one call")
def mixed_placements() -> Case:
    mesh = world_mesh("dp", "tp")
    grads = [random_grad(8, 6, seed=i) for i in range(4)]
    layouts = [[Shard(0), Shard(1)], [Shard(0), Replicate()], [Replicate(), Shard(0)], [Replicate(), Replicate()]]
    return Case([dtensor_param(g, mesh, p) for g, p in zip(grads, layouts, strict=True)], grads)


@row(4, why="parameters on three meshes and plain ones in one call: torch raises on two")
def many_meshes() -> Case:
    mesh, flat = world_mesh("dp", "tp"), world_mesh("all")
    grads = [random_grad(9, 6, seed=i) for i in range(5)]
    plain = nn.Parameter(torch.zeros(9, 6))
    plain.grad = grads[4].clone()
    parameters = [
        dtensor_param(grads[0], flat, [Shard(0)]),
        dtensor_param(grads[1], mesh, [Replicate(), Shard(1)]),
        dtensor_param(grads[2], mesh["tp"], [Shard(0)]),
        dtensor_param(grads[3], mesh["dp"], [Shard(1)]),
        plain,
    ]
    return Case(parameters, grads, exchanges=True)


@row(4, why="axes that cross: no rank knows all ranks from its own meshes")
def crossing_axes() -> Case:
    mesh = world_mesh("dp", "tp")
    grads = [random_grad(6, 4, seed=i) for i in range(2)]
    return Case(
        [dtensor_param(grads[0], mesh["tp"], [Shard(0)]), dtensor_param(grads[1], mesh["dp"], [Shard(0)])],
        grads,
        exchanges=True,
    )


def _partial_param(grad: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    """Make a replicated parameter whose gradient is Partial over the mesh."""
    size, rank = mesh.size(), mesh.get_local_rank()
    pieces = [random_grad(*grad.shape, seed=50 + i) for i in range(size - 1)]
    pieces.append(grad - sum(pieces))
    param = nn.Parameter(distribute_tensor(torch.zeros_like(grad), mesh, [Replicate()], src_data_rank=None))
    param.grad = DTensor.from_local(pieces[rank], mesh, [Partial()], run_check=False)
    return param


@row(2, 4, why="a Partial gradient: its norm does not follow from the norms of its parts")
def partial() -> Case:
    mesh = world_mesh("tp")
    parameters = [_partial_param(random_grad(4, 6), mesh), dtensor_param(random_grad(8, 2, seed=1), mesh, [Shard(0)])]
    return Case(parameters, full_grads(parameters), all_reduces=3, other_collectives=1)


@row(2, 4, why="a Partial gradient that one rank does not have: that rank must still take part in the reduction")
def partial_missing_on_one() -> Case:
    mesh = world_mesh("tp")
    param, other = _partial_param(random_grad(4, 6), mesh), dtensor_param(random_grad(8, 2, seed=1), mesh, [Shard(0)])
    last = mesh.size() - 1
    total = param.grad.to_local().clone() if mesh.get_local_rank() != last else torch.zeros(4, 6)
    dist.all_reduce(total)
    if mesh.get_local_rank() == last:
        param.grad = None
    return Case([param, other], [total, random_grad(8, 2, seed=1)], all_reduces=3, other_collectives=1)


@row(8, why="three axes: replicate, shard, tensor", norms=(2.0, float("inf")))
def three_axes() -> Case:
    mesh = world_mesh("pod", "dp", "tp")
    grads = [random_grad(9, 8, seed=i) for i in range(4)]
    layouts = [
        [Replicate(), Shard(0), Shard(1)],
        [Replicate(), Shard(0), Replicate()],
        [Shard(0), Shard(1), Replicate()],
        [Shard(0), Shard(0), Shard(0)],
    ]
    return Case([dtensor_param(g, mesh, p) for g, p in zip(grads, layouts, strict=True)], grads)


@row(4, why="experts on an (ep, efsdp) mesh, dense parameters on another mesh")
def experts() -> Case:
    sparse, dense = world_mesh("ep", "efsdp"), world_mesh("fsdp")
    grads = [random_grad(4, 6, 5), random_grad(7, 6, seed=1)]
    parameters = [
        dtensor_param(grads[0], sparse, [Shard(0), Shard(1)]),
        dtensor_param(grads[1], dense, [Shard(0)]),
    ]
    return Case(parameters, grads)


@row(4, why="no token went to the experts of one half of the ranks: no gradient on those ranks")
def experts_idle() -> Case:
    case = experts()
    case.whole[0][2:] = 0
    if dist.get_rank() >= 2:
        case.parameters[0].grad = None
    return case


@row(2, 4, why="experts as plain tensors, different on each rank of the ep axis, among dense DTensors")
def experts_plain() -> Case:
    mesh = world_mesh("ep")
    mine = [random_grad(3, 4, seed=10 + rank) for rank in range(mesh.size())]
    expert = nn.Parameter(torch.zeros(3, 4))
    expert.grad = mine[mesh.get_local_rank()].clone()
    dense = random_grad(8, 3)
    return Case([expert, dtensor_param(dense, mesh, [Shard(0)])], [*mine, dense], split_over=mesh)


@row(4, why="plain experts split over ep and replicated over dp; split_over= is a process group")
def experts_plain_dp() -> Case:
    mesh = world_mesh("dp", "ep")
    mine = [random_grad(3, 4, seed=10 + rank) for rank in range(2)]
    expert = nn.Parameter(torch.zeros(3, 4))
    expert.grad = mine[mesh.get_local_rank("ep")].clone()
    return Case([expert], mine, split_over=mesh.get_group("ep"))


@row(2, 4, why="a gradient with other placements than its parameter")
def gradient_elsewhere() -> Case:
    mesh = world_mesh("dp")
    grads = [random_grad(8, 6), random_grad(4, 8, seed=1)]
    parameters = [dtensor_param(grads[0], mesh, [Replicate()]), dtensor_param(grads[1], mesh, [Shard(0)])]
    with torch.no_grad():
        parameters[0].grad = distribute_tensor(grads[0], mesh, [Shard(1)], src_data_rank=None)
        parameters[1].grad = distribute_tensor(grads[1], mesh, [Replicate()], src_data_rank=None)
    return Case(parameters, grads)


@row(8, why="HSDP x tensor parallel on three axes, by a real backward", norms=(2.0, float("inf")))
def hsdp_tp() -> Case:
    mesh = world_mesh("replicate", "shard", "tp")
    model = parallelize_module(Block(), mesh["tp"], PLAN)
    parallelize_module(model.norm, mesh["tp"], _Replicated())
    data = mesh["replicate", "shard"]
    for part in (model.norm, model.up, model.down):
        fully_shard(part, mesh=data)
    fully_shard(model, mesh=data)
    block_backward(model, seed=2 * mesh.get_local_rank("replicate") + mesh.get_local_rank("shard"))
    return Case(model.parameters(), full_grads(model.parameters()))


@row(4, why="Partial gradients over two axes, of two dtypes, some as a mean, and one that is not Partial")
def partial_two_axes() -> Case:
    mesh = world_mesh("dp", "tp")
    layouts = [[Partial(), Partial()], [Partial("avg"), Shard(0)], [Shard(0), Partial()], [Replicate(), Replicate()]]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    parameters = []
    for i, (placements, dtype) in enumerate(zip(layouts, dtypes, strict=True)):
        seed = 7 if placements[0].is_replicate() else 7 + dist.get_rank()
        local = random_grad(4, 3, seed=10 * i + seed).to(dtype)
        grad = DTensor.from_local(local, mesh, placements, run_check=False)
        whole = [Replicate() if p.is_partial() else p for p in placements]
        param = nn.Parameter(DTensor.from_local(torch.zeros_like(local), mesh, whole, run_check=False))
        param.grad = grad
        parameters.append(param)
    wide = [
        DTensor.from_local(p.grad.to_local().double(), mesh, p.grad.placements, run_check=False) for p in parameters
    ]
    # One all-reduce per axis and the usual two: bfloat16 is reduced as float32, together with float32.
    return Case(parameters, [w.full_tensor().float() for w in wide], all_reduces=4, other_collectives=1)
