"""Compare adapters that share a step with adapters that are trained alone, bit by bit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip import (
    ArgumentError,
    DisagreementError,
    GradClipper,
    LayoutError,
    NonFiniteWarning,
    NormPolicy,
    TooManySkippedSteps,
    global_norm,
    group_norm,
)
from tests.ranks import gather_from_ranks, on_ranks

NAMES = [f"tenant{i}" for i in range(6)]

POLICIES: list[Any] = [
    global_norm(1.0),
    distclip.zclip(cap=2.0, warmup=2),
    distclip.adagc(warmup=2, per="model"),
    distclip.median_mad(1.0, warmup=2, skip=True),
    distclip.aggc(0.9, 1.1, warmup=1, per="model"),
    # Together with the other one it decides about two groups at once, whose norms must not be added up.
    distclip.adagc(warmup=2, per="model"),
]

BAD = {2: (1, math.nan), 3: (1, math.inf), 5: (4, math.nan)}
"""Steps in which an element of one tenant is not finite: (tenant, value)."""


class Drifting(torch.optim.Optimizer):
    """Move every parameter of its groups, also those without a gradient, as some optimizers of users do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.mul_(0.9)
                if param.grad is not None:
                    param.sub_(group["lr"] * param.grad)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "drifting": Drifting,
}


def make_adapters() -> dict[str, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (4, 3), (5,))]
        for name in NAMES
    }


def fill(params: list[nn.Parameter], tenant: int, step: int) -> None:
    """Set the gradients of a tenant. Some tenants have none in some steps, or only zeros."""
    generator = torch.Generator().manual_seed(100 * tenant + step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator) * 10 ** ((tenant + step) % 3 - 1)
        param.grad = None if (tenant, step) == (0, 3) else grad * ((tenant, step) != (5, 4))
    if step in BAD and BAD[step][0] == tenant:
        assert params[0].grad is not None
        params[0].grad.view(-1)[1] = BAD[step][1]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)
        yield


