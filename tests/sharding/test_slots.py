"""What is one slot: pieces and copies that only marks, axes or names tell apart; rows wherever they are cut."""

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
from distclip.sharding import parameter_plan
from distclip.sharding.annotations import set_layout
from distclip.sharding.layout import Layout
from distclip.sharding.slots import arrange, find
from tests.engine.test_bad_input import refused
from tests.policies.test_policies import Oracle, Piece, check_clipper, of_dtensor, part_of, pieces_of, rules, whole
from tests.ranks import World, everywhere
from tests.tables.layouts import Case
from tests.tables.layouts.data_parallel import backward, mlp
from tests.tables.layouts.model_parallel import axis, known, made
from tests.tables.layouts.pipeline import plain
from tests.tables.layouts.tagged import tagged

Build = Callable[[], tuple[list[Piece], Case]]
BUILDS: dict[str, tuple[int, Build]] = {}


def built(size: int) -> Callable[[Build], Build]:
    def enter(build: Build) -> Build:
        BUILDS[build.__name__] = (size, build)
        return build

    return enter


def pairs(pieces: list[Piece]) -> list[tuple[str, Tensor]]:
    return [(p.name, p.param) for p in pieces]


def cut(grad: Tensor, dim: int, place: int, places: int) -> nn.Parameter:
    """A plain piece of a parameter, in memory of its own."""
    return plain(grad.chunk(places, dim)[place].clone())


@built(4)
def tags() -> tuple[list[Piece], Case]:
    """Pipeline x tensor parallel by Megatron's tags: pieces along dim 0 and dim 1, copies, one of them `shared`."""
    mesh = axis("pp", "tp")
    stage, place = mesh.get_local_rank("pp"), mesh.get_local_rank("tp")
    column, row = cut(known(6, 4, seed=stage), 0, place, 2), cut(known(5, 6, seed=10 + stage), 1, place, 2)
    for param, dim in ((column, 0), (row, 1)):
        param.tensor_model_parallel, param.partition_dim = True, dim
    tied = cut(known(8, 3, seed=20), 0, place, 2)
    tied.tensor_model_parallel, tied.partition_dim = True, 0
    tied.shared = stage == 1
    norm = tagged(known(5, seed=30 + stage), tensor_model_parallel=False)
    pieces = [
        part_of("column", column, ("column", stage), 0, place, 2),
        part_of("row", row, ("row", stage), 1, place, 2),
        part_of(("embedding", "head")[stage], tied, "tied", 0, place, 2),
        whole("norm", norm, ("norm", stage)),
    ]
    return pieces, Case(pairs(pieces), [], {"pp": mesh["pp"].get_group(), "tp": mesh["tp"].get_group()})


@built(4)
def annotations() -> tuple[list[Piece], Case]:
    """annotate_ along dim 0, dim 1, both, twice along dim 0, over a convolution, and none."""
    mesh = axis("a", "b")
    flat = axis("all")
    a, b, rank = mesh.get_local_rank("a"), mesh.get_local_rank("b"), dist.get_rank()
    pieces = []

    def add(name: str, grad: Tensor, on: Any, placements: list[Any], at: Tensor) -> None:
        param = plain(grad.reshape(-1)[at.reshape(-1)].view(at.shape).clone())
        distclip.annotate_(param, on, placements)
        pieces.append(Piece(name, param, name, tuple(grad.shape), at.reshape(-1)))

    def ids(*shape: int) -> Tensor:
        return torch.arange(torch.Size(shape).numel()).view(shape)

    add("rows", known(8, 3), flat, [Shard(0)], ids(8, 3).chunk(4)[rank])
    add("columns", known(5, 8, seed=1), flat, [Shard(1)], ids(5, 8).chunk(4, 1)[rank])
    add("both", known(4, 6, seed=2), mesh, [Shard(0), Shard(1)], ids(4, 6).chunk(2)[a].chunk(2, 1)[b])
    add("swapped", known(4, 6, seed=3), mesh, [Shard(1), Shard(0)], ids(4, 6).chunk(2, 1)[a].chunk(2)[b])
    add("twice", known(8, 3, seed=4), mesh, [Shard(0), Shard(0)], ids(8, 3).chunk(2)[a].chunk(2)[b])
    add("half", known(6, 4, seed=5), mesh, [Replicate(), Shard(0)], ids(6, 4).chunk(2)[b])
    add("last", known(6, 4, seed=6), mesh, [Shard(-1), Replicate()], ids(6, 4).chunk(2, 1)[a])
    add("conv", known(8, 3, 2, 2, seed=7), mesh["a"], [Shard(0)], ids(8, 3, 2, 2).chunk(2)[a])
    add("kernel", known(4, 4, 3, 3, seed=8), mesh["b"], [Shard(1)], ids(4, 4, 3, 3).chunk(2, 1)[b])
    add("vector", known(8, seed=9), flat, [Shard(0)], ids(8).chunk(4)[rank])
    pieces.append(whole("scalar", plain(torch.tensor(2.5))))
    return pieces, Case(pairs(pieces), [])


