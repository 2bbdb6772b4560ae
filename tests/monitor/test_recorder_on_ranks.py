"""Recording on many ranks: norms of tensors beside any policy, one rank that writes what all of them know."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip import ArgumentError, DisagreementError, GradClipper
from distclip.monitor import Recorder, UpdateRatio
from tests.ranks import World, everywhere
from tests.rig import CASES, Rig, bits, build, everywhere_, local, made_up, quietly

POLICIES: dict[str, Callable[[], Any]] = {
    "global": lambda: distclip.global_norm(0.5),
    "excluding": lambda: distclip.NormPolicy(distclip.Fixed(0.5), exclude=["bias|copy|dense|up"]),
    "groups": lambda: distclip.group_norm({"weights": ("weight|expert", 0.3)}, 0.7),
    "tensors": lambda: distclip.per_tensor_norm(0.5),
    "rows": lambda: distclip.NormPolicy(distclip.Fixed(0.1), per="row"),
    "value": lambda: distclip.value(0.1),
    "largest": lambda: distclip.global_norm(0.1, norm_type=float("inf")),
    "agc": lambda: distclip.NormPolicy(distclip.RelativeToWeight(0.01), per="group", groups={"w": "weight|expert"}),
}


def whole_norms(rig: Rig, step: int, p: float) -> Tensor:
    """Of every parameter's whole gradient, in order of size; what Megatron cuts is one."""
    told = everywhere({rig.key(name, param): tuple(param.shape) for name, param in rig.named})
    pieces: dict[str, dict[str, Tensor]] = {}
    for key, shape in {item for rank in told for item in rank.items()}:
        of = key.split("@")[0] if rig.split_over is dist.group.WORLD else key
        pieces.setdefault(of, {})[key] = made_up(key, shape, step).float().double().reshape(-1)
    norms = [torch.linalg.vector_norm(torch.cat(list(each.values())), p) for each in pieces.values()]
    return torch.stack(norms).sort().values


