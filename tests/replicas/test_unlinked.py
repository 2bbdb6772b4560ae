"""Compare ranks that measure alone: plain tensors without `split_over=`, and drop-in functions under DDP."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import GradClipper, ReplicaWarning, global_norm
from tests.ranks import gather_from_ranks, on_ranks
from tests.replicas.flips import flip
from tests.tables.layouts.data_parallel import backward, mlp
from tests.tables.layouts.meshes import group_of, world_mesh
from tests.tables.layouts.tensors import dtensor_param, plain_param, random_grad


def warnings_of(call: Callable[[], object]) -> list[str]:
    """Return the texts of the warnings about replicas. Any other warning is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert {warning.category for warning in caught} <= {ReplicaWarning}
    return [str(warning.message) for warning in caught]


def in_turn(call: Callable[[], object]) -> list[list[str]]:
    """Call on one rank after another, and return the warnings of each."""
    found: list[str] = []
    for rank in range(dist.get_world_size()):
        if dist.get_rank() == rank:
            found = warnings_of(call)
        dist.barrier()
    return gather_from_ranks(found)


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [plain_param(random_grad(*shape)) for shape in shapes]


SHAPES: dict[str, Callable[[int], list[tuple[int, ...]]]] = {
    "stages": lambda rank: [(4, 3), (3 + rank,)],
    "other order and other length": lambda rank: [(5,), (2 + rank, 2)][:: 1 - 2 * (rank % 2)],
}
"""Shapes of the tensors of each rank, which differ."""

CALLS: dict[str, Callable[[list[torch.Tensor]], Callable[[], object]]] = {
    "clip_grad_norm_": lambda params: lambda: distclip.clip_grad_norm_(params, 1e9),
    "get_total_norm": lambda params: lambda: distclip.get_total_norm([param.grad for param in params]),  # type: ignore[misc]
}


@on_ranks(2, 4)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("function", CALLS)
def test_drop_ins_with_different_tensors_warn(shapes: str, function: str) -> None:
    call = CALLS[function](tensors(*SHAPES[shapes](dist.get_rank())))
    first, second = in_turn(call), in_turn(call)
    assert [len(found) for found in first] == [0] + [1] * (dist.get_world_size() - 1)
    # The first rank reads in its next call what the others have found.
    assert [len(found) for found in second] == [1] + [0] * (dist.get_world_size() - 1)
    assert "split_over=" in first[1][0]
    assert in_turn(call) == [[]] * dist.get_world_size()


@on_ranks(2)
def test_tensors_that_one_rank_has_in_addition() -> None:
    """A rank may log the norm of some tensors first. So drop-ins decide in the second call, and clippers at once."""
    rank = dist.get_rank()
    params = tensors(*[(4, 3), (2,)][: 1 + rank])
    call = CALLS["clip_grad_norm_"](params)
    assert in_turn(call) == [[], []]
    assert [len(found) for found in in_turn(call)] == [0, 1]
    assert [len(found) for found in in_turn(lambda: GradClipper(params, global_norm(1.0)))] == [0, 1]


@on_ranks(2)
def test_clippers_with_different_names_warn() -> None:
    named = [(f"layer{dist.get_rank()}", tensors((4, 3))[0])]
    clippers: list[GradClipper] = []
    texts = in_turn(lambda: clippers.append(GradClipper(named, global_norm(1.0))))
    assert [len(found) for found in texts] == [0, 1]
    assert "layer1 (4, 3) is among them on rank 1 only" in texts[1][0]
    assert [len(found) for found in in_turn(lambda: [clippers[0].clip() for _ in range(3)])] == [1, 0]
    assert in_turn(lambda: GradClipper([("x" * (1 + dist.get_rank()), named[0][1])], global_norm(1.0))) == [[], []]


@on_ranks(2, 4)
def test_equal_tensors_are_silent() -> None:
    """Ranks may log other norms, alone and first, and pass several models in turn."""
    rank = dist.get_rank()
    params, other = tensors((4, 3), (2,)), tensors((7,))

    def calls() -> None:
        if rank == 0:
            distclip.clip_grad_norm_(params[:1], float("inf"))
            distclip.get_total_norm([torch.ones(3)])
        distclip.clip_grad_norm_(params, 1e9)
        distclip.clip_grad_norm_(other, 1e9)
        GradClipper(params, global_norm(1.0)).clip()

    for _ in range(3):
        assert in_turn(calls) == [[]] * dist.get_world_size()


@on_ranks(2)
def test_ranks_with_a_communicator_of_their_own_are_not_compared() -> None:
    params = tensors((4 + dist.get_rank(), 3))

    def calls() -> None:
        distclip.clip_grad_norm_(params, 1e9, comm=distclip.LocalComm())
        GradClipper(params, global_norm(1.0), comm=distclip.LocalComm())
        GradClipper(params, global_norm(1.0), replicas="off")

    assert in_turn(calls) == [[], []]


# ---- DTensors on meshes that reach a part of the ranks ----


def in_groups(call: Callable[[], object]) -> list[int]:
    """Call on ranks 0 and 1, then on ranks 2 and 3, and return the number of warnings in each of these groups."""
    found: list[str] = []
    for group in ((0, 1), (2, 3)):
        if dist.get_rank() in group:
            found = warnings_of(call)
        dist.barrier()
    assert all("split_over=" in text for text in found)
    counts = [len(texts) for texts in gather_from_ranks(found)]
    return [sum(counts[:2]), sum(counts[2:])]


