"""List descriptions of layouts: wrong ones with the mistake that `audit` must name, and right ones that look odd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import distclip
from tests.tables.layouts.meshes import group_of, mesh_of, world_mesh
from tests.tables.layouts.tensors import random_grad

__all__ = ["MISTAKES", "RIGHT", "Description"]


@dataclass
class Description:
    """Arguments of `audit`, on one rank.

    Args:
        model: first argument.
        options: keyword arguments.
    """

    model: Any
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Mistake:
    """A wrong description.

    Args:
        build: makes the arguments on each rank.
        num_ranks: size of the world.
        kind: kind of the problem that must be found, and no other one.
        words: parts of its message and fix.
        parameters: names that it must have. Empty if it may have any.
    """

    build: Callable[[], Description]
    num_ranks: int
    kind: str
    words: tuple[str, ...]
    parameters: tuple[str, ...] = ()


MISTAKES: dict[str, Mistake] = {}
RIGHT: dict[str, tuple[Callable[[], Description], int]] = {}


def mistake(num_ranks: int, kind: str, *words: str, parameters: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Enter a builder into `MISTAKES`."""

    def enter(build: Callable[[], Description]) -> Callable[[], Description]:
        MISTAKES[build.__name__] = Mistake(build, num_ranks, kind, words, parameters)
        return build

    return enter


def right(num_ranks: int) -> Callable[[Any], Any]:
    """Enter a builder into `RIGHT`."""

    def enter(build: Callable[[], Description]) -> Callable[[], Description]:
        RIGHT[build.__name__] = (build, num_ranks)
        return build

    return enter


def param(*shape: int, seed: int = 0) -> nn.Parameter:
    """Make a plain parameter with random values."""
    return nn.Parameter(random_grad(*shape, seed=seed))


def sharded(mesh: DeviceMesh, *shape: int, seed: int = 0) -> nn.Parameter:
    """Make a DTensor parameter with random values, sharded on dim 0."""
    return nn.Parameter(distribute_tensor(random_grad(*shape, seed=seed), mesh, [Shard(0)], src_data_rank=None))


def stage_of(index: int, width: int = 6) -> nn.Sequential:
    """Make a stage whose values depend on its index."""
    torch.manual_seed(index)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


# ---- Missing split_over ----


@mistake(2, "missing split_over", "split_over=", "rank 0", "rank 1")
def stages_without_split_over() -> Description:
    rank = dist.get_rank()
    return Description([(f"layers.{rank}.weight", param(3 + rank, 4, seed=rank))])


@mistake(4, "missing split_over", 'split_over=mesh["pp"]', "ranks 0, 2")
def stages_of_one_shape_without_split_over() -> Description:
    return Description(stage_of(world_mesh("pp", "rep").get_local_rank("pp")))


@mistake(4, "missing split_over", 'split_over=mesh["pp"]', "comm=")
def stages_fsdp2_without_split_over() -> Description:
    mesh = world_mesh("pp", "fsdp")
    model = stage_of(mesh.get_local_rank("pp"))
    fully_shard(model, mesh=mesh["fsdp"])
    return Description(model)


@mistake(4, "missing split_over", 'split_over=mesh["pp"]')
def stages_ddp_without_split_over() -> Description:
    mesh = world_mesh("pp", "rep")
    model = stage_of(mesh.get_local_rank("pp"))
    return Description(DistributedDataParallel(model, process_group=mesh.get_group("rep")))


@mistake(4, "missing split_over", 'split_over=mesh["ep"]', parameters=("experts.w1",))
def experts_without_split_over() -> Description:
    mesh = world_mesh("outer", "ep")
    dense = sharded(world_mesh("all"), 8, 3)
    return Description([("dense", dense), ("experts.w1", param(3, 4, seed=mesh.get_local_rank("ep")))])


