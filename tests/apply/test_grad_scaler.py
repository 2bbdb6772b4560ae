"""Train with a GradScaler: an overflow on one rank is seen by all, and their scales stay the same."""

from __future__ import annotations

from collections.abc import Sequence
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
from tests.ranks import on_ranks
from tests.rig import (
    INF,
    LOSS_SCALE,
    RIG_CASES,
    Rig,
    assert_raises_on_ranks,
    assert_same_on_ranks,
    build_rig,
    each_rig,
    local_tensor,
    make_scaler,
    to_bytes,
    training_state,
    whole_gradient,
)
from tests.tables.layouts.data_parallel import mlp
from tests.tables.layouts.tensors import plain_param
from tests.tables.optimizers import OPTIMIZERS
from tests.tables.policies import POLICIES


class WholeModel:
    """The model of a rig on one process in float64, trained without a scaler.

    Args:
        rig: has the initial parameters.
        kinds: names in `OPTIMIZERS`, each for a share of the keys.
    """

    def __init__(self, rig: Rig, kinds: Sequence[str]) -> None:
        self.params = {key: nn.Parameter(value) for key, value in rig.gather_whole(lambda p: p).items()}
        shares = [[self.params[key] for key in sorted(self.params)[i :: len(kinds)]] for i in range(len(kinds))]
        # In one process the fused kernel would be the one under test.
        kinds = ["adamw" if kind == "fused" else kind for kind in kinds]
        self.optimizers = [OPTIMIZERS[kind](share) for kind, share in zip(kinds, shares, strict=True)]

    def step(self, number: int, max_norm: float) -> Tensor:
        """Clip and step, and return the norm before clipping."""
        grads = {key: whole_gradient(key, param.shape, number) for key, param in self.params.items()}
        norm = reference.total_norm(grads.values())
        for key, grad in grads.items():
            self.params[key].grad = grad * reference.clip_coefficient(norm, max_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        return norm

    def assert_same(self, rig: Rig) -> None:
        """Assert that the rig has the same parameters."""
        for name, param in rig.named:
            expected = local_tensor(rig.distribute(param, self.params[rig.key(name, param)].detach()))
            torch.testing.assert_close(local_tensor(param.data), expected, rtol=1e-6, atol=1e-6)


def split_optimizers(rig: Rig, kinds: Sequence[str]) -> list[Optimizer]:
    """Make optimizers of these kinds, each for the same share of the keys as in `WholeModel`."""
    keys = sorted(rig.gather_whole(lambda p: p))
    optimizers = []
    for i, kind in enumerate(kinds):
        share = [p for name, p in rig.named if rig.key(name, p) in keys[i :: len(kinds)]]
        groups = [[p for p in share if isinstance(p, DTensor)], [p for p in share if not isinstance(p, DTensor)]]
        # A rank may have no parameter for one of the optimizers.
        groups = [{"params": group} for group in groups if group] or [{"params": []}]
        optimizers.append(OPTIMIZERS[kind](groups))
    return optimizers


def check_training(name: str, kinds: tuple[str, ...], together: bool) -> None:
    """Train through overflows and growth of the scale: all ranks step or all skip, as one process does."""
    rig = build_rig(name)
    whole, optimizers = WholeModel(rig, kinds), split_optimizers(rig, kinds)
    clipper, scaler = rig.clipper(distclip.global_norm(2.0)), make_scaler(growth_interval=3)
    expected, num_healthy = LOSS_SCALE, 0
    for number in range(9):
        bad = number in (1, 6, 7)
        rig.fill(number, scaler.get_scale())
        if bad:
            rig.poison(number % dist.get_world_size(), INF)
        else:
            norm = whole.step(number, 2.0)
        before, writes = training_state(rig, *optimizers), [g._version for g in rig.grads()]
        versions: list[list[int]] = []

        def record(*_: Any, versions: list[list[int]] = versions) -> None:
            versions.append([g._version for g in rig.grads()])

        hooks = [optimizer.register_step_pre_hook(record) for optimizer in optimizers]
        reports = [clipper.step(part, scaler) for part in ([optimizers] if together else optimizers)]
        for hook in hooks:
            hook.remove()
        if not bad:
            scales_in_kernel = kinds[0] == "fused" and (not together or set(kinds) == {"fused"})
            assert (versions[0] == writes) == scales_in_kernel
            assert all(now - old <= 1 for now, old in zip(versions[0], writes, strict=True)), "more than one pass"
            assert all(abs(float(report.norm) / float(norm) - 1) < 1e-6 for report in reports)
        else:
            assert training_state(rig, *optimizers) == before
        assert [bool(report.skipped) for report in reports] == [bad] * len(reports)
        scaler.update()
        num_healthy = 0 if bad else num_healthy + 1
        expected *= 0.5 if bad else 2.0 if num_healthy == 3 else 1.0
        num_healthy %= 3
        assert scaler.get_scale() == expected
        whole.assert_same(rig)
    assert clipper.skipped == 3
    assert [i.step for i in clipper.incidents] == [2, 7, 8]
    assert_same_on_ranks(clipper, scaler.get_scale())


MIXES: list[tuple[tuple[str, ...], bool]] = [
    (("adamw",), True),
    (("fused",), True),
    (("fused", "sgd"), True),
    (("fused", "sgd"), False),
    (("adamw", "fused"), False),
    (("fused", "fused"), False),
]


TRAINING = [
    (name, num_ranks, kinds, together)
    for name, num_ranks in RIG_CASES
    for kinds, together in (MIXES if (name, num_ranks) in (("fsdp2", 2), ("stages_fsdp2", 4)) else MIXES[3:4])
]
"""Every mix in two rigs, and one mix in every rig."""


@pytest.mark.parametrize(("name", "num_ranks", "kinds", "together"), TRAINING)
@on_ranks()
def test_trains_as_one_process_without_a_scaler(name: str, kinds: tuple[str, ...], together: bool) -> None:
    check_training(name, kinds, together)


@on_ranks(4)
@pytest.mark.parametrize(
    ("which", "together"),
    [((True,), True), ((True, True), True), ((True, False), True), ((False, True), True), ((True, True), False)],
)
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "stages", "stages_fsdp2"])
def test_does_not_unscale_twice(name: str, which: tuple[bool, ...], together: bool) -> None:
    """Train where the caller has unscaled some of the optimizers, which must not be unscaled again."""
    kinds = ("adamw", "sgd")[: len(which)]
    rig = build_rig(name)
    whole, optimizers = WholeModel(rig, kinds), split_optimizers(rig, kinds)
    clipper, scaler = rig.clipper(distclip.global_norm(2.0)), make_scaler()
    for number in range(3):
        rig.fill(number, scaler.get_scale())
        whole.step(number, 2.0)
        for unscaled, optimizer in zip(which, optimizers, strict=True):
            if unscaled:
                scaler.unscale_(optimizer)
        for part in [optimizers] if together else optimizers:
            clipper.step(part, scaler)
        scaler.update()
        whole.assert_same(rig)


