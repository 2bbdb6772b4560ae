"""Tensor, sequence and expert parallelism; several meshes in one call; Partial gradients; three axes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from tests.tables.layouts import Case, row
from tests.tables.layouts.data_parallel import full


class Block(nn.Module):
    """A norm and a feed-forward pair, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def axis(*names: str, shape: tuple[int, ...] = ()) -> DeviceMesh:
    """A mesh over the world with those axes; two equal halves unless told."""
    size = dist.get_world_size()
    shape = shape or {1: (size,), 2: (2, size // 2), 3: (2, 2, size // 4)}[len(names)]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def step(model: nn.Module, *, seed: int = 0) -> None:
    """Backward on a batch; `seed` is the data-parallel rank."""
    torch.manual_seed(100 + seed)
    (model(torch.randn(2, 4, 8)) * 5).square().sum().backward()


def made(grad: Tensor, mesh: DeviceMesh, placements: list[Shard | Replicate]) -> nn.Parameter:
    """A parameter with a known whole gradient, laid out by hand; no communication."""
    param = nn.Parameter(distribute_tensor(torch.zeros_like(grad), mesh, placements, src_data_rank=None))
    param.grad = distribute_tensor(grad, mesh, placements, src_data_rank=None)
    return param


def known(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    """A gradient that every rank can make up alike."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@row(2, 4, why="tensor parallel by parallelize_module; the norm stays plain beside DTensors: torch raises")
def tp_plain_norm() -> Case:
    model = parallelize_module(Block(), axis("tp"), PLAN)
    step(model)
    return Case(model.parameters(), full(model.parameters()))


@row(2, 4, why="sequence parallel: replicated norms whose gradients may come as summands")
def tp_sequence() -> Case:
    plan = {
        "norm": SequenceParallel(sequence_dim=1),
        "up": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1)),
        "down": RowwiseParallel(input_layouts=Shard(-1), output_layouts=Shard(1)),
    }
    model = parallelize_module(Block(), axis("tp"), plan)
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    normed = model.norm(DTensor.from_local(x.chunk(dist.get_world_size(), 1)[dist.get_rank()], axis("tp"), [Shard(1)]))
    out = model.down(torch.relu(model.up(normed)))
    (out * 5).square().sum().backward()
    # Both parameters of the norm are summands: one collective for the two.
    return Case(model.parameters(), full(model.parameters()), all_reduces=3, other_collectives=1)


@row(
    4, why="FSDP2 over tensor parallel: strided shards, which do not call themselves Shard; torch needs two collectives"
)
def fsdp2_tp() -> Case:
    mesh = axis("dp", "tp")
    model = parallelize_module(Block(), mesh["tp"], {**PLAN, "norm": SequenceParallel()})
    model.norm = Block().norm
    parallelize_module(model.norm, mesh["tp"], _Copies())
    for part in (model.norm, model.up, model.down):
        fully_shard(part, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    step(model, seed=mesh.get_local_rank("dp"))
    return Case(model.parameters(), full(model.parameters()))


class _Copies(SequenceParallel):
    """A module whose parameters are replicated DTensors and whose activations stay plain."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, param in list(module.named_parameters(recurse=False)):
            laid = distribute_tensor(param.data, device_mesh, [Replicate()])
            module.register_parameter(name, nn.Parameter(laid))
        inner = module.forward

        def forward(x: Tensor) -> Tensor:
            return inner(DTensor.from_local(x, device_mesh, [Replicate()], run_check=False)).to_local()

        module.forward = forward  # type: ignore[method-assign]
        return module


@row(4, why="sharded over one axis, replicated over the other, and both, in one call")
def mixed_placements() -> Case:
    mesh = axis("dp", "tp")
    grads = [known(8, 6, seed=i) for i in range(4)]
    layouts = [[Shard(0), Shard(1)], [Shard(0), Replicate()], [Replicate(), Shard(0)], [Replicate(), Replicate()]]
    return Case([made(g, mesh, p) for g, p in zip(grads, layouts, strict=True)], grads)


@row(4, why="parameters on three meshes and plain ones in one call: torch raises on two")
def many_meshes() -> Case:
    mesh, flat = axis("dp", "tp"), axis("all")
    grads = [known(9, 6, seed=i) for i in range(5)]
    plain = nn.Parameter(torch.zeros(9, 6))
    plain.grad = grads[4].clone()
    parameters = [
        made(grads[0], flat, [Shard(0)]),
        made(grads[1], mesh, [Replicate(), Shard(1)]),
        made(grads[2], mesh["tp"], [Shard(0)]),
        made(grads[3], mesh["dp"], [Shard(1)]),
        plain,
    ]
    return Case(parameters, grads)


@row(4, why="only axes that cross: no rank knows all ranks from its own meshes")
def crossing_axes() -> Case:
    mesh = axis("dp", "tp")
    grads = [known(6, 4, seed=i) for i in range(2)]
    return Case([made(grads[0], mesh["tp"], [Shard(0)]), made(grads[1], mesh["dp"], [Shard(0)])], grads)


def _summands(grad: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    """A replicated parameter whose gradient is spread as summands over the mesh."""
    size, rank = mesh.size(), mesh.get_local_rank()
    pieces = [known(*grad.shape, seed=50 + i) for i in range(size - 1)]
    pieces.append(grad - sum(pieces))
    param = nn.Parameter(distribute_tensor(torch.zeros_like(grad), mesh, [Replicate()], src_data_rank=None))
    param.grad = DTensor.from_local(pieces[rank], mesh, [Partial()], run_check=False)
    return param


@row(2, 4, why="a gradient in Partial placement: its norm does not follow from the summands' norms")
def partial() -> Case:
    mesh = axis("tp")
    parameters = [_summands(known(4, 6), mesh), made(known(8, 2, seed=1), mesh, [Shard(0)])]
    return Case(parameters, full(parameters), all_reduces=3, other_collectives=1)


@row(2, 4, why="a Partial gradient that one rank does not have: it must still help the others to add up")
def partial_missing_on_one() -> Case:
    mesh = axis("tp")
    param, other = _summands(known(4, 6), mesh), made(known(8, 2, seed=1), mesh, [Shard(0)])
    last = mesh.size() - 1
    total = param.grad.to_local().clone() if mesh.get_local_rank() != last else torch.zeros(4, 6)
    dist.all_reduce(total)
    if mesh.get_local_rank() == last:
        param.grad = None
    return Case([param, other], [total, known(8, 2, seed=1)], all_reduces=3, other_collectives=1)


@row(8, why="three axes: replicate, shard, tensor", norms=(2.0, float("inf")))
def three_axes() -> Case:
    mesh = axis("pod", "dp", "tp")
    grads = [known(9, 8, seed=i) for i in range(4)]
    layouts = [
        [Replicate(), Shard(0), Shard(1)],
        [Replicate(), Shard(0), Replicate()],
        [Shard(0), Shard(1), Replicate()],
        [Shard(0), Shard(0), Shard(0)],
    ]
    return Case([made(g, mesh, p) for g, p in zip(grads, layouts, strict=True)], grads)


@row(4, why="experts on an (ep, efsdp) mesh beside dense parameters on another")
def experts() -> Case:
    sparse, dense = axis("ep", "efsdp"), axis("fsdp")
    grads = [known(4, 6, 5), known(7, 6, seed=1)]
    parameters = [made(grads[0], sparse, [Shard(0), Shard(1)]), made(grads[1], dense, [Shard(0)])]
    return Case(parameters, grads)


@row(4, why="no token went to the experts of one half of the ranks: no gradient there")
def experts_idle() -> Case:
    case = experts()
    case.whole[0][2:] = 0
    if dist.get_rank() >= 2:
        case.parameters[0].grad = None
    return case


@row(2, 4, why="experts as plain tensors, different on each rank of the ep axis, beside dense DTensors")
def experts_plain() -> Case:
    mesh = axis("ep")
    mine = [known(3, 4, seed=10 + rank) for rank in range(mesh.size())]
    expert = nn.Parameter(torch.zeros(3, 4))
    expert.grad = mine[mesh.get_local_rank()].clone()
    dense = known(8, 3)
    return Case([expert, made(dense, mesh, [Shard(0)])], [*mine, dense], split_over=mesh)


@row(4, why="plain experts split over ep and copied over dp, given as a process group")
def experts_plain_dp() -> Case:
    mesh = axis("dp", "ep")
    mine = [known(3, 4, seed=10 + rank) for rank in range(2)]
    expert = nn.Parameter(torch.zeros(3, 4))
    expert.grad = mine[mesh.get_local_rank("ep")].clone()
    return Case([expert], mine, split_over=mesh.get_group("ep"))


@row(2, 4, why="a gradient laid out unlike its parameter")
def gradient_elsewhere() -> Case:
    mesh = axis("dp")
    grads = [known(8, 6), known(4, 8, seed=1)]
    parameters = [made(grads[0], mesh, [Replicate()]), made(grads[1], mesh, [Shard(0)])]
    with torch.no_grad():
        parameters[0].grad = distribute_tensor(grads[0], mesh, [Shard(1)], src_data_rank=None)
        parameters[1].grad = distribute_tensor(grads[1], mesh, [Replicate()], src_data_rank=None)
    return Case(parameters, grads)


@row(8, why="HSDP x tensor parallel on three axes, by a real backward", norms=(2.0, float("inf")))
def hsdp_tp() -> Case:
    mesh = axis("replicate", "shard", "tp")
    model = parallelize_module(Block(), mesh["tp"], PLAN)
    parallelize_module(model.norm, mesh["tp"], _Copies())
    data = mesh["replicate", "shard"]
    for part in (model.norm, model.up, model.down):
        fully_shard(part, mesh=data)
    fully_shard(model, mesh=data)
    step(model, seed=2 * mesh.get_local_rank("replicate") + mesh.get_local_rank("shard"))
    return Case(model.parameters(), full(model.parameters()))


@row(4, why="summands over two axes, of two dtypes, some as a mean, beside what is whole")
def partial_two_axes() -> Case:
    mesh = axis("dp", "tp")
    layouts = [[Partial(), Partial()], [Partial("avg"), Shard(0)], [Shard(0), Partial()], [Replicate(), Replicate()]]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    parameters = []
    for i, (placements, dtype) in enumerate(zip(layouts, dtypes, strict=True)):
        seed = 7 if placements[0].is_replicate() else 7 + dist.get_rank()
        local = known(4, 3, seed=10 * i + seed).to(dtype)
        grad = DTensor.from_local(local, mesh, placements, run_check=False)
        whole = [Replicate() if p.is_partial() else p for p in placements]
        param = nn.Parameter(DTensor.from_local(torch.zeros_like(local), mesh, whole, run_check=False))
        param.grad = grad
        parameters.append(param)
    wide = [
        DTensor.from_local(p.grad.to_local().double(), mesh, p.grad.placements, run_check=False) for p in parameters
    ]
    # Two of their own, and one sum per axis: bfloat16 travels as float32 with the rest.
    return Case(parameters, [w.full_tensor().float() for w in wide], all_reduces=4, other_collectives=1)