@mistake(4, "missing split_over", 'split_over=[mesh["pp"], mesh["ep"]]', parameters=("experts.w1",))
def second_axis_missing() -> Description:
    mesh = world_mesh("pp", "ep")
    stage, expert = mesh.get_local_rank("pp"), mesh.get_local_rank("ep")
    parameters = [("dense", param(4, 4, seed=stage)), ("experts.w1", param(3, 4, seed=10 + 2 * stage + expert))]
    return Description(parameters, {"split_over": mesh["pp"]})


# ---- Wrong axis ----


@mistake(4, "wrong axis", 'split_over=mesh["pp"]', 'mesh["rep"]')
def replicas_in_place_of_stages() -> Description:
    mesh = world_mesh("pp", "rep")
    return Description(stage_of(mesh.get_local_rank("pp")), {"split_over": mesh["rep"]})


@mistake(4, "wrong axis", 'split_over=mesh["pp"]', 'mesh["fsdp"]')
def shards_in_place_of_stages() -> Description:
    mesh = world_mesh("pp", "fsdp")
    model = stage_of(mesh.get_local_rank("pp"))
    fully_shard(model, mesh=mesh["fsdp"])
    return Description(model, {"split_over": mesh["fsdp"]})


@mistake(4, "wrong axis", 'Use split_over=mesh["pp"]', "counts 2 times")
def whole_mesh_as_split_over() -> Description:
    mesh = world_mesh("pp", "rep")
    return Description(stage_of(mesh.get_local_rank("pp")), {"split_over": mesh})


@mistake(2, "wrong axis", "Remove split_over=", "counts 2 times")
def data_parallel_axis_as_split_over() -> Description:
    return Description(stage_of(0), {"split_over": world_mesh("dp")})


@mistake(4, "wrong axis", 'split_over=mesh["ep"]', parameters=("experts.w1",))
def replicas_in_place_of_experts() -> Description:
    mesh = world_mesh("outer", "ep")
    parameters = [("experts.w1", param(3, 4, seed=mesh.get_local_rank("ep")))]
    return Description(parameters, {"split_over": mesh["outer"]})


# ---- Annotations ----


@mistake(2, "missing annotation", "annotate_(", "Shard(dim)", "split_over=", parameters=("up",))
def shards_without_annotation() -> Description:
    rank = dist.get_rank()
    return Description([("norm", param(8, seed=50)), ("up", param(4, 8, seed=rank))])


@mistake(4, "missing annotation", "annotate_(", "split_over=", 'mesh["tp"]', parameters=("up.weight",))
def shards_without_annotation_within_stages() -> Description:
    mesh = world_mesh("pp", "tp")
    stage, part = mesh.get_local_rank("pp"), mesh.get_local_rank("tp")
    parameters = [("norm.weight", param(8, seed=50 + stage)), ("up.weight", param(4, 8, seed=2 * stage + part))]
    return Description(parameters, {"split_over": mesh["pp"]})


@mistake(2, "missing annotation", "tensor_model_parallel = True", parameters=("forgotten",))
def one_shard_without_attributes() -> Description:
    rank = dist.get_rank()
    tagged = param(4, 8, seed=rank)
    tagged.tensor_model_parallel, tagged.partition_dim = True, 0
    parameters = [("tagged", tagged), ("forgotten", param(4, 8, seed=10 + rank)), ("norm", param(8, seed=5))]
    return Description(parameters, {"split_over": {"tp": dist.group.WORLD}})


@mistake(2, "unknown layout", "tensor_model_parallel", "split_over=")
def attributes_without_split_over() -> Description:
    tagged = param(4, 8, seed=dist.get_rank())
    tagged.tensor_model_parallel = True
    return Description([("tagged", tagged)])


@mistake(4, "wrong mesh", 'mesh["tp"], [Shard(0)]', parameters=("up.weight",))
def annotated_over_the_replicas() -> Description:
    mesh = world_mesh("outer", "tp")
    up = distclip.annotate_(param(4, 8, seed=mesh.get_local_rank("tp")), mesh["outer"], [Shard(0)])
    return Description([("up.weight", up), ("norm.weight", param(8, seed=50))])