@on_ranks(2)
@pytest.mark.parametrize("which", [(True, False), (False, True)])
def test_raises_in_the_first_of_two_calls_if_one_optimizer_was_unscaled(which: tuple[bool, bool]) -> None:
    """Step two optimizers in two calls: there is no norm over both if only one was unscaled."""
    rig = build_rig("stages")
    optimizers = split_optimizers(rig, ("sgd", "adamw"))
    clipper, scaler = rig.clipper(distclip.global_norm(1.0)), make_scaler()
    rig.fill(0, scaler.get_scale())
    for unscaled, optimizer in zip(which, optimizers, strict=True):
        if unscaled:
            scaler.unscale_(optimizer)
    before = to_bytes(rig.grads())
    assert_raises_on_ranks(
        lambda: clipper.step(optimizers[0], scaler), ArgumentError, "has unscaled some of the clipper's gradients"
    )
    assert to_bytes(rig.grads()) == before


@on_ranks(2)
@pytest.mark.parametrize("everyone", [True, False])
@pytest.mark.parametrize("name", ["megatron", "stages", "experts"])
def test_mistakes_raise_on_all_ranks_and_change_nothing(name: str, everyone: bool) -> None:
    rig = build_rig(name)
    here = everyone or dist.get_rank() == 1
    clipper, optimizer = rig.clipper(distclip.global_norm(1.0)), rig.optimizer("sgd")
    scaler, unscaled = make_scaler(), torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE)
    stranger = torch.optim.SGD([plain_param(torch.ones(2))], lr=1.0)
    rig.fill(0, LOSS_SCALE)
    before, grads = training_state(rig, optimizer), to_bytes(rig.grads())
    if everyone:
        assert_raises_on_ranks(lambda: clipper.step(optimizer, unscaled), ArgumentError, "has not scaled a loss")
    assert_raises_on_ranks(lambda: clipper.step(optimizer, 3 if here else scaler), ArgumentError, "scaler=3")
    other = "adam" if here else optimizer
    assert_raises_on_ranks(lambda: clipper.step(other, scaler), ArgumentError, "optimizer='adam'")
    # Another clipper, because the first call with an optimizer compares ranks.
    other = rig.clipper(distclip.global_norm(1.0))
    assert_raises_on_ranks(
        lambda: other.step([optimizer, stranger] if here else optimizer, scaler),
        ArgumentError,
        "clipper does not have",
    )
    _, param = rig.named[-1]
    if here:
        param.data, param.grad = param.data.half(), None
        param.grad = rig.distribute(param, torch.ones(param.shape))
    assert_raises_on_ranks(lambda: clipper.step(optimizer, scaler), ArgumentError, "FP16 gradients")
    if here:
        param.data, param.grad = param.data.float(), None
    rig.fill(0, LOSS_SCALE)
    assert (training_state(rig, optimizer), to_bytes(rig.grads())) == (before, grads)
    clipper.step(optimizer, scaler)
    assert_raises_on_ranks(lambda: clipper.step(optimizer, scaler), ArgumentError, "scaler.update()")
    scaler.update()
    rig.fill(1, LOSS_SCALE)
    clipper.step(optimizer, scaler)


