"""Keep shard tables from one call to the next, and drop them when parameters change."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import reference
from distclip.sharding import cache, cached_table
from distclip.sharding.shard import ShardInfos
from tests.ranks import on_ranks
from tests.sharding.checks import CountOperators, enabled


def make_params(count: int, numel: int = 3, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Make parameters with gradients."""
    parameters = [nn.Parameter(torch.ones(numel, dtype=dtype)) for _ in range(count)]
    for param in parameters:
        param.grad = torch.randn_like(param)
    return parameters


def expected_norm(parameters: list[nn.Parameter]) -> Tensor:
    return reference.total_norm([p.grad for p in parameters if p.grad is not None])


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    cache.forget_all()
    yield
    cache.forget_all()


def test_functions_reuse_the_table_of_the_same_parameters() -> None:
    parameters = make_params(4)
    plans = [cached_table(p, ()) for p in (parameters, (p for p in parameters), list(parameters))]
    assert len({id(plan.metadata) for plan in plans}) == 1
    assert cached_table(parameters[:3], ()).metadata is not plans[0].metadata
    model = nn.Linear(2, 2)
    assert cached_table(model, ()).metadata is cached_table(model, ()).metadata
    pairs = list(model.named_parameters())
    assert cached_table(pairs, ()).metadata is cached_table(iter(pairs), ()).metadata
    assert cached_table(pairs, ()).metadata is not cached_table(model, ()).metadata


def test_attribute_set_between_calls_counts() -> None:
    """Set an attribute of Megatron between two calls."""
    parameters = make_params(2)
    whole = distclip.clip_grad_norm_(parameters, float("inf"))
    parameters[0].shared = True  # type: ignore[attr-defined]
    # A replica that does not count leaves the other parameter.
    rest = distclip.clip_grad_norm_(parameters, float("inf"))
    assert float(rest) == pytest.approx(float(expected_norm(parameters[1:])))
    assert rest < whole


def test_duplicates_and_unknown_layouts_are_checked_at_every_call() -> None:
    """List a parameter twice, which counts once, and then pass one whose layout is unknown."""
    parameters = make_params(2)
    for _ in range(3):
        norm = distclip.clip_grad_norm_([*parameters, parameters[0]], float("inf"))
        torch.testing.assert_close(norm.double(), expected_norm(parameters), rtol=1e-6, atol=0)
    parameters[1]._fsdp_flattened = True  # type: ignore[attr-defined]
    for _ in range(3):
        with pytest.raises(distclip.LayoutError, match="FSDP1"):
            distclip.clip_grad_norm_(parameters, float("inf"))


def test_table_does_not_keep_parameters_alive() -> None:
    model = nn.Linear(3, 3)
    model(torch.ones(1, 3)).sum().backward()
    distclip.clip_grad_norm_(model, 1.0)
    distclip.clip_grad_norm_(model.parameters(), 1.0)
    assert len(cache._entries) == 2
    gone = weakref.ref(model.weight)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert not cache._entries


@on_ranks(2)
def test_parameters_of_fsdp2_can_be_converted_after_a_call() -> None:
    """Convert a model whose parameters are DTensors, which torch refuses where something refers to them weakly."""
    model = nn.Linear(4, 2)
    fully_shard(model)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        norms = [float(distclip.clip_grad_norm_(p, float("inf"))) for p in (model, list(model.parameters()))]
        assert norms == pytest.approx([10**0.5] * 2)
        entries = len(cache._entries)
        model.zero_grad()
        model.to(dtype)
        # The old local tensors are gone.
        assert len(cache._entries) < entries


def test_parameters_can_be_swapped_after_a_call() -> None:
    with enabled(torch.__future__.set_swap_module_params_on_conversion):
        model = nn.Linear(3, 3)
        model.weight.grad = torch.ones(3, 3)
        assert float(distclip.clip_grad_norm_(model, 1.0)) == 3.0
        model.zero_grad()
        assert model.double().weight.dtype == torch.float64


def test_new_tensor_at_the_address_of_a_deleted_one() -> None:
    """Delete and create parameters, because tables are found by identity and addresses are reused."""
    for i in range(50):
        parameters = make_params(3, numel=1 + i % 3)
        norm = distclip.clip_grad_norm_(parameters, float("inf"))
        torch.testing.assert_close(norm.double(), expected_norm(parameters), rtol=1e-6, atol=0)


def test_number_of_tables_is_limited() -> None:
    models = [make_params(1) for _ in range(40)]
    for parameters in models:
        distclip.clip_grad_norm_(parameters, 1.0)
    assert len(cache._entries) == cache._MAX_ENTRIES


