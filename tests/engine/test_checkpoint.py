"""Save and load the state of a policy, also on another number of ranks and in another layout."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
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
from tests.ranks import World, gather_from_ranks, on_ranks
from tests.rig import NAN, build_rig, record_warnings, to_bytes
from tests.tables.layouts.meshes import world_mesh
from tests.tables.layouts.tensors import plain_param, random_grad
from tests.tables.policies import ADAPTIVE

STATEFUL = {(name, row.per): row for name, row in ADAPTIVE.items()} | {("zclip", "row"): ADAPTIVE["zclip"]}
"""Rows of the table by name and granularity."""


def check_interrupted(name: str, policy: str, per: str) -> None:
    """Compare twelve steps, one of them skipped, with the same steps saved and loaded after the seventh."""
    row = ADAPTIVE[policy]
    options = {"restart_after": 4} if row.restarts else {}
    assert row.small is not None

    def trace(clipper: GradClipper, rig: Any, steps: range) -> list[bytes]:
        coefs = []
        for step in steps:
            # Different norms, so that the rules clip some.
            rig.fill(step, 1.0 + step % 3)
            if step == 4:
                rig.poison(0, NAN)
            coefs.append(clipper.clip().coefs)
        return to_bytes(coefs)

    rigs = [build_rig(name) for _ in range(3)]
    clippers = [rig.clipper(row.small(per=per, **options)) for rig in rigs]
    with warnings.catch_warnings():
        # A rule warns if it clips half of the steps.
        warnings.simplefilter("ignore")
        uninterrupted = trace(clippers[0], rigs[0], range(12))
        before = trace(clippers[1], rigs[1], range(7))
        state = copy.deepcopy(clippers[1].state_dict())
        # Further steps must not change what was saved.
        assert trace(clippers[1], rigs[1], range(7, 12)) == uninterrupted[7:]
        clippers[2].load_state_dict(state)
        assert before + trace(clippers[2], rigs[2], range(7, 12)) == uninterrupted
    counts = [{key: int(n) for key, n in clipper.state_dict()["counts"].items()} for clipper in clippers]
    assert counts[0] == counts[1] == counts[2]
    assert (counts[0]["steps"], counts[0]["skipped"], counts[0]["in_a_row"]) == (12, 1, 0)
    assert len(set(uninterrupted[3:])) > 1, "nothing was ever clipped"
    assert state_by_name(clippers[0]) == state_by_name(clippers[2])
    assert gather_from_ranks(state_by_name(clippers[2])) == [state_by_name(clippers[2])] * dist.get_world_size()


def state_by_name(clipper: GradClipper) -> dict[str, dict[str, bytes]]:
    """Return the bytes of a policy's state by slot name and key."""
    state = clipper.state_dict()["state"]
    return {name: dict(zip(values, to_bytes(values.values()), strict=True)) for name, values in state.items()}


@on_ranks(4)
@pytest.mark.parametrize(("policy", "per"), STATEFUL)
@pytest.mark.parametrize("name", ["stages_fsdp2"])
def test_continues_as_if_never_interrupted(name: str, policy: str, per: str) -> None:
    check_interrupted(name, policy, per)


@on_ranks(2)
@pytest.mark.parametrize(("policy", "per"), [("adagc", "tensor"), ("zclip", "row")])
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "tp", "megatron", "stages", "experts"])
def test_continues_on_two_ranks(name: str, policy: str, per: str) -> None:
    check_interrupted(name, policy, per)


SHAPES = {"0.weight": (6, 8), "0.bias": (6,), "1.weight": (4, 6), "1.bias": (4,)}


def make_params(layout: str) -> tuple[list[tuple[str, nn.Parameter]], Any]:
    """Make the same model with replicas, with FSDP2, or with a layer per pipeline stage, and split_over=."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    if layout == "fsdp2":
        fully_shard(model)
    if layout != "stages":
        return list(model.named_parameters()), None
    mesh = world_mesh("pp", "dp")
    stage = str(mesh.get_local_rank("pp"))
    return [(name, plain_param(random_grad(*shape))) for name, shape in SHAPES.items() if name[0] == stage], mesh["pp"]


def fill(named: list[tuple[str, nn.Parameter]], step: int) -> None:
    """Set the gradients of a step."""
    for name, param in named:
        whole = random_grad(*SHAPES[name], seed=10 * step + list(SHAPES).index(name))
        mesh, placements = getattr(param, "device_mesh", None), getattr(param, "placements", None)
        param.grad = dist.tensor.distribute_tensor(whole, mesh, placements, src_data_rank=None) if mesh else whole


def make_clipper(layout: str, per: str) -> tuple[GradClipper, list[tuple[str, nn.Parameter]]]:
    named, split_over = make_params(layout)
    rows = NormPolicy(MedianMAD(0.1, window=4, warmup=2), per="row")
    policy = distclip.adagc(warmup=2) if per == "tensor" else rows
    return GradClipper(named, policy, split_over=split_over), named


def save(folder: str, layout: str, per: str) -> dict[str, dict[str, Tensor]]:
    """Save a clipper after five steps, and return the policy's state by slot name."""
    clipper, named = make_clipper(layout, per)
    for step in range(5):
        fill(named, step)
        clipper.clip()
    dcp.save({"clipper": clipper}, checkpoint_id=folder)
    return clipper.state_dict()["state"]


