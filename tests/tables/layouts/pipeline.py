"""Enter pipeline stages into the table: ranks with different parameters, which only `split_over=` can declare."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import distclip
from tests.tables.layouts import Case, row
from tests.tables.layouts.data_parallel import mlp
from tests.tables.layouts.meshes import group_of, mesh_of, world_mesh
from tests.tables.layouts.model_parallel import block_backward
from tests.tables.layouts.tensors import dtensor_param, full_grads, plain_param, random_grad


@row(2, 4, why="stages alone: torch computes one norm per stage")
def stages() -> Case:
    mesh = world_mesh("pp")
    grads = [random_grad(3 + rank, 4, seed=rank) for rank in range(mesh.size())]
    return Case([plain_param(grads[mesh.get_local_rank()])], grads, split_over=mesh)


@row(4, why="stages x FSDP2, the usual combination, sliced from one mesh")
def stages_fsdp2() -> Case:
    mesh = world_mesh("pp", "dp")
    model = mlp(8, 6 + 2 * mesh.get_local_rank("pp"), 8)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    block_backward(model, seed=mesh.get_local_rank("dp"))
    stages: list[list[Tensor]] = [[], []]
    dist.all_gather_object(stages, full_grads(model.parameters()), group=mesh.get_group("pp"))
    return Case(model.parameters(), stages[0] + stages[1], split_over=mesh["pp"])


@row(4, why="stages x FSDP2 on separate meshes, split_over= is a process group: a rank knows its neighbors only")
def stages_separate_meshes() -> Case:
    rank = dist.get_rank()
    groups = [group_of(0, 2), group_of(1, 3)]
    both = [mesh_of(0, 1), mesh_of(2, 3)]
    grads = [random_grad(5, 4, seed=stage) for stage in range(2)]
    param = dtensor_param(grads[rank // 2], both[rank // 2], [Shard(0)])
    return Case([param], grads, split_over=groups[rank % 2])


@row(4, why="a frozen stage: none of its parameters has a gradient")
def stage_without_gradients() -> Case:
    mesh = world_mesh("pp", "dp")
    grad = random_grad(6, 4)
    param = dtensor_param(grad, mesh["dp"], [Shard(0)])
    if mesh.get_local_rank("pp") == 1:
        param.grad = None
    return Case([param], [grad], split_over=mesh["pp"])


@row(4, why="a stage without any parameter: the pipeline axis is its only mesh")
def stage_empty() -> Case:
    mesh = world_mesh("pp", "dp")
    grad = random_grad(6, 4)
    parameters = [dtensor_param(grad, mesh["dp"], [Shard(0)])] if mesh.get_local_rank("pp") == 0 else []
    return Case(parameters, [grad], split_over=mesh["pp"])


@row(4, why="one rank with an empty list, whose neighbors are on meshes that it does not know")
def rank_empty() -> Case:
    mesh = world_mesh("pp", "dp")
    grads = [random_grad(6, 4), random_grad(5, 3, seed=1)]
    stage = mesh.get_local_rank("pp")
    param = dtensor_param(grads[stage], mesh["dp"], [Shard(0)])
    grads[1] = grads[1][:3]
    return Case([] if dist.get_rank() == 3 else [param], grads, split_over=mesh["pp"])


@row(2, 4, why="stages with gradients of different dtypes: torchtitan aborts on buffers of different sizes")
def stages_dtypes() -> Case:
    mesh = world_mesh("pp")
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float32]
    grads = [random_grad(3, 4, seed=rank).to(dtypes[rank]) for rank in range(mesh.size())]
    return Case([plain_param(grads[mesh.get_local_rank()])], grads, split_over=mesh)


@row(2, why="one stage in float64: the norm is float64 on the other stage too")
def stages_fp64() -> Case:
    mesh = world_mesh("pp")
    grads = [random_grad(3, 4).double(), random_grad(3, 4, seed=1)]
    return Case([plain_param(grads[mesh.get_local_rank()])], grads, split_over=mesh, gathers_once=True)


@row(2, 4, why="an embedding tied between the first and the last stage, its gradients summed: it counts once")
def tied_embedding() -> Case:
    mesh = world_mesh("pp")
    rank, last = mesh.get_local_rank(), mesh.size() - 1
    ends = group_of(0, last)
    embedding, grads = random_grad(7, 4, seed=9), [random_grad(3, 4, seed=r) for r in range(mesh.size())]
    parameters = [plain_param(grads[rank])]
    if rank in (0, last):
        parameters.append(distclip.annotate_(plain_param(embedding), ends, [Replicate()]))
    return Case(parameters, [embedding, *grads], split_over=mesh)


@row(4, why="a tied embedding that FSDP2 shards within each stage: axes of a DTensor and of an annotation")
def tied_embedding_fsdp2() -> Case:
    mesh = world_mesh("pp", "dp")
    embedding, grads = random_grad(7, 4, seed=9), [random_grad(3, 4, seed=r) for r in range(2)]
    tied = distclip.annotate_(dtensor_param(embedding, mesh["dp"], [Shard(0)]), mesh["pp"], [Replicate()])
    own = dtensor_param(grads[mesh.get_local_rank("pp")], mesh["dp"], [Shard(0)])
    return Case([own, tied], [embedding, *grads], split_over=mesh["pp"])


@row(4, why="stages x data-parallel replicas x tensor-parallel shards by annotation, on plain tensors")
def annotated_stages() -> Case:
    mesh = world_mesh("pp", "tp")
    grads = [random_grad(4, 6, seed=stage) for stage in range(2)]
    copies = [random_grad(5, seed=5 + stage) for stage in range(2)]
    stage = mesh.get_local_rank("pp")
    piece = distribute_tensor(grads[stage], mesh["tp"], [Shard(1)], src_data_rank=None).to_local()
    shard = distclip.annotate_(plain_param(piece), mesh["tp"], [Shard(1)])
    return Case([shard, plain_param(copies[stage])], [*grads, *copies], split_over=mesh["pp"])


@row(4, why="a second model on the other ranks of the job, which never call: no rank may wait for them")
def second_model() -> Case:
    mesh = world_mesh("model", "dp")
    grad = random_grad(6, 4)
    param = dtensor_param(grad, mesh["dp"], [Shard(0)])
    return Case([param], [grad], idle=mesh.get_local_rank("model") == 1, ranks=mesh.get_group("dp"))


@row(4, why="stages of unequal width, three ranks and one, with the world as split_over=")
def stages_uneven() -> Case:
    wide, narrow = mesh_of(0, 1, 2), mesh_of(3)
    grads = [random_grad(7, 4), random_grad(5, 3, seed=1)]
    first = dist.get_rank() < 3
    param = dtensor_param(grads[0], wide, [Shard(0)]) if first else dtensor_param(grads[1], narrow, [Shard(0)])
    return Case([param], grads, split_over=dist.group.WORLD)


@row(4, why="a real GPipe schedule over stages that DDP replicates")
def stages_ddp() -> Case:
    mesh = world_mesh("pp", "dp")
    stage = mesh.get_local_rank("pp")
    model = mlp(8, 6 + 2 * stage, 8)
    torch.manual_seed(100 + mesh.get_local_rank("dp"))
    x = torch.randn(4, 8)
    pipe = PipelineStage(
        DistributedDataParallel(model, process_group=mesh.get_group("dp")),
        stage,
        2,
        torch.device("cpu"),
        input_args=(x[:2].clone().requires_grad_(stage > 0),),
        output_args=(x[:2].clone().requires_grad_(),),
        group=mesh.get_group("pp"),
    )
    schedule = ScheduleGPipe(pipe, 2, loss_fn=lambda y, t: (y - t).square().sum() * 30)
    if stage == 0:
        schedule.step(x)
    else:
        schedule.step(target=torch.zeros(4, 8))
    both: list[list[Tensor]] = [[], []]
    dist.all_gather_object(both, full_grads(model.parameters()), group=mesh.get_group("pp"))
    return Case(model, both[0] + both[1], split_over=mesh["pp"])


@row(4, why="stages x FSDP1: the module knows the slices, split_over= declares the stages")
def stages_fsdp1() -> Case:
    mesh = world_mesh("pp", "dp")
    stage, replica = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    reference = DistributedDataParallel(mlp(8, 6 + stage, 1), process_group=mesh.get_group("dp"))
    model = FullyShardedDataParallel(
        mlp(8, 6 + stage, 1), process_group=mesh.get_group("dp"), device_id=torch.device("cpu"), use_orig_params=True
    )
    block_backward(reference, seed=replica)
    block_backward(model, seed=replica)
    both: list[list[Tensor]] = [[], []]
    dist.all_gather_object(both, full_grads(reference.parameters()), group=mesh.get_group("pp"))
    return Case(model, both[0] + both[1], split_over=mesh["pp"], tolerance=2e-6)


@row(4, why="stages x plain experts: two axes hold different parameters, both as process groups")
def stages_experts() -> Case:
    mesh = world_mesh("pp", "ep")
    grads = [random_grad(3, 4, seed=rank) for rank in range(4)]
    return Case([plain_param(grads[dist.get_rank()])], grads, split_over=[mesh.get_group("pp"), mesh.get_group("ep")])
