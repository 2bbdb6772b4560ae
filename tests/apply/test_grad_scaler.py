"""Under a GradScaler: what one rank's scaler cannot see, all ranks act on, and their scales stay the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import distclip
from distclip import ArgumentError, DisagreementError, GradClipper, reference
from tests.ranks import World
from tests.rig import CASES, INF, KINDS, Rig, alike, bits, build, everywhere_, frozen, local, made_up
from tests.tables.layouts.data_parallel import mlp
from tests.tables.layouts.pipeline import plain

SCALE = 2.0**10


def scaler_of(**options: Any) -> torch.amp.GradScaler:
    """One that has scaled a loss."""
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, **options)
    scaler.scale(torch.ones(()))
    return scaler


class Whole:
    """The model on one process in float64: what training without a scaler makes of it.

    Args:
        rig: whose parameters it starts from.
        kinds: of optimizers, as in the rig's, each with its share of the keys.
    """

    def __init__(self, rig: Rig, kinds: Sequence[str]) -> None:
        self.params = {key: nn.Parameter(value) for key, value in rig.gathered(lambda p: p).items()}
        own = [[self.params[key] for key in sorted(self.params)[i :: len(kinds)]] for i in range(len(kinds))]
        self.optimizers = [KINDS["adamw" if kind == "fused" else kind](p) for kind, p in zip(kinds, own, strict=True)]

    def step(self, number: int, max_norm: float) -> Tensor:
        """The norm before clipping."""
        grads = {key: made_up(key, param.shape, number) for key, param in self.params.items()}
        norm = reference.total_norm(grads.values())
        for key, grad in grads.items():
            self.params[key].grad = grad * reference.clip_coefficient(norm, max_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        return norm

    def matches(self, rig: Rig) -> None:
        for name, param in rig.named:
            expected = local(rig.lay(param, self.params[rig.key(name, param)].detach()))
            torch.testing.assert_close(local(param.data), expected, rtol=1e-6, atol=1e-6)


def shared_out(rig: Rig, kinds: Sequence[str]) -> list[Optimizer]:
    """Optimizers of these kinds, with the same share of the keys as in `Whole`."""
    keys = sorted(rig.gathered(lambda p: p))
    optimizers = []
    for i, kind in enumerate(kinds):
        own = [p for name, p in rig.named if rig.key(name, p) in keys[i :: len(kinds)]]
        groups = [[p for p in own if isinstance(p, DTensor)], [p for p in own if not isinstance(p, DTensor)]]
        # A rank may have nothing for one of them.
        groups = [{"params": group} for group in groups if group] or [{"params": []}]
        optimizers.append(KINDS[kind](groups))
    return optimizers


def check_training(name: str, kinds: tuple[str, ...], together: bool) -> None:
    """A trace with overflows and growth: as in one process, all step or all skip, one scale."""
    rig = build(name)
    whole, optimizers = Whole(rig, kinds), shared_out(rig, kinds)
    clipper, scaler = rig.clipper(distclip.global_norm(2.0)), scaler_of(growth_interval=3)
    expected, healthy = SCALE, 0
    for number in range(9):
        bad = number in (1, 6, 7)
        rig.fill(number, scaler.get_scale())
        if bad:
            rig.poison(number % dist.get_world_size(), INF)
        else:
            norm = whole.step(number, 2.0)
        before, writes = frozen(rig, *optimizers), [g._version for g in rig.grads()]
        seen: list[list[int]] = []

        def look(*_: Any, seen: list[list[int]] = seen) -> None:
            seen.append([g._version for g in rig.grads()])

        hooks = [optimizer.register_step_pre_hook(look) for optimizer in optimizers]
        reports = [clipper.step(part, scaler) for part in ([optimizers] if together else optimizers)]
        for hook in hooks:
            hook.remove()
        if not bad:
            assert (seen[0] == writes) == (kinds[0] == "fused" and (not together or set(kinds) == {"fused"}))
            assert all(now - old <= 1 for now, old in zip(seen[0], writes, strict=True)), "more than one pass"
            assert all(abs(float(report.norm) / float(norm) - 1) < 1e-6 for report in reports)
        else:
            assert frozen(rig, *optimizers) == before
        assert [bool(report.skipped) for report in reports] == [bad] * len(reports)
        scaler.update()
        healthy = 0 if bad else healthy + 1
        expected *= 0.5 if bad else 2.0 if healthy == 3 else 1.0
        healthy %= 3
        assert scaler.get_scale() == expected
        whole.matches(rig)
    assert clipper.skipped == 3 and [i.step for i in clipper.incidents] == [2, 7, 8]
    alike(clipper, scaler.get_scale())


MIXES = [
    (("adamw",), True),
    (("fused",), True),
    (("fused", "sgd"), True),
    (("fused", "sgd"), False),
    (("adamw", "fused"), False),
    (("fused", "fused"), False),
]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_training(world: Callable[[int], World], name: str, size: int) -> None:
    for kinds, together in MIXES if size == 4 else MIXES[3:4]:
        world(size).run(check_training, name=name, kinds=kinds, together=together)


def check_unscaled(name: str, which: tuple[bool, ...], together: bool) -> None:
    """What the caller has unscaled is not unscaled again; `which` of the optimizers were."""
    kinds = ("adamw", "sgd")[: len(which)]
    rig = build(name)
    whole, optimizers = Whole(rig, kinds), shared_out(rig, kinds)
    clipper, scaler = rig.clipper(distclip.global_norm(2.0)), scaler_of()
    for number in range(3):
        rig.fill(number, scaler.get_scale())
        whole.step(number, 2.0)
        for unscaled, optimizer in zip(which, optimizers, strict=True):
            if unscaled:
                scaler.unscale_(optimizer)
        for part in [optimizers] if together else optimizers:
            clipper.step(part, scaler)
        scaler.update()
        whole.matches(rig)


@pytest.mark.parametrize(
    ("which", "together"),
    [((True,), True), ((True, True), True), ((True, False), True), ((False, True), True), ((True, True), False)],
)
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "stages", "stages_fsdp2"])
def test_unscaled(world: Callable[[int], World], name: str, which: tuple[bool, ...], together: bool) -> None:
    world(4).run(check_unscaled, name=name, which=which, together=together)


def check_unscaled_apart(which: tuple[bool, bool]) -> None:
    """In a call each, where only one was unscaled, there is no norm of both: the first call says so."""
    rig = build("stages")
    optimizers, clipper, scaler = shared_out(rig, ("sgd", "adamw")), rig.clipper(distclip.global_norm(1.0)), scaler_of()
    rig.fill(0, scaler.get_scale())
    for unscaled, optimizer in zip(which, optimizers, strict=True):
        if unscaled:
            scaler.unscale_(optimizer)
    before = bits(rig.grads())
    refused(lambda: clipper.step(optimizers[0], scaler), "some of the clipper's gradients have been unscaled")
    assert bits(rig.grads()) == before


@pytest.mark.parametrize("which", [(True, False), (False, True)])
def test_unscaled_apart(world: Callable[[int], World], which: tuple[bool, bool]) -> None:
    world(2).run(check_unscaled_apart, which=which)


def refused(call: Callable[[], Any], *words: str, kind: type[Exception] = ArgumentError) -> None:
    """On every rank, and the world goes on."""
    try:
        call()
    except Exception as error:
        assert isinstance(error, kind), f"{type(error).__name__}: {error}"
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"not refused on rank {dist.get_rank()}")
    dist.barrier()


def check_refused(name: str, everyone: bool) -> None:
    """What one rank does wrong, or all, all refuse; nothing moves."""
    rig = build(name)
    here = everyone or dist.get_rank() == 1
    clipper, optimizer = rig.clipper(distclip.global_norm(1.0)), rig.optimizer("sgd")
    scaler, unscaled = scaler_of(), torch.amp.GradScaler("cpu", init_scale=SCALE)
    stranger = torch.optim.SGD([plain(torch.ones(2))], lr=1.0)
    rig.fill(0, SCALE)
    before, grads = frozen(rig, optimizer), bits(rig.grads())
    if everyone:
        refused(lambda: clipper.step(optimizer, unscaled), "has not scaled a loss")
    refused(lambda: clipper.step(optimizer, 3 if here else scaler), "scaler=3")
    refused(lambda: clipper.step("adam" if here else optimizer, scaler), "optimizer='adam'")
    # Made apart, so that what this clipper has met stays the same on all ranks.
    other = rig.clipper(distclip.global_norm(1.0))
    refused(lambda: other.step([optimizer, stranger] if here else optimizer, scaler), "not the clipper's")
    _, param = rig.named[-1]
    if here:
        param.data, param.grad = param.data.half(), None
        param.grad = rig.lay(param, torch.ones(param.shape))
    refused(lambda: clipper.step(optimizer, scaler), "FP16 gradients")
    if here:
        param.data, param.grad = param.data.float(), None
    rig.fill(0, SCALE)
    assert (frozen(rig, optimizer), bits(rig.grads())) == (before, grads)
    clipper.step(optimizer, scaler)
    refused(lambda: clipper.step(optimizer, scaler), "scaler.update()")
    scaler.update()
    rig.fill(1, SCALE)
    clipper.step(optimizer, scaler)


@pytest.mark.parametrize("everyone", [True, False])
@pytest.mark.parametrize("name", ["megatron", "stages", "experts"])
def test_refused(world: Callable[[int], World], name: str, everyone: bool) -> None:
    world(2).run(check_refused, name=name, everyone=everyone)


def check_no_loss(init_scale: float) -> None:
    """Only the last stage sees a loss; the scalers of the others have to start where its own does."""
    rig = build("stages")
    clipper, optimizer = rig.clipper(distclip.global_norm(1.0)), rig.optimizer("sgd")
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale) if dist.get_rank() == 0 else scaler_of()
    rig.fill(0, SCALE)
    if init_scale != SCALE:
        refused(lambda: clipper.step(optimizer, scaler), "scale", kind=DisagreementError)
        return
    norm = reference.total_norm(rig.gathered(lambda p: p.grad).values()) / SCALE
    report = clipper.step(optimizer, scaler)
    torch.testing.assert_close(report.norm.double(), norm, rtol=1e-6, atol=0)
    scaler.update()
    alike(clipper, scaler.get_scale())


@pytest.mark.parametrize("init_scale", [SCALE, 2.0 * SCALE])
def test_no_loss(world: Callable[[int], World], init_scale: float) -> None:
    world(2).run(check_no_loss, init_scale=init_scale)


def check_second_call() -> None:
    """What the first of two calls would refuse, the second has to as well."""
    rig = build("stages")
    clipper, scaler, stranger = rig.clipper(distclip.global_norm(1.0)), scaler_of(), plain(torch.ones(2))
    optimizers = [rig.optimizer("sgd"), torch.optim.SGD([stranger], lr=1.0)]
    rig.fill(0, SCALE)
    stranger.grad = torch.full((2,), SCALE)
    clipper.step(optimizers[0], scaler)
    refused(lambda: clipper.step(optimizers[1], scaler), "not the clipper's")


def test_second_call(world: Callable[[int], World]) -> None:
    world(2).run(check_second_call)


def check_unscaled_between() -> None:
    """Multiplied in the first call already: the caller's unscale_ before the second is one too many."""
    rig = build("stages")
    optimizers, clipper, scaler = shared_out(rig, ("sgd", "adamw")), rig.clipper(distclip.global_norm(1.0)), scaler_of()
    rig.fill(0, SCALE)
    clipper.step(optimizers[0], scaler)
    scaler.unscale_(optimizers[1])
    refused(lambda: clipper.step(optimizers[1], scaler), "unscale_")