def load(folder: str, layout: str, per: str) -> tuple[dict[str, dict[str, Tensor]], int, Tensor]:
    """Load a clipper, and return its state, its number of steps, and the next coefficients by slot."""
    clipper, named = make_clipper(layout, per)
    dcp.load({"clipper": clipper}, checkpoint_id=folder)
    state = clipper.state_dict()
    fill(named, 5)
    coefs = dict(zip(clipper.slots, clipper.clip().coefs.tolist(), strict=True))
    return state["state"], int(state["counts"]["steps"]), coefs


@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize("saved_as", ["fsdp2", "stages"])
def test_loads_on_other_ranks_and_in_other_layouts(world: Callable[[int], World], saved_as: str, per: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        saved = world(4).run(save, folder=str(Path(folder)), layout=saved_as, per=per)
        next_coefs = []
        for size, layout in ((2, "fsdp2"), (2, "ddp"), (2, "stages"), (4, "stages"), (4, "fsdp2")):
            for state, steps, coefs in world(size).run(load, folder=folder, layout=layout, per=per):
                assert steps == 5
                assert set(state) == set(SHAPES) == set(saved[0])
                for name, values in state.items():
                    for key, value in values.items():
                        assert torch.equal(value, saved[0][name][key]), f"{layout}: {name} {key}"
                next_coefs.append(coefs)
    assert len({tuple(sorted(coefs)) for coefs in next_coefs}) == 1
    for coefs in next_coefs:
        torch.testing.assert_close(coefs, next_coefs[0], rtol=1e-12, atol=0)
    assert min(next_coefs[0].values()) < 1, "nothing was ever clipped"


def clip_alone(policy: NormPolicy, steps: int = 4, names: str = "ab") -> GradClipper:
    """Make a clipper on one process and call it a few times."""
    named = [(name, plain_param(random_grad(3, seed=ord(name)))) for name in names]
    clipper = GradClipper(named, policy)
    for _ in range(steps):
        clipper.clip()
    return clipper


def test_refuses_the_state_of_another_rule() -> None:
    state = clip_alone(distclip.zclip(warmup=2)).state_dict()
    with pytest.raises(ArgumentError, match=r"ZScore.*EMA.*Resume with the policy"):
        clip_alone(distclip.ema()).load_state_dict(state)
    with pytest.raises(ArgumentError, match="window"):
        clip_alone(distclip.zclip(restart_after=64)).load_state_dict(state)
    with pytest.raises(ArgumentError, match="window"):
        clip_alone(distclip.autoclip(window=9)).load_state_dict(clip_alone(distclip.autoclip(window=8)).state_dict())
    # Other values of the same rule's arguments are allowed.
    other = clip_alone(distclip.zclip(4.0, cap=2.0), steps=0)
    other.load_state_dict(state)
    assert state_by_name(other) == {
        name: dict(zip(s, to_bytes(s.values()), strict=True)) for name, s in state["state"].items()
    }


def test_refused_state_changes_nothing() -> None:
    clipper = clip_alone(distclip.autoclip(window=9))
    before, counts = state_by_name(clipper), clipper.state_dict()["counts"]
    with pytest.raises(ArgumentError):
        clipper.load_state_dict(clip_alone(distclip.autoclip(window=8), steps=7).state_dict())
    assert state_by_name(clipper) == before
    assert clipper.state_dict()["counts"] == counts


SPOILED: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "unknown counter": ("max_skips", lambda s: s["counts"].update(max_skips=torch.tensor(10**9))),
    "missing counter": ("steps", lambda s: s["counts"].pop("steps")),
    "negative counter": ("skipped", lambda s: s["counts"].update(skipped=torch.tensor(-1))),
    "fractional counter": ("skipped", lambda s: s["counts"].update(skipped=torch.tensor(0.5))),
    "counter of NaN": ("steps", lambda s: s["counts"].update(steps=torch.tensor(float("nan")))),
    "counter of text": ("steps", lambda s: s["counts"].update(steps="7")),
    "counter of truth": ("steps", lambda s: s["counts"].update(steps=True)),
    "counter of a true tensor": ("steps", lambda s: s["counts"].update(steps=torch.tensor(True))),
    "several counters": ("steps", lambda s: s["counts"].update(steps=torch.tensor([7, 7]))),
    "no counter": ("steps", lambda s: s["counts"].update(steps=None)),
    "counter without value": ("steps", lambda s: s["counts"].update(steps=torch.tensor(7, device="meta"))),
    "endless counter": ("steps", lambda s: s["counts"].update(steps=10**30)),
    "more in a row than in all": ("in a row", lambda s: s["counts"].update(in_a_row=torch.tensor(10**9))),
    "no counters": ("counts", lambda s: s.update(counts=None)),
    "no state": ("state", lambda s: s.update(state=[1])),
    "no state of a slot": ("model", lambda s: s["state"].update(model=None)),
    "state without values": ("mean", lambda s: s["state"]["model"].update(mean=torch.zeros(1, device="meta").double())),
    "names that are no text": ("state", lambda s: s["state"].update({1: {}})),
    "unknown state": ("momentum", lambda s: s["state"]["model"].update(momentum=torch.zeros(1))),
    "missing state": ("mean", lambda s: s["state"]["model"].pop("mean")),
    "shape": ("mean", lambda s: s["state"]["model"].update(mean=torch.zeros(2, dtype=torch.float64))),
    "dtype": ("count", lambda s: s["state"]["model"].update(count=torch.zeros(1))),
    "no tensor": ("mean", lambda s: s["state"]["model"].update(mean=1.0)),
    "unknown key": ("optimizer", lambda s: s.update(optimizer={})),
    "missing key": ("counts", lambda s: s.pop("counts")),
    "later version": ("version", lambda s: s.update(version=99)),
    "version of text": ("version", lambda s: s.update(version="1")),
    "truth as a version": ("version", lambda s: s.update(version=True)),
    "fraction as a version": ("version", lambda s: s.update(version=1.0)),
    "other policy": ("policy", lambda s: s.update(rule="NormPolicy(EMA)")),
}
"""Ways to spoil a state dict, with a word of the error."""