def check_norms_beside(name: str, policy: str) -> None:
    """With and without norms of tensors, a policy does the same; and they are those of the whole gradients."""
    plain, measured = build(name), build(name)
    clippers = [rig.clipper(POLICIES[policy]()) for rig in (plain, measured)]
    clippers[1].measure_tensors()
    clippers[1].measure_tensors()  # again is nothing
    for step in range(2):
        reports = []
        for rig, clipper in zip((plain, measured), clippers, strict=True):
            rig.fill(step, 1.0 + 4 * step)
            with CommDebugMode() as counter:
                reports.append(clipper.clip())
            assert sum(counter.get_comm_counts().values()) == (clipper.comm.size > 1)
        torch.testing.assert_close(reports[1].coefs, reports[0].coefs, rtol=1e-12, atol=0)
        torch.testing.assert_close(reports[1].norms, reports[0].norms, rtol=1e-12, atol=0)
        for one, other in zip(measured.grads(), plain.grads(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
        expected = whole_norms(plain, step, POLICIES[policy]().spec.norm_type) * (1.0 + 4 * step)
        norms = reports[1].tensor_norms
        assert norms is not None
        torch.testing.assert_close(norms.sort().values, expected, rtol=1e-6, atol=0)
        assert len(clippers[1].tensors) == len(norms)
        assert len(set(map(bytes, everywhere(bits([norms])[0])))) == 1
    assert bool(reports[1].clipped)


@pytest.mark.parametrize("policy", POLICIES)
@everywhere_
def test_norms_of_tensors_beside_any_policy(world: Callable[[int], World], name: str, size: int, policy: str) -> None:
    world(size).run(check_norms_beside, name=name, policy=policy)


def lines_of(folder: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Headers and steps, once all ranks are here."""
    dist.barrier()
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "distclip" in line], [line for line in lines if "step" in line]


def shared_folder() -> str:
    return str(everywhere(tempfile.mkdtemp())[0])


def counting(comm: Any) -> Counter[str]:
    """How often a communicator is asked, from now on."""
    asked = Counter[str]()

    def ask(its_own: Callable[[Any], Any], name: str, value: Any) -> Any:
        asked[name] += 1
        return its_own(value)

    for name in ("sum_", "max_", "gather_objects"):
        setattr(comm, name, partial(ask, getattr(comm, name), name))
    return asked


def check_lines(name: str) -> None:
    """A run with a spike that one rank has alone, and a NaN; written by one rank, the same as all of them saw."""
    rank, size, folder = dist.get_rank(), dist.get_world_size(), shared_folder()
    rig = build(name)
    clipper = rig.clipper(distclip.global_norm(0.5))
    asked = counting(clipper.comm)
    seen = []
    with Recorder(clipper, folder, every=10, per_tensor=True, facts={"batch": 4 * size}) as recorder:
        for step in range(1, 41):
            rig.fill(step)
            if step == 25 and rank == size - 1:
                local(dict(rig.named)[rig.target].grad).mul_(100)
            if step == 33:
                said = rig.poison(size - 1, float("nan"))
            asked.clear()
            report, _ = quietly(clipper.clip)
            seen.append(report)
            # One all-reduce for the norm, one for losses where the last ten are written.
            writes = step in (11, 21, 31)
            stands_out = step == 31
            expected = Counter({"sum_": 1 + writes, "gather_objects": (step == 33) + stands_out})
            assert asked == +expected, (step, asked)
            loss = None if rank == 0 and size > 1 else torch.tensor(float(step + rank))
            recorder.note(lr=0.1, ids=torch.arange(2) + 2 * rank + 1000 * step)
            if loss is not None:
                recorder.note(loss=loss)
    headers, rows = lines_of(folder)
    (header,) = headers
    assert header["world_size"] == size
    assert header["batch"] == 4 * size
    assert header["tensors"] == list(clipper.tensors)
    assert [row["step"] for row in rows] == list(range(1, 41))
    for step, (row, report) in enumerate(zip(rows, seen, strict=True), 1):
        finite = bool(report.finite)
        assert row["finite"] == finite != row["skipped"] == (step == 33)
        if finite:
            assert row["norm"] == float(report.norms[0])
            assert row["tensor_norms"] == pytest.approx(report.tensor_norms.tolist(), rel=1e-5)
        assert row["coef"] == float(report.coef)
        assert row["clipped"] == bool(report.clipped)
        assert row["bound"] == 0.5
        assert row["lr"] == 0.1
        ranks = [r for r in range(size) if r > 0 or size == 1]
        assert row["loss"] == pytest.approx(sum(step + r for r in ranks) / len(ranks))
    bad = rows[32]
    assert bad["norm"] is None
    assert bad["nonfinite"] == 1
    assert bad["culprits"][0]["name"] == rig.target
    assert bad["ids"] == [33000 + i for i in range(2 * size)]
    assert said
    spike = rows[24]
    assert spike["spike"] > 2
    assert spike["ids"] == [25000 + i for i in range(2 * size)]
    assert spike["worst"]["rank"] == size - 1
    assert spike["worst"]["tensor"] == rig.target
    assert 0.5 < spike["worst"]["share"] <= 1 + 1e-9
    assert sum("ids" in row for row in rows) == 2


@pytest.mark.parametrize(("name", "size"), [case for case in CASES if case[0] != "ddp"])
def test_one_rank_writes_what_all_of_them_know(world: Callable[[int], World], name: str, size: int) -> None:
    world(size).run(check_lines, name=name)


def check_closed_early() -> None:
    """A rank that has closed its recorder still comes wherever the others do."""
    rank, folder, coefs = dist.get_rank(), shared_folder(), []
    rig = build("fsdp2")
    clipper = rig.clipper(distclip.global_norm(0.5))
    recorder = Recorder(clipper, folder, every=20, top=1)
    for step in range(1, 61):
        rig.fill(1, {19: 50.0, 25: 80.0, 59: 120.0}.get(step, 1.0))
        coefs.append(float(clipper.clip().coef))
        recorder.note(ids=[step + 100 * rank])
        if step == 30 and rank == 0:
            recorder.close()
    recorder.flush()
    assert everywhere(coefs) == [coefs] * dist.get_world_size()
    headers, rows = lines_of(folder)
    assert len(headers) == 1
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert rows[18]["ids"] == [19, 119]  # written by all
    assert rows[24]["ids"] == [25]  # by one alone
    assert "worst" in rows[24]


def test_a_rank_that_closes_alone_keeps_nobody_waiting(world: Callable[[int], World]) -> None:
    world(2).run(check_closed_early)


def check_raised_alone() -> None:
    """A rank that leaves by an exception of its own waits for nobody."""
    rank, folder = dist.get_rank(), shared_folder()
    rig = build("fsdp2")
    clipper = rig.clipper(distclip.global_norm(0.5))
    recorder = Recorder(clipper, folder)
    rig.fill(1)
    clipper.clip()
    if rank == 0:
        with pytest.raises(KeyError), recorder:
            raise KeyError
    recorder.close()
    assert len(lines_of(folder)[1]) == 1


def test_a_rank_that_raises_alone_waits_for_nobody(world: Callable[[int], World]) -> None:
    world(2).run(check_raised_alone)


def check_refusals() -> None:
    rank, folder = dist.get_rank(), shared_folder()
    rig = build("fsdp2")
    clipper = rig.clipper(distclip.global_norm(0.5))
    with pytest.raises(DisagreementError, match="different"):
        Recorder(clipper, folder, every=10 + rank)
    with pytest.raises(ArgumentError, match="every=0"):
        Recorder(clipper, folder, every=10 if rank else 0)
    (Path(folder) / f"file_{rank}").write_text("")
    with pytest.raises((OSError, distclip.PeerError)):
        Recorder(clipper, Path(folder) / "file_0" / "run")
    recorder = Recorder(clipper, folder)
    with pytest.raises(ArgumentError, match="no step to add to"):
        recorder.note(loss=1.0)
    rig.fill(1)
    clipper.clip()
    with pytest.raises(ArgumentError, match=r"note\(loss=tensor"):
        recorder.note(loss=torch.ones(2))
    with pytest.raises(ArgumentError, match=r"note\(ids=7"):
        recorder.note(ids=7)
    with pytest.raises(ArgumentError, match="coef, norm would hide"):
        recorder.note(norm=1.0, coef=1.0, lr=0.1)


def test_refusals_on_all_ranks(world: Callable[[int], World]) -> None:
    world(2).run(check_refusals)


def check_sinks() -> None:
    """A sink that raises, on the one rank that has sinks, stops neither training nor the file."""
    folder, told = shared_folder(), []

    def fails(numbers: dict[str, float], step: int) -> None:
        raise OSError("no space left")

    rig = build("fsdp2")
    clipper = rig.clipper(POLICIES["groups"]())
    recorder = Recorder(clipper, folder, every=5, sinks=[fails, lambda numbers, step: told.append((step, numbers))])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 12):
            rig.fill(step)
            clipper.clip()
        recorder.flush()
    texts = [str(warning.message) for warning in caught]
    if dist.get_rank() == 0:
        assert texts == ["recorder: OSError: no space left. Nothing more goes there; training goes on."]
        assert [step for step, _ in told] == list(range(1, 12))
        assert {"norm", "coef", "norms/weights", "norms/rest"} <= told[0][1].keys()
    else:
        assert not texts
        assert not told
    assert len(lines_of(folder)[1]) == 11


def test_what_cannot_be_written_stops_nothing(world: Callable[[int], World]) -> None:
    world(2).run(check_sinks)


def check_copies_alone() -> None:
    """Ranks that clip copies alone, without a word to each other, leave one file."""
    folder = shared_folder()
    weight = torch.nn.Parameter(torch.zeros(3))
    clipper = GradClipper([weight], distclip.global_norm(1.0))
    with Recorder(clipper, folder):
        weight.grad = torch.ones(3)
        clipper.clip()
    headers, rows = lines_of(folder)
    assert (len(headers), len(rows)) == (1, 1)


def test_copies_that_clip_alone_leave_one_file(world: Callable[[int], World]) -> None:
    world(2).run(check_copies_alone)


def check_update(name: str, policy: str) -> None:
    """Of whole parameters, whatever lies where."""
    rig = build(name)
    clipper = rig.clipper(POLICIES[policy]())
    optimizer = rig.optimizer("sgd")
    rig.fill(1)
    before = rig.gathered(lambda param: param)
    with UpdateRatio(clipper) as update:
        clipper.step(optimizer)
    after = rig.gathered(lambda param: param)
    moved = torch.cat([(after[key] - before[key]).reshape(-1) for key in before])
    whole = torch.cat([value.reshape(-1) for value in before.values()])
    torch.testing.assert_close(update.ratio, moved.norm() / whole.norm(), rtol=1e-6, atol=0)
    if dist.get_rank() == 0:
        with pytest.raises(KeyError), UpdateRatio(clipper):
            raise KeyError  # on this rank alone: nobody is waited for


@pytest.mark.parametrize("policy", ["global", "rows"])
@everywhere_
def test_how_far_a_step_moves(world: Callable[[int], World], name: str, size: int, policy: str) -> None:
    world(size).run(check_update, name=name, policy=policy)