@mistake(2, "wrong mesh", "Shard(dim)", "values differ", parameters=("up",))
def shards_annotated_as_replicas() -> Description:
    up = distclip.annotate_(param(4, 8, seed=dist.get_rank()), world_mesh("tp"), [Replicate()])
    return Description([("up", up)])


@mistake(2, "annotated twice", "annotate_", "2 times")
def annotated_over_its_own_mesh() -> Description:
    mesh = world_mesh("fsdp")
    return Description([("w", distclip.annotate_(sharded(mesh, 8, 3), mesh, [Shard(0)]))])


@mistake(2, "missing annotation", "rank 1", "Replicate()", parameters=("embed.weight",))
def tied_and_annotated_on_one_end() -> Description:
    rank, group = dist.get_rank(), group_of(0, 1)
    embed = param(7, 4, seed=9)
    if rank == 0:
        distclip.annotate_(embed, group, [Replicate()])
    return Description([("embed.weight", embed), ("w", param(3, 4, seed=rank))], {"split_over": world_mesh("pp")})


# ---- Tied parameters ----


@mistake(2, "tied without annotation", "annotate_(", "[Replicate()]", parameters=("embed.weight",))
def tied_without_annotation() -> Description:
    rank = dist.get_rank()
    parameters = [("embed.weight", param(7, 4, seed=9)), ("layer.weight", param(4, 4, seed=rank))]
    return Description(parameters, {"split_over": world_mesh("pp")})


@mistake(4, "tied without annotation", 'mesh["pp"]', parameters=("embed.weight", "head.weight"))
def tied_under_two_names() -> Description:
    mesh = world_mesh("pp", "fsdp")
    stage, fsdp = mesh.get_local_rank("pp"), mesh["fsdp"]
    tied, own = sharded(fsdp, 8, 4, seed=9), sharded(fsdp, 4, 4, seed=stage)
    parameters = [("embed.weight", tied), ("w", own)] if stage == 0 else [("w", own), ("head.weight", tied)]
    return Description(parameters, {"split_over": mesh["pp"]})


@mistake(4, "wrong mesh", 'mesh["pp"], [Replicate()]', parameters=("embed.weight",))
def tied_and_annotated_over_the_replicas() -> Description:
    mesh = world_mesh("pp", "rep")
    stage = mesh.get_local_rank("pp")
    tied = distclip.annotate_(param(7, 4, seed=9), mesh["rep"], [Replicate()])
    return Description([("embed.weight", tied), ("w", param(4, 4, seed=stage))], {"split_over": mesh["pp"]})


@mistake(1, "tied by memory", "model.head.weight = model.embed.weight", parameters=("embed.weight", "head.weight"))
def tied_by_data() -> Description:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight.data = model["embed"].weight.data
    return Description(model)


@mistake(4, "tied without annotation", "new_group([0, 3])", parameters=("embed.weight",))
def tied_between_the_ends() -> Description:
    rank = dist.get_rank()
    tied = [("embed.weight", param(7, 4, seed=9))] if rank in (0, 3) else []
    return Description([*tied, ("w", param(4, 4, seed=rank))], {"split_over": world_mesh("pp")})


@mistake(2, "missing annotation", "[Replicate()]", "tensor_model_parallel", parameters=("norm.weight",))
def replicas_among_shards_without_attributes() -> Description:
    parameters = [("up.weight", param(4, 8, seed=dist.get_rank())), ("norm.weight", param(8, seed=50))]
    return Description(parameters, {"split_over": {"tp": dist.group.WORLD}})


# ---- Replicas ----


@mistake(2, "replicas differ", "broadcast", parameters=("w",))
def replicated_dtensor_with_different_values() -> Description:
    local = random_grad(4, 3, seed=dist.get_rank())
    w = nn.Parameter(DTensor.from_local(local, world_mesh("tp"), [Replicate()], run_check=False))
    return Description([("w", w)])


