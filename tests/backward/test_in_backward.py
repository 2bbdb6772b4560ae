"""Clip within backward: bounds measured on what the weights did, memory, hooks of users, layouts, and bad input."""

from __future__ import annotations

import math
import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

import distclip
from distclip import ArgumentError, GradClipper, NonFiniteWarning, reference
from tests.ranks import on_ranks

WIDTH = 8
BOUND = 0.3


def make_model(depth: int = 3, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(depth)]
    return nn.Sequential(*blocks, nn.Linear(WIDTH, 4)).to(dtype)


def whole(param: Tensor) -> Tensor:
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()


def batches(num_steps: int, spike_at: int = -1) -> list[tuple[Tensor, float]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(8, WIDTH, generator=generator, dtype=torch.float64) for _ in range(num_steps)]
    return [(x, 100.0 if step == spike_at else 1.0) for step, x in enumerate(inputs)]


def loss_of(model: nn.Module, x: Tensor, factor: float) -> Tensor:
    return model(x).square().mean() * factor


def moved(model: nn.Module, step: Callable[[], Any]) -> list[Tensor]:
    """Return how far a step moves each parameter. With SGD and a learning rate of 1 these are the gradients applied."""
    before = [whole(param) for param in model.parameters()]
    step()
    return [old - whole(param) for old, param in zip(before, model.parameters(), strict=True)]


def norm_of(tensors: list[Tensor]) -> float:
    return float(reference.total_norm(tensors))


# ---- One process ----


@pytest.mark.parametrize("spike_at", [0, 4])
@pytest.mark.parametrize("cap", [math.inf, 0.05])
def test_budget_is_divided_as_the_reference_divides_it(spike_at: int, cap: float) -> None:
    model = make_model()
    params = list(model.parameters())
    order: list[int] = []
    for i, param in enumerate(params):
        param.register_post_accumulate_grad_hook(lambda _, i=i: order.append(i))
    clipper = GradClipper(model, distclip.budget(BOUND, cap=cap))
    handle = clipper.in_backward(SGD(params, lr=1.0))
    roots = [math.sqrt(param.numel()) for param in params]
    norms: list[list[float]] = []
    clipped = 0
    for x, factor in batches(7, spike_at):
        grads = torch.autograd.grad(loss_of(model, x, factor), params)
        order.clear()
        applied = moved(model, loss_of(model, x, factor).backward)
        learned = reference.budget_shares(norms) if norms else [0.0] * len(params)
        floor = 0.02 if norms else 1.0
        shares = [(1 - floor) * share + floor * root / sum(roots) for share, root in zip(learned, roots, strict=True)]
        norms.append([norm_of([grad]) for grad in grads])
        coefs = reference.budget_coefficients(
            [norms[-1][i] for i in order], [shares[i] for i in order], BOUND * (1 - 1e-6), cap
        )
        for i, coef in zip(order, coefs, strict=True):
            torch.testing.assert_close(applied[i], grads[i] * coef, rtol=1e-9, atol=1e-15)
        assert norm_of(applied) <= BOUND
        clipped += min(coefs) < 1
        report = handle.report
        assert report is not None
        assert float(report.norm) == pytest.approx(norm_of(list(grads)), rel=1e-6)
        assert float(report.coef) == pytest.approx(norm_of(applied) / norm_of(list(grads)), rel=1e-6)
    assert clipped > 0, "the test tests nothing"


def test_a_parameter_that_begins_late_is_not_stopped_for_good() -> None:
    """A gradient that was zero in the first steps, as that of a LoRA matrix is, has no share yet."""
    one, two = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    clipper = GradClipper([("one", one), ("two", two)], distclip.budget(1.0))
    clipper.in_backward([SGD([one], lr=1.0), SGD([two], lr=1.0)])
    lengths = []
    for step in range(4):
        before = two.detach().clone()
        ((0.0 if step < 2 else 3.0) * two.sum() + 3.0 * one.sum()).backward()
        lengths.append(float((before - two.detach()).norm()))
    assert lengths[:2] == [0.0, 0.0]
    assert 0 < lengths[2] < lengths[3] <= 1