@pytest.mark.parametrize("name", sorted(SPOILED))
def test_refuses_a_spoiled_state_dict_and_changes_nothing(name: str) -> None:
    word, spoil = SPOILED[name]
    clipper = clip_alone(distclip.zclip(warmup=2))
    state = clip_alone(distclip.zclip(warmup=2), steps=7).state_dict()
    spoil(state)
    before, counts = state_by_name(clipper), clipper.state_dict()["counts"]
    with pytest.raises(ArgumentError, match=word):
        clipper.load_state_dict(state)
    assert state_by_name(clipper) == before
    assert clipper.state_dict()["counts"] == counts


@pytest.mark.parametrize("state_dict", [None, "state", [("version", 1)], 7], ids=repr)
def test_refuses_what_is_no_state_dict(state_dict: Any) -> None:
    with pytest.raises(ArgumentError, match="state_dict"):
        clip_alone(distclip.zclip()).load_state_dict(state_dict)


RESTARTING = {name: {"restart_after": 4} if row.restarts else {} for name, row in ADAPTIVE.items()}
POISONS = {"nan": NAN, "inf": float("inf"), "-inf": -float("inf"), "negative": -1, "huge": 2**62}
"""Values that no state has. A logarithm can be negative, and a norm huge."""


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("policy", ADAPTIVE)
def test_refuses_values_that_no_step_leads_to(policy: str, poison: str) -> None:
    """Poison each tensor of each slot in turn, in one of its values."""
    small, options = ADAPTIVE[policy].small, RESTARTING[policy]
    assert small is not None
    clipper, saved = (clip_alone(small(per="tensor", **options), steps=n) for n in (3, 7))
    before, counts = state_by_name(clipper), clipper.state_dict()["counts"]
    poisoned = 0
    for name, values in saved.state_dict()["state"].items():
        for key, value in values.items():
            is_float = value.dtype.is_floating_point
            if value.dtype == torch.bool or (poison in ("nan", "inf", "-inf") and not is_float):
                continue
            if (key == "log_norms" and poison == "negative") or (poison == "huge" and is_float):
                continue
            state = saved.state_dict()
            state["state"][name][key].view(-1)[-1] = POISONS[poison]
            with pytest.raises(ArgumentError, match=f"state_dict: '{key}' of {name} has the value .*no step"):
                clipper.load_state_dict(state)
            assert state_by_name(clipper) == before
            assert clipper.state_dict()["counts"] == counts
            poisoned += 1
    assert poisoned >= 2


@pytest.mark.parametrize("policy", ADAPTIVE)
def test_refuses_a_history_that_never_was(policy: str) -> None:
    """Increase the count of a fresh state, whose means and norms are 0, so that it would clip everything."""
    small = ADAPTIVE[policy].small
    assert small is not None
    state = clip_alone(small(per="model"), steps=0).state_dict()
    state["state"]["model"]["count"].fill_(1000)
    clipper = clip_alone(small(per="model"), steps=0)
    if policy == "median_mad":
        # Logarithms of 0 are norms of 1.
        clipper.load_state_dict(state)
        return
    with pytest.raises(ArgumentError, match="no step of the policy leads to"):
        clipper.load_state_dict(state)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 30])