@built(4)
def uneven_annotations() -> tuple[list[Piece], Case]:
    """Pieces of different sizes, one of them empty."""
    mesh, rank = axis("a"), dist.get_rank()
    grad, begins = known(6, 3), [0, 3, 4, 4, 6]
    mine = slice(begins[rank], begins[rank + 1])
    param = distclip.annotate_(plain(grad[mine].clone()), mesh, [Shard(0)])
    pieces = [Piece("w", param, "w", (6, 3), torch.arange(18).view(6, 3)[mine].reshape(-1))]
    return pieces, Case(pairs(pieces), [])


@built(4)
def dtensor_annotated() -> tuple[list[Piece], Case]:
    """Experts that FSDP2 shards on one axis, and an annotation cuts along another."""
    mesh = axis("ep", "dp")
    place, grad = mesh.get_local_rank("ep"), known(8, 3)
    ids = torch.arange(24).view(8, 3).chunk(2)[place]
    local = ids.chunk(2)[mesh.get_local_rank("dp")]
    param = made(grad.chunk(2)[place].clone(), mesh["dp"], [Shard(0)])
    distclip.annotate_(param, mesh["ep"], [Shard(0)])
    pieces = [Piece("w", param, "w", (8, 3), local.reshape(-1))]
    return pieces, Case(pairs(pieces), [])


@built(4)
def tied() -> tuple[list[Piece], Case]:
    """An embedding tied between the outer stages, under two names; equal local names elsewhere."""
    mesh = axis("pp")
    rank, ends = mesh.get_local_rank(), dist.new_group([0, 3])
    pieces = [whole("0.weight", plain(known(3, 4, seed=rank)), ("0.weight", rank))]
    if rank in (0, 3):
        param = distclip.annotate_(plain(known(7, 4, seed=9)), ends, [Replicate()])
        pieces.append(whole("embed.weight" if rank == 0 else "head.weight", param, "tied"))
    return pieces, Case(pairs(pieces), [], mesh)


@built(4)
def tied_fsdp2() -> tuple[list[Piece], Case]:
    """The same within stages that FSDP2 shards."""
    mesh = axis("pp", "dp")
    stage = mesh.get_local_rank("pp")
    own = made(known(3, 4, seed=stage), mesh["dp"], [Shard(0)])
    param = distclip.annotate_(made(known(7, 4, seed=9), mesh["dp"], [Shard(0)]), mesh["pp"], [Replicate()])
    pieces = [
        of_dtensor("0.weight", own, ("0.weight", stage)),
        of_dtensor(("embed", "head")[stage], param, "tied"),
    ]
    return pieces, Case(pairs(pieces), [], mesh["pp"])


@built(4)
def experts() -> tuple[list[Piece], Case]:
    """Plain experts along ep, tensor-parallel pieces along an axis called tp: different parameters, and one."""
    mesh = axis("ep", "tp")
    expert, place = mesh.get_local_rank("ep"), mesh.get_local_rank("tp")
    param = cut(known(4, 6, seed=expert), 1, place, 2)
    param.partition_dim = 1
    pieces = [part_of("w1", param, ("w1", expert), 1, place, 2)]
    return pieces, Case(pairs(pieces), [], mesh)


@built(4)
def marked_experts() -> tuple[list[Piece], Case]:
    """allreduce=False beside dense copies."""
    mesh = axis("dp", "ep")
    expert = mesh.get_local_rank("ep")
    pieces = [
        whole("w1", tagged(known(3, 4, seed=expert), allreduce=False), ("w1", expert)),
        whole("dense", tagged(known(6, 2, seed=7), allreduce=True)),
    ]
    return pieces, Case(pairs(pieces), [], mesh["ep"])