@pytest.mark.parametrize("optimizers", ["one", "many", "mapping"])
def test_live_gradients_are_those_of_one_tensor(optimizers: str) -> None:
    model = make_model(depth=4)
    params = list(model.parameters())
    alive: list[tuple[Any, int]] = []
    peak = 0

    def count(param: Tensor) -> None:
        nonlocal peak
        assert param.grad is not None
        alive.append((weakref.ref(param.grad.untyped_storage()), param.grad.nbytes))
        peak = max(peak, sum(size for reference, size in alive if reference() is not None))

    for param in params:
        param.register_post_accumulate_grad_hook(count)
    own = {param: AdamW([param], lr=1e-3) for param in params}
    given = {"one": AdamW(params, lr=1e-3), "many": list(own.values()), "mapping": own}[optimizers]
    GradClipper(model, distclip.budget(BOUND)).in_backward(given)
    for x, factor in batches(3):
        loss_of(model, x, factor).backward()
    assert peak <= 1.2 * max(param.nbytes for param in params)
    assert len(alive) == 3 * len(params)


@pytest.mark.parametrize("hooks", ["before", "after"])
def test_hooks_of_the_program_may_stay(hooks: str) -> None:
    model, twin = make_model(), make_model()
    own = {param: SGD([param], lr=1.0, momentum=0.9) for param in model.parameters()}

    def step(param: Tensor) -> None:
        own[param].step()
        own[param].zero_grad()

    clipper = GradClipper(model, distclip.budget(BOUND))
    for kind in ("before", "after"):
        if kind == hooks:
            for param in model.parameters():
                param.register_post_accumulate_grad_hook(step)
        elif hooks == "before" or kind == "before":
            clipper.in_backward(own)
    GradClipper(twin, distclip.budget(BOUND)).in_backward(SGD(twin.parameters(), lr=1.0, momentum=0.9))
    for x, factor in batches(4, spike_at=2):
        loss_of(model, x, factor).backward()
        loss_of(twin, x, factor).backward()
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()

        def forward(self, x: Tensor) -> Tensor:
            for block in self.inner:
                x = checkpoint(block, x, use_reentrant=use_reentrant)
            return x

    model, twin = Checkpointed(), make_model()
    clipper = GradClipper(model, distclip.budget(BOUND))
    clipper.in_backward(SGD(model.parameters(), lr=1.0))
    other = GradClipper(twin, distclip.budget(BOUND))
    other.in_backward(SGD(twin.parameters(), lr=1.0))
    for step, (x, factor) in enumerate(batches(4, spike_at=2), 1):
        loss_of(model, x.clone().requires_grad_(), factor).backward()
        loss_of(twin, x, factor).backward()
        assert clipper.steps == step
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), twin.parameters(), strict=True))
    assert torch.equal(clipper._engine.state["shares"], other._engine.state["shares"])


def test_accumulated_gradients_are_stepped_once() -> None:
    model, twin = make_model(), make_model()
    handle = GradClipper(model, distclip.budget(BOUND)).in_backward(SGD(model.parameters(), lr=1.0))
    GradClipper(twin, distclip.budget(BOUND)).in_backward(SGD(twin.parameters(), lr=1.0))
    for x, factor in batches(3):
        with handle.accumulate():
            loss_of(model, x[:4], factor / 2).backward()
        loss_of(model, x[4:], factor / 2).backward()
        loss_of(twin, x, factor).backward()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