@on_ranks(2)
@pytest.mark.parametrize("init_scale", [LOSS_SCALE, 2.0 * LOSS_SCALE])
def test_stages_without_a_loss_need_the_same_initial_scale(init_scale: float) -> None:
    """Scale a loss on one stage only: the scalers of the other stages must have the same initial scale."""
    rig = build_rig("stages")
    clipper, optimizer = rig.clipper(distclip.global_norm(1.0)), rig.optimizer("sgd")
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale) if dist.get_rank() == 0 else make_scaler()
    rig.fill(0, LOSS_SCALE)
    if init_scale != LOSS_SCALE:
        assert_raises_on_ranks(lambda: clipper.step(optimizer, scaler), DisagreementError, "scale")
        return
    norm = reference.total_norm(rig.gather_whole(lambda p: p.grad).values()) / LOSS_SCALE
    report = clipper.step(optimizer, scaler)
    torch.testing.assert_close(report.norm.double(), norm, rtol=1e-6, atol=0)
    scaler.update()
    assert_same_on_ranks(clipper, scaler.get_scale())


@on_ranks(2)
def test_second_call_checks_its_optimizer() -> None:
    rig = build_rig("stages")
    clipper, scaler, stranger = rig.clipper(distclip.global_norm(1.0)), make_scaler(), plain_param(torch.ones(2))
    optimizers = [rig.optimizer("sgd"), torch.optim.SGD([stranger], lr=1.0)]
    rig.fill(0, LOSS_SCALE)
    stranger.grad = torch.full((2,), LOSS_SCALE)
    clipper.step(optimizers[0], scaler)
    assert_raises_on_ranks(lambda: clipper.step(optimizers[1], scaler), ArgumentError, "clipper does not have")


@on_ranks(2)
def test_raises_if_unscaled_between_two_calls() -> None:
    """Unscale between two calls, of which the first has already unscaled all gradients."""
    rig = build_rig("stages")
    optimizers = split_optimizers(rig, ("sgd", "adamw"))
    clipper, scaler = rig.clipper(distclip.global_norm(1.0)), make_scaler()
    rig.fill(0, LOSS_SCALE)
    clipper.step(optimizers[0], scaler)
    scaler.unscale_(optimizers[1])
    assert_raises_on_ranks(lambda: clipper.step(optimizers[1], scaler), ArgumentError, "unscale_")


@each_rig
@on_ranks()
def test_value_bounds_unscaled_elements(name: str) -> None:
    rig = build_rig(name)
    clipper, scaler, optimizer = rig.clipper(distclip.value(0.5)), make_scaler(), rig.optimizer("sgd")
    whole = {key: p.clone() for key, p in rig.gather_whole(lambda p: p).items()}
    rig.fill(0, LOSS_SCALE)
    expected = {
        key: whole[key] - 0.01 * (g / LOSS_SCALE).clamp(-0.5, 0.5)
        for key, g in rig.gather_whole(lambda p: p.grad).items()
    }
    clipper.step(optimizer, scaler)
    scaler.update()
    for key, param in rig.gather_whole(lambda p: p).items():
        torch.testing.assert_close(param, expected[key], rtol=1e-6, atol=1e-6)
    rig.fill(1, LOSS_SCALE)
    rig.poison(1, INF)
    assert clipper.step(optimizer, scaler).skipped
    scaler.update()
    assert_same_on_ranks(clipper, scaler.get_scale())
    assert scaler.get_scale() == LOSS_SCALE / 2


