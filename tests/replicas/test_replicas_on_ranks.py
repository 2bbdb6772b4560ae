"""Compare replicas of real layouts: DDP, HSDP, FSDP1, tied embeddings, tensor parallelism, and plain tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import GradClipper, LayoutError, ReplicaError, ReplicaWarning, devices, global_norm
from tests.ranks import gather_from_ranks, on_ranks
from tests.replicas.flips import flip
from tests.rig import assert_raises_on_ranks
from tests.tables.layouts.data_parallel import backward, mlp
from tests.tables.layouts.meshes import group_of, world_mesh
from tests.tables.layouts.model_parallel import PLAN, Block, block_backward
from tests.tables.layouts.tensors import dtensor_param, plain_param, random_grad


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def ddp() -> nn.Module:
    model = DistributedDataParallel(mlp(5, 7, 3))
    backward(model, 5)
    return model


def hsdp() -> nn.Module:
    model = mlp(8, 6, 4)
    fully_shard(model, mesh=world_mesh("replicate", "shard", shape=(2, dist.get_world_size() // 2)))
    backward(model, 8)
    return model


def fsdp1() -> nn.Module:
    model = FullyShardedDataParallel(
        mlp(5, 7, 3),
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        device_mesh=world_mesh("replicate", "shard"),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )
    backward(model, 5)
    return model


def tp() -> nn.Module:
    """Leave the norm plain among DTensors, and the bias of `down` replicated."""
    model = parallelize_module(Block(), world_mesh("tp"), PLAN)
    block_backward(model)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"ddp": ddp, "hsdp": hsdp, "fsdp1": fsdp1, "tp": tp}
HELD = {"ddp": "0.weight", "hsdp": "0.bias", "fsdp1": "2.bias", "tp": "norm.bias"}
"""Parameter of each model that the last rank holds some elements of."""


def find_held(model: nn.Module, name: str) -> nn.Parameter:
    return next(p for n, p in model.named_parameters() if n.endswith(name))


@on_ranks(4)
@pytest.mark.parametrize("ranks", [(0, 1), (0, 2), (0, 3), (1,)])
def test_ranks_with_one_gradient_and_ranks_with_another_are_found(ranks: tuple[int, ...]) -> None:
    """A missing all-reduce between nodes leaves the ranks of each node equal."""
    mesh = world_mesh("node", "local", shape=(2, 2))
    for placements, groups in (
        ([Replicate(), Replicate()], [{0, 1, 2, 3}]),
        ([Replicate(), Shard(0)], [{0, 2}, {1, 3}]),
        ([Shard(0), Replicate()], [{0, 1}, {2, 3}]),
    ):
        param = dtensor_param(random_grad(4), mesh, placements)
        clipper = GradClipper([("w", param)], global_norm(1.0), replicas="raise")
        clipper.clip()
        local(param.grad)[0] += dist.get_rank() in ranks
        if all(group <= {*ranks} or not group & {*ranks} for group in groups):
            clipper.clip()
        else:
            assert_raises_on_ranks(clipper.clip, ReplicaError, "the gradient of w", unchanged=local(param.grad))


@pytest.mark.parametrize(
    ("name", "num_ranks"), [("ddp", 2), ("ddp", 4), ("hsdp", 4), ("fsdp1", 4), ("tp", 2), ("tp", 4)]
)
@on_ranks()
def test_flip_on_the_last_rank_is_found(name: str) -> None:
    """Flip the last bit of a gradient, and then one bit of a parameter."""
    model, last = MODELS[name](), dist.get_world_size() - 1
    clipper = GradClipper(model, global_norm(1e9), replicas="raise")
    for _ in range(2):
        assert not clipper.clip().replicas_differ
    param = find_held(model, HELD[name])
    for tensor, kind in ((param.grad, "gradient"), (param, "parameter")):
        # FSDP1 gives some ranks an empty part.
        has_elements = dist.get_rank() == last and local(tensor).numel() > 0
        if not any(gather_from_ranks(has_elements)):
            continue
        if has_elements:
            flip(local(tensor), 0, 0)
        with pytest.raises(ReplicaError, match=f"the {kind} of .*{HELD[name]}"):  # noqa: PT012
            for _ in range(64):
                clipper.clip()
        (culprit,) = clipper.incidents[-1].culprits
        assert last in culprit.ranks
        if name in ("ddp", "tp") and dist.get_world_size() == 4:
            assert culprit.ranks == (last,)
        assert culprit.bit == 0
        if has_elements:
            flip(local(tensor), 0, 0)
    for _ in range(64):
        clipper.clip()
    assert gather_from_ranks(clipper.incidents) == [clipper.incidents] * dist.get_world_size()


@on_ranks(4)
def test_tied_embedding_that_is_not_reduced() -> None:
    """Forget the all-reduce of a tied embedding: the gradients of both ends differ."""
    mesh, rank = world_mesh("pp"), dist.get_rank()
    ends = group_of(0, 3)
    parameters = [("own", plain_param(random_grad(3, 4, seed=rank)))]
    if rank in (0, 3):
        tied = plain_param(random_grad(7, 4, seed=50 + rank))
        parameters.append((f"tied{rank}", distclip.annotate_(tied, ends, [Replicate()])))
    clipper = GradClipper(parameters, global_norm(1.0), split_over=mesh, replicas="raise")
    with pytest.raises(ReplicaError, match="the gradient of tied0 differs between ranks 0, 3"):
        clipper.clip()


@on_ranks(4)
def test_repair_of_a_gradient_and_a_parameter() -> None:
    model = ddp()
    clipper = GradClipper(model, global_norm(1e9), replicas="repair")
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None], [p.clone() for p in model.parameters()]
    if dist.get_rank() == 2:
        grad = next(model.parameters()).grad
        assert grad is not None
        flip(grad, 4, 30)
        flip(find_held(model, "2.weight"), 1, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reports = [clipper.clip() for _ in range(64)]
    assert bool(reports[0].replicas_differ)
    assert bool(reports[0].finite)
    assert [incident.action for incident in clipper.incidents] == ["repair"]
    assert {culprit.kind for culprit in clipper.incidents[0].culprits} == {"gradient", "parameter"}
    assert all(warning.category is ReplicaWarning for warning in caught)
    for param, grad, old in zip(model.parameters(), *whole, strict=True):
        assert torch.equal(param, old)
        assert param.grad is not None
        assert torch.equal(param.grad, grad)


@on_ranks(2, 4)
def test_accelerators_warn_a_step_later() -> None:
    model = ddp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    clipper = GradClipper(model, global_norm(1.0), on_nonfinite="propagate", replicas="warn")
    with mock.patch.object(devices, "host_reads_free", return_value=False), warnings.catch_warnings():
        warnings.simplefilter("error")
        clipper.step(optimizer)
        grad = next(model.parameters()).grad
        assert grad is not None
        if dist.get_rank() == 1:
            flip(grad, 2, 12)
        assert bool(clipper.step(optimizer).replicas_differ)
        if dist.get_rank() == 1:
            flip(grad, 2, 12)
        # Scaling has spread the flipped bit no further: the coefficient is the same on all ranks.
        with pytest.warns(ReplicaWarning, match="step 2: .* gradient of 0.weight"):
            clipper.step(optimizer)
    assert [incident.step for incident in clipper.incidents] == [2]


@on_ranks(2)
def test_drop_ins_warn() -> None:
    mesh = world_mesh("dp")
    param = dtensor_param(random_grad(8, 3), mesh, [Replicate()])
    distclip.clip_grad_norm_([param], 1e9)
    if dist.get_rank() == 1:
        flip(local(param.grad), 5, 1)
    with pytest.warns(ReplicaWarning, match=r"parameters\[0\] differs between ranks 0, 1"):
        distclip.clip_grad_norm_([param], 1e9)


def pairs(*tensors: Tensor) -> list[tuple[str, Tensor]]:
    return [(f"w{i}", tensor) for i, tensor in enumerate(tensors)]


@on_ranks(2)
@pytest.mark.parametrize(
    ("difference", "cause"),
    [("stages", "split_over="), ("widths", "split_over="), ("one", "all-reduce"), ("all", "different data")],
)
def test_plain_tensors_that_differ(difference: str, cause: str) -> None:
    """Mix plain tensors, which are assumed to be replicas, with a DTensor, through which the ranks find each other."""
    rank = dist.get_rank()
    grads = [random_grad(4 + rank * (difference == "widths"), 3, seed=rank * (difference != "equal")), random_grad(5)]
    if difference == "all":
        grads[1] = random_grad(5, seed=rank)
    plain = [plain_param(grad) for grad in grads]
    if difference == "stages":
        plain[0].data += rank
    sharded = dtensor_param(random_grad(8, 3), world_mesh("dp"), [Shard(0)])
    clipper = GradClipper(pairs(*plain, sharded), global_norm(1.0), replicas="raise")
    with pytest.raises(ReplicaError, match=cause):
        clipper.clip()


@on_ranks(2)
def test_rounding_errors_of_plain_tensors_are_no_difference() -> None:
    """Differ in the last bits of many elements, in every step, and then by more."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    plain = [plain_param(random_grad(50, 3, seed=i)) for i in range(3)]
    sharded = dtensor_param(random_grad(8, 3), world_mesh("dp"), [Shard(0)])
    clipper = GradClipper(pairs(*plain, sharded), global_norm(1e9), replicas="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(20):
            for i, param in enumerate(plain):
                param.grad = random_grad(50, 3, seed=10 * step + i)
                param.grad *= 1 + 1e-7 * torch.randn(50, 3, generator=generator)
            assert step == 0 or not clipper.clip().replicas_differ
        assert not clipper.incidents
        assert plain[1].grad is not None
        if dist.get_rank() == 1:
            plain[1].grad *= 1.01
        with pytest.raises(ReplicaError, match="w1"):
            clipper.clip()


@on_ranks(2)
@pytest.mark.parametrize("replicas", ["warn", "raise"])
def test_placements_that_contradict_split_over_are_refused(replicas: Any) -> None:
    """Declare the tensors of pipeline stages to be replicas over the pipeline."""
    mesh, rank = world_mesh("pp"), dist.get_rank()
    param = dtensor_param(random_grad(4, 3, seed=rank), mesh, [Replicate()])
    before = local(param.grad).clone()
    clipper = GradClipper([("w", param)], global_norm(1.0), split_over=mesh, replicas=replicas)
    with pytest.raises(LayoutError, match=r"w: its placements declare replicas .* pp over ranks \[0, 1\]"):
        clipper.clip()
    with pytest.raises(LayoutError, match="placements"):
        distclip.clip_grad_norm_([param], 1.0, split_over=mesh)
    assert torch.equal(local(param.grad), before)