@pytest.mark.parametrize("set_to_none", [True, False])
def test_clipper_describes_each_set_of_gradients_once(set_to_none: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alternate between two sets of gradients, each of which is described at its first step."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = distclip.GradClipper(model, distclip.global_norm(0.1))
    calls: list[int] = []
    real = ShardInfos.__new__
    monkeypatch.setattr(ShardInfos, "__new__", lambda cls, *args: calls.append(1) or real(cls, *args))
    for step in range(6):
        # Every other step does not use the last layer.
        parts = model if step % 2 else model[:2]
        parts(torch.ones(1, 3)).sum().backward()
        clipper.step(optimizer)
        optimizer.zero_grad(set_to_none=set_to_none)
        if step == 1:
            num_calls = len(calls)
    assert len(calls) == num_calls


def test_other_gradients_are_missing_at_each_step() -> None:
    """Remove another gradient at each step, so that their number is the same and their slots are not."""
    parameters = make_params(4)
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
        parameters = [p for dtype in dtypes for p in make_params(number, dtype=dtype)]
        clipper = distclip.GradClipper(parameters, distclip.global_norm(1e9))
        call = clipper.clip if clip == "clipper" else lambda p=parameters: distclip.clip_grad_norm_(p, 1e9)
        call()
        with CountOperators() as operators:
            call()
        counts.append(operators.count)
    assert counts[0] == counts[1] <= 30


def test_module_with_a_renamed_part_has_a_new_table() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert cached_table(model, ()).names == ["0.weight", "0.bias"]
    part = model._modules.pop("0")
    model.add_module("head", part)
    assert cached_table(model, ()).names == ["head.weight", "head.bias"]


@on_ranks(2)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp1"])
def test_module_with_a_part_that_was_wrapped_in_place_has_a_new_table(wrapper: str) -> None:
    """Clip before and after, because the first call leaves a table of plain parameters in the cache."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    assert cached_table(model, ()).groups == frozenset()
    if wrapper == "ddp":
        model[1] = DistributedDataParallel(model[1])
    else:
        model[1] = FullyShardedDataParallel(model[1], device_id=torch.device("cpu"), use_orig_params=True)
    table = cached_table(model, ())
    assert table.groups == {(0, 1)}
    assert table.metadata is cached_table(model, ()).metadata
    # A part that is wrapped again over other ranks gets another table too.
    if wrapper == "ddp":
        alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
        model[1] = DistributedDataParallel(model[1].module, process_group=alone)
        assert cached_table(model, ()).groups == {(dist.get_rank(),)}


class TestFlatGrads:
    """`GradClipper(flat_grads=True)`."""

    def test_stores_gradients_of_a_dtype_together(self) -> None:
        parameters = [*make_params(3, 7), *make_params(2, 5, torch.bfloat16), nn.Parameter(torch.zeros(2))]
        parameters[0].grad = torch.randn(7, 2).t()[0].contiguous()
        before = [p.grad for p in parameters]
        clipper = distclip.GradClipper(parameters, distclip.global_norm(1e9), flat_grads=True)
        report = clipper.clip()
        torch.testing.assert_close(report.norm.double(), expected_norm(parameters), rtol=1e-6, atol=0)
        grads = [p.grad for p in parameters if p.grad is not None]
        assert len({g.untyped_storage().data_ptr() for g in grads}) == 2
        assert all(torch.equal(g, old) for g, old in zip(grads, before, strict=False) if old is not None)
        assert parameters[-1].grad is None

    def test_backward_accumulates_into_the_flat_storage(self) -> None:
        """Train with one tensor for all gradients, in comparison with separate ones."""
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
        shards = clippers[0]._engine.table.gradients()
        assert shards.merged is not None
        assert len(shards.merged) == 1
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)

    def test_measures_one_norm_per_tensor(self) -> None:
        parameters = make_params(3)
        named = [(f"p{i}", p) for i, p in enumerate(parameters)]
        clipper = distclip.GradClipper(named, distclip.per_tensor_norm(0.1), flat_grads=True)
        for _ in range(2):
            report = clipper.clip()
        torch.testing.assert_close(report.norms, torch.full((3,), 0.1).double(), rtol=1e-4, atol=0)

    def test_names_the_tensor_with_a_nan(self) -> None:
        parameters = make_params(3)
        clipper = distclip.GradClipper(parameters, distclip.global_norm(1.0), flat_grads=True)
        clipper.clip()
        parameters[1].grad[0] = float("nan")  # type: ignore[index]
        with pytest.warns(distclip.NonFiniteWarning, match=r"parameters\[1\] \(1 NaN\)"):
            clipper.clip()

    def test_keeps_gradients_that_share_a_storage(self) -> None:
        """Keep gradients in a bucket of DDP, into which its reducer writes."""
        flat = torch.randn(6)
        parameters = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
        for i, param in enumerate(parameters):
            param.grad = flat[3 * i : 3 * i + 3]
        clipper = distclip.GradClipper(parameters, distclip.global_norm(1.0), flat_grads=True)
        for _ in range(2):
            clipper.clip()
        assert all(p.grad.untyped_storage().data_ptr() == flat.data_ptr() for p in parameters if p.grad is not None)

    def test_warns_once_if_gradients_were_replaced(self) -> None:
        parameters = make_params(3)
        clipper = distclip.GradClipper(parameters, distclip.global_norm(1e9), flat_grads=True)
        clipper.clip()
        for param in parameters:
            param.grad = torch.randn(3)
        with pytest.warns(UserWarning, match="set_to_none=False"):
            report = clipper.clip()
        assert torch.equal(report.norm, clipper.clip().norm)
        torch.testing.assert_close(report.norm.double(), expected_norm(parameters), rtol=1e-6, atol=0)
