"""Keep annotations and Megatron's attributes where torch makes a new Parameter, and report those that are lost."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.nn.utils import parametrizations, parametrize

import distclip
from distclip import LayoutError
from distclip.sharding import attributes
from tests.ranks import on_ranks
from tests.rig import assert_raises_on_ranks
from tests.sharding.checks import enabled
from tests.tables.layouts.meshes import world_mesh


def deepcopied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def assigned(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    return model


def emptied(model: nn.Module) -> nn.Module:
    model.to_empty(device="meta")
    return model.to_empty(device="cpu")


def widened(model: nn.Module) -> nn.Module:
    """Convert by new Parameters, as torch does for parameters that it cannot change in place."""
    with enabled(torch.__future__.set_overwrite_module_params_on_conversion):
        return model.double()


def swapped(model: nn.Module) -> nn.Module:
    """Convert by exchanging the contents of Parameters, which torch refuses where anything refers to one weakly."""
    with enabled(torch.__future__.set_swap_module_params_on_conversion):
        return model.double()


def parametrized(model: nn.Module) -> nn.Module:
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    return model


def with_adapter(model: nn.Module) -> nn.Module:
    """Wrap a layer in another one, as PEFT does."""
    adapter = nn.Module()
    adapter.base_layer = model[0]
    model[0] = adapter
    return model


def replaced(model: nn.Module) -> nn.Module:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    return model


HOW: dict[str, Callable[[nn.Module], nn.Module]] = {
    made.__name__: made
    for made in (deepcopied, pickled, assigned, emptied, widened, swapped, parametrized, with_adapter, replaced)
}


def build(how: str, *, tags: bool = False) -> nn.Module:
    """Make a model whose first weight is a shard on every rank."""
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    if tags:
        model[0].weight.tensor_model_parallel = True
        model[0].weight.partition_dim = 0
    elif how == "partial":
        distclip.annotate_(model[0].weight, world_mesh("tp"), [Partial()])
    else:
        distclip.annotate_(model[0].weight, world_mesh("tp"), [Shard(0)])
    return model


def norm_of(model: nn.Module, **options: object) -> float:
    """Fill the gradients with 2, and return the norm."""
    for param in model.parameters():
        param.grad = torch.full_like(param, 2.0)
    return float(distclip.clip_grad_norm_(model, math.inf, **options))


@on_ranks(2)
@pytest.mark.parametrize("second", [None, "deepcopied", "assigned", "emptied"])
@pytest.mark.parametrize("first", HOW)
def test_annotations_survive(first: str, second: str | None) -> None:
    model = HOW[first](build(first))
    if first in ("pickled", "emptied", "widened"):
        # torch gives no sign when it loads a parameter, or converts one. The next call notices the new parameter.
        assert norm_of(model) == 16.0
    if second is not None and not {first, second} & {"parametrized"}:
        model = HOW[second](model)
    assert norm_of(model) == 16.0  # 2 · √64, and not 2 · √32
    model[0] = nn.Linear(8, 4, bias=False)
    assert norm_of(model) == pytest.approx(2 * math.sqrt(32)), "a new layer must not inherit a layout"


@on_ranks(2)
@pytest.mark.parametrize("how", [how for how in HOW if how != "swapped"])
def test_attributes_of_megatron_survive_once_they_were_read(how: str) -> None:
    model, axes = build(how, tags=True), {"tp": dist.group.WORLD}
    model.append(nn.Linear(4, 4, bias=False))
    model[1].weight.tensor_model_parallel = False
    expected = 2 * math.sqrt(64 + 16)
    assert norm_of(model, split_over=axes) == pytest.approx(expected)
    assert norm_of(HOW[how](model), split_over=axes) == pytest.approx(expected)


@on_ranks(2)
def test_list_of_parameters_finds_the_new_ones() -> None:
    model = build("emptied")
    for make in (assigned, emptied, replaced):
        make(model)
        params = list(model.parameters())
        params[0].grad = torch.full_like(params[0], 2.0)
        assert float(distclip.clip_grad_norm_(params, math.inf)) == 16.0


@on_ranks(2)
@pytest.mark.parametrize("how", ["deepcopied", "pickled"])
def test_partial_gradients_survive(how: str) -> None:
    assert norm_of(HOW[how](build("partial"))) == pytest.approx(4 * math.sqrt(32))


@on_ranks(4)
@pytest.mark.parametrize("max_scans", [0, 1 << 30])
@pytest.mark.parametrize("annotate_first", [True, False])
def test_annotation_and_fully_shard(annotate_first: bool, max_scans: int) -> None:
    mesh = world_mesh("dp", "tp")
    with pytest.MonkeyPatch.context() as patch:
        distclip.annotate_(nn.Linear(1, 1).weight, mesh, [Replicate(), Replicate()])  # the first one sets the hook
        patch.setattr(attributes, "_MAX_SCANS", max_scans)
        model = nn.Linear(8, 4, bias=False, device="meta")
        if annotate_first:
            distclip.annotate_(model.weight, mesh["tp"], [Shard(0)])
        fully_shard(model, mesh=mesh["dp"])
        if not annotate_first:
            distclip.annotate_(model.weight, mesh["tp"], [Shard(0)])
        model.to_empty(device="cpu")
        nn.init.ones_(model.weight)
        model(torch.ones(1, 8)).sum().backward()
        assert float(distclip.clip_grad_norm_(model, math.inf)) == 8.0  # √64: ones of (8, 8) in four shards


@on_ranks(2)
def test_lost_layouts_are_reported() -> None:
    def resized(model: nn.Module) -> None:
        model[0].weight = nn.Parameter(torch.zeros(6, 8))

    def normalized(model: nn.Module) -> None:
        parametrizations.weight_norm(model[0])

    for lose in (resized, normalized):
        model = build("lost")
        lose(model)
        for call in (
            lambda m: distclip.clip_grad_norm_(m, 1.0),
            lambda m: distclip.GradClipper(m, distclip.global_norm(1.0)),
        ):
            assert_raises_on_ranks(lambda c=call, m=model: c(m), LayoutError, "weight", "annotate_")
    # Other models, also with the same names and shapes, are no concern of it.
    assert norm_of(nn.Sequential(nn.Linear(8, 4, bias=False))) == pytest.approx(2 * math.sqrt(32))


def test_annotation_of_another_job_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    from distclip.sharding.annotations import set_layout
    from distclip.sharding.layout import Layout

    set_layout(weight, Layout(((0, 1),), num_pieces=2))
    with pytest.raises(LayoutError, match="with a mesh of this job"):
        distclip.clip_grad_norm_([weight], 1.0)


def test_copies_share_no_memory_and_keep_ties() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.two = nn.Parameter(torch.ones(2))

    from distclip.sharding.annotations import annotation_of, set_layout
    from distclip.sharding.layout import Layout

    model = Tied()
    set_layout(model.one, Layout(((0,),)))
    other = copy.deepcopy(copy.deepcopy(model))
    assert other.one is other.two
    assert annotation_of(other.one) == annotation_of(model.one)
    assert isinstance(other.one, nn.Parameter)
    values: list[Tensor] = [model.one.data, other.one.data]
    values[0].zero_()
    assert values[1].tolist() == [1.0, 1.0]