@built(4)
def odd_gradients() -> tuple[list[Piece], Case]:
    """bf16, fp16, strided, channels last, sparse, summands; 0-d, 1-D and 4-D; one that no rank has."""
    mesh = axis("dp")
    rank = mesh.get_local_rank()
    turned = plain(known(6, 4))
    turned.grad = known(4, 6, seed=1).t()
    channels = plain(known(4, 3, 2, 2, seed=2))
    channels.grad = channels.grad.contiguous(memory_format=torch.channels_last)
    embedding = nn.Embedding(10, 4, sparse=True)
    index = torch.tensor([[7, 1, 3, 1]])
    embedding.weight.grad = torch.sparse_coo_tensor(index, known(4, 4, seed=3), (10, 4), check_invariants=True)
    summand = nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Replicate()], src_data_rank=None))
    summand.grad = DTensor.from_local(known(4, 3, seed=40 + rank), mesh, [Partial()], run_check=False)
    bare = distclip.annotate_(plain(known(5, 3, seed=50 + rank)), mesh, [Partial()])
    params = {
        "bf16": made(known(9, 5, seed=4).bfloat16(), mesh, [Shard(0)]),
        "fp16": made(known(9, 5, seed=5).half(), mesh, [Shard(1)]),
        "turned": turned,
        "channels": channels,
        "embedding": embedding.weight,
        "scalar": plain(torch.tensor(-2.0)),
        "one_row": made(known(1, 5, seed=6), mesh, [Shard(0)]),
        "never": plain(None, (4, 2)),
        "summand": summand,
    }
    pieces = [*pieces_of(params.items()), whole("bare", bare, part=(rank,))]
    return pieces, Case(pairs(pieces), [], all_reduces=3, other_collectives=1, tolerance=2e-6)


def check_build(name: str) -> None:
    pieces, case = BUILDS[name][1]()
    oracle = Oracle(pieces)
    names = []
    for policy, bound in rules(oracle):
        clipper = GradClipper(case.parameters, policy, split_over=case.split_over)
        names.append((policy.per, clipper.slots))
        clipped = check_clipper(oracle, clipper, bound, f"{name}, {policy}", case)
        assert clipped, f"{name}, {policy}: the test tests nothing"
    told = everywhere(names)
    assert all(said == told[0] for said in told)


@pytest.mark.parametrize("name", BUILDS)
def test_slots(world: Callable[[int], World], name: str) -> None:
    world(BUILDS[name][0]).run(check_build, name=name)