@pytest.mark.parametrize("together", [True, False], ids=["one optimizer", "one each"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_each_tenant_trains_as_if_alone(kind: str, together: bool) -> None:
    """Train six tenants with six policies in one step each, and alone. A NaN of one is no matter of the others."""
    make = OPTIMIZERS[kind]
    shared, alone = make_adapters(), make_adapters()
    clipper = GradClipper([], global_norm(1.0), isolate=True)
    for (name, params), policy in zip(shared.items(), POLICIES, strict=True):
        clipper.add_group(name, params, policy)
    sets = [[p for params in shared.values() for p in params]] if together else list(shared.values())
    optimizers = [make(params) for params in sets]
    clippers = [GradClipper(params, policy) for params, policy in zip(alone.values(), POLICIES, strict=True)]
    own = [make(params) for params in alone.values()]
    for step in range(8):
        skipped = []
        for i, name in enumerate(NAMES):
            fill(shared[name], i, step)
            fill(alone[name], i, step)
            if alone[name][0].grad is not None:
                # A tenant without gradients makes no step alone.
                skipped.append(bool(clippers[i].step(own[i]).skipped))
        owners = [one for one, params in zip(optimizers, sets, strict=True) if any(p.grad is not None for p in params)]
        report = clipper.step(owners)
        assert report.skips is not None
        present = [i for i in range(len(NAMES)) if shared[NAMES[i]][0].grad is not None]
        assert [report.skips.tolist()[i] for i in present] == skipped
        if not (together and kind == "drifting" and step >= 3):
            # The optimizer of a user moves the tenant without gradients, which is not the clipper's business.
            for name in NAMES:
                assert all(map(torch.equal, shared[name], alone[name])), f"step {step}, {name}"
    for i, name in enumerate(NAMES):
        if kind != "drifting" or not together:
            assert clipper.groups[name].skipped == clippers[i].skipped
        expected = clippers[i].state_dict()["state"].get("model", {})
        found = clipper.state_dict(group=name)["state"]
        assert expected.keys() == found.keys()
        assert all(torch.allclose(found[key], expected[key], rtol=1e-12, atol=0) for key in expected)


def make_scaler() -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    scaler.scale(torch.zeros(1))
    return scaler


def scale_grads_(scaler: torch.amp.GradScaler, params: list[nn.Parameter]) -> None:
    for param in params:
        if param.grad is not None:
            param.grad *= scaler.get_scale()


@pytest.mark.parametrize("mode", ["together", "each", "one a call", "unscaled", "clip", "clip each", "decide"])
def test_a_shared_loss_scale_follows_any_tenant_and_skips_none_of_the_others(mode: str) -> None:
    """Train with one GradScaler for all, and alone with one for each, whose scale is soon another one."""
    shared, alone = make_adapters(), make_adapters()
    clipper = GradClipper([], global_norm(1.0), isolate=True)
    clipper.add_groups(shared)
    own = {name: GradClipper(params, global_norm(1.0)) for name, params in alone.items()}

    def make(params: Any) -> torch.optim.Optimizer:
        # Alone, a fused kernel would divide by the scale and the coefficient itself, with another rounding.
        return torch.optim.AdamW(params, lr=0.1)

    everyone = [param for params in shared.values() for param in params]
    sets = list(shared.values()) if mode in ("each", "one a call", "clip each") else [everyone]
    optimizers, lonely = [make(params) for params in sets], [make(params) for params in alone.values()]
    scaler, scalers = make_scaler(), [make_scaler() for _ in NAMES]
    scales = []
    for step in range(8):
        for i, name in enumerate(NAMES):
            fill(shared[name], i, step)
            fill(alone[name], i, step)
            scale_grads_(scaler, shared[name])
            scale_grads_(scalers[i], alone[name])
            own[name].step(lonely[i], scalers[i])
            scalers[i].update()
        if mode == "unscaled":
            scaler.unscale_(optimizers[0])
        if mode == "decide":
            outcome = clipper.decide(scaler.get_scale())
            kept = [i for i, param in enumerate(everyone) if param.grad is not None]
            clipper.write_(outcome, kept, [everyone[i].grad for i in kept])  # type: ignore[misc]
            skipped = clipper.skipped_parameters(outcome)
            for name, param in zip(clipper.parameters, everyone, strict=True):
                if name in skipped:
                    assert param.grad is not None
                    assert not param.grad.any()
                    param.grad = None
            optimizers[0].step()
            scaler._scale = scaler._scale * (0.5 if step in BAD else 1.0)  # type: ignore[operator]
        elif mode.startswith("clip"):
            clipper.clip(optimizers, scaler)
            for optimizer in optimizers:
                scaler.step(optimizer)
        elif mode == "one a call":
            for optimizer in optimizers:
                clipper.step(optimizer, scaler)
        else:
            report = clipper.step(optimizers, scaler)
            assert report.skips is not None
            assert report.skips.any() == (step in BAD)
        if mode != "decide":
            scaler.update()
        scales.append(scaler.get_scale())
        for i, name in enumerate(NAMES):
            assert all(map(torch.equal, shared[name], alone[name])), f"step {step}, {name}"
            assert clipper.groups[name].skipped == own[name].skipped, i
    assert scales[2] == scales[1] / 2 == scales[3] * 2


def test_a_group_that_decide_has_skipped_too_often_raises_in_the_next_call() -> None:
    params = {name: [nn.Parameter(torch.zeros(1))] for name in ("alice", "bob")}
    clipper = GradClipper([], global_norm(1.0), isolate=True, max_skips=1)
    clipper.add_groups(params)
    for step in range(2):
        params["alice"][0].grad, params["bob"][0].grad = torch.tensor([math.nan]), torch.ones(1)
        if step == 0:
            assert clipper.skipped_parameters(clipper.decide()) == ("alice/parameters[0]",)
        else:
            with pytest.raises(TooManySkippedSteps, match="group 'alice'"):
                clipper.decide()


def test_patterns_make_isolated_groups() -> None:
    """Isolate the groups of a policy, each with its bound. A NaN in one group leaves the others their step."""
    model = nn.ModuleDict({name: nn.Linear(2, 1) for name in ("a", "b", "c")})
    bounds = group_norm({"first": ("^a", 0.5), "second": ("^b", 2.0)}, 1.0)
    clipper = GradClipper(model, bounds, isolate=True)
    for params in model.parameters():
        params.grad = torch.full_like(params, 3.0)
    before = [param.detach().clone() for param in model["b"].parameters()]
    model["b"].weight.grad[0, 0] = math.nan
    report = clipper.step(torch.optim.SGD(model.parameters(), lr=1.0))
    assert clipper.slots == ("first", "second", "rest")
    assert report.bounds is not None
    assert report.bounds.tolist() == [0.5, 2.0, 1.0]
    assert report.skips is not None
    assert report.skips.tolist() == [False, True, False]
    assert not report.skipped
    assert all(map(torch.equal, before, model["b"].parameters()))
    assert float(nn.utils.get_total_norm([p.grad for p in model["a"].parameters()])) == pytest.approx(0.5, rel=1e-5)
    with pytest.raises(ArgumentError, match="isolate"):
        NormPolicy(isolate=True)
    with pytest.raises(ArgumentError, match=r"isolate=True.*per='tensor'"):
        GradClipper(model, distclip.per_tensor_norm(), isolate=True)


@pytest.mark.parametrize("mode", ["clip", "attach"])
def test_other_ways_to_step(mode: str) -> None:
    """Clip before the optimizer of all tenants steps: the one that is not finite keeps parameters and momentum."""
    params = {name: [nn.Parameter(torch.ones(2))] for name in "ab"}
    optimizer = torch.optim.SGD([p for some in params.values() for p in some], lr=1.0, momentum=0.9)
    clipper = GradClipper([], global_norm(1.0), isolate=True)
    clipper.add_groups(params)
    if mode == "attach":
        clipper.attach(optimizer)
    for value in (0.0, 1.0, math.nan):
        before = {name: some[0].detach().clone() for name, some in params.items()}
        params["a"][0].grad, params["b"][0].grad = torch.tensor([1.0, value]), torch.ones(2)
        if mode == "clip":
            clipper.clip()
        optimizer.step()
        assert torch.equal(before["a"], params["a"][0]) == math.isnan(value)
        assert not torch.equal(before["b"], params["b"][0])


def test_max_skips_of_one_group_raises_after_the_step_of_the_others() -> None:
    params = {name: [nn.Parameter(torch.zeros(1))] for name in ("alice", "bob")}
    optimizer = torch.optim.SGD([p for some in params.values() for p in some], lr=1.0)
    clipper = GradClipper([], global_norm(1.0), isolate=True, max_skips=2)
    clipper.add_groups(params)
    for step in range(2):
        params["alice"][0].grad, params["bob"][0].grad = torch.tensor([math.nan]), torch.ones(1)
        if step == 0:
            with pytest.warns(NonFiniteWarning, match=r"group 'alice'.*alice/parameters"):
                clipper.step(optimizer)
        else:
            with pytest.raises(TooManySkippedSteps, match="group 'alice'"):
                clipper.step(optimizer)
    assert params["bob"][0].item() == pytest.approx(-2, abs=1e-5)
    assert params["alice"][0].item() == 0
    assert clipper.groups["alice"].in_a_row == 2
    assert clipper.groups["bob"].skipped == clipper.skipped == 0
    assert clipper.incidents[0].culprits[0].name == "alice/parameters[0]"  # type: ignore[union-attr]
    clipper.remove_group("alice")
    params["bob"][0].grad = torch.ones(1)
    clipper.step(torch.optim.SGD(params["bob"], lr=1.0))


def test_groups_come_and_go_with_their_states() -> None:
    """Save a group, remove it, add it again, and load its state. The others keep theirs."""
    params = {name: [nn.Parameter(torch.zeros(1))] for name in "abc"}
    clipper = GradClipper([], distclip.zclip(cap=1.0), isolate=True)
    clipper.add_groups({name: params[name] for name in "ab"})

    def step(factor: float) -> None:
        for i, name in enumerate("abc"):
            params[name][0].grad = torch.tensor([factor * (i + 1) * 0.1]) if name in clipper.slots else None
        clipper.clip()

    step(1.0)
    step(2.0)
    saved = clipper.state_dict(group="a")
    clipper.remove_group("a")
    clipper.add_group("c", params["c"])
    step(3.0)
    assert clipper.state_dict(group="b")["state"]["mean"].item() == pytest.approx(0.4)
    assert clipper.state_dict(group="c")["state"]["mean"].item() == pytest.approx(0.9)
    clipper.add_group("a", params["a"])
    clipper.load_state_dict(saved, group="a")
    assert clipper.state_dict(group="a")["state"]["mean"].item() == pytest.approx(0.15)
    assert clipper.groups["a"].steps == 2
    everything = clipper.state_dict()
    step(5.0)
    clipper.load_state_dict(everything)
    assert clipper.state_dict(group="b")["state"]["mean"].item() == pytest.approx(0.4)
    assert clipper.steps == 3
    for wrong in ({}, clipper.state_dict(), {**saved, "rule": "NormPolicy(EMA)"}):
        with pytest.raises(ArgumentError, match="state_dict"):
            clipper.load_state_dict(wrong, group="a")
    with pytest.raises(ArgumentError, match="version"):
        clipper.load_state_dict({**everything, "version": True})
    with pytest.raises(ArgumentError, match="version"):
        clipper.load_state_dict({**saved, "version": True}, group="a")
    with pytest.raises(ArgumentError, match="no such group"):
        clipper.state_dict(group="d")


def test_wrong_groups_raise() -> None:
    """Raise by name, before anything has changed."""
    one, frozen = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1), requires_grad=False)
    clipper = GradClipper([], global_norm(1.0), isolate=True)
    clipper.add_group("a", [one])
    free = nn.Parameter(torch.zeros(1))
    wrong: list[tuple[str, Any, Any, str]] = [
        ("b", [one], None, "'b'.*group 'a'"),
        ("a", [free], None, "'a'.*exists"),
        ("rest", [free], None, "rest"),
        ("b/c", [free], None, "b/c"),
        ("b", [frozen], None, "does not train"),
        ("b", [], None, "'b'.*no parameters"),
        ("b", [free], distclip.value(0.1), "'b'.*limits"),
        ("b", [free], distclip.adagc(), "'b'.*per='tensor'"),
        ("b", [free], global_norm(1.0, math.inf), "'b'.*norm_type"),
        ("b", [free], 1.0, "not a policy"),
        ("b", 3, None, "expected a torch.nn.Module"),
    ]
    for name, params, policy, match in wrong:
        with pytest.raises(ArgumentError, match=match):
            clipper.add_group(name, params, policy)
        assert clipper.slots == ("a", "rest")
    with pytest.raises(ArgumentError, match=r"'b'.*no such group"):
        clipper.remove_group("b")
    one.grad, free.grad = torch.ones(1), torch.ones(1)
    with pytest.raises(ArgumentError, match="does not have"):
        clipper.step(torch.optim.SGD([one, free], lr=1.0))
    with pytest.raises(ArgumentError, match="isolate=True"):
        GradClipper([one], global_norm(1.0)).add_group("b", [free])


