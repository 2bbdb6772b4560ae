"""Enter plain tensors with Megatron's attributes, and annotated ones, into the table of layouts."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch.distributed.tensor import Partial

import distclip
from tests.tables.layouts import Case, row
from tests.tables.layouts.meshes import world_mesh
from tests.tables.layouts.tensors import plain_param, random_grad, tagged_param


@row(2, 4, why="tensor parallel by tag: tagged tensors are shards, others are replicas; split_over= has no name")
def megatron_tp() -> Case:
    size, rank = dist.get_world_size(), dist.get_rank()
    pieces, copies = [random_grad(3, 4, seed=r) for r in range(size)], [random_grad(5), random_grad(6, seed=8)]
    parameters = [
        tagged_param(pieces[rank], tensor_model_parallel=True, partition_dim=0),
        tagged_param(copies[0], tensor_model_parallel=False),
        plain_param(copies[1]),
    ]
    return Case(parameters, [*pieces, *copies], split_over=dist.group.WORLD)


@row(4, why="pipeline x tensor parallel by tag; the replica of the embedding on the last stage is tagged `shared`")
def megatron_pp_tp() -> Case:
    mesh = world_mesh("pp", "tp")
    stage, part = mesh.get_local_rank("pp"), mesh.get_local_rank("tp")
    embedding = [random_grad(4, 3, seed=20 + p) for p in range(2)]
    pieces = [[random_grad(3, 4, seed=10 * s + p) for p in range(2)] for s in range(2)]
    norms = [random_grad(5, seed=30 + s) for s in range(2)]
    tied = tagged_param(embedding[part], tensor_model_parallel=True, partition_dim=0)
    if stage == 1:
        tied.shared = True
    parameters = [
        tied,
        tagged_param(pieces[stage][part], tensor_model_parallel=True, partition_dim=1),
        tagged_param(norms[stage], tensor_model_parallel=False),
    ]
    axes = {"pp": mesh["pp"].get_group(), "tp": mesh["tp"].get_group()}
    return Case(parameters, [*embedding, *pieces[0], *pieces[1], *norms], split_over=axes)


@row(4, why="experts tagged allreduce=False among dense replicas, expert parallel over half of the ranks")
def megatron_experts() -> Case:
    mesh = world_mesh("dp", "ep")
    experts = [random_grad(3, 4, seed=r) for r in range(2)]
    dense = random_grad(6, seed=7)
    parameters = [
        tagged_param(experts[mesh.get_local_rank("ep")], allreduce=False),
        tagged_param(dense, allreduce=True),
    ]
    return Case(parameters, [*experts, dense], split_over=mesh["ep"])


@row(2, 4, why="a plain tensor that is Partial by annotation")
def annotated_partial() -> Case:
    mesh = world_mesh("dp")
    summands = [random_grad(4, 3, seed=r) for r in range(mesh.size())]
    param = distclip.annotate_(plain_param(summands[mesh.get_local_rank()]), mesh, [Partial()])
    whole = torch.stack(summands).sum(0)
    return Case([param], [whole], all_reduces=3, other_collectives=1)


if find_spec("spmd_types") is not None:

    @row(4, why="plain tensors with types of spmd_types over dp x tp: R, I, V, a shard of a known dim, one axis of two")
    def spmd_types() -> Case:
        import spmd_types as spmd

        mesh = world_mesh("dp", "tp")
        dp, tp = mesh["dp"].get_group(), mesh["tp"].get_group()
        i, j = mesh.get_local_rank("dp"), mesh.get_local_rank("tp")
        cut, both, norm, bias = (
            random_grad(8, 3),
            random_grad(8, 2, seed=1),
            random_grad(5, seed=2),
            random_grad(3, seed=3),
        )
        both_ways = spmd.PartitionSpec((spmd.MeshAxis.of(tp), spmd.MeshAxis.of(dp)), None)
        parameters = [
            spmd.assert_type(plain_param(cut.chunk(2)[j]), {dp: spmd.R, tp: spmd.S(0)}),
            # The first axis of an entry is the outer one: tp cuts into halves, and dp each half into quarters.
            spmd.assert_type(plain_param(both.chunk(2)[j].chunk(2)[i]), {dp: spmd.V, tp: spmd.V}, both_ways),
            spmd.assert_type(plain_param(norm), {dp: spmd.R, tp: spmd.I}),
            plain_param(bias),
        ]
        return Case(parameters, [cut, both, norm, bias])
