"""Step what was not measured, or measure what is not stepped: refused on all ranks, and nothing else is."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import distclip
from distclip import ArgumentError, GradClipper, UnclippedStepWarning
from tests.ranks import on_ranks
from tests.rig import assert_raises_on_ranks, make_scaler, to_bytes
from tests.tables.layouts.tensors import plain_param


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def backward(model: nn.Module, factor: float = 1.0) -> None:
    (factor * model(torch.ones(2, 4)).square().sum()).backward()


def clipper_of(parameters: Any, **options: Any) -> GradClipper:
    return GradClipper(parameters, distclip.global_norm(1.0), **options)


class Low(nn.Module):
    """A linear layer with an adapter, as parameter-efficient training injects it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def assign(model: nn.Sequential) -> nn.Module:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    return model


def materialize(model: nn.Sequential) -> nn.Module:
    model.to_empty(device="cpu")
    for param in model.parameters():
        nn.init.ones_(param)
    return model


def inject(model: nn.Sequential) -> nn.Module:
    model[0], model[2] = Low(model[0]), Low(model[2])
    return model


def exchange(model: nn.Sequential) -> nn.Module:
    model[2] = nn.Linear(6, 2)
    return model


def parametrize(model: nn.Sequential) -> nn.Module:
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    return model


CHANGES: dict[str, tuple[Callable[[nn.Sequential], nn.Module], str]] = {
    "assign": (assign, "created again"),
    "to_empty": (materialize, "created again"),
    "adapters": (inject, "does not have"),
    "exchange": (exchange, "created again"),
    "to": (lambda model: model.double().float(), ""),
    "freeze": (lambda model: model[0].requires_grad_(False) and model, ""),
    "parametrize": (parametrize, ""),
    "load": (lambda model: model.load_state_dict(model.state_dict()) and model, ""),
}
"""Changes of a model after its clipper, and a word of the error, or "" without an error."""


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("how", ["step", "clip", "attach"])
@pytest.mark.parametrize("pass_module", [True, False])
def test_parameters_that_change_after_the_clipper(kind: str, how: str, pass_module: bool) -> None:
    change, words = CHANGES[kind]
    with torch.device("meta" if kind == "to_empty" else "cpu"):
        model = make_model()
    clipper = clipper_of(model if pass_module else list(model.named_parameters()))
    model = change(model)
    optimizer = SGD(model.parameters(), lr=1.0)
    step: Callable[[], Any] = {
        "step": lambda: clipper.step(optimizer),
        "clip": clipper.clip,
        "attach": optimizer.step,
    }[how]
    if how == "attach":
        clipper.attach(optimizer)
        step = optimizer.step
    backward(model)
    before = to_bytes(model.parameters())
    if how == "clip" and not pass_module:
        # Nothing shows that the parameters belong together.
        return
    if words:
        with pytest.raises(ArgumentError, match=words if pass_module else "does not have") as caught:
            step()
        assert to_bytes(model.parameters()) == before
        assert "rebind" in str(caught.value)
        clipper.rebind(model)
    report = step()
    if how == "step":
        moved = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert float(moved.norm()) <= 1.0 + 1e-5
        assert float(report.norm) > 0


def add_group(first: nn.Parameter, second: nn.Parameter) -> Optimizer:
    optimizer = SGD([first], lr=1.0)
    optimizer.add_param_group({"params": [second]})
    return optimizer


def replace_in_place(first: nn.Parameter, second: nn.Parameter) -> Optimizer:
    optimizer = SGD([first, nn.Parameter(torch.zeros(4))], lr=1.0)
    optimizer.param_groups[0]["params"][1] = second
    return optimizer


def named(first: nn.Parameter, second: nn.Parameter) -> Optimizer:
    return SGD([("one", first), ("two", second)], lr=1.0)