def test_a_tenant_is_not_removed_within_a_step() -> None:
    """Remove a group in a hook of the optimizer, which raises and leaves the group where it is."""
    one = nn.Parameter(torch.zeros(1))
    clipper = GradClipper([], global_norm(1.0), isolate=True)
    clipper.add_group("a", [one])
    optimizer = torch.optim.SGD([one], lr=1.0)
    hook = optimizer.register_step_pre_hook(lambda *_: clipper.remove_group("a"))
    one.grad = torch.ones(1)
    with pytest.raises(ArgumentError, match=r"remove_group\('a'\).*step"):
        clipper.step(optimizer)
    hook.remove()
    clipper.step(optimizer)
    assert clipper.groups["a"].steps == 1


# ---- Ranks ----


@on_ranks(2)
def test_a_tenant_that_one_rank_removes_within_a_step_raises_there_and_then_everywhere() -> None:
    one, two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    for module in (one, two):
        fully_shard(module)
    clipper = GradClipper([], global_norm(1.0), isolate=True)
    clipper.add_groups({"a": one, "b": two})
    optimizer = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: clipper.remove_group("a") if dist.get_rank() == 1 else None)

    def step() -> str:
        one.weight.grad, two.weight.grad = torch.ones_like(one.weight), torch.ones_like(two.weight)
        try:
            clipper.step(optimizer)
        except distclip.DistclipError as error:
            return type(error).__name__
        return ""

    assert gather_from_ranks(step()) == ["", "ArgumentError"]
    assert gather_from_ranks(step()) == ["DisagreementError"] * 2
    assert clipper.slots == ("a", "b", "rest")


