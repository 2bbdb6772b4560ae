"""Plain tensors with Megatron's attributes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Partial

import distclip
from tests.tables.layouts import Case, row
from tests.tables.layouts.model_parallel import axis, known
from tests.tables.layouts.pipeline import plain


def tagged(grad: Tensor, **tags: object) -> nn.Parameter:
    """A plain parameter with attributes."""
    param = plain(grad)
    for name, value in tags.items():
        setattr(param, name, value)
    return param


@row(2, 4, why="tensor parallel by tag: what is tagged is a piece, what is not is a copy, on a group nobody named")
def megatron_tp() -> Case:
    size, rank = dist.get_world_size(), dist.get_rank()
    pieces, copies = [known(3, 4, seed=r) for r in range(size)], [known(5), known(6, seed=8)]
    parameters = [
        tagged(pieces[rank], tensor_model_parallel=True, partition_dim=0),
        tagged(copies[0], tensor_model_parallel=False),
        plain(copies[1]),
    ]
    return Case(parameters, [*pieces, *copies], split_over=dist.group.WORLD)


@row(4, why="pipeline x tensor parallel by tag; the embedding's copy on the last stage is marked `shared`")
def megatron_pp_tp() -> Case:
    mesh = axis("pp", "tp")
    stage, part = mesh.get_local_rank("pp"), mesh.get_local_rank("tp")
    embedding = [known(4, 3, seed=20 + p) for p in range(2)]
    pieces = [[known(3, 4, seed=10 * s + p) for p in range(2)] for s in range(2)]
    norms = [known(5, seed=30 + s) for s in range(2)]
    tied = tagged(embedding[part], tensor_model_parallel=True, partition_dim=0)
    if stage == 1:
        tied.shared = True
    parameters = [
        tied,
        tagged(pieces[stage][part], tensor_model_parallel=True, partition_dim=1),
        tagged(norms[stage], tensor_model_parallel=False),
    ]
    axes = {"pp": mesh["pp"].get_group(), "tp": mesh["tp"].get_group()}
    return Case(parameters, [*embedding, *pieces[0], *pieces[1], *norms], split_over=axes)


@row(4, why="experts marked allreduce=False beside dense copies, expert parallel over half of the ranks")
def megatron_experts() -> Case:
    mesh = axis("dp", "ep")
    experts = [known(3, 4, seed=r) for r in range(2)]
    dense = known(6, seed=7)
    parameters = [
        tagged(experts[mesh.get_local_rank("ep")], allreduce=False),
        tagged(dense, allreduce=True),
    ]
    return Case(parameters, [*experts, dense], split_over=mesh["ep"])


@row(2, 4, why="a plain tensor whose ranks each hold a summand, by annotation")
def annotated_partial() -> Case:
    mesh = axis("dp")
    summands = [known(4, 3, seed=r) for r in range(mesh.size())]
    param = distclip.annotate_(plain(summands[mesh.get_local_rank()]), mesh, [Partial()])
    whole = torch.stack(summands).sum(0)
    return Case([param], [whole], all_reduces=3, other_collectives=1)