class Foreign(Optimizer):
    """Optimizer of another library, with a value that all of its parameters share."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.num_steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.num_steps += 1
        for group in self.param_groups:
            for param in group["params"]:
                param.mul_(0.9 if param.grad is None else 1.0).sub_(0 if param.grad is None else param.grad)


def test_an_optimizer_of_another_library_steps_once() -> None:
    model = make_model()
    head, rest = Foreign(model[-1].parameters()), SGD(model[:-1].parameters(), lr=1.0)
    clipper = GradClipper(model, distclip.budget(BOUND))
    clipper.in_backward([head, rest])
    for x, factor in batches(3, spike_at=1):
        assert norm_of(moved(model, loss_of(model, x, factor).backward)) <= BOUND
    assert head.num_steps == 3
    model[-1].bias.register_hook(lambda grad: grad * math.nan)
    with pytest.warns(NonFiniteWarning, match=r"3\.bias"):
        applied = moved(model, loss_of(model, *batches(1)[0]).backward)
    assert [bool(step.any()) for step in applied[-3:]] == [True, False, False]
    assert head.num_steps == 3


def test_not_finite_gradients_are_skipped_alone() -> None:
    model = make_model()
    clipper = GradClipper(model, distclip.budget(BOUND), max_skips=2)
    handle = clipper.in_backward(AdamW(model.parameters(), lr=0.1))
    x, factor = batches(1)[0]
    loss_of(model, x, factor).backward()
    poison = model[1][0].weight.register_hook(lambda grad: grad * math.inf)
    with pytest.warns(NonFiniteWarning, match=r"step 2 skipped parameters.*1\.0\.weight \(.*Inf\)"):
        applied = moved(model, loss_of(model, x, factor).backward)
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, step in zip(names, applied, strict=True) if not step.any()] == ["1.0.weight"]
    assert (clipper.skipped, clipper.steps, len(clipper.incidents)) == (1, 2, 1)
    assert handle.report is not None
    assert not handle.report.finite
    with pytest.raises(distclip.TooManySkippedSteps):
        loss_of(model, x, factor).backward()
    poison.remove()
    loss_of(model, x, factor).backward()
    assert clipper.skipped == 2


def test_an_exception_in_backward_is_forgotten() -> None:
    model = make_model()
    clipper = GradClipper(model, distclip.budget(BOUND))
    clipper.in_backward(SGD(model.parameters(), lr=1.0))
    x, factor = batches(1)[0]

    def fail(grad: Tensor) -> None:
        raise RuntimeError("interrupted")

    handle = model[0][0].weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        loss_of(model, x, factor).backward()
    handle.remove()
    for count in (1, 2):
        assert norm_of(moved(model, loss_of(model, x, factor).backward)) <= BOUND
        assert clipper.steps == count


def test_lagged_applies_the_coefficient_of_the_step_before() -> None:
    weight = nn.Parameter(torch.zeros(4))
    clipper = GradClipper([("weight", weight)], distclip.lagged(distclip.global_norm(1.0), budget=4.0))
    clipper.in_backward(SGD([weight], lr=1.0))
    lengths = []
    for norm in (2.0, 2.0, 100.0, 2.0, 0.5, 0.5):
        before = weight.detach().clone()
        (weight * norm / 2).sum().backward()
        lengths.append(float((weight.detach() - before).norm()))
    # A spike passes once, up to the budget, and the step after it is scaled down for nothing.
    assert lengths == pytest.approx([2.0, 1.0, 4.0, 0.02, 0.25, 0.5], rel=1e-5)


@pytest.mark.parametrize("per", ["model", "tensor", "group"])
def test_lagged_policies_decide_about_the_same_norms(per: str) -> None:
    """The coefficients of a step are those that an ordinary clipper found in the step before."""
    policy: Any = {
        "model": distclip.ema(1.0, warmup=1),
        "tensor": distclip.ema(1.0, warmup=1, per="tensor"),
        "group": distclip.NormPolicy(distclip.EMA(1.0, warmup=1), per="group", groups={"head": "^3"}),
    }[per]
    model, twin = make_model(), make_model()
    clipper = GradClipper(model, distclip.lagged(policy))
    handle = clipper.in_backward(SGD(model.parameters(), lr=1e-9))
    ordinary = GradClipper(twin, policy)
    last: Tensor | None = None
    for x, factor in batches(5, spike_at=3):
        loss_of(model, x, factor).backward()
        loss_of(twin, x, factor).backward()
        report = ordinary.clip()
        twin.zero_grad()
        assert handle.report is not None
        torch.testing.assert_close(handle.report.norms, report.norms, rtol=1e-5, atol=0)
        if last is not None:
            torch.testing.assert_close(handle.report.coefs, last, rtol=1e-5, atol=0)
        last = report.coefs
    assert last is not None


def test_state_is_saved_by_name() -> None:
    model = make_model()
    clipper = GradClipper(model, distclip.budget(BOUND))
    clipper.in_backward(SGD(model.parameters(), lr=1.0))
    for x, factor in batches(3):
        loss_of(model, x, factor).backward()
    other = GradClipper(make_model(), distclip.budget(BOUND))
    other.load_state_dict(clipper.state_dict())
    assert other.steps == 3
    assert torch.equal(other._engine.state["shares"], clipper._engine.state["shares"])
    assert float(other._engine.state["shares"].sum()) == pytest.approx(1.0)


def _attached(model: nn.Module, optimizer: Optimizer) -> GradClipper:
    clipper = GradClipper(model, distclip.budget(1.0))
    clipper.attach(optimizer)
    return clipper


_REFUSED: dict[str, tuple[Callable[[nn.Module, Optimizer], Any], str]] = {
    "policy": (lambda m, o: GradClipper(m, distclip.global_norm(1.0)).in_backward(o), r"distclip\.budget"),
    "zero": (lambda m, o: GradClipper(m, distclip.budget(), on_nonfinite="zero").in_backward(o), "on_nonfinite='zero'"),
    "attached": (lambda m, o: _attached(m, o).in_backward(o), "attached to optimizers already"),
    "flat": (lambda m, o: GradClipper(m, distclip.budget(), flat_grads=True).in_backward(o), "flat_grads"),
    "missing": (lambda m, o: GradClipper(m, distclip.budget()).in_backward(SGD(m[0].parameters())), r"1\.0\.weight"),
    "foreign": (
        lambda m, o: GradClipper(m, distclip.budget()).in_backward([o, SGD([nn.Parameter(torch.ones(2))])]),
        "SGD steps none of the clipper's parameters",
    ),
    "more": (lambda m, o: GradClipper(m[0], distclip.budget()).in_backward(o), "parameters that the clipper does not"),
    "twice": (lambda m, o: GradClipper(m, distclip.budget()).in_backward([o, SGD(m.parameters())]), "move twice"),
    "closure": (
        lambda m, o: GradClipper(m, distclip.budget()).in_backward(torch.optim.LBFGS(m.parameters())),
        "needs a closure",
    ),
    "no optimizer": (lambda m, o: GradClipper(m, distclip.budget()).in_backward([3]), "not a torch.optim.Optimizer"),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_bad_input_is_refused(case: str) -> None:
    refused, message = _REFUSED[case]
    model = make_model(2)
    with pytest.raises(ArgumentError, match=message):
        refused(model, SGD(model.parameters(), lr=0.1))
    hooks = [hook for param in model.parameters() for hook in (param._post_accumulate_grad_hooks or {}).values()]
    assert not any("InBackward" in hook.__qualname__ for hook in hooks)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: distclip.budget(-1.0), "max_norm"),
        (lambda: distclip.budget(1.0, decay=1.0), "decay"),
        (lambda: distclip.lagged(distclip.agc()), "Euclidean"),
        (lambda: distclip.lagged(distclip.value(1.0)), "Euclidean"),
        (lambda: distclip.lagged(distclip.median_mad(skip=True)), "skips steps"),
        (lambda: distclip.lagged(distclip.global_norm(1.0), budget="much"), "budget='much'"),
        (lambda: distclip.lagged(distclip.group_norm({"a": ("a", 1.0)}), budget=1.0), "divides it"),
        (lambda: distclip.lagged(3.0), "not a policy"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        make()


def test_other_calls_are_refused_while_the_clipper_steps_within_backward() -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), lr=1.0)
    clipper = GradClipper(model, distclip.budget(1.0))
    handle = clipper.in_backward(optimizer)
    for name, call in {
        "step": lambda: clipper.step(optimizer),
        "clip": clipper.clip,
        "attach": lambda: clipper.attach(optimizer),
    }.items():
        with pytest.raises(ArgumentError, match=rf"^{name}: .*Leave out clipper\.{name}"):
            call()
    assert clipper.steps == 0
    handle.remove()
    clipper.clip()


def test_ordinary_ways_to_step_are_refused() -> None:
    model = make_model(1)
    optimizer = SGD(model.parameters(), lr=1.0)
    handle = GradClipper(model, distclip.budget(1.0)).in_backward(optimizer)
    loss_of(model, *batches(1)[0]).backward()
    optimizer.step()  # It finds no gradients, and does nothing.
    with handle.accumulate():
        loss_of(model, *batches(1)[0]).backward()
    before = [whole(param) for param in model.parameters()]
    with pytest.raises(ArgumentError, match="outside of backward"):
        optimizer.step()
    handle.remove()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    optimizer.step()

    attached = GradClipper(model, distclip.budget(1.0))
    attached.attach(optimizer)
    model[0][0].weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(ArgumentError, match=r"clipper\.in_backward"):
        loss_of(model, *batches(1)[0]).backward()


# ---- Several ranks ----


def spread(kind: str) -> tuple[nn.Module, int]:
    """Return a model on all ranks, and the number of ranks that share a batch."""
    size, model = dist.get_world_size(), make_model()
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (size,))
        for block in model:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh), size
    if kind == "tp":
        mesh = init_device_mesh("cpu", (size,))
        for block in model[:-1]:
            parallelize_module(block, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return model, 1
    return DistributedDataParallel(model, bucket_cap_mb=0.0005, gradient_as_bucket_view=kind == "ddp, views"), size


@on_ranks()
@pytest.mark.parametrize(
    ("kind", "num_ranks"), [("fsdp2", 2), ("fsdp2", 4), ("ddp", 2), ("ddp", 4), ("ddp, views", 2), ("tp", 2)]
)
def test_layouts_step_as_one_process(kind: str) -> None:
    model, shares = spread(kind)
    twin = make_model()
    clipper, other = GradClipper(model, distclip.budget(BOUND)), GradClipper(twin, distclip.budget(BOUND))
    handle = clipper.in_backward(AdamW(model.parameters(), lr=0.01))
    expected = other.in_backward(AdamW(twin.parameters(), lr=0.01))
    rank = dist.get_rank() if shares > 1 else 0
    for x, factor in batches(5, spike_at=3):
        loss_of(model, x.chunk(shares)[rank], factor).backward()
        loss_of(twin, x, factor).backward()
        assert all(param.grad is None for param in model.parameters())
        assert handle.report is not None
        assert expected.report is not None
        assert float(handle.report.norm) == pytest.approx(float(expected.report.norm), rel=1e-6)
        assert float(handle.report.coef) == pytest.approx(float(expected.report.coef), rel=1e-6)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(whole(one), two.detach(), rtol=1e-9, atol=1e-12)


@on_ranks(2)
def test_live_gradients_are_those_of_one_unit() -> None:
    """Count the shards of gradients that are alive, each time that FSDP2 has made those of a unit."""
    model = make_model(depth=4)
    mesh = init_device_mesh("cpu", (2,))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    alive: dict[int, tuple[Any, int]] = {}
    peak = largest = 0

    def count(param: Any) -> None:
        nonlocal peak, largest
        # FSDP2 makes the shards of a unit in one storage.
        storage = param.grad.to_local().untyped_storage()
        alive[storage._cdata] = weakref.ref(storage), storage.nbytes()
        largest = max(largest, storage.nbytes())
        peak = max(peak, sum(size for reference, size in alive.values() if reference() is not None))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)
    handle = GradClipper(model, distclip.budget(BOUND)).in_backward(AdamW(model.parameters(), lr=1e-3))
    for x, factor in batches(3):
        loss_of(model, x.chunk(2)[dist.get_rank()], factor).backward()
    assert largest <= peak <= 1.2 * largest
    handle.remove()
    loss_of(model, x.chunk(2)[dist.get_rank()], factor).backward()
    assert peak > 2 * largest, "the test counts nothing"


@on_ranks(2)
@pytest.mark.parametrize("kind", ["fsdp2", "ddp", "tp"])
def test_one_rank_makes_all_skip_the_tensor(kind: str) -> None:
    model, shares = spread(kind)
    clipper = GradClipper(model, distclip.budget(BOUND))
    clipper.in_backward(SGD(model.parameters(), lr=1.0))
    x = batches(1)[0][0].chunk(shares)[dist.get_rank() if shares > 1 else 0]
    loss_of(model, x, 1.0).backward()

    def poison(grad: Tensor) -> Tensor:
        return grad * (math.nan if dist.get_rank() == 1 else 1.0)

    name = "1.0.weight"
    if kind == "fsdp2":
        # FSDP2 makes the gradient of a shard itself: one rank's input is poisoned, and so all tensors.
        x = x * (math.nan if dist.get_rank() == 1 else 1.0)
    else:
        next(param for n, param in model.named_parameters() if n.endswith(name)).register_hook(poison)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        applied = moved(model, loss_of(model, x, 1.0).backward)
    assert any(issubclass(one.category, NonFiniteWarning) for one in caught)
    names = [n.removeprefix("module.") for n, _ in model.named_parameters()]
    still = [n for n, step in zip(names, applied, strict=True) if not step.any()]
    assert still == (names if kind == "fsdp2" else [name])
    assert clipper.skipped == 1
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, clipper._engine.state["shares"].tolist())
    assert all(shares == gathered[0] for shares in gathered)


@on_ranks(2)
def test_a_unit_without_gradient_on_one_rank() -> None:
    """The ranks send equally many messages, and what comes out of order waits until the end."""
    mesh = init_device_mesh("cpu", (2,))
    model = make_model()
    for block in model[:-1]:
        parallelize_module(block, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    clipper = GradClipper(model, distclip.budget(BOUND))
    clipper.in_backward(SGD(model.parameters(), lr=1.0))
    x, factor = batches(1)[0]
    loss_of(model, x, factor).backward()
    # The head is not sharded: one rank leaves it out.
    hidden = model[:-1](x)
    loss = hidden.square().mean() * 50 + (model[-1](hidden.detach()).square().mean() if dist.get_rank() else 0.0)
    applied = moved(model, loss.backward)
    assert norm_of(applied[:-2]) <= BOUND
    assert norm_of(applied[:-2]) > 0.9 * BOUND
    loss_of(model, x, factor).backward()
    assert clipper.steps == 3


@on_ranks(2)
def test_errors_of_one_rank_are_raised_on_all() -> None:
    model, _ = spread("fsdp2")
    clipper = GradClipper(model, distclip.budget(BOUND))
    optimizer: Any = SGD(model.parameters(), lr=1.0)
    with pytest.raises((ArgumentError, distclip.PeerError), match=r"not a torch\.optim\.Optimizer"):
        clipper.in_backward(3 if dist.get_rank() else optimizer)
    clipper.in_backward(optimizer)
    x = batches(1)[0][0].chunk(2)[dist.get_rank()]
    if dist.get_rank():
        optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("broken")))
    with pytest.raises((ValueError, distclip.PeerError), match="broken"):
        loss_of(model, x, 1.0).backward()