@on_ranks(2)
@pytest.mark.parametrize("everyone", [True, False])
@pytest.mark.parametrize("make", [add_group, replace_in_place, named])
def test_steps_more_than_the_clipper_has(make: Callable[..., Optimizer], everyone: bool) -> None:
    """A parameter that only the optimizer has is refused on all ranks, also if one rank alone has it."""
    first, second = (nn.Parameter(torch.zeros(4)) for _ in range(2))
    clipper, optimizer = clipper_of([("first", first)], split_over=dist.group.WORLD), make(first, second)
    first.grad = torch.ones(4)
    clipper.step(optimizer)
    if everyone or dist.get_rank() == 1:
        second.grad = torch.ones(4)
    first.grad = torch.ones(4)
    names = {add_group: "parameter 0 of group 1", replace_in_place: "parameter 1 of group 0", named: "two"}
    words = [f"{names[make]} (4,)", "partial=True"]
    for _ in range(2):
        assert_raises_on_ranks(lambda: clipper.step(optimizer), ArgumentError, *words, unchanged=first.grad)
    assert clipper_of([("first", first)], split_over=dist.group.WORLD, partial=True).step(optimizer).clipped
    second.grad = None
    clipper.step(optimizer)


@on_ranks(2)
@pytest.mark.parametrize("everyone", [True, False])
def test_gradient_that_no_optimizer_steps(everyone: bool) -> None:
    body, head = (nn.Parameter(torch.zeros(4)) for _ in range(2))
    clipper = clipper_of([("body", body), ("head", head)], split_over=dist.group.WORLD)
    optimizer, other = SGD([head], lr=1.0), SGD([body], lr=1.0)
    head.grad, body.grad = torch.ones(4), torch.ones(4) * (everyone or dist.get_rank() == 1)
    # It is zero on the other rank, as zero_grad(set_to_none=False) leaves it.
    assert_raises_on_ranks(
        lambda: clipper.step(optimizer), ArgumentError, "body", "whose gradients", unchanged=head.grad
    )
    clipper.step([optimizer, other])
    body.grad.zero_()
    head.grad = torch.ones(4)
    assert float(clipper.step(optimizer).norm) == pytest.approx(8**0.5)