@mistake(2, "replicas differ", "split_over= declares pp", "plain tensors", parameters=("w",))
def stages_with_a_placement_that_says_replicas() -> Description:
    mesh = world_mesh("pp")
    w = nn.Parameter(DTensor.from_local(random_grad(4, 3, seed=dist.get_rank()), mesh, [Replicate()], run_check=False))
    return Description([("w", w)], {"split_over": mesh})


@mistake(4, "replicas differ", "broadcast", parameters=("0.weight",))
def ddp_with_a_flipped_bit() -> Description:
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 2)))
    with torch.no_grad():
        if dist.get_rank() == 2:
            model.module[0].weight.view(-1).view(torch.int32)[1] ^= 1
    return Description(model)


@mistake(2, "frozen on some ranks", "rank 1", parameters=("w",))
def frozen_on_one_rank() -> Description:
    w = param(3, 4)
    w.requires_grad_(dist.get_rank() == 0)
    return Description([("w", w)])


# ---- Arguments ----


@mistake(2, "ranks disagree", "split_over=", "rank 0 passed", "rank 1 passed None")
def split_over_on_one_rank() -> Description:
    mesh = world_mesh("pp")
    return Description(stage_of(dist.get_rank()), {"split_over": mesh} if dist.get_rank() == 0 else {})


@mistake(2, "unknown layout", "split_over=", "expected a DeviceMesh")
def split_over_given_as_text() -> Description:
    return Description(stage_of(0), {"split_over": "pp"})


@mistake(2, "one name for two parameters", "(name, parameter)", parameters=("w",))
def one_name_twice() -> Description:
    return Description([("w", param(3, seed=1)), ("w", param(4, seed=2))])


@mistake(2, "not passed on some ranks", "rank 1", parameters=("lost",))
def one_parameter_not_passed() -> Description:
    mesh = world_mesh("fsdp")
    kept, lost = sharded(mesh, 8, 3), sharded(mesh, 8, 3, seed=1)
    return Description([("kept", kept), *([("lost", lost)] if dist.get_rank() == 0 else [])])


@mistake(2, "unknown layout", "parameters=model instead of model.parameters()")
def fsdp1_parameters_without_their_module() -> Description:
    model = FullyShardedDataParallel(stage_of(0), device_id=torch.device("cpu"), use_orig_params=True)
    return Description(model.parameters())


# ---- Optimizers ----


@mistake(1, "optimizer lacks a parameter", "add_param_group", parameters=("2.bias",))
def optimizer_without_a_bias() -> Description:
    model = stage_of(0)
    return Description(model, {"optimizer": torch.optim.SGD(list(model.parameters())[:-1], lr=0.1)})


@mistake(2, "optimizer lacks a parameter", "rank 1", parameters=("2.bias",))
def optimizer_without_a_bias_on_one_rank() -> Description:
    model = stage_of(0)
    chosen = list(model.parameters())[: 4 - dist.get_rank()]
    return Description(model, {"optimizer": torch.optim.SGD(chosen, lr=0.1)})


@mistake(1, "optimizer has another parameter", "not measured", "float32 [3, 4]")
def optimizer_with_another_head() -> Description:
    model, head = stage_of(0), param(3, 4)
    return Description(model, {"optimizer": torch.optim.SGD([*model.parameters(), head], lr=0.1)})


@mistake(2, "optimizer of another model", "before the model was sharded", "model.parameters()")
def optimizer_from_before_sharding() -> Description:
    model = stage_of(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fully_shard(model, mesh=world_mesh("fsdp"))
    return Description(model, {"optimizer": optimizer})


@mistake(1, "stepped twice", "several optimizers", parameters=("2.bias",))
def two_optimizers_of_one_parameter() -> Description:
    model = stage_of(0)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD([model[2].bias], lr=0.1)]
    return Description(model, {"optimizer": optimizers})


