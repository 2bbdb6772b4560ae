"""What a clipper remembers: taken up where it was left, on another number of ranks and in another layout too."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import distclip
from distclip import ArgumentError, GradClipper, MedianMAD, NormPolicy
from tests.ranks import World, everywhere
from tests.rig import NAN, bits, build, quietly
from tests.tables.layouts.model_parallel import axis, known
from tests.tables.layouts.pipeline import plain

ADAPTIVE: dict[str, Callable[[], NormPolicy]] = {
    "autoclip": lambda: distclip.autoclip(50, window=5),
    "zclip": lambda: distclip.zclip(1.0, warmup=3, restart_after=4),
    "adagc": lambda: distclip.adagc(warmup=3, restart_after=2),
    "ema": lambda: distclip.ema(1.0, warmup=3, restart_after=4),
    "median_mad": lambda: NormPolicy(MedianMAD(0.5, window=5, warmup=2), per="tensor"),
    "rows": lambda: distclip.zclip(1.0, warmup=3, per="row", restart_after=4),
}


def check_interrupted(name: str, policy: str) -> None:
    """Twelve steps, with one skipped among them, against the same ones saved and taken up after the seventh."""

    def trace(clipper: GradClipper, rig: Any, steps: range) -> list[bytes]:
        coefs = []
        for step in steps:
            # Norms that scatter, so that the rules have something to do.
            rig.fill(step, 1.0 + step % 3)
            if step == 4:
                rig.poison(0, NAN)
            coefs.append(clipper.clip().coefs)
        return bits(coefs)

    rigs = [build(name) for _ in range(3)]
    clippers = [rig.clipper(ADAPTIVE[policy]()) for rig in rigs]
    with warnings.catch_warnings():
        # A rule that clips half of the steps says so.
        warnings.simplefilter("ignore")
        straight = trace(clippers[0], rigs[0], range(12))
        before = trace(clippers[1], rigs[1], range(7))
        state = copy.deepcopy(clippers[1].state_dict())
        # What was saved is not moved by going on.
        assert trace(clippers[1], rigs[1], range(7, 12)) == straight[7:]
        clippers[2].load_state_dict(state)
        assert before + trace(clippers[2], rigs[2], range(7, 12)) == straight
    counts = [{key: int(n) for key, n in clipper.state_dict()["counts"].items()} for clipper in clippers]
    assert counts[0] == counts[1] == counts[2]
    assert (counts[0]["steps"], counts[0]["skipped"], counts[0]["in_a_row"]) == (12, 1, 0)
    assert len(set(straight[3:])) > 1, "nothing was ever clipped"
    assert flat(clippers[0]) == flat(clippers[2])
    assert everywhere(flat(clippers[2])) == [flat(clippers[2])] * dist.get_world_size()


def flat(clipper: GradClipper) -> dict[str, dict[str, bytes]]:
    """By name, what is remembered, bit by bit."""
    state = clipper.state_dict()["state"]
    return {name: dict(zip(values, bits(values.values()), strict=True)) for name, values in state.items()}


@pytest.mark.parametrize("policy", ADAPTIVE)
@pytest.mark.parametrize("name", ["tp", "stages_fsdp2"])
def test_interrupted(world: Callable[[int], World], name: str, policy: str) -> None:
    world(4).run(check_interrupted, name=name, policy=policy)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "megatron", "stages", "experts"])
def test_interrupted_in_twos(world: Callable[[int], World], name: str) -> None:
    for policy in ("adagc", "rows"):
        world(2).run(check_interrupted, name=name, policy=policy)


SHAPES = {"0.weight": (6, 8), "0.bias": (6,), "1.weight": (4, 6), "1.bias": (4,)}


def laid_out(layout: str) -> tuple[list[tuple[str, nn.Parameter]], Any]:
    """The same model by other means: copies, FSDP2, or a layer per pipeline stage."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    if layout == "fsdp2":
        fully_shard(model)
    if layout != "stages":
        return list(model.named_parameters()), None
    mesh = axis("pp", "dp")
    stage = str(mesh.get_local_rank("pp"))
    return [(name, plain(known(*shape))) for name, shape in SHAPES.items() if name[0] == stage], mesh["pp"]


def fill(named: list[tuple[str, nn.Parameter]], step: int) -> None:
    for name, param in named:
        whole = known(*SHAPES[name], seed=10 * step + list(SHAPES).index(name))
        mesh, placements = getattr(param, "device_mesh", None), getattr(param, "placements", None)
        param.grad = dist.tensor.distribute_tensor(whole, mesh, placements, src_data_rank=None) if mesh else whole


def clipper_of(layout: str, per: str) -> tuple[GradClipper, list[tuple[str, nn.Parameter]]]:
    named, split_over = laid_out(layout)
    rows = NormPolicy(MedianMAD(0.1, window=4, warmup=2), per="row")
    policy = distclip.adagc(warmup=2) if per == "tensor" else rows
    return GradClipper(named, policy, split_over=split_over), named