@pytest.mark.parametrize("policy", ADAPTIVE)
def test_accepts_every_state_of_its_own(policy: str, steps: int) -> None:
    """Load states before and after warm-ups and restarts, with a zero gradient, at a cap of 0, and at small norms."""
    small, options = ADAPTIVE[policy].small, RESTARTING[policy]
    assert small is not None
    capped = replace(small(per="tensor").threshold, cap=0.0)
    for make in (lambda: small(per="tensor", **options), lambda: NormPolicy(capped, per="tensor", **options)):
        for scale in (1e-30, 0.0, 1.0):
            named = [(name, plain_param(scale * random_grad(3, seed=ord(name)))) for name in "ab"]
            clippers = [GradClipper(named, make()) for _ in range(2)]
            named[0][1].grad = random_grad(3, seed=1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for step in range(steps):
                    named[1][1].grad = scale * (1 + step % 3) * random_grad(3, seed=2)
                    clippers[0].clip()
                clippers[1].load_state_dict(clippers[0].state_dict())
            assert state_by_name(clippers[1]) == state_by_name(clippers[0])


class Remembering:
    """A custom threshold that begins with NaN and inf, and has negative values."""

    def init(self, slots: int, device: torch.device) -> dict[str, Tensor]:
        empty = torch.full((slots,), NAN, dtype=torch.float64, device=device)
        return {"last": empty, "least": torch.full_like(empty, float("inf")), "sign": -torch.ones_like(empty)}

    def __call__(self, totals: Any, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        least = torch.minimum(state["least"], totals.norms)
        return 2 * least, {"last": totals.norms, "least": least, "sign": -state["sign"]}


def test_state_of_a_custom_threshold_may_have_what_it_begins_with() -> None:
    clipper, saved = (clip_alone(NormPolicy(Remembering()), steps=n) for n in (0, 4))
    clipper.load_state_dict(clip_alone(NormPolicy(Remembering()), steps=0).state_dict())
    clipper.load_state_dict(saved.state_dict())
    assert state_by_name(clipper) == state_by_name(saved)
    state = saved.state_dict()
    state["state"]["model"]["sign"].fill_(NAN)
    with pytest.raises(ArgumentError, match="'sign' of model has the value nan"):
        clipper.load_state_dict(state)


def test_loads_a_state_dict_from_before_the_version_number() -> None:
    """Rename the counters and tensors back to what they were called."""
    saved = clip_alone(distclip.zclip(warmup=2), steps=7)
    state = saved.state_dict()
    old_names = {"restarts": "reseeds", "recent_norms": "recent", "recent_clipped": "over", "since_restart": "seen"}

    def rename(values: dict[str, Any]) -> dict[str, Any]:
        return {old_names.get(key, key): value for key, value in values.items()}

    del state["version"]
    state["counts"] = rename(state["counts"])
    state["state"] = {slot: rename(values) for slot, values in state["state"].items()}
    loaded = clip_alone(distclip.zclip(warmup=2), steps=0)
    loaded.load_state_dict(state)
    assert state_by_name(loaded) == state_by_name(saved)
    assert loaded.state_dict()["counts"] == saved.state_dict()["counts"]


def test_missing_names_start_fresh_with_a_warning() -> None:
    state = clip_alone(distclip.adagc(warmup=2), names="ab").state_dict()
    clipper = clip_alone(distclip.adagc(warmup=2), steps=0, names="bc")
    with pytest.warns(UserWarning, match=r"no state for 1 of 2 norms \(c"):
        clipper.load_state_dict(state)
    loaded = clipper.state_dict()["state"]
    assert torch.equal(loaded["b"]["gamma"], state["state"]["b"]["gamma"])
    assert loaded["c"]["gamma"].isinf()
    assert loaded["c"]["count"] == 0


@on_ranks(2)
def test_counts_skipped_steps_in_a_row_across_a_checkpoint() -> None:
    rig = build_rig("stages")
    clippers = [rig.clipper(distclip.global_norm(1.0), max_skips=3) for _ in range(2)]
    for _ in range(2):
        rig.fill(0)
        rig.poison(1, NAN)
        record_warnings(clippers[0].clip)
    clippers[1].load_state_dict(clippers[0].state_dict())
    assert clippers[1].skipped == 2
    rig.fill(0)
    rig.poison(0, NAN)
    with pytest.raises(distclip.TooManySkippedSteps, match="step 3: 3 steps in a row"):
        clippers[1].clip()