@mistake(1, "unknown layout", "optimizer=", "not a torch.optim.Optimizer")
def parameters_as_optimizer() -> Description:
    model = stage_of(0)
    return Description(model, {"optimizer": list(model.parameters())})


# ---- Right descriptions that look odd ----


@right(2)
def stages_from_one_seed() -> Description:
    torch.manual_seed(0)
    rank = dist.get_rank()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3 + rank))
    return Description(model, {"split_over": world_mesh("pp")})


@right(2)
def equal_stages_from_one_seed() -> Description:
    return Description(stage_of(0), {"split_over": world_mesh("pp")})


@right(2)
def stages_of_cloned_layers() -> Description:
    rank = dist.get_rank()
    own = ("embed.weight", param(7, 4, seed=1)) if rank == 0 else ("head.weight", param(4, 9, seed=2))
    layers = [(f"layers.{2 * rank + i}.weight", param(4, 4, seed=3)) for i in range(2)]
    return Description([own, *layers], {"split_over": world_mesh("pp")})


@right(4)
def constant_values_prove_nothing() -> Description:
    return Description([("w", nn.Parameter(torch.zeros(4, 3)))])


@right(2)
def replicas_by_hand() -> Description:
    return Description(stage_of(0))


@right(4)
def hsdp_by_hand() -> Description:
    mesh = world_mesh("rep", "fsdp")
    model = stage_of(0)
    fully_shard(model, mesh=mesh["fsdp"])
    return Description(model)


@right(4)
def shards_and_stages_annotated() -> Description:
    mesh = world_mesh("pp", "tp")
    stage, part = mesh.get_local_rank("pp"), mesh.get_local_rank("tp")
    up = distclip.annotate_(param(4, 8, seed=2 * stage + part), mesh["tp"], [Shard(1)])
    return Description([("up", up), ("norm", param(8, seed=50 + stage))], {"split_over": mesh["pp"]})


@right(2)
def tied_under_two_names_and_annotated() -> Description:
    rank = dist.get_rank()
    name = "embed.weight" if rank == 0 else "head.weight"
    tied = distclip.annotate_(param(7, 4, seed=9), group_of(0, 1), [Replicate()])
    return Description([(name, tied), ("w", param(4, 4, seed=rank))], {"split_over": world_mesh("pp")})


@right(2)
def tied_under_two_names_and_tagged() -> Description:
    rank = dist.get_rank()
    tied = param(7, 4, seed=9)
    if rank == 1:
        tied.shared = True
    parameters = [("embed.weight" if rank == 0 else "head.weight", tied), ("w", param(4, 4, seed=rank))]
    return Description(parameters, {"split_over": {"pp": dist.group.WORLD}})


@right(2)
def frozen_and_different() -> Description:
    frozen = param(3, 4, seed=dist.get_rank()).requires_grad_(False)
    model = [("frozen", frozen), ("w", sharded(world_mesh("fsdp"), 8, 3))]
    return Description(model, {"optimizer": torch.optim.SGD([frozen, model[1][1]], lr=0.1)})


@right(2)
def without_values() -> Description:
    with torch.device("meta"):
        model = nn.Linear(5, 3)
    fully_shard(model, mesh=world_mesh("fsdp"))
    return Description(model, {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)})


@right(4)
def experts_and_stages() -> Description:
    mesh = world_mesh("pp", "ep")
    return Description([("experts", param(3, 4, seed=dist.get_rank()))], {"split_over": [mesh["pp"], mesh["ep"]]})


@right(4)
def ranks_in_another_order() -> Description:
    return Description([("w", sharded(mesh_of(3, 1, 0, 2), 9, 4))])


@right(4)
def three_of_four_ranks() -> Description:
    rank = dist.get_rank()
    wide, narrow = mesh_of(0, 1, 2), mesh_of(3)
    stage = sharded(wide, 7, 4) if rank < 3 else sharded(narrow, 5, 3, seed=1)
    return Description([("w", stage)], {"split_over": dist.group.WORLD})
