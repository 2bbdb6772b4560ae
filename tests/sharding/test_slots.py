"""Assign slots to shards and replicas that only tags, axes or names distinguish, and to rows of shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distclip
from distclip import ArgumentError, DisagreementError, GradClipper, LayoutError
from distclip.norms.spec import NormSpec
from distclip.sharding import parameter_table
from distclip.sharding.annotations import set_layout
from distclip.sharding.layout import Layout
from distclip.sharding.slots import assign_slots, describe_params
from tests.policies.checks import PER_GRANULARITY, SHORT_TRACE, check_clipper, check_fitted
from tests.policies.oracle import Oracle, Piece, chunk_piece, dtensor_piece, pieces_of, whole_piece
from tests.ranks import on_ranks
from tests.rig import assert_raises_on_ranks
from tests.tables.layouts import Case
from tests.tables.layouts.data_parallel import backward, mlp
from tests.tables.layouts.meshes import group_of, world_mesh
from tests.tables.layouts.tensors import dtensor_param, plain_param, random_grad, tagged_param

Build = Callable[[], tuple[list[Piece], Case]]
MODELS: dict[str, tuple[int, Build]] = {}
"""Number of ranks and builder of each model, by name."""


def model(num_ranks: int) -> Callable[[Build], Build]:
    """Enter a builder into `MODELS`."""

    def enter(build: Build) -> Build:
        MODELS[build.__name__] = (num_ranks, build)
        return build

    return enter


def named_params(pieces: list[Piece]) -> list[tuple[str, Tensor]]:
    return [(p.name, p.param) for p in pieces]


def chunk_param(grad: Tensor, dim: int, index: int, num_chunks: int) -> nn.Parameter:
    """Make a plain parameter that is one of `num_chunks` equal parts of a whole one."""
    return plain_param(grad.chunk(num_chunks, dim)[index].clone())


@model(4)
def tags() -> tuple[list[Piece], Case]:
    """Build stages x tensor parallel by tags: shards along dim 0 and 1, replicas, one `shared`."""
    mesh = world_mesh("pp", "tp")
    stage, part = mesh.get_local_rank("pp"), mesh.get_local_rank("tp")
    column, row = (
        chunk_param(random_grad(6, 4, seed=stage), 0, part, 2),
        chunk_param(random_grad(5, 6, seed=10 + stage), 1, part, 2),
    )
    for param, dim in ((column, 0), (row, 1)):
        param.tensor_model_parallel, param.partition_dim = True, dim
    tied = chunk_param(random_grad(8, 3, seed=20), 0, part, 2)
    tied.tensor_model_parallel, tied.partition_dim = True, 0
    tied.shared = stage == 1
    norm = tagged_param(random_grad(5, seed=30 + stage), tensor_model_parallel=False)
    pieces = [
        chunk_piece("column", column, ("column", stage), 0, part, 2),
        chunk_piece("row", row, ("row", stage), 1, part, 2),
        chunk_piece(("embedding", "head")[stage], tied, "tied", 0, part, 2),
        whole_piece("norm", norm, ("norm", stage)),
    ]
    return pieces, Case(named_params(pieces), [], {"pp": mesh["pp"].get_group(), "tp": mesh["tp"].get_group()})


@model(4)
def annotations() -> tuple[list[Piece], Case]:
    """Annotate along dim 0, dim 1, both, twice along dim 0, over a convolution, and not at all."""
    mesh = world_mesh("a", "b")
    flat = world_mesh("all")
    a, b, rank = mesh.get_local_rank("a"), mesh.get_local_rank("b"), dist.get_rank()
    pieces = []

    def add(name: str, grad: Tensor, on: Any, placements: list[Any], at: Tensor) -> None:
        param = plain_param(grad.reshape(-1)[at.reshape(-1)].view(at.shape).clone())
        distclip.annotate_(param, on, placements)
        pieces.append(Piece(name, param, name, tuple(grad.shape), at.reshape(-1)))

    def ids(*shape: int) -> Tensor:
        return torch.arange(torch.Size(shape).numel()).view(shape)

    add("rows", random_grad(8, 3), flat, [Shard(0)], ids(8, 3).chunk(4)[rank])
    add("columns", random_grad(5, 8, seed=1), flat, [Shard(1)], ids(5, 8).chunk(4, 1)[rank])
    add("both", random_grad(4, 6, seed=2), mesh, [Shard(0), Shard(1)], ids(4, 6).chunk(2)[a].chunk(2, 1)[b])
    add("swapped", random_grad(4, 6, seed=3), mesh, [Shard(1), Shard(0)], ids(4, 6).chunk(2, 1)[a].chunk(2)[b])
    add("twice", random_grad(8, 3, seed=4), mesh, [Shard(0), Shard(0)], ids(8, 3).chunk(2)[a].chunk(2)[b])
    add("half", random_grad(6, 4, seed=5), mesh, [Replicate(), Shard(0)], ids(6, 4).chunk(2)[b])
    add("last", random_grad(6, 4, seed=6), mesh, [Shard(-1), Replicate()], ids(6, 4).chunk(2, 1)[a])
    add("conv", random_grad(8, 3, 2, 2, seed=7), mesh["a"], [Shard(0)], ids(8, 3, 2, 2).chunk(2)[a])
    add("kernel", random_grad(4, 4, 3, 3, seed=8), mesh["b"], [Shard(1)], ids(4, 4, 3, 3).chunk(2, 1)[b])
    add("vector", random_grad(8, seed=9), flat, [Shard(0)], ids(8).chunk(4)[rank])
    pieces.append(whole_piece("scalar", plain_param(torch.tensor(2.5))))
    return pieces, Case(named_params(pieces), [])


@model(4)
def uneven_annotations() -> tuple[list[Piece], Case]:
    """Build shards of different sizes, one of them empty."""
    mesh, rank = world_mesh("a"), dist.get_rank()
    grad, begins = random_grad(6, 3), [0, 3, 4, 4, 6]
    rows = slice(begins[rank], begins[rank + 1])
    param = distclip.annotate_(plain_param(grad[rows].clone()), mesh, [Shard(0)])
    pieces = [Piece("w", param, "w", (6, 3), torch.arange(18).view(6, 3)[rows].reshape(-1))]
    return pieces, Case(named_params(pieces), [])


@model(4)
def dtensor_annotated() -> tuple[list[Piece], Case]:
    """Build experts that FSDP2 shards along one axis, and an annotation along another."""
    mesh = world_mesh("ep", "dp")
    part, grad = mesh.get_local_rank("ep"), random_grad(8, 3)
    ids = torch.arange(24).view(8, 3).chunk(2)[part]
    local = ids.chunk(2)[mesh.get_local_rank("dp")]
    param = dtensor_param(grad.chunk(2)[part].clone(), mesh["dp"], [Shard(0)])
    distclip.annotate_(param, mesh["ep"], [Shard(0)])
    pieces = [Piece("w", param, "w", (8, 3), local.reshape(-1))]
    return pieces, Case(named_params(pieces), [])


@model(4)
def tied() -> tuple[list[Piece], Case]:
    """Build an embedding tied between the outer stages under two names."""
    mesh = world_mesh("pp")
    rank, ends = mesh.get_local_rank(), group_of(0, 3)
    pieces = [whole_piece("0.weight", plain_param(random_grad(3, 4, seed=rank)), ("0.weight", rank))]
    if rank in (0, 3):
        param = distclip.annotate_(plain_param(random_grad(7, 4, seed=9)), ends, [Replicate()])
        pieces.append(whole_piece("embed.weight" if rank == 0 else "head.weight", param, "tied"))
    return pieces, Case(named_params(pieces), [], mesh)


@model(4)
def tied_fsdp2() -> tuple[list[Piece], Case]:
    """Build a tied embedding within stages that FSDP2 shards."""
    mesh = world_mesh("pp", "dp")
    stage = mesh.get_local_rank("pp")
    weight = dtensor_param(random_grad(3, 4, seed=stage), mesh["dp"], [Shard(0)])
    param = distclip.annotate_(
        dtensor_param(random_grad(7, 4, seed=9), mesh["dp"], [Shard(0)]), mesh["pp"], [Replicate()]
    )
    pieces = [
        dtensor_piece("0.weight", weight, ("0.weight", stage)),
        dtensor_piece(("embed", "head")[stage], param, "tied"),
    ]
    return pieces, Case(named_params(pieces), [], mesh["pp"])


@model(4)
def experts() -> tuple[list[Piece], Case]:
    """Build plain experts along an axis ep, and tensor-parallel shards of each along an axis tp."""
    mesh = world_mesh("ep", "tp")
    expert, part = mesh.get_local_rank("ep"), mesh.get_local_rank("tp")
    param = chunk_param(random_grad(4, 6, seed=expert), 1, part, 2)
    param.partition_dim = 1
    pieces = [chunk_piece("w1", param, ("w1", expert), 1, part, 2)]
    return pieces, Case(named_params(pieces), [], mesh)


@model(4)
def tagged_experts() -> tuple[list[Piece], Case]:
    """Build experts tagged allreduce=False among dense replicas."""
    mesh = world_mesh("dp", "ep")
    expert = mesh.get_local_rank("ep")
    pieces = [
        whole_piece("w1", tagged_param(random_grad(3, 4, seed=expert), allreduce=False), ("w1", expert)),
        whole_piece("dense", tagged_param(random_grad(6, 2, seed=7), allreduce=True)),
    ]
    return pieces, Case(named_params(pieces), [], mesh["ep"])


@model(4)
def odd_gradients() -> tuple[list[Piece], Case]:
    """Build bf16, fp16, strided, channels-last, sparse, Partial and missing gradients of 0 to 4 dims."""
    mesh = world_mesh("dp")
    rank = mesh.get_local_rank()
    transposed = plain_param(random_grad(6, 4))
    transposed.grad = random_grad(4, 6, seed=1).t()
    channels = plain_param(random_grad(4, 3, 2, 2, seed=2))
    channels.grad = channels.grad.contiguous(memory_format=torch.channels_last)
    embedding = nn.Embedding(10, 4, sparse=True)
    index = torch.tensor([[7, 1, 3, 1]])
    embedding.weight.grad = torch.sparse_coo_tensor(index, random_grad(4, 4, seed=3), (10, 4), check_invariants=True)
    partial = nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Replicate()], src_data_rank=None))
    partial.grad = DTensor.from_local(random_grad(4, 3, seed=40 + rank), mesh, [Partial()], run_check=False)
    bare = distclip.annotate_(plain_param(random_grad(5, 3, seed=50 + rank)), mesh, [Partial()])
    params = {
        "bf16": dtensor_param(random_grad(9, 5, seed=4).bfloat16(), mesh, [Shard(0)]),
        "fp16": dtensor_param(random_grad(9, 5, seed=5).half(), mesh, [Shard(1)]),
        "transposed": transposed,
        "channels": channels,
        "embedding": embedding.weight,
        "scalar": plain_param(torch.tensor(-2.0)),
        "one_row": dtensor_param(random_grad(1, 5, seed=6), mesh, [Shard(0)]),
        "never": plain_param(None, (4, 2)),
        "partial": partial,
    }
    pieces = [*pieces_of(params.items()), whole_piece("bare", bare, part=(rank,))]
    return pieces, Case(named_params(pieces), [], all_reduces=3, other_collectives=1, tolerance=2e-6)


@pytest.mark.parametrize(("name", "num_ranks"), [(name, size) for name, (size, _) in MODELS.items()])
@on_ranks()
@pytest.mark.parametrize("policy", PER_GRANULARITY)
def test_norms_and_gradients_of_slots(name: str, policy: str) -> None:
    pieces, case = MODELS[name][1]()
    oracle = Oracle(pieces)
    clipped = check_fitted(oracle, case.parameters, case, policy, name)
    assert clipped, "no step was clipped, so this tests nothing"


@on_ranks(4)
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_one_slot_of_which_some_ranks_hold_nothing(norm_type: float) -> None:
    param = dtensor_param(random_grad(1, 5), world_mesh("dp"), [Shard(0)])
    clipper = GradClipper([("w", param)], distclip.agc(0.1, norm_type=norm_type))
    report = clipper.clip()
    expected = torch.linalg.vector_norm(random_grad(1, 5).double(), norm_type)
    torch.testing.assert_close(report.norms, expected.view(1), rtol=1e-6, atol=0)


@on_ranks(2)
def test_two_tied_pairs_of_one_shape_are_distinguished_or_refused() -> None:
    """Build two tied pairs under four names, which must not become four slots."""
    mesh = world_mesh("pp")
    stage = mesh.get_local_rank()
    params = {}
    for i, name in enumerate((("a", "b"), ("c", "d"))[stage]):
        params[name] = distclip.annotate_(plain_param(random_grad(4, 3, seed=i)), mesh, [Replicate()])
    try:
        clipper = GradClipper(params.items(), distclip.per_tensor_norm(1.0), split_over=mesh)
    except LayoutError:
        return
    report = clipper.clip()
    expected = sorted(float(random_grad(4, 3, seed=i).double().norm()) for i in range(2))
    assert sorted(report.norms.tolist()) == pytest.approx(expected, rel=1e-6), clipper.slots


@on_ranks(4)
def test_clipper_made_before_the_first_backward() -> None:
    for shard in (
        lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu"), use_orig_params=True),
        lambda m: fully_shard(m, shard_placement_fn=lambda p: Shard(p.ndim - 1)),
    ):
        model = shard(mlp(8, 12, 4))
        clippers = [GradClipper(model, policy) for policy in (distclip.agc(0.05), distclip.per_tensor_norm(1.0))]
        backward(model, 8)
        oracle = Oracle(pieces_of(model))
        for clipper, bound in zip(clippers, (lambda n, t, s, w: 0.05 * max(w, 1e-3), lambda *_: 1.0), strict=True):
            case = Case(model, [], tolerance=2e-6)
            assert check_clipper(oracle, clipper, bound, str(clipper.policy), case, SHORT_TRACE)


@on_ranks(2)
def test_patterns_must_match_on_some_stage() -> None:
    """Pass patterns that match no name, and patterns that match on another stage."""
    mesh = world_mesh("pp")
    stage = mesh.get_local_rank()
    param = plain_param(random_grad(3, 4, seed=stage))
    local_params = [("first.weight" if stage == 0 else "last.weight", param)]
    for policy in (
        distclip.agc(exclude=["nowhere"]),
        distclip.group_norm({"x": ("nowhere", 1.0)}),
        distclip.NormPolicy(exclude=["nowhere"]),
    ):
        assert_raises_on_ranks(
            lambda policy=policy: GradClipper(local_params, policy, split_over=mesh), ArgumentError, "nowhere"
        )
    assert_raises_on_ranks(
        lambda: GradClipper(local_params, distclip.agc(exclude=["("]), split_over=mesh), ArgumentError, "regular"
    )
    assert_raises_on_ranks(
        lambda: GradClipper(local_params, distclip.per_tensor_norm(1.0 + (stage == 1)), split_over=mesh),
        DisagreementError,
        "different policies",
    )
    before = [random_grad(3, 4, seed=s).double() for s in range(2)]
    norms = [float(g.norm()) for g in before]
    clipper = GradClipper(local_params, distclip.group_norm({"out": ("last", 0.5)}, 2.0), split_over=mesh)
    report = clipper.clip()
    assert clipper.slots == ("out", "rest")
    assert report.norms.tolist() == pytest.approx([norms[1], norms[0]])
    assert float(param.grad.norm()) == pytest.approx((2.0, 0.5)[stage])
    param.grad.copy_(before[stage])
    # As in the paper, the last layer is not clipped. It counts in the total norm all the same.
    report = GradClipper(local_params, distclip.agc(0.01, exclude=["last"]), split_over=mesh).clip()
    assert float(report.norm) == pytest.approx((norms[0] ** 2 + norms[1] ** 2) ** 0.5)
    assert torch.equal(param.grad.double(), before[1]) == (stage == 1)
    # Rows of zeros are bounded by epsilon, so that training can move them.
    assert stage == 1 or param.grad.norm(dim=1).tolist() == pytest.approx([1e-5] * 3)
    param.grad.copy_(before[stage])
    policy = distclip.NormPolicy(distclip.Fixed(1.0), exclude=["last"])
    report = GradClipper(local_params, policy, split_over=mesh).clip()
    assert float(report.norm) == pytest.approx((norms[0] ** 2 + norms[1] ** 2) ** 0.5)
    assert float(param.grad.norm()) == pytest.approx(1.0 if stage == 0 else norms[1])
    flat = FullyShardedDataParallel(mlp(5, 7, 3), device_id=torch.device("cpu"))
    assert_raises_on_ranks(lambda: GradClipper(flat, distclip.per_tensor_norm(1.0)), LayoutError, "use_orig_params")
    one = plain_param(random_grad(3, 4))
    assert_raises_on_ranks(
        lambda: GradClipper([("w", one)], distclip.agc(), split_over={"tp": mesh}), LayoutError, "partition_dim"
    )


@on_ranks(4)
def test_ranks_without_parameters_or_gradients() -> None:
    """Build stages of which one has no parameter and one has no gradient."""
    mesh = world_mesh("pp")
    rank = mesh.get_local_rank()
    params = [] if rank == 1 else [("w", plain_param(random_grad(3, 4, seed=rank) if rank != 2 else None, (3, 4)))]
    clipper = GradClipper(params, distclip.per_tensor_norm(1.0), split_over=mesh)
    report = clipper.clip()
    expected = [float(random_grad(3, 4, seed=r).double().norm()) if r in (0, 3) else 0.0 for r in (0, 2, 3)]
    assert len(clipper.slots) == len(set(clipper.slots)) == 3
    assert report.norms.tolist() == pytest.approx(expected)
    assert report.coefs[1] == 1
    if rank in (0, 3):
        assert float(params[0][1].grad.norm()) == pytest.approx(1.0)


def test_replica_with_other_slices_is_found_by_the_shape_of_the_whole() -> None:
    by_rank, per_tensor = [], NormSpec(per="tensor")
    for name, numel, shape, counted in (
        ("embed", 12, (4, 5), True),
        ("other", 8, (2, 4), True),
        ("head", 8, (4, 5), False),
    ):
        layout = Layout(groups=((0, 1),), num_pieces=2, counted=counted)
        param = set_layout(torch.zeros(numel), layout, (shape, 0))
        table = parameter_table([(name, param)], ())
        table.world_size = 2
        by_rank.append(describe_params(table, 0, per_tensor, None))
    slots = assign_slots(by_rank, 2, per_tensor)
    assert slots.names == ("embed", "other")
    assert slots.by_name["head"] == (0, None)
