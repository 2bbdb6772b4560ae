"""A NaN or an Inf on one rank only, in every layout: all ranks do the same about it, and say whose it was."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import GradClipper, NonFiniteError, NonFiniteWarning, Report, TooManySkippedSteps, reference
from tests.layouts.data_parallel import mlp
from tests.layouts.model_parallel import PLAN, Block, axis, known, made
from tests.layouts.pipeline import plain
from tests.layouts.tagged import tagged
from tests.ranks import World

NAN, INF = float("nan"), float("inf")


@dataclass
class Rig:
    """Parameters in one layout, whose gradients every rank can make up by itself.

    Args:
        named: of this rank.
        target: the parameter that gets bad elements.
        split_over: what is passed.
        place: along the axes where parameters differ; -1 where they do not.
        alike: gradients are the same on all ranks, so are bad elements.
    """

    named: list[tuple[str, nn.Parameter]]
    target: str
    split_over: Any = None
    place: int = -1
    alike: bool = False

    def key(self, name: str, param: Tensor) -> str:
        own = self.place >= 0 and (not isinstance(param, DTensor) or self.target.startswith("stage"))
        own = own and "copy" not in name
        return f"{name}@{self.place}" if own else name

    def lay(self, param: Tensor, whole: Tensor) -> Tensor:
        """This rank's part."""
        whole = whole.to(param.dtype)
        if isinstance(param, DTensor):
            return distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None)
        return whole.clone()

    def fill(self, step: int, factor: float = 1.0) -> None:
        """The gradients of a step."""
        for name, param in self.named:
            param.grad = self.lay(param, made_up(self.key(name, param), param.shape, step) * factor)

    def poison(self, rank: int, *values: float) -> str:
        """Bad elements in the target's gradient on one rank; what is to be said of them."""
        here = self.alike or dist.get_rank() == rank
        if here:
            local(dict(self.named)[self.target].grad).view(-1)[: len(values)] = torch.tensor(values)
        nans = sum(value != value for value in values)
        counts = [f"{n} {kind}" for n, kind in ((nans, "NaN"), (len(values) - nans, "Inf")) if n]
        # Copies that nobody adds up are judged by each rank alone.
        return f"{self.target} ({' and '.join(counts)}{'' if self.alike else f' on rank {rank}'})"

    def gathered(self, of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
        """By key, everything of the model once, in float64."""
        mine = {}
        for name, param in self.named:
            tensor = of(param)
            if tensor is not None:
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                mine[self.key(name, param)] = whole.detach().double()
        return {key: value for rank in everywhere(mine) for key, value in rank.items()}

    def grads(self) -> list[Tensor]:
        return [local(param.grad) for _, param in self.named if param.grad is not None]

    def clipper(self, policy: Any, **options: Any) -> GradClipper:
        return GradClipper(self.named, policy, split_over=self.split_over, **options)

    def optimizer(self, kind: str, **options: Any) -> torch.optim.Optimizer:
        """torch's multi-tensor steps take DTensors and plain tensors in groups of their own only."""
        sharded = [p for _, p in self.named if isinstance(p, DTensor)]
        copied = [p for _, p in self.named if not isinstance(p, DTensor)]
        groups = [{"params": params} for params in (sharded, copied) if params]
        return KINDS[kind](groups, **options)


def made_up(key: str, shape: tuple[int, ...], step: int) -> Tensor:
    """A whole gradient, in float64, that every rank knows."""
    return known(*shape, seed=zlib.crc32(f"{key}/{step}".encode())).double()


KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=True),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
}


def ddp() -> Rig:
    model = DistributedDataParallel(mlp(8, 6, 4))
    return Rig([(n.removeprefix("module."), p) for n, p in model.named_parameters()], "2.weight", alike=True)


def fsdp2() -> Rig:
    model = mlp(8, 6, 4)
    fully_shard(model)
    return Rig(list(model.named_parameters()), "2.weight")


def tp() -> Rig:
    """A plain replicated parameter comes first."""
    return Rig(list(parallelize_module(Block(), axis("tp"), PLAN).named_parameters()), "down.weight")


