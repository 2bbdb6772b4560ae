"""Count what a step of sharded parameters costs in addition to reading them, because a count has no noise."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distclip
from distclip import reference
from distclip.bench.cases.sharded import tiny
from distclip.bench.race import Options
from distclip.sharding import local_table, parameter_table
from distclip.sharding import table as table_module
from distclip.sharding.layout import Layout
from distclip.sharding.shard import ShardInfos
from distclip.sharding.source import LayoutReader, Request, Source
from distclip.sharding.split_over import mesh_ranks
from tests.ranks import on_ranks
from tests.sharding.checks import CountOperators
from tests.tables.layouts.meshes import world_mesh


def backward(model: nn.Module) -> None:
    model(torch.ones(8, model.width)).square().sum().backward()


@on_ranks(4)
@pytest.mark.parametrize("tensor_parallel", [False, True])
def test_operators_do_not_grow_with_the_number_of_parameters(tensor_parallel: bool) -> None:
    counts = []
    for num_params in (8, 80):
        model = tiny(Options(), num_params, tensor_parallel)
        clipper = distclip.GradClipper(model, distclip.global_norm(1e9))
        for call in (clipper.clip, lambda model=model: distclip.clip_grad_norm_(model.parameters(), 1e9)):
            call()
            with CountOperators() as operators, CommDebugMode() as collectives:
                call()
            assert operators.on_dtensors == 0
            assert collectives.get_total_counts() == 1
            counts.append(operators.count)
    # The part of the parameters that a step compares with their replicas can be empty in a tiny model.
    assert counts[2] <= counts[0] + 2, counts
    assert counts[1] == counts[3], counts


@on_ranks(4)
@pytest.mark.parametrize("tensor_parallel", [False, True])
def test_new_gradients_do_not_change_the_table(tensor_parallel: bool) -> None:
    model = tiny(Options(), 8, tensor_parallel)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clipper = distclip.GradClipper(model, distclip.global_norm(0.1))
    calls: list[int] = []
    real = ShardInfos.__new__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardInfos, "__new__", lambda cls, *args: calls.append(1) or real(cls, *args))
        for step in range(4):
            backward(model)
            whole = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
            report = clipper.step(optimizer)
            torch.testing.assert_close(report.norm.double(), reference.total_norm(whole), rtol=1e-6, atol=0)
            optimizer.zero_grad()
            if step == 0:
                num_calls = len(calls)
    assert len(calls) == num_calls


@on_ranks(2)
def test_flat_grads_keep_dtensors_and_take_the_same_steps() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        parallelize_module(model, world_mesh("tp"), {"0": ColwiseParallel(), "1": RowwiseParallel()})
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    clippers = [distclip.GradClipper(m, distclip.global_norm(0.5), flat_grads=i == 0) for i, m in enumerate(models)]
    for step in range(4):
        for model, optimizer, clipper in zip(models, optimizers, clippers, strict=True):
            model(torch.full((2, 8), 1.0 + step)).square().sum().backward()
            clipper.step(optimizer)
            optimizer.zero_grad(set_to_none=False)
    assert all(isinstance(p.grad, DTensor) for p in models[0].parameters() if isinstance(p, DTensor))
    shards = clippers[0]._engine.table.gradients()
    # Sharded and replicated elements count differently and are stored apart.
    assert shards.merged is not None
    assert len(shards.merged) == 2
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        local = [p.to_local() if isinstance(p, DTensor) else p for p in (one, other)]
        torch.testing.assert_close(*local, rtol=1e-6, atol=1e-7)


@on_ranks(2)
def test_ranks_of_a_mesh_do_not_keep_it_alive() -> None:
    mesh = dist.DeviceMesh("cpu", [0, 1], _init_backend=False)
    assert mesh_ranks(mesh) == mesh_ranks(mesh) == (0, 1)
    gone = weakref.ref(mesh)
    del mesh
    gc.collect()
    assert gone() is None


def test_tables_of_two_world_sizes_share_their_metadata() -> None:
    """Use a cached table with several communicators in turn."""
    table = local_table([nn.Parameter(torch.ones(2))])
    table.tensors[0].grad = torch.ones(2)
    infos = {}
    for world_size in (1, 4, 1, 4):
        table.world_size = world_size
        shards = table.gradients()
        assert shards[0].num_replicas == world_size
        assert infos.setdefault(world_size, shards.infos) is shards.infos


class StripedSource(Source):
    """A kind of sharding as a third party would write it: an attribute has the ranks of the shards."""

    attributes = frozenset({"stripes"})

    def layout_reader(self, request: Request) -> LayoutReader | None:
        """Return a reader of the attribute."""

        def read(name: str, tensor: Tensor, known: Layout | None) -> Layout | None:
            ranks = getattr(tensor, "stripes", None)
            return known if ranks is None else Layout((ranks,), num_pieces=len(ranks))

        return read


def test_new_source_is_one_entry_in_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "SOURCES", (*table_module.SOURCES, StripedSource()))
    striped, plain = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    striped.stripes = (0, 1, 2)
    table = parameter_table([("striped", striped), ("plain", plain)], ())
    table.world_size = 6
    assert table.groups == {(0, 1, 2)}
    assert [shard.num_replicas for shard in table.weights()] == [2.0, 6.0]