@on_ranks(2)
@pytest.mark.parametrize("name", ["fsdp2", "tp", "stages", "experts"])
@pytest.mark.parametrize(
    ("policy", "action"),
    [("adagc", "skip"), ("agc", "raise"), ("per_tensor_norm", "zero"), ("zclip", "propagate")],
)
def test_policies_skip_overflows_with_any_rule_for_nonfinite_steps(name: str, policy: str, action: str) -> None:
    """Compare with a twin that has no scaler and that does not take the step."""
    small = POLICIES[policy].small
    assert small is not None
    rig, twin = build_rig(name), build_rig(name)
    optimizers = [rig.optimizer("fused"), twin.optimizer("adamw")]
    clippers, scaler = [rig.clipper(small(), on_nonfinite=action), twin.clipper(small())], make_scaler()
    for number in range(4):
        rig.fill(number, scaler.get_scale())
        twin.fill(number)
        if number == 2:
            rig.poison(1, INF)
        else:
            clippers[1].step(optimizers[1])
        assert bool(clippers[0].step(optimizers[0], scaler).skipped) == (number == 2)
        scaler.update()
    assert scaler.get_scale() == LOSS_SCALE / 2
    assert clippers[0].skipped == 1
    for (_, one), (_, two) in zip(rig.named, twin.named, strict=True):
        torch.testing.assert_close(local_tensor(one.data), local_tensor(two.data), rtol=1e-6, atol=1e-6)


@on_ranks(2)
def test_disabled_scaler_keeps_nothing_of_a_round() -> None:
    rig = build_rig("stages")
    clipper, optimizer = rig.clipper(distclip.global_norm(1.0)), rig.optimizer("fused")
    rig.fill(0)
    coef = clipper.step(optimizer, torch.amp.GradScaler("cpu", enabled=False)).coef
    assert 0 < coef < 1
    rig.fill(1)
    assert clipper.step(optimizer, torch.amp.GradScaler("cpu", enabled=False)).coef != coef


@on_ranks(2)
def test_sharded_grad_scaler_of_fsdp1() -> None:
    model = FullyShardedDataParallel(mlp(8, 6, 4), device_id=torch.device("cpu"), use_orig_params=True)
    scaler = ShardedGradScaler("cpu", init_scale=LOSS_SCALE, growth_interval=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    clipper, scale, norms = GradClipper(model, distclip.global_norm(1.0)), LOSS_SCALE, []
    for number in range(4):
        torch.manual_seed(dist.get_rank())
        scaler.scale(model(torch.randn(6, 8)).square().sum() * 30).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None and p.grad.numel()]
        if number == 1 and dist.get_rank() == 1:
            grads[0].view(-1)[0] = INF
        before = to_bytes(model.parameters())
        report = clipper.step(optimizer, scaler)
        assert bool(report.skipped) == (number == 1) == (to_bytes(model.parameters()) == before)
        scaler.update()
        scale *= 0.5 if number == 1 else 1.0
        assert scaler.get_scale() == scale
        norms.append(float(report.norm))
        optimizer.zero_grad()
    assert 0 < norms[3] < norms[0] < LOSS_SCALE, "the norm depends on the scale"
    assert_same_on_ranks(clipper, norms[0])


@on_ranks(2)
@pytest.mark.parametrize("method", ["step", "clip"])
def test_rank_without_optimizers_updates_its_scale(method: str) -> None:
    """Train a stage with parameters and one without: both scales back off and grow together."""
    own = [("weight", plain_param(torch.ones(3)))] if dist.get_rank() == 0 else []
    clipper = GradClipper(own, distclip.global_norm(1.0), split_over=dist.group.WORLD)
    optimizers = [torch.optim.SGD([param], lr=0.1) for _, param in own]
    scaler, scales = make_scaler(growth_interval=2), []
    for step in range(4):
        for _, param in own:
            param.grad = torch.full((3,), INF if step == 1 else scaler.get_scale())
        getattr(clipper, method)(optimizers, scaler)
        if method == "clip":
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale() / LOSS_SCALE)
    assert scales == [1.0, 0.5, 0.5, 1.0]
    assert_same_on_ranks(clipper, scales)