class Lora(nn.Module):
    """A frozen base that FSDP2 shards, and adapters that are sharded on the same mesh."""

    def __init__(self, num_tenants: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(8, 8).requires_grad_(requires_grad=False)
        self.adapters = nn.ModuleDict({f"t{i}": nn.Linear(8, 8, bias=False) for i in range(num_tenants)})
        for module in (self.base, *self.adapters.values()):
            fully_shard(module)

    def backward(self, name: str, step: int) -> None:
        seed = 100 * int(name[1:]) + 10 * step + dist.get_rank()
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
        (self.base(x) + self.adapters[name](x)).square().sum().backward()


@on_ranks(2, 4)
def test_a_nan_on_one_rank_stops_one_tenant_only() -> None:
    """Train adapters on a frozen base, and each alone. Only the adapter with the NaN is skipped, on all ranks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)
        names = [f"t{i}" for i in range(5)]
        shared, alone = Lora(5), Lora(5)
        clipper = GradClipper(shared, global_norm(0.5), isolate=True)
        num_groups = len(dist.distributed_c10d._world.pg_map)
        clipper.add_groups({name: shared.adapters[name] for name in names[:4]})
        clipper.add_group("t4", shared.adapters["t4"], distclip.zclip(cap=1.0, warmup=1))
        # The ranks need not find each other again.
        assert len(dist.distributed_c10d._world.pg_map) == num_groups
        optimizer = torch.optim.AdamW([p for p in shared.parameters() if p.requires_grad], lr=0.1)
        policies = [global_norm(0.5)] * 4 + [distclip.zclip(cap=1.0, warmup=1)]
        own = [
            (
                GradClipper(alone.adapters[name], policy),
                torch.optim.AdamW(alone.adapters[name].parameters(), lr=0.1),
            )
            for name, policy in zip(names, policies, strict=True)
        ]
        for step in range(4):
            for model in (shared, alone):
                for name in names:
                    model.backward(name, step)
                if step == 1 and dist.get_rank() == dist.get_world_size() - 1:
                    grad: Any = model.adapters["t2"].weight.grad
                    grad.to_local().view(-1)[0] = math.nan
            for one, its in own:
                one.step(its)
            with CommDebugMode() as counter:
                report = clipper.step(optimizer)
            assert report.skips is not None
            assert report.skips.tolist() == [step == 1 and i == 2 for i in range(6)]
            assert sum(counter.comm_counts.values()) == 1 or step == 1, counter.comm_counts
            for name in names:
                pair: list[Any] = [model.adapters[name].weight for model in (shared, alone)]
                assert torch.equal(*(weight.to_local() for weight in pair)), f"step {step}, {name}"
            optimizer.zero_grad()
            alone.zero_grad()
        assert clipper.groups["t2"].skipped == 1
        assert clipper.incidents[0].culprits[0].ranks == (dist.get_world_size() - 1,)  # type: ignore[union-attr]
        clipper.remove_group("t0")
        assert clipper.slots == ("t1", "t2", "t3", "t4", "rest")


NUM_MANY, BROKEN = 256, 100


@on_ranks(2)
def test_a_nan_in_one_of_many_adapters_leaves_the_others_as_if_alone() -> None:
    """Train 256 adapters of a frozen, sharded layer in one step, and each of them alone, with a NaN in one of them."""
    base = fully_shard(nn.Linear(4, 4).requires_grad_(requires_grad=False))
    weight: Any = base.weight
    mesh, rank = weight.device_mesh, dist.get_rank()

    def shard(seed: int) -> DTensor:
        local = torch.randn(2, 3, generator=torch.Generator().manual_seed(2 * seed + rank))
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)

    shared, alone = ([[nn.Parameter(shard(2 * i + j)) for j in range(2)] for i in range(NUM_MANY)] for _ in range(2))
    names = [f"t{i}" for i in range(NUM_MANY)]
    clipper = GradClipper(base, global_norm(0.5), isolate=True)
    clipper.add_groups(dict(zip(names, shared, strict=True)))
    optimizer = torch.optim.SGD([p for params in shared for p in params], lr=0.1, momentum=0.9)
    own = [GradClipper(params, global_norm(0.5)) for params in alone]
    its = [torch.optim.SGD(params, lr=0.1, momentum=0.9) for params in alone]
    for step in range(2):
        for i, adapter in enumerate(zip(shared, alone, strict=True)):
            for j in range(2):
                grad = shard(1000 * (step + 1) + 2 * i + j)
                if (step, i, rank) == (0, BROKEN, 1):
                    grad.to_local()[0, 0] = math.nan
                for params in adapter:
                    params[j].grad = grad.clone()
        with warnings.catch_warnings(record=True) as caught, CommDebugMode() as counter:
            warnings.simplefilter("always", NonFiniteWarning)
            report = clipper.step(optimizer)
        assert report.skips is not None
        assert report.skips.nonzero().flatten().tolist() == [BROKEN] * (step == 0)
        if step == 0:
            assert f"'t{BROKEN}'" in str(caught[0].message)
        else:
            assert sum(counter.comm_counts.values()) == 1
        for i, (one, sgd) in enumerate(zip(own, its, strict=True)):
            if (step, i) != (0, BROKEN):
                one.step(sgd)
    assert clipper.groups[names[BROKEN]].skipped == 1
    for name, one, two in zip(names, shared, alone, strict=True):
        pairs: Any = zip(one, two, strict=True)
        assert all(torch.equal(a.to_local(), b.to_local()) for a, b in pairs), name


WRONG_ON_RANKS: dict[str, tuple[type[Exception], Callable[[GradClipper, Lora, bool], Any]]] = {
    "some ranks": (LayoutError, lambda c, _, first: c.add_group("bob", [nn.Parameter(torch.zeros(1))] * first)),
    "other name": (
        DisagreementError,
        lambda c, _, first: c.add_group("bob" if first else "t1", [nn.Parameter(torch.zeros(1))]),
    ),
    "other policy": (
        DisagreementError,
        lambda c, model, first: c.add_group("t1", model.adapters["t1"], global_norm(1.0 + first)),
    ),
    "overlap": (
        ArgumentError,
        lambda c, model, first: c.add_group("bob", model.adapters["t0" if first else "t1"]),
    ),
    "removed": (ArgumentError, lambda c, _, first: c.remove_group("t1" if first else "t0")),
    "step": (DisagreementError, lambda c, _, first: c.remove_group("t0") if first else c.clip()),
}
"""The error on every rank, and what two ranks do at a time."""


@on_ranks(2)
@pytest.mark.parametrize("case", WRONG_ON_RANKS)
def test_ranks_that_differ_raise_together(case: str) -> None:
    """Add and remove groups differently on two ranks, which raises on both and changes nothing."""
    model = Lora(2)
    clipper = GradClipper(model, global_norm(1.0), isolate=True)
    clipper.add_group("t0", model.adapters["t0"])
    kind, act = WRONG_ON_RANKS[case]
    with pytest.raises(kind, match=r"t0|t1|bob|step"):
        act(clipper, model, dist.get_rank() == 0)
    assert clipper.slots == ("t0", "rest")
    model.backward("t0", 0)
    clipper.clip()


def parameters_by_adapter(model: Any, names: Any) -> dict[str, list[tuple[str, Tensor]]]:
    return {n: [(k, p) for k, p in model.named_parameters() if f".{n}." in k and "lora" in k] for n in names}


@pytest.mark.slow
@pytest.mark.parametrize("num_adapters", [3])
def test_lora_of_peft(num_adapters: int) -> None:
    """Train adapters of PEFT in one step, add one at run time, and skip the one whose gradient is not finite."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    config = peft.LoraConfig(r=2, target_modules=["0", "2"])
    model = peft.get_peft_model(base, config, adapter_name="a0")
    for i in range(1, num_adapters):
        model.add_adapter(f"a{i}", config)
    names = [f"a{i}" for i in range(num_adapters)]
    for key, param in model.named_parameters():
        param.requires_grad_("lora" in key)
    groups = {name: rf"lora_\w+\.{name}\." for name in names[:-1]}
    policy = NormPolicy(distclip.Fixed(0.1), per="group", groups=groups, isolate=True)
    # The last adapter is added at run time, and its parameters are in "rest" until then.
    clipper = GradClipper(model, policy)
    clipper.add_group(names[-1], parameters_by_adapter(model, names)[names[-1]])
    assert clipper.slots == (*names, "rest")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        for name in names:
            model.set_adapter(name)
            for key, param in model.named_parameters():
                param.requires_grad_("lora" in key)
            model(torch.randn(3, 4)).square().sum().backward()
        by_name = parameters_by_adapter(model, names)
        if step == 1:
            next(p for _, p in by_name["a1"] if p.grad is not None).grad.view(-1)[0] = math.nan  # type: ignore[union-attr]
        before = {name: [p.detach().clone() for _, p in by_name[name]] for name in names}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = clipper.step(optimizer)
        assert report.skips is not None
        assert report.skips.tolist() == [step == 1 and name == "a1" for name in clipper.slots]
        assert step != 1 or any("group 'a1'" in str(w.message) and "lora_" in str(w.message) for w in caught)
        for name in names:
            changed = [not torch.equal(old, p) for old, (_, p) in zip(before[name], by_name[name], strict=True)]
            assert any(changed) == (not (step == 1 and name == "a1"))
