"""Planned once, run often: what is kept from one call to the next, and what makes it be found out anew."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import distclip
from distclip import reference
from distclip.sharding import cache, recent_plan
from distclip.sharding.shard import ShardInfos


class Operators(TorchDispatchMode):  # type: ignore[misc]
    """Counts what torch dispatches."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


def made(count: int, numel: int = 3, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Parameters with gradients."""
    parameters = [nn.Parameter(torch.ones(numel, dtype=dtype)) for _ in range(count)]
    for param in parameters:
        param.grad = torch.randn_like(param)
    return parameters


def norm_of(parameters: list[nn.Parameter]) -> Tensor:
    return reference.total_norm([p.grad for p in parameters if p.grad is not None])


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    cache._recent.clear()
    yield
    cache._recent.clear()


def test_a_function_plans_once_for_the_same_parameters() -> None:
    parameters = made(4)
    plans = [recent_plan(p, ()) for p in (parameters, (p for p in parameters), list(parameters))]
    assert len({id(plan.arrangement) for plan in plans}) == 1
    assert recent_plan(parameters[:3], ()).arrangement is not plans[0].arrangement
    model = nn.Linear(2, 2)
    assert recent_plan(model, ()).arrangement is recent_plan(model, ()).arrangement
    pairs = list(model.named_parameters())
    assert recent_plan(pairs, ()).arrangement is recent_plan(iter(pairs), ()).arrangement
    assert recent_plan(pairs, ()).arrangement is not recent_plan(model, ()).arrangement


def test_an_attribute_set_later_is_seen() -> None:
    """Megatron's, or `annotate_`'s."""
    parameters = made(2)
    whole = distclip.clip_grad_norm_(parameters, float("inf"))
    parameters[0].shared = True  # type: ignore[attr-defined]
    # A copy that does not count: of what is left there is one.
    left = distclip.clip_grad_norm_(parameters, float("inf"))
    assert float(left) == pytest.approx(float(norm_of(parameters[1:]))) and left < whole


def test_what_cannot_be_found_again_is_planned_anew() -> None:
    """A parameter listed twice, which counts once, and one of which nobody knows where it lies: at every call."""
    parameters = made(2)
    for _ in range(3):
        norm = distclip.clip_grad_norm_([*parameters, parameters[0]], float("inf"))
        torch.testing.assert_close(norm.double(), norm_of(parameters), rtol=1e-6, atol=0)
    parameters[1]._fsdp_flattened = True  # type: ignore[attr-defined]
    for _ in range(3):
        with pytest.raises(distclip.LayoutError, match="FSDP1"):
            distclip.clip_grad_norm_(parameters, float("inf"))


def test_what_a_plan_keeps_does_not_keep_parameters_alive() -> None:
    model = nn.Linear(3, 3)
    model(torch.ones(1, 3)).sum().backward()
    distclip.clip_grad_norm_(model, 1.0)
    distclip.clip_grad_norm_(model.parameters(), 1.0)
    assert len(cache._recent) == 2
    gone = weakref.ref(model.weight)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert not cache._recent


def test_another_tensor_in_the_place_of_one_that_has_gone() -> None:
    """Identity is all a plan is found by, and an address is soon used again."""
    for i in range(50):
        parameters = made(3, numel=1 + i % 3)
        norm = distclip.clip_grad_norm_(parameters, float("inf"))
        torch.testing.assert_close(norm.double(), norm_of(parameters), rtol=1e-6, atol=0)


def test_only_so_many_plans_are_kept() -> None:
    kept = [made(1) for _ in range(40)]
    for parameters in kept:
        distclip.clip_grad_norm_(parameters, 1.0)
    assert len(cache._recent) == cache._LIMIT


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_clipper_plans_once(set_to_none: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients come and go; where they lie is found out at the first step, and of another set once more."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = distclip.GradClipper(model, distclip.global_norm(0.1))
    lists: list[int] = []
    real = ShardInfos.__new__
    monkeypatch.setattr(ShardInfos, "__new__", lambda cls, *args: lists.append(1) or real(cls, *args))
    for step in range(6):
        # Every other step does without the last layer.
        parts = model if step % 2 else model[:2]
        parts(torch.ones(1, 3)).sum().backward()
        clipper.step(optimizer)
        optimizer.zero_grad(set_to_none=set_to_none)
        if step == 1:
            seen = len(lists)
    assert len(lists) == seen


def test_other_gradients_may_be_missing_every_time() -> None:
    """As many as before, but not the same: each still counts in its own slot."""
    parameters = made(4)
    clipper = distclip.GradClipper([(f"p{i}", p) for i, p in enumerate(parameters)], distclip.per_tensor_norm(1e9))
    whole = [p.grad for p in parameters]
    for missing in (0, 1, 3, 2, 0):
        for i, param in enumerate(parameters):
            param.grad = None if i == missing else whole[i]
        norms = clipper.clip().norms
        expected = [0.0 if i == missing else float(g.double().norm()) for i, g in enumerate(whole) if g is not None]
        assert norms.tolist() == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.parametrize("clip", ["function", "clipper"])
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float32, torch.bfloat16, torch.float16, torch.float64]])
def test_operators_do_not_grow_with_the_number_of_parameters(clip: str, dtypes: list[torch.dtype]) -> None:
    counts = []
    for number in (4, 400):
        parameters = [p for dtype in dtypes for p in made(number, dtype=dtype)]
        clipper = distclip.GradClipper(parameters, distclip.global_norm(1e9))
        call = clipper.clip if clip == "clipper" else lambda p=parameters: distclip.clip_grad_norm_(p, 1e9)
        call()
        with Operators() as operators:
            call()
        counts.append(operators.count)
    assert counts[0] == counts[1] <= 30


class TestFlatGrads:
    """`GradClipper(flat_grads=True)`."""

    def test_one_storage_for_each_dtype(self) -> None:
        parameters = [*made(3, 7), *made(2, 5, torch.bfloat16), nn.Parameter(torch.zeros(2))]
        parameters[0].grad = torch.randn(7, 2).t()[0].contiguous()
        before = [p.grad for p in parameters]
        clipper = distclip.GradClipper(parameters, distclip.global_norm(1e9), flat_grads=True)
        report = clipper.clip()
        torch.testing.assert_close(report.norm.double(), norm_of(parameters), rtol=1e-6, atol=0)
        grads = [p.grad for p in parameters if p.grad is not None]
        assert len({g.untyped_storage().data_ptr() for g in grads}) == 2
        assert all(torch.equal(g, old) for g, old in zip(grads, before, strict=False) if old is not None)
        assert parameters[-1].grad is None

    def test_they_stay_there(self) -> None:
        """Backward accumulates into them, clipping scales them, and they are read as one tensor."""
        torch.manual_seed(0)
        models = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]
        clippers = [distclip.GradClipper(m, distclip.global_norm(0.5), flat_grads=i == 0) for i, m in enumerate(models)]
        for step in range(5):
            for model, optimizer, clipper in zip(models, optimizers, clippers, strict=True):
                model(torch.full((2, 3), float(step))).square().sum().backward()
                clipper.step(optimizer)
                optimizer.zero_grad(set_to_none=False)
        assert len({p.grad.untyped_storage().data_ptr() for p in models[0].parameters() if p.grad is not None}) == 1
        found = clippers[0]._judge.plan.shards(1)
        assert found.merged is not None and len(found.merged) == 1
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)

    def test_each_of_them_can_have_a_norm_of_its_own(self) -> None:
        parameters = made(3)
        named = [(f"p{i}", p) for i, p in enumerate(parameters)]
        clipper = distclip.GradClipper(named, distclip.per_tensor_norm(0.1), flat_grads=True)
        for _ in range(2):
            report = clipper.clip()
        torch.testing.assert_close(report.norms, torch.full((3,), 0.1).double(), rtol=1e-4, atol=0)

    def test_what_is_bad_is_named_all_the_same(self) -> None:
        parameters = made(3)
        clipper = distclip.GradClipper(parameters, distclip.global_norm(1.0), flat_grads=True)
        clipper.clip()
        parameters[1].grad[0] = float("nan")  # type: ignore[index]
        with pytest.warns(distclip.NonFiniteWarning, match=r"parameters\[1\] \(1 NaN\)"):
            clipper.clip()

    def test_gradients_that_lie_together_stay(self) -> None:
        """DDP's buckets: its reducer writes there."""
        flat = torch.randn(6)
        parameters = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
        for i, param in enumerate(parameters):
            param.grad = flat[3 * i : 3 * i + 3]
        clipper = distclip.GradClipper(parameters, distclip.global_norm(1.0), flat_grads=True)
        for _ in range(2):
            clipper.clip()
        assert all(p.grad.untyped_storage().data_ptr() == flat.data_ptr() for p in parameters if p.grad is not None)

    def test_when_they_are_gone_it_says_so_once(self) -> None:
        parameters = made(3)
        clipper = distclip.GradClipper(parameters, distclip.global_norm(1e9), flat_grads=True)
        clipper.clip()
        for param in parameters:
            param.grad = torch.randn(3)
        with pytest.warns(UserWarning, match="set_to_none=False"):
            report = clipper.clip()
        assert torch.equal(report.norm, clipper.clip().norm)
        torch.testing.assert_close(report.norm.double(), norm_of(parameters), rtol=1e-6, atol=0)
