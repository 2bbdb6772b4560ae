"""Step by hand before the clip: it is found, and no other code that writes parameters there is taken for a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import distclip
from distclip import GradClipper, UnclippedStepWarning
from distclip.apply import by_hand
from tests.ranks import on_ranks

Write = Callable[[nn.Module, list[nn.Parameter], list[Tensor]], object]

STEPS: dict[str, Write] = {
    "sgd": lambda model, params, grads: [p.sub_(0.1 * g) for p, g in zip(params, grads, strict=True)],
    "foreach": lambda model, params, grads: torch._foreach_add_(params, grads, alpha=-0.1),
    "decay": lambda model, params, grads: [p.mul_(0.99).sub_(0.01 * g) for p, g in zip(params, grads, strict=True)],
    "adam": lambda model, params, grads: [
        p.sub_(1e-3 * g / (g.abs() + 1e-8)) for p, g in zip(params, grads, strict=True)
    ],
    "data": lambda model, params, grads: [p.data.add_(g, alpha=-0.1) for p, g in zip(params, grads, strict=True)],
    "other data": lambda model, params, grads: [
        setattr(p, "data", p.data - 0.1 * g) for p, g in zip(params, grads, strict=True)
    ],
}

# Code between backward and the clip that makes no step.
WRITES: dict[str, Write] = {
    "exchange for an average": lambda model, params, _: [p.lerp_(torch.randn_like(p), 0.001) for p in params],
    "exchange and back": lambda model, params, _: [p.add_(1.0).sub_(1.0) for p in params],
    "ascend along the gradient": lambda model, params, grads: torch._foreach_add_(params, grads, alpha=0.1),
    "clamp": lambda model, params, _: [p.clamp_(-0.1, 0.1) for p in params],
    "zero": lambda model, params, _: [p.zero_() for p in params],
    "initialize": lambda model, params, _: [nn.init.normal_(p) for p in params],
    "scale": lambda model, params, _: [p.div_(p.norm()) for p in params],
    "prune": lambda model, params, _: [p.mul_(p.abs() > 0.1) for p in params],
    "round": lambda model, params, _: [p.copy_(p.bfloat16()) for p in params],
    "load": lambda model, params, _: model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()}),
}


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def find(model: nn.Module, between: Write, after: Write, *, function: bool = False) -> list[str]:
    """Train for some steps, and return the texts of the warnings about unclipped steps."""
    params = list(model.parameters())
    clip = (lambda: distclip.clip_grad_norm_(model, 1.0)) if function else GradClipper(model, distclip.adagc()).clip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            model.zero_grad()
            model(torch.randn(8, 5, dtype=params[0].dtype)).square().sum().backward()
            with torch.no_grad():
                for write in (between, lambda *args: clip(), after):
                    write(model, params, [p.grad for p in params if p.grad is not None])
    return [str(one.message) for one in caught if one.category is UnclippedStepWarning]


def nothing(*args: object) -> None:
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_by_hand_before_the_clip_warns_once(step: str, dtype: torch.dtype) -> None:
    if (step, dtype) in (("decay", torch.bfloat16), ("adam", torch.bfloat16)):
        pytest.skip("the rounding of bfloat16 hides such a small step")
    model = make_model(dtype)
    (text,) = find(model, STEPS[step], nothing)
    assert "a step by hand" in text
    # The hooks of the backward pass are gone.
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


def test_a_function_finds_it_from_its_second_call_on() -> None:
    assert len(find(make_model(), STEPS["sgd"], nothing, function=True)) == 1


def test_parameters_are_watched_again_after_many_others_were() -> None:
    others: list[GradClipper] = []

    def watch_others(*args: object) -> None:
        if not others:
            others.extend(GradClipper(make_model(), distclip.adagc()) for _ in range(20))

    def step_later(*args: object) -> None:
        if others:
            STEPS["sgd"](*args)  # type: ignore[arg-type]

    assert len(find(make_model(), step_later, watch_others)) == 1


@pytest.mark.parametrize("write", WRITES)
def test_other_writes_are_silent(write: str) -> None:
    for step in STEPS:
        assert find(make_model(), WRITES[write], STEPS[step]) == []
        assert find(make_model(), nothing, lambda *args, s=step: (STEPS[s](*args), WRITES[write](*args))) == []


def test_a_parameter_at_the_address_of_an_earlier_one_is_looked_at() -> None:
    ids: list[int] = []
    # Models are in cycles of references, so that it depends on the garbage collector when an address is used again.
    while len(set(ids)) == len(ids):
        model = nn.Linear(5, 3, bias=False)
        ids.append(id(model.weight))
        assert len(find(model, STEPS["other data"], nothing)) == 1
        assert len(ids) < 1000
        del model


def test_many_watched_parameters_and_one_at_an_earlier_address_warn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_hand, "_records", {})
    model, others = make_model(), [nn.Parameter(torch.ones(2)) for _ in range(by_hand._MAX_WATCHED)]
    for other in others:
        by_hand.watch_backward(other)
    # The oldest record is that of a parameter that is gone, and had the id of one of the model.
    (_, oldest), *records = by_hand._records.items()
    monkeypatch.setattr(by_hand, "_records", dict([(id(model[0].weight), oldest), *records]))
    assert len(find(model, STEPS["sgd"], nothing)) == 1


@on_ranks(2)
@pytest.mark.parametrize("step", ["sgd", "data", "adam"])
def test_shards_of_fsdp2(step: str) -> None:
    model = make_model()
    fully_shard(model)
    assert len(find(model, STEPS[step], nothing)) == 1
    assert find(model, nothing, STEPS[step]) == []


@pytest.mark.parametrize("radius", [0.5, 0.05, 0.002])
def test_a_restored_perturbation_is_silent(radius: float) -> None:
    model = make_model()
    params = list(model.parameters())

    def restore(model: nn.Module, params: list[nn.Parameter], grads: list[Tensor]) -> None:
        # Sharpness-aware minimization: the second backward pass is at perturbed parameters.
        ascents = [radius * grad / grad.norm() for grad in grads]
        torch._foreach_add_(params, ascents)
        model.zero_grad()
        with torch.enable_grad():
            model(torch.randn(8, 5)).square().sum().backward()
        torch._foreach_sub_(params, ascents)

    assert find(model, restore, STEPS["sgd"]) == []
    assert params[0].grad is not None