def check_single_row(norm_type: float) -> None:
    """One slot in all, and ranks with nothing of it."""
    param = made(known(1, 5), axis("dp"), [Shard(0)])
    clipper = GradClipper([("w", param)], distclip.agc(0.1, norm_type=norm_type))
    report = clipper.clip()
    expected = torch.linalg.vector_norm(known(1, 5).double(), norm_type)
    torch.testing.assert_close(report.norms, expected.view(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_single_row(world: Callable[[int], World], norm_type: float) -> None:
    world(4).run(check_single_row, norm_type=norm_type)


def check_two_tied() -> None:
    """Two tied pairs of one shape, under four names: either told apart or refused, never four halves."""
    mesh = axis("pp")
    stage = mesh.get_local_rank()
    params = {}
    for i, name in enumerate((("a", "b"), ("c", "d"))[stage]):
        params[name] = distclip.annotate_(plain(known(4, 3, seed=i)), mesh, [Replicate()])
    try:
        clipper = GradClipper(params.items(), distclip.per_tensor_norm(1.0), split_over=mesh)
    except LayoutError:
        return
    report = clipper.clip()
    expected = sorted(float(known(4, 3, seed=i).double().norm()) for i in range(2))
    assert sorted(report.norms.tolist()) == pytest.approx(expected, rel=1e-6), clipper.slots


def test_two_tied(world: Callable[[int], World]) -> None:
    world(2).run(check_two_tied)


def check_before_backward() -> None:
    """As in a training script: the clipper is made before there is any gradient."""
    for made_by in (
        lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu"), use_orig_params=True),
        lambda m: fully_shard(m, shard_placement_fn=lambda p: Shard(p.ndim - 1)),
    ):
        model = made_by(mlp(8, 12, 4))
        clippers = [GradClipper(model, policy) for policy in (distclip.agc(0.05), distclip.per_tensor_norm(1.0))]
        backward(model, 8)
        oracle = Oracle(pieces_of(model))
        for clipper, bound in zip(clippers, (lambda n, t, s, w: 0.05 * max(w, 1e-3), lambda *_: 1.0), strict=True):
            assert check_clipper(oracle, clipper, bound, str(clipper.policy), Case(model, [], tolerance=2e-6))


def test_before_backward(world: Callable[[int], World]) -> None:
    world(4).run(check_before_backward)


def check_names() -> None:
    """What is searched in names is refused by all ranks if it is nowhere, and is fine if it is on another stage."""
    mesh = axis("pp")
    stage = mesh.get_local_rank()
    param = plain(known(3, 4, seed=stage))
    mine = [("first.weight" if stage == 0 else "last.weight", param)]
    for policy in (
        distclip.agc(exclude=["nowhere"]),
        distclip.group_norm({"x": ("nowhere", 1.0)}),
        distclip.NormPolicy(exclude=["nowhere"]),
    ):
        refused(lambda policy=policy: GradClipper(mine, policy, split_over=mesh), ArgumentError, "nowhere")
    refused(lambda: GradClipper(mine, distclip.agc(exclude=["("]), split_over=mesh), ArgumentError, "regular")
    refused(
        lambda: GradClipper(mine, distclip.per_tensor_norm(1.0 + (stage == 1)), split_over=mesh),
        DisagreementError,
        "different policies",
    )
    before = [known(3, 4, seed=s).double() for s in range(2)]
    norms = [float(g.norm()) for g in before]
    clipper = GradClipper(mine, distclip.group_norm({"out": ("last", 0.5)}, 2.0), split_over=mesh)
    report = clipper.clip()
    assert clipper.slots == ("out", "rest")
    assert report.norms.tolist() == pytest.approx([norms[1], norms[0]])
    assert float(param.grad.norm()) == pytest.approx((2.0, 0.5)[stage])
    param.grad.copy_(before[stage])
    # The paper leaves the last layer alone; it counts all the same.
    report = GradClipper(mine, distclip.agc(0.01, exclude=["last"]), split_over=mesh).clip()
    assert float(report.norm) == pytest.approx((norms[0] ** 2 + norms[1] ** 2) ** 0.5)
    assert torch.equal(param.grad.double(), before[1]) == (stage == 1)
    # Rows that start at zero are bounded by ε, not held at zero.
    assert stage == 1 or param.grad.norm(dim=1).tolist() == pytest.approx([1e-5] * 3)
    param.grad.copy_(before[stage])
    policy = distclip.NormPolicy(distclip.Fixed(1.0), exclude=["last"])
    report = GradClipper(mine, policy, split_over=mesh).clip()
    assert float(report.norm) == pytest.approx((norms[0] ** 2 + norms[1] ** 2) ** 0.5)
    assert float(param.grad.norm()) == pytest.approx(1.0 if stage == 0 else norms[1])
    flat = FullyShardedDataParallel(mlp(5, 7, 3), device_id=torch.device("cpu"))
    refused(lambda: GradClipper(flat, distclip.per_tensor_norm(1.0)), LayoutError, "use_orig_params")
    one = plain(known(3, 4))
    refused(lambda: GradClipper([("w", one)], distclip.agc(), split_over={"tp": mesh}), LayoutError, "partition_dim")


def test_names(world: Callable[[int], World]) -> None:
    world(2).run(check_names)


def check_nothing_here() -> None:
    """One rank has no parameter, another no gradient; copies and experts go on."""
    mesh = axis("pp")
    rank = mesh.get_local_rank()
    params = [] if rank == 1 else [("w", plain(known(3, 4, seed=rank) if rank != 2 else None, (3, 4)))]
    clipper = GradClipper(params, distclip.per_tensor_norm(1.0), split_over=mesh)
    report = clipper.clip()
    expected = [float(known(3, 4, seed=r).double().norm()) if r in (0, 3) else 0.0 for r in (0, 2, 3)]
    assert len(clipper.slots) == len(set(clipper.slots)) == 3
    assert report.norms.tolist() == pytest.approx(expected)
    assert report.coefs[1] == 1
    if rank in (0, 3):
        assert float(params[0][1].grad.norm()) == pytest.approx(1.0)


def test_nothing_here(world: Callable[[int], World]) -> None:
    world(4).run(check_nothing_here)


def test_a_copy_in_other_slices_is_found_by_the_shape_of_the_whole() -> None:
    told = []
    for name, numel, shape, counted in (
        ("embed", 12, (4, 5), True),
        ("other", 8, (2, 4), True),
        ("head", 8, (4, 5), False),
    ):
        layout = Layout(groups=((0, 1),), pieces=2, counted=counted)
        param = set_layout(torch.zeros(numel), layout, (shape, 0))
        told.append(find(parameter_plan([(name, param)], ()), 2, 0, False, {}))
    slots = arrange(told, 2, "tensor", {}, ())
    assert slots.names == ("embed", "other") and slots.places["head"] == (0, None)
