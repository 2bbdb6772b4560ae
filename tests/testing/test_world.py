"""Run programs in simulated worlds, with faults, and check that bad input has clear errors."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distclip
from distclip import PeerError
from distclip.errors import ArgumentError
from distclip.testing import STAGES, InjectedFault, World, WorldHangs


def step(num_steps: int = 1) -> list[float]:
    """Clip and step a stage of a pipeline. Return the norms, and a weight of this rank."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper = distclip.GradClipper([("w", weight)], distclip.global_norm(1.0), split_over=dist.group.WORLD)
    norms = []
    for _ in range(num_steps):
        weight.grad = torch.tensor([1.0 + dist.get_rank()])
        norms.append(round(float(clipper.step(optimizer).norm), 4))
    return [*norms, float(weight.detach())]


def train_shards() -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicas", "shards"))
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
    clipper = distclip.GradClipper(model, distclip.zclip())
    optimizer = torch.optim.AdamW(model.parameters())
    for i in range(2):
        model(torch.full((2, 8), 1.0 + dist.get_rank() + i)).square().sum().backward()
        norm = clipper.step(optimizer).norm
        optimizer.zero_grad()
    return float(norm)


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_ranks_agree_in_every_order(num_ranks: int) -> None:
    expected = round(sum((1.0 + rank) ** 2 for rank in range(num_ranks)) ** 0.5, 4)
    for seed in range(3):
        run = World(num_ranks, seed=seed).run(step).raise_if_failed()
        assert [norm for norm, _ in run.results] == [expected] * num_ranks


def test_fsdp2_trains() -> None:
    runs = [World(4, seed=seed).run(train_shards) for seed in (0, 0, 1)]
    assert len({*runs[0].results, *runs[1].results, *runs[2].results}) == 1
    assert runs[0].schedule == runs[1].schedule != runs[2].schedule
    assert not dist.is_initialized()


@pytest.mark.parametrize("at", ["table", "shards", "measure"])
def test_a_failure_is_raised_on_all_ranks(at: str) -> None:
    run = World(3).fail(rank=1, at=at).late(rank=0, seconds=9.0).run(step)
    assert type(run.errors[1]) is InjectedFault
    assert [type(run.errors[rank]) for rank in (0, 2)] == [PeerError] * 2
    assert run.seconds >= 9.0


def test_every_stage_is_reached() -> None:
    for at in STAGES:
        # After the all-reduce the other ranks go on, as they cannot know.
        run = World(2).kill(rank=0, at=at).run(step)
        assert run.killed == {0}, at
        assert run.stages[0] == at
    assert str(World(2).fail(rank=0, at="measure", error=KeyError("w")).run(step).errors[0]) == "'w'"


def test_faults_of_all_kinds() -> None:
    world = World(4).fail(rank=2, at="measure").late(rank=1).kill(rank=3, at="all_reduce")
    run = world.run(step)
    assert run.killed == {3}
    assert set(run.errors) == {0, 1, 2}
    assert run.results == (None,) * 4
    # A world does not change.
    assert World(4).run(step).raise_if_failed().killed == frozenset()


def test_a_fault_in_the_second_step() -> None:
    run = World(2).fail(rank=0, at="measure", call=2).run(step, 2)
    assert set(run.errors) == {0, 1}


def test_time_is_virtual() -> None:
    def job() -> float:
        begin = time.monotonic()
        time.sleep(0.25 * dist.get_rank())
        return time.monotonic() - begin

    # A real clock never shows these durations exactly.
    assert World(2).run(job).results == (0.0, 0.25)


def test_a_missing_rank_is_named() -> None:
    run = World(3).late(rank=1, seconds=1000.0).run(step)
    assert "rank 1" in str(run.errors[0])
    assert set(run.errors) == {0, 1, 2}


def test_a_world_that_hangs_prints_the_last_stage_of_each_rank() -> None:
    def job() -> None:
        step()
        if dist.get_rank() == 1:
            dist.barrier()

    with pytest.raises(WorldHangs) as caught:
        World(2).run(job)
    text = str(caught.value)
    assert "rank 0: last stage step, has ended" in text
    assert "rank 1: last stage step, waits in barrier" in text


BAD: list[tuple[Any, str]] = [
    (lambda: World(0), "num_ranks=0"),
    (lambda: World(True), "num_ranks=True"),
    (lambda: World(10**9), "MiB"),
    (lambda: World(2).fail(rank=0, at="mesure"), "at='mesure'.*measure"),
    (lambda: World(2).kill(rank=2, at="measure"), "rank=2"),
    (lambda: World(2).late(rank=-1), "rank=-1"),
    (lambda: World(2).late(rank=0, seconds=0.0), "seconds=0.0"),
    (lambda: World(2).fail(rank=0, at="measure", call=0), "call=0"),
]


@pytest.mark.parametrize(("make", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_input(make: Any, text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        make()


def test_worlds_do_not_nest() -> None:
    run = World(1).run(lambda: World(1).run(step))
    assert "another simulated world" in str(run.errors[0])