def megatron() -> Rig:
    weight = tagged(known(3, 4), tensor_model_parallel=True, partition_dim=0)
    named = [("copy", plain(known(5))), ("weight", weight)]
    return Rig(named, "weight", dist.group.WORLD, dist.get_rank())


def stages() -> Rig:
    mesh, rows = axis("pp"), 3 + dist.get_rank()
    return Rig([("bias", plain(known(rows))), ("weight", plain(known(rows, 4)))], "weight", mesh, dist.get_rank())


def experts() -> Rig:
    mesh = axis("ep")
    return Rig([("dense", made(known(8, 3), mesh, [Shard(0)])), ("expert", plain(known(3, 4)))], "expert", mesh, 0)


def stages_fsdp2() -> Rig:
    mesh = axis("pp", "dp")
    stage = nn.Module()
    stage.stage = mlp(8, 6 + 2 * mesh.get_local_rank("pp"), 8)
    fully_shard(stage, mesh=mesh["dp"])
    return Rig(list(stage.named_parameters()), "stage.2.weight", mesh["pp"], mesh.get_local_rank("pp"))


def build(name: str) -> Rig:
    rig = RIGS[name]()
    rig.place = dist.get_rank() if name == "experts" else rig.place
    return rig


RIGS = {f.__name__: f for f in (ddp, fsdp2, tp, megatron, stages, experts, stages_fsdp2)}
CASES = [(name, size) for name in RIGS for size in (2, 4) if size == 4 or name != "stages_fsdp2"]
everywhere_ = pytest.mark.parametrize(("name", "size"), CASES)


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def everywhere(mine: Any) -> list[Any]:
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return told


def bits(tensors: Any) -> list[bytes]:
    return [local(t).detach().contiguous().numpy().tobytes() for t in tensors]


def frozen(rig: Rig, *optimizers: torch.optim.Optimizer) -> list[bytes]:
    """Parameters, optimizer state and step counters, bit by bit."""
    states = [optimizer.state.get(p, {}) for optimizer in optimizers for _, p in rig.named]
    return bits([p for _, p in rig.named] + [value for state in states for value in state.values()])


def memory(clipper: GradClipper) -> list[bytes]:
    return bits(value for state in clipper.state_dict()["state"].values() for value in state.values())