def stage_tensors(*shapes: tuple[int, ...], of: str = "dtensor") -> list[torch.Tensor]:
    """Return tensors that ranks 0 and 1 share, and ranks 2 and 3: DTensors, or plain tensors with an annotation."""
    mesh = world_mesh("half", "part")["part"]
    grads = [random_grad(*shape) for shape in shapes]
    if of == "dtensor":
        return [dtensor_param(grad, mesh, [Shard(0)]) for grad in grads]
    rank = mesh.get_local_rank()
    return [distclip.annotate_(plain_param(grad.tensor_split(2)[rank]), mesh, [Shard(0)]) for grad in grads]


@on_ranks(4)
@pytest.mark.parametrize("of", ["dtensor", "annotated"])
@pytest.mark.parametrize("function", [*CALLS, "GradClipper"])
def test_stages_with_meshes_of_their_own_warn(function: str, of: str) -> None:
    """Shard each stage over its own ranks, and forget `split_over`: the ranks of a stage find each other only."""
    stage = dist.get_rank() // 2
    params = stage_tensors((5, 3), (3, 2 + stage), of=of)
    if function == "GradClipper":
        clippers: list[GradClipper] = []
        assert in_groups(lambda: clippers.append(GradClipper(params, global_norm(1.0)))) == [0, 2]
        # The rank that came first reads what the others have found.
        assert in_groups(lambda: [clippers[0].clip() for _ in range(3)]) == [1, 0]
    elif (function, of) != ("get_total_norm", "annotated"):
        call = CALLS[function](params)
        assert [in_groups(call) for _ in range(3)] == [[0, 2], [1, 0], [0, 0]]


@on_ranks(4)
def test_some_ranks_with_dtensors_and_others_with_plain_tensors() -> None:
    shapes = [(5, 3), (3, 2)]
    params = stage_tensors(*shapes) if dist.get_rank() < 2 else tensors(*shapes)
    call = CALLS["clip_grad_norm_"](params)
    assert [in_groups(call) for _ in range(3)] == [[0, 0]] * 3
    other = stage_tensors((7, 3)) if dist.get_rank() < 2 else tensors((2, 3))
    assert in_groups(lambda: GradClipper(other, global_norm(1.0))) == [0, 2]


@on_ranks(4)
def test_models_with_meshes_of_their_own_that_are_equal_are_silent() -> None:
    """Train one model on two halves of the job, whose ranks have uneven shards, and then two models."""
    params = [*stage_tensors((5, 3), (3, 2)), *stage_tensors((5,), of="annotated")]
    group = [group_of(0, 1), group_of(2, 3)][dist.get_rank() // 2]
    other = stage_tensors((4 + dist.get_rank() // 2,))

    def calls() -> None:
        distclip.clip_grad_norm_(params, 1e9)
        GradClipper(params, global_norm(1.0)).clip()
        distclip.clip_grad_norm_(other, 1e9, comm=distclip.ProcessGroupComm(group))

    assert [in_groups(calls) for _ in range(3)] == [[0, 0]] * 3


def no_call(*args: Any, **kwargs: Any) -> None:
    raise AssertionError


@on_ranks(2)
def test_settled_calls_use_no_store() -> None:
    """The store is asked in the first two calls, and never if it fails."""
    params = tensors((4, 3))
    call = CALLS["clip_grad_norm_"](params)
    assert in_turn(call) + in_turn(call) == [[]] * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distclip.comm.postings.Posting.begin_call", no_call)
        patch.setattr("distclip.replicas.unlinked.posting_of", no_call)
        call()
        assert warnings_of(CALLS["get_total_norm"](params)) == []


def ddp(seed: int) -> nn.Module:
    model = DistributedDataParallel(mlp(5, 7, 3))
    backward(model, 5)
    return model


@on_ranks(2, 4)
def test_drop_ins_under_ddp_compare_gradients_in_their_first_call() -> None:
    model = ddp(0)
    call = lambda: distclip.clip_grad_norm_(model, 1e9)  # noqa: E731
    if dist.get_rank() == 1:
        grad = next(model.parameters()).grad
        assert grad is not None
        flip(grad, 3, 12)
    texts = in_turn(call)
    assert [len(found) for found in texts] == [0, 1] + [0] * (dist.get_world_size() - 2)
    assert "the gradient of 0.weight differs between ranks 0, 1" in texts[1][0]
    assert [len(found) for found in in_turn(call)] == [1] + [0] * (dist.get_world_size() - 1)
    assert in_turn(call) == [[]] * dist.get_world_size()


@on_ranks(2)
def test_drop_ins_under_ddp_are_silent_in_different_steps() -> None:
    """Rank 0 logs every step, and rank 1 makes its first call in the second one."""
    model = ddp(0)
    if dist.get_rank() == 0:
        assert warnings_of(lambda: distclip.clip_grad_norm_(model, float("inf"))) == []
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()
    backward(model, 5)
    for _ in range(4):
        assert in_turn(lambda: distclip.clip_grad_norm_(model, 1.0)) == [[], []]