def test_unscaled_between(world: Callable[[int], World]) -> None:
    world(2).run(check_unscaled_between)


def check_value(name: str) -> None:
    """Bounds of elements mean unscaled ones."""
    rig = build(name)
    clipper, scaler, optimizer = rig.clipper(distclip.value(0.5)), scaler_of(), rig.optimizer("sgd")
    whole = {key: p.clone() for key, p in rig.gathered(lambda p: p).items()}
    rig.fill(0, SCALE)
    moved = {key: whole[key] - 0.01 * (g / SCALE).clamp(-0.5, 0.5) for key, g in rig.gathered(lambda p: p.grad).items()}
    clipper.step(optimizer, scaler)
    scaler.update()
    for key, param in rig.gathered(lambda p: p).items():
        torch.testing.assert_close(param, moved[key], rtol=1e-6, atol=1e-6)
    rig.fill(1, SCALE)
    rig.poison(1, INF)
    assert clipper.step(optimizer, scaler).skipped
    scaler.update()
    alike(clipper, scaler.get_scale())
    assert scaler.get_scale() == SCALE / 2


@everywhere_
def test_value(world: Callable[[int], World], name: str, size: int) -> None:
    world(size).run(check_value, name=name)


def check_policies(name: str) -> None:
    """Whatever the policy and whatever it does about NaN: as a twin without a scaler that skips."""
    policies = [distclip.adagc(warmup=2), distclip.agc(0.1), distclip.per_tensor_norm(0.5), distclip.zclip(warmup=2)]
    for policy, action in zip(policies, ("skip", "raise", "zero", "propagate"), strict=True):
        rig, twin = build(name), build(name)
        optimizers = [rig.optimizer("fused"), twin.optimizer("adamw")]
        clippers, scaler = [rig.clipper(policy, on_nonfinite=action), twin.clipper(policy)], scaler_of()
        for number in range(4):
            rig.fill(number, scaler.get_scale())
            twin.fill(number)
            if number == 2:
                rig.poison(1, INF)
            else:
                clippers[1].step(optimizers[1])
            assert bool(clippers[0].step(optimizers[0], scaler).skipped) == (number == 2)
            scaler.update()
        assert scaler.get_scale() == SCALE / 2 and clippers[0].skipped == 1
        for (_, one), (_, two) in zip(rig.named, twin.named, strict=True):
            torch.testing.assert_close(local(one.data), local(two.data), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["fsdp2", "tp", "stages", "experts"])