class Copies(Optimizer):
    """Steps float32 copies of its parameters, whose gradients it makes in its step."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        super().__init__([nn.Parameter(param.detach().float()) for param in params], {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param, copied in zip(self.params, self.param_groups[0]["params"], strict=True):
            copied -= self.param_groups[0]["lr"] * param.grad.float()
            param.copy_(copied)


class Wrapped:
    """An optimizer that holds another one, and shows its groups."""

    def __init__(self, *inner: Optimizer) -> None:
        self.inner = inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.inner for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.inner:
            optimizer.step()


def half() -> tuple[nn.Module, Any]:
    model = make_model().bfloat16()
    return model, Copies(list(model.parameters()))


def with_frozen() -> tuple[nn.Module, Any]:
    model = make_model()
    model[0].requires_grad_(False)
    return model, AdamW(model.parameters())


def several() -> tuple[nn.Module, Any]:
    model = make_model()
    return model, [SGD(model[0].parameters(), lr=0.1), AdamW(model[2].parameters())]


def wrapped() -> tuple[nn.Module, Any]:
    model = make_model()
    return model, Wrapped(SGD(model[0].parameters(), lr=0.1), AdamW(model[2].parameters()))


def tied() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model, SGD(model.parameters(), lr=0.1)


def groups() -> tuple[nn.Module, Any]:
    model = make_model()
    return model, SGD([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.2}], lr=0.1)


def compiled_name() -> tuple[nn.Module, Any]:
    model = torch.compile(make_model(), backend="eager")
    return model, SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("make", [half, with_frozen, several, wrapped, tied, groups, compiled_name])
def test_no_false_alarms(make: Callable[[], tuple[nn.Module, Any]]) -> None:
    model, optimizer = make()
    clipper = clipper_of(model)
    trainable = clipper_of([p for p in model.parameters() if p.requires_grad])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(8):
            model.zero_grad(set_to_none=step % 2 == 0)
            dtype = next(model.parameters()).dtype
            model(torch.ones(2, 4, dtype=dtype)).square().sum().backward()
            (clipper if step % 3 else trainable).step(optimizer)


@on_ranks(2)
def test_no_false_alarms_of_wrappers_and_sharded_optimizers() -> None:
    with warnings.catch_warnings():
        # The package scripts functions when it is imported, which torch has deprecated.
        warnings.simplefilter("ignore")
        from torch.distributed.optim import ZeroRedundancyOptimizer

    for make in (
        lambda model: (model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)),
        lambda model: (model, SGD(model.parameters(), lr=0.1)),
    ):
        model, optimizer = make(DistributedDataParallel(make_model()))
        clipper = clipper_of(model)
        for _ in range(3):
            optimizer.zero_grad()
            backward(model)
            assert float(clipper.step(optimizer).norm) > 0


@on_ranks(2)
@pytest.mark.parametrize("how", ["step", "clip"])
def test_clipper_before_sharding(how: str) -> None:
    model = make_model()
    clipper = clipper_of(model)
    fully_shard(model)
    optimizer = SGD(model.parameters(), lr=1.0)
    backward(model)
    call = clipper.clip if how == "clip" else lambda: clipper.step(optimizer)
    assert_raises_on_ranks(call, ArgumentError, "fully_shard", "0.weight", unchanged=model[0].weight.grad.to_local())
    clipper.rebind(model)
    call()


def test_two_calls_in_one_round_of_a_scaler() -> None:
    """Optimizers that step one by one with a scaler cover the gradients together, or the next round raises."""
    model = make_model()
    optimizers = [SGD(model[0].parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)]
    clipper, scaler = clipper_of(model), make_scaler()

    def train(*which: int, factor: float = 1.0) -> None:
        model.zero_grad()
        backward(model, factor * scaler.get_scale())
        for i in which:
            clipper.step(optimizers[i], scaler)
        scaler.update()

    for _ in range(2):
        train(0, 1)
        train(1, 0)
    # A step that is skipped need not be finished.
    train(0, factor=float("inf"))
    train(0, 1)
    train(0)
    with pytest.raises(ArgumentError, match=r"2\.weight, 2\.bias"):
        train(0, 1)
    train(0, 1)


def test_optimizer_that_needs_a_closure() -> None:
    model = make_model()
    backward(model)
    with pytest.raises(ArgumentError, match=r"attach\(optimizer\)"):
        clipper_of(model).step(torch.optim.LBFGS(model.parameters()))


def step_in_hook(model: nn.Module) -> None:
    """Step every parameter as soon as it has a gradient."""
    optimizers = {param: SGD([param], lr=1e-4) for param in model.parameters()}

    def step(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)


def test_no_gradients_while_parameters_change() -> None:
    model = make_model()
    step_in_hook(model)
    clipper = clipper_of(model)
    messages: list[str] = []
    for _ in range(9):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            backward(model)
            clipper.clip()
        messages += [str(w.message) for w in caught if w.category is UnclippedStepWarning]
    assert len(messages) == 1
    assert "within backward" in messages[0]


def idle() -> Iterator[nn.Module]:
    """A model that does not train, and one that trains every other step."""
    yield make_model()
    model = make_model()
    for _ in range(4):
        yield model
        yield model
        backward(model)
        yield model
        SGD(model.parameters(), lr=0.1).step()
        model.zero_grad()


def test_no_warning_if_nothing_changes() -> None:
    clippers: dict[int, GradClipper] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in idle():
            for _ in range(1 if clippers else 6):
                clippers.setdefault(id(model), clipper_of(model)).clip()


def test_keeps_no_module_alive() -> None:
    model = make_model()
    clipper, reference = clipper_of(model), weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    clipper.clip()


@on_ranks(2)
def test_rank_without_optimizers() -> None:
    own = [("weight", plain_param(torch.ones(3)))] if dist.get_rank() == 0 else []
    clipper = clipper_of(own, split_over=dist.group.WORLD)
    clipper.step([SGD([own[0][1]], lr=0.1)] if own else [])