def quietly(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What the call returns, and its NonFiniteWarnings; the same on every rank."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = call()
    assert all(warning.category is NonFiniteWarning for warning in caught), [str(w.message) for w in caught]
    said = [str(warning.message) for warning in caught]
    assert everywhere(said) == [said] * dist.get_world_size()
    return answer, said


def alike(clipper: GradClipper, *numbers: Any) -> None:
    """What the ranks of one clipper know is the same."""
    told = everywhere((clipper.incidents, clipper.skipped, *numbers))
    assert told == [told[0]] * len(told)


POLICIES = {
    "zclip": lambda: distclip.zclip(warmup=2),
    "adagc": lambda: distclip.adagc(warmup=2),
    "median_mad": lambda: distclip.median_mad(window=4),
    "global_norm": lambda: distclip.global_norm(1.0),
}


def check_skip(name: str, kind: str, policy: str, how: str, values: tuple[float, ...]) -> None:
    """Beside a twin that never sees the bad step."""
    rig, twin = build(name), build(name)
    clippers = [one.clipper(POLICIES[policy]()) for one in (rig, twin)]
    optimizers = [one.optimizer(kind) for one in (rig, twin)]
    clipper, optimizer = clippers[0], optimizers[0]
    if how == "attach":
        clipper.attach(optimizer)

    def step() -> Report | None:
        if how == "step":
            return clipper.step(optimizer)
        report = clipper.clip() if how == "clip" else None
        optimizer.step()
        return report

    def healthy(number: int) -> None:
        for one in (rig, twin):
            one.fill(number)
        step()
        clippers[1].step(optimizers[1])

    for number in range(3):
        healthy(number)
    before, remembered = frozen(rig, optimizer), memory(clipper)
    rig.fill(3)
    whose = rig.poison(dist.get_world_size() - 1, *values)
    report, said = quietly(step)
    assert said == [f"step 4 was skipped (1 in all): elements are not finite in {whose}."]
    assert frozen(rig, optimizer) == before
    assert memory(clipper) == remembered
    assert report is None or (bool(report.skipped), bool(report.finite), bool(report.clipped)) == (True, False, False)
    assert (not rig.grads()) == (how != "step")
    assert [(i.step, i.action) for i in clipper.incidents] == [(4, "skip")] and clipper.skipped == 1
    assert str(clipper.incidents[0].culprits[0]) == whose
    alike(clipper)
    for number in range(4, 6):
        healthy(number)
    assert frozen(rig, optimizer) == frozen(twin, optimizers[1]) != before
    assert memory(clipper) == memory(clippers[1])


WAYS: list[dict[str, Any]] = [
    {"kind": "sgd", "policy": "zclip", "how": "step", "values": (NAN,)},
    {"kind": "adamw", "policy": "adagc", "how": "step", "values": (INF, NAN)},
    {"kind": "fused", "policy": "median_mad", "how": "step", "values": (-INF,)},
    {"kind": "sgd", "policy": "adagc", "how": "clip", "values": (NAN, NAN)},
    {"kind": "fused", "policy": "zclip", "how": "attach", "values": (INF,)},
]


@everywhere_
def test_skip(world: Callable[[int], World], name: str, size: int) -> None:
    for way in WAYS[:: 1 if size == 4 else 2]:
        world(size).run(check_skip, name=name, **way)


def check_raise(name: str) -> None:
    rig = build(name)
    clipper, optimizer = rig.clipper(distclip.zclip(), on_nonfinite="raise"), rig.optimizer("sgd")
    for call in (clipper.clip, lambda: clipper.step(optimizer)):
        rig.fill(0)
        whose = rig.poison(0, NAN, INF, -INF)
        before, frozen_before, remembered = bits(rig.grads()), frozen(rig, optimizer), memory(clipper)
        text = ""
        try:
            call()
        except NonFiniteError as error:
            text = str(error)
        assert f"elements are not finite in {whose}. No gradient was changed." in text, text
        assert len(set(everywhere(text))) == 1
        assert (bits(rig.grads()), frozen(rig, optimizer), memory(clipper)) == (before, frozen_before, remembered)
        alike(clipper)
    rig.fill(1)
    assert not clipper.step(optimizer).skipped
    if not rig.alike:
        last = dist.get_world_size() - 1
        for rank in (0, last):
            rig.poison(rank, NAN)
        try:
            clipper.clip()
        except NonFiniteError as error:
            assert f"{rig.target} (2 NaN on ranks 0, {last})" in str(error), error
        else:
            raise AssertionError("two bad shards were let through")


def check_overflow(name: str, on_nonfinite: str) -> None:
    """Finite elements, and a norm beyond float64."""
    rig = build(name)
    for _, param in rig.named:
        param.data = param.data.double()
    clipper = rig.clipper(distclip.global_norm(), on_nonfinite=on_nonfinite)
    rig.fill(0, 1e200)
    before = bits(rig.grads())
    if on_nonfinite == "raise":
        try:
            clipper.clip()
        except NonFiniteError as error:
            assert "the norm overflowed: every element is finite" in str(error), error
        else:
            raise AssertionError("an infinite norm was let through")
    else:
        _, said = quietly(lambda: clipper.step(rig.optimizer("sgd")))
        assert "the norm overflowed: every element is finite" in said[0]
    assert bits(rig.grads()) == before
    assert clipper.incidents[0].culprits == ()
    alike(clipper)


@everywhere_
def test_raise(world: Callable[[int], World], name: str, size: int) -> None:
    world(size).run(check_raise, name=name)
    for on_nonfinite in ("raise", "skip", "zero"):
        world(size).run(check_overflow, name=name, on_nonfinite=on_nonfinite)


def check_zero(name: str) -> None:
    rig = build(name)
    clipper = rig.clipper(distclip.global_norm(1.0), on_nonfinite="zero")
    rig.fill(0)
    whose = rig.poison(0, NAN, INF, -INF)
    expected = {key: g.nan_to_num(0, 0, 0) for key, g in rig.gathered(lambda p: p.grad).items()}
    report, said = quietly(clipper.clip)
    assert said == [f"step 1: elements are not finite in {whose}; they were set to zero."]
    norm = reference.total_norm(expected.values())
    torch.testing.assert_close(report.norm.double(), norm, rtol=1e-6, atol=0)
    assert not report.skipped and report.finite and report.clipped and clipper.skipped == 0
    for key, grad in rig.gathered(lambda p: p.grad).items():
        torch.testing.assert_close(grad, expected[key] * reference.clip_coefficient(norm, 1.0), rtol=2e-6, atol=1e-12)
    assert [(i.step, i.action) for i in clipper.incidents] == [(1, "zero")]
    alike(clipper, float(report.coef))


def check_propagate(name: str, value: float) -> None:
    """Whatever torch makes of the whole gradient."""
    rig = build(name)
    clipper = rig.clipper(distclip.global_norm(1.0), on_nonfinite="propagate")
    rig.fill(0)
    rig.poison(0, value)
    wholes = [nn.Parameter(torch.zeros_like(g)) for g in rig.gathered(lambda p: p.grad).values()]
    for param, grad in zip(wholes, rig.gathered(lambda p: p.grad).values(), strict=True):
        param.grad = grad
    norm = torch.nn.utils.clip_grad_norm_(wholes, 1.0)
    report, said = quietly(clipper.clip)
    assert said == [] and not report.skipped and not report.finite and clipper.skipped == 0
    torch.testing.assert_close(report.norm.double(), norm, equal_nan=True)
    for got, param in zip(rig.gathered(lambda p: p.grad).values(), wholes, strict=True):
        torch.testing.assert_close(got, param.grad, equal_nan=True)


@everywhere_
def test_zero_and_propagate(world: Callable[[int], World], name: str, size: int) -> None:
    world(size).run(check_zero, name=name)
    for value in (NAN, INF):
        world(size).run(check_propagate, name=name, value=value)


def check_max_skips(name: str) -> None:
    rig = build(name)
    clipper, optimizer = rig.clipper(distclip.global_norm(), max_skips=3), rig.optimizer("adamw")
    raised: list[int] = []
    for number, bad in enumerate((True, True, False, True, True, True)):
        rig.fill(number)
        if bad:
            rig.poison(number % dist.get_world_size(), NAN)
        try:
            quietly(lambda: clipper.step(optimizer))
        except TooManySkippedSteps as error:
            assert "step 6: 3 steps in a row were skipped (max_skips=3)" in str(error), error
            raised.append(number)
    assert raised == [5]
    alike(clipper)


def check_random(name: str, kind: str) -> None:
    """Ten steps with bad elements anywhere: one all-reduce in each that is healthy, one outcome everywhere."""
    rig = build(name)
    clipper, optimizer = rig.clipper(distclip.median_mad(window=4, cap=2.0)), rig.optimizer(kind)
    dice = torch.Generator().manual_seed(7)
    trace = []
    for number in range(10):
        rig.fill(number)
        bad = bool(torch.rand((), generator=dice) < 0.4)
        rank = int(torch.randint(dist.get_world_size(), (), generator=dice))
        if bad:
            rig.poison(rank, NAN)
        with CommDebugMode() as counter:
            report, said = quietly_alone(lambda: clipper.step(optimizer))
        assert bool(report.skipped) == bad == bool(said)
        # The first call with an optimizer asks the other ranks about theirs.
        assert bad or not number or counter.get_total_counts() == (name != "ddp"), counter.get_comm_counts()
        trace.append(report.as_dict()["coef"])
    assert 0 < clipper.skipped < 10
    copies = {name: bits([p])[0] for name, p in rig.named if rig.key(name, p) == name and not isinstance(p, DTensor)}
    alike(clipper, trace, copies)


def quietly_alone(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Without asking the other ranks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return call(), [str(warning.message) for warning in caught]


@everywhere_
def test_runs(world: Callable[[int], World], name: str, size: int) -> None:
    world(size).run(check_max_skips, name=name)
    for kind in KINDS:
        world(size).run(check_random, name=name, kind=kind)