def test_policies(world: Callable[[int], World], name: str) -> None:
    world(2).run(check_policies, name=name)


def check_disabled() -> None:
    rig = build("stages")
    clipper, optimizer = rig.clipper(distclip.global_norm(1.0)), rig.optimizer("fused")
    rig.fill(0)
    coef = clipper.step(optimizer, torch.amp.GradScaler("cpu", enabled=False)).coef
    assert 0 < coef < 1
    # Nothing of a round is kept: the next one is clipped anew.
    rig.fill(1)
    assert clipper.step(optimizer, torch.amp.GradScaler("cpu", enabled=False)).coef != coef


def check_fsdp1() -> None:
    model = FullyShardedDataParallel(mlp(8, 6, 4), device_id=torch.device("cpu"), use_orig_params=True)
    scaler = ShardedGradScaler("cpu", init_scale=SCALE, growth_interval=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    clipper, scale, norms = GradClipper(model, distclip.global_norm(1.0)), SCALE, []
    for number in range(4):
        torch.manual_seed(dist.get_rank())
        scaler.scale(model(torch.randn(6, 8)).square().sum() * 30).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None and p.grad.numel()]
        if number == 1 and dist.get_rank() == 1:
            grads[0].view(-1)[0] = INF
        before = bits(model.parameters())
        report = clipper.step(optimizer, scaler)
        assert bool(report.skipped) == (number == 1) == (bits(model.parameters()) == before)
        scaler.update()
        scale *= 0.5 if number == 1 else 1.0
        assert scaler.get_scale() == scale
        norms.append(float(report.norm))
        optimizer.zero_grad()
    assert 0 < norms[3] < norms[0] < SCALE, "the norm is free of the scale"
    alike(clipper, norms[0])


def test_other_scalers(world: Callable[[int], World]) -> None:
    world(2).run(check_disabled)
    world(2).run(check_fsdp1)