def save(folder: str, layout: str, per: str) -> dict[str, dict[str, Tensor]]:
    clipper, named = clipper_of(layout, per)
    for step in range(5):
        fill(named, step)
        clipper.clip()
    dcp.save({"clipper": clipper}, checkpoint_id=folder)
    return clipper.state_dict()["state"]


def load(folder: str, layout: str, per: str) -> tuple[dict[str, dict[str, Tensor]], int, Tensor]:
    """What was loaded, the number of steps, and the next coefficients by slot."""
    clipper, named = clipper_of(layout, per)
    dcp.load({"clipper": clipper}, checkpoint_id=folder)
    state = clipper.state_dict()
    fill(named, 5)
    coefs = dict(zip(clipper.slots, clipper.clip().coefs.tolist(), strict=True))
    return state["state"], int(state["counts"]["steps"]), coefs


@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize("saved_as", ["fsdp2", "stages"])
def test_elsewhere(world: Callable[[int], World], saved_as: str, per: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        saved = world(4).run(save, folder=str(Path(folder)), layout=saved_as, per=per)
        nexts = []
        for size, layout in ((2, "fsdp2"), (2, "ddp"), (2, "stages"), (4, "stages"), (4, "fsdp2")):
            for state, steps, coefs in world(size).run(load, folder=folder, layout=layout, per=per):
                assert steps == 5
                assert set(state) == set(SHAPES) == set(saved[0])
                for name, values in state.items():
                    for key, value in values.items():
                        assert torch.equal(value, saved[0][name][key]), f"{layout}: {name} {key}"
                nexts.append(coefs)
    assert len({tuple(sorted(coefs)) for coefs in nexts}) == 1
    for coefs in nexts:
        torch.testing.assert_close(coefs, nexts[0], rtol=1e-12, atol=0)
    assert min(nexts[0].values()) < 1, "nothing was ever clipped"


def alone(policy: NormPolicy, steps: int = 4, names: str = "ab") -> GradClipper:
    named = [(name, plain(known(3, seed=ord(name)))) for name in names]
    clipper = GradClipper(named, policy)
    for _ in range(steps):
        clipper.clip()
    return clipper


def test_other_rules() -> None:
    state = alone(distclip.zclip(warmup=2)).state_dict()
    with pytest.raises(ArgumentError, match=r"ZScore.*EMA.*resume with the policy"):
        alone(distclip.ema()).load_state_dict(state)
    with pytest.raises(ArgumentError, match="window"):
        alone(distclip.zclip(restart_after=64)).load_state_dict(state)
    with pytest.raises(ArgumentError, match="window"):
        alone(distclip.autoclip(window=9)).load_state_dict(alone(distclip.autoclip(window=8)).state_dict())
    # Numbers may change.
    other = alone(distclip.zclip(4.0, cap=2.0), steps=0)
    other.load_state_dict(state)
    assert flat(other) == {name: dict(zip(s, bits(s.values()), strict=True)) for name, s in state["state"].items()}


def test_refused_state_changes_nothing() -> None:
    clipper = alone(distclip.autoclip(window=9))
    before, counts = flat(clipper), clipper.state_dict()["counts"]
    with pytest.raises(ArgumentError):
        clipper.load_state_dict(alone(distclip.autoclip(window=8), steps=7).state_dict())
    assert flat(clipper) == before
    assert clipper.state_dict()["counts"] == counts


def test_names_that_are_missing() -> None:
    state = alone(distclip.adagc(warmup=2), names="ab").state_dict()
    clipper = alone(distclip.adagc(warmup=2), steps=0, names="bc")
    with pytest.warns(UserWarning, match=r"no memory of 1 of 2 norms \(c"):
        clipper.load_state_dict(state)
    loaded = clipper.state_dict()["state"]
    assert torch.equal(loaded["b"]["gamma"], state["state"]["b"]["gamma"])
    assert loaded["c"]["gamma"].isinf() and loaded["c"]["count"] == 0


def check_counters() -> None:
    """A run of skipped steps goes on across a checkpoint."""
    rig = build("stages")
    clippers = [rig.clipper(distclip.global_norm(1.0), max_skips=3) for _ in range(2)]
    for _ in range(2):
        rig.fill(0)
        rig.poison(1, NAN)
        quietly(clippers[0].clip)
    clippers[1].load_state_dict(clippers[0].state_dict())
    assert clippers[1].skipped == 2
    rig.fill(0)
    rig.poison(0, NAN)
    try:
        clippers[1].clip()
    except distclip.TooManySkippedSteps as error:
        assert "step 3: 3 steps in a row" in str(error)
    else:
        raise AssertionError("the third skipped step in a row was let through")


def test_counters(world: Callable[[int], World]) -> None:
    world(2).run(check_counters)
