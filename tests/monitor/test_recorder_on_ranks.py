"""Recording on several ranks: per-tensor norms with any policy, and one file with the details of all ranks."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import ArgumentError, DisagreementError, GradClipper
from distclip.monitor import Recorder, UpdateRatio
from distclip.monitor import recorder as recorder_module
from tests.ranks import gather_from_ranks, on_ranks
from tests.rig import RIG_CASES, Rig, build_rig, each_rig, local_tensor, record_warnings, to_bytes, whole_gradient
from tests.tables.layouts.meshes import world_mesh

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
    """Return the norm of each whole gradient, sorted. The parts of a tensor that Megatron splits count as one."""
    by_rank = gather_from_ranks({rig.key(name, param): tuple(param.shape) for name, param in rig.named})
    pieces: dict[str, dict[str, Tensor]] = {}
    for key, shape in {item for shapes in by_rank for item in shapes.items()}:
        parameter = key.split("@")[0] if rig.split_over is dist.group.WORLD else key
        pieces.setdefault(parameter, {})[key] = whole_gradient(key, shape, step).float().double().reshape(-1)
    norms = [torch.linalg.vector_norm(torch.cat(list(parts.values())), p) for parts in pieces.values()]
    return torch.stack(norms).sort().values


@pytest.mark.parametrize(
    ("name", "num_ranks", "policy"),
    [
        (*case, policy)
        for case in RIG_CASES
        for policy in (POLICIES if case in (("fsdp2", 2), ("megatron", 4), ("stages_fsdp2", 4)) else ("groups", "rows"))
    ],
)
@on_ranks()
def test_tensor_norms_with_any_policy(name: str, policy: str) -> None:
    """Per-tensor norms do not change the policy's decision, and equal the norms of the whole gradients."""
    plain, measured = build_rig(name), build_rig(name)
    clippers = [rig.clipper(POLICIES[policy]()) for rig in (plain, measured)]
    clippers[1].measure_tensors()
    clippers[1].measure_tensors()  # a second call has no effect
    for step in range(2):
        reports = []
        for rig, clipper in zip((plain, measured), clippers, strict=True):
            rig.fill(step, 1.0 + 4 * step)
            with CommDebugMode() as counter:
                reports.append(clipper.clip())
            # A maximum is taken after the ranks have agreed.
            num_expected = 0 if clipper.comm.size == 1 else 2 if policy == "largest" else 1
            assert sum(counter.get_comm_counts().values()) == num_expected
        torch.testing.assert_close(reports[1].coefs, reports[0].coefs, rtol=1e-12, atol=0)
        torch.testing.assert_close(reports[1].norms, reports[0].norms, rtol=1e-12, atol=0)
        for one, other in zip(measured.grads(), plain.grads(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
        expected = whole_norms(plain, step, POLICIES[policy]().spec.norm_type) * (1.0 + 4 * step)
        norms = reports[1].tensor_norms
        assert norms is not None
        torch.testing.assert_close(norms.sort().values, expected, rtol=1e-6, atol=0)
        assert len(clippers[1].tensors) == len(norms)
        assert len(set(map(bytes, gather_from_ranks(to_bytes([norms])[0])))) == 1
    assert bool(reports[1].clipped)


def read_lines(folder: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Wait for all ranks, and return the headers and the steps."""
    dist.barrier()
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "distclip" in line], [line for line in lines if "step" in line]


def make_shared_folder() -> str:
    return str(gather_from_ranks(tempfile.mkdtemp())[0])


def count_collectives(comm: Any) -> Counter[str]:
    """Count the calls of a communicator's methods from now on."""
    counts = Counter[str]()

    def call(method: Callable[[Any], Any], name: str, value: Any) -> Any:
        counts[name] += 1
        return method(value)

    for name in ("sum_", "max_", "gather_objects"):
        setattr(comm, name, partial(call, getattr(comm, name), name))
    return counts


@on_ranks()
@pytest.mark.parametrize(("name", "num_ranks"), [case for case in RIG_CASES if case[0] != "ddp"])
def test_one_rank_writes_details_of_all_ranks(name: str) -> None:
    """The run has a spike on one rank only, and a NaN. The lines agree with the reports on all ranks."""
    rank, size, folder = dist.get_rank(), dist.get_world_size(), make_shared_folder()
    rig = build_rig(name)
    clipper = rig.clipper(distclip.global_norm(0.5))
    counts = count_collectives(clipper.comm)
    reports = []
    with Recorder(clipper, folder, every=10, per_tensor=True, facts={"batch": 4 * size}) as recorder:
        for step in range(1, 41):
            rig.fill(step)
            if step == 25 and rank == size - 1:
                local_tensor(dict(rig.named)[rig.target].grad).mul_(100)
            if step == 33:
                message = rig.poison(size - 1, float("nan"))
            counts.clear()
            report, _ = record_warnings(clipper.clip)
            reports.append(report)
            # One all-reduce for the norm, and one for the losses of the last ten steps when they are written.
            writes = step in (11, 21, 31)
            writes_spike = step == 31
            expected = Counter({"sum_": 1 + writes, "gather_objects": (step == 33) + writes_spike})
            assert counts == +expected, (step, counts)
            loss = None if rank == 0 and size > 1 else torch.tensor(float(step + rank))
            recorder.note(lr=0.1, ids=torch.arange(2) + 2 * rank + 1000 * step)
            if loss is not None:
                recorder.note(loss=loss)
    headers, rows = read_lines(folder)
    (header,) = headers
    assert header["world_size"] == size
    assert header["batch"] == 4 * size
    assert header["tensors"] == list(clipper.tensors)
    assert [row["step"] for row in rows] == list(range(1, 41))
    for step, (row, report) in enumerate(zip(rows, reports, strict=True), 1):
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
    nonfinite = rows[32]
    assert nonfinite["norm"] is None
    assert nonfinite["nonfinite"] == 1
    assert nonfinite["culprits"][0]["name"] == rig.target
    assert nonfinite["ids"] == [33000 + i for i in range(2 * size)]
    assert message
    spike = rows[24]
    assert spike["spike"] > 2
    assert spike["ids"] == [25000 + i for i in range(2 * size)]
    assert spike["worst"]["rank"] == size - 1
    assert spike["worst"]["tensor"] == rig.target
    assert 0.5 < spike["worst"]["share"] <= 1 + 1e-9
    assert sum("ids" in row for row in rows) == 2


@on_ranks(2)
def test_rank_with_closed_recorder_joins_collectives() -> None:
    rank, folder, coefs = dist.get_rank(), make_shared_folder(), []
    rig = build_rig("fsdp2")
    clipper = rig.clipper(distclip.global_norm(0.5))
    recorder = Recorder(clipper, folder, every=20, top=1)
    for step in range(1, 61):
        rig.fill(1, {19: 50.0, 25: 80.0, 59: 120.0}.get(step, 1.0))
        coefs.append(float(clipper.clip().coef))
        recorder.note(ids=[step + 100 * rank])
        if step == 30 and rank == 0:
            recorder.close()
    recorder.flush()
    assert gather_from_ranks(coefs) == [coefs] * dist.get_world_size()
    headers, rows = read_lines(folder)
    assert len(headers) == 1
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert rows[18]["ids"] == [19, 119]  # written by flush, with all ranks
    assert rows[24]["ids"] == [25]  # written by close, with one rank
    assert "worst" in rows[24]


@on_ranks(2)
def test_rank_that_raises_does_not_wait_for_others() -> None:
    rank, folder = dist.get_rank(), make_shared_folder()
    rig = build_rig("fsdp2")
    clipper = rig.clipper(distclip.global_norm(0.5))
    recorder = Recorder(clipper, folder)
    rig.fill(1)
    clipper.clip()
    if rank == 0:
        with pytest.raises(KeyError), recorder:
            raise KeyError
    recorder.close()
    assert len(read_lines(folder)[1]) == 1


@on_ranks(2)
def test_invalid_arguments_raise_on_all_ranks() -> None:
    rank, folder = dist.get_rank(), make_shared_folder()
    rig = build_rig("fsdp2")
    clipper = rig.clipper(distclip.global_norm(0.5))
    with pytest.raises(DisagreementError, match=r"\(every, .*\) of a recorder differ"):
        Recorder(clipper, folder, every=10 + rank)
    with pytest.raises(ArgumentError, match="every=0"):
        Recorder(clipper, folder, every=10 if rank else 0)
    (Path(folder) / f"file_{rank}").write_text("")
    with pytest.raises((OSError, distclip.PeerError)):
        Recorder(clipper, Path(folder) / "file_0" / "run")
    recorder = Recorder(clipper, folder)
    with pytest.raises(ArgumentError, match="there is no step to add to"):
        recorder.note(loss=1.0)
    rig.fill(1)
    clipper.clip()
    with pytest.raises(ArgumentError, match=r"note\(loss=tensor"):
        recorder.note(loss=torch.ones(2))
    with pytest.raises(ArgumentError, match=r"note\(ids=7"):
        recorder.note(ids=7)
    with pytest.raises(ArgumentError, match="coef, norm would replace"):
        recorder.note(norm=1.0, coef=1.0, lr=0.1)


def train(clipper: GradClipper, rig: Rig, steps: int, note: Callable[[int], None] | None = None) -> list[float]:
    """Clip gradients of which one is a spike, with a collective of the program between steps."""
    norms = []
    for step in range(steps):
        rig.fill(1, 50.0 if step == 7 else 1.0)
        norms.append(float(clipper.clip().norm))
        if note is not None:
            note(step)
        ones = torch.ones(())
        dist.all_reduce(ones)
        assert float(ones) == dist.get_world_size()
    return norms


def impatient() -> Any:
    """Let no rank wait for the recorders of other ranks."""
    return mock.patch.multiple(recorder_module, _PATIENCE=0.0, _LONG_PATIENCE=0.0)


@on_ranks()
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize(("chosen", "num_ranks"), [([0], 2), ([1], 2), ([1, 3], 4)])
def test_recorders_on_some_ranks_do_not_communicate(chosen: list[int], per_tensor: bool) -> None:
    """Record on the chosen ranks only: training goes on, and the lowest of them writes what it knows."""
    rank, size, folder = dist.get_rank(), dist.get_world_size(), make_shared_folder()
    rig = build_rig("fsdp2")
    clipper = rig.clipper(distclip.global_norm(0.5))
    counts = count_collectives(clipper.comm)
    with warnings.catch_warnings(record=True) as caught, impatient():
        warnings.simplefilter("always")
        if rank in chosen:
            with Recorder(clipper, folder, every=4, per_tensor=per_tensor) as recorder:
                norms = train(clipper, rig, 10, lambda i: recorder.note(loss=i + 10.0 * rank, ids=[100 * rank + i]))
        else:
            norms = train(clipper, rig, 10)
    assert counts == {"sum_": 10}
    assert gather_from_ranks(norms) == [norms] * size
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (rank in chosen) * (1 + per_tensor)
    assert all(str(list(range(size))) in text and "Construct it on every rank" in text for text in messages)
    headers, rows = read_lines(folder)
    assert len(headers) == 1
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["loss"] for row in rows] == [step + 10.0 * chosen[0] for step in range(10)]
    assert rows[7]["ids"] == [100 * chosen[0] + 7]
    assert not any("tensor_norms" in row for row in rows)


@on_ranks(2)
@pytest.mark.parametrize("difference", ["steps", "arguments", "error"])
def test_recorders_that_differ_do_not_communicate(difference: str) -> None:
    """Make the recorder of rank 1 some steps later, or with another argument, or with an invalid one."""
    rank, folder = dist.get_rank(), make_shared_folder()
    rig = build_rig("fsdp2")
    clipper = rig.clipper(distclip.global_norm(0.5))
    counts = count_collectives(clipper.comm)
    every: Any = {"arguments": 4 + rank, "error": 4 if rank == 0 else "four", "steps": 4}[difference]
    num_before = 3 if rank == 1 and difference == "steps" else 0
    warns = pytest.warns(RuntimeWarning, match="Construct it on every rank")
    with impatient(), warns if rank == 0 or difference == "steps" else nullcontext():
        if rank == 1 and difference != "steps":
            dist.barrier()
        train(clipper, rig, num_before)
        # Rank 0 does not wait for rank 1, which finds the recorder of rank 0.
        fails = pytest.raises((ArgumentError, DisagreementError), match="every")
        with fails if rank == 1 and difference != "steps" else nullcontext():
            recorder = Recorder(clipper, folder, every=every)
        if rank == 0 and difference != "steps":
            dist.barrier()
        train(clipper, rig, 10 - num_before)
        if rank == 0:
            recorder.flush()
    assert counts == {"sum_": 10}
    assert len(read_lines(folder)[1]) == 10


@on_ranks(2)
def test_recorder_of_a_late_rank_is_found_by_the_first_write() -> None:
    """Make no rank wait, so that one of them does not find the other at construction."""
    rank = dist.get_rank()
    rig = build_rig("fsdp2")
    clipper = rig.clipper(distclip.global_norm(0.5))
    for _ in range(2):
        folder = make_shared_folder()
        with impatient():
            if rank == 1:
                dist.barrier()
            recorder = Recorder(clipper, folder, every=4)
            if rank == 0:
                dist.barrier()
        train(clipper, rig, 10, lambda i, to=recorder: to.note(loss=float(i + rank), ids=[100 * rank + i]))  # type: ignore[misc]
        recorder.flush()
        _, rows = read_lines(folder)
        assert [row["loss"] for row in rows] == [i + 0.5 for i in range(10)]
        assert rows[7]["ids"] == [7, 107]


@on_ranks(2)
def test_flush_of_one_rank_writes_nothing_and_warns() -> None:
    """Flush on rank 1 only, and later on both ranks: no step is lost, and no collective is entered alone."""
    rank, folder = dist.get_rank(), make_shared_folder()
    rig = build_rig("fsdp2")
    clipper = rig.clipper(distclip.global_norm(0.5))
    counts = count_collectives(clipper.comm)
    with Recorder(clipper, folder, every=7) as recorder:
        train(clipper, rig, 2, lambda i: recorder.note(loss=float(i + rank)))
        if rank == 1:
            with impatient(), pytest.warns(RuntimeWarning, match=r"only ranks \[1\] called flush"):
                recorder.flush()
        assert counts == {"sum_": 2}
        train(clipper, rig, 10, lambda i: recorder.note(loss=float(i + rank)))
    assert counts == {"sum_": 14, "gather_objects": 1}
    _, rows = read_lines(folder)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["loss"] for row in rows] == [i + 0.5 for i in (0, 1, *range(10))]


@on_ranks(2)
def test_uneven_inputs_do_not_communicate() -> None:
    """Join uneven inputs with DDP, where rank 1 makes fewer steps, and flush at the end."""
    rank, folder = dist.get_rank(), make_shared_folder()
    model = DistributedDataParallel(torch.nn.Linear(2, 1))
    clipper = GradClipper(model, distclip.global_norm(0.5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Recorder(clipper, folder, every=4) as recorder, model.join():
            for step in range(12 - 5 * rank):
                model(torch.ones(1, 2)).sum().backward()
                clipper.clip()
                recorder.note(loss=float(step))
    assert sum("DDP joins uneven inputs" in str(warning.message) for warning in caught) == 1
    _, rows = read_lines(folder)
    assert [row["loss"] for row in rows] == list(range(12))


@on_ranks(2)
def test_odd_note_on_one_rank_leaves_the_ranks_in_step() -> None:
    rank, folder = dist.get_rank(), make_shared_folder()
    rig = build_rig("fsdp2")
    clipper = rig.clipper(distclip.global_norm(0.5))
    mesh = world_mesh("dp")
    odd: list[dict[str, Any]] = [
        {"loss": np.ones(3)},
        {"step": float("nan")},
        {"ids": [[1], {}]},
        {"loss": distribute_tensor(torch.ones(2), mesh, [Shard(0)], src_data_rank=None)},
        {"loss": DTensor.from_local(torch.ones(()), mesh, [Partial()])},
        {"loss": torch.ones((), device="meta")},
        {"lr": object()},
    ]

    def note(step: int) -> None:
        if rank == 1 and step < len(odd):
            with pytest.raises(ArgumentError, match=r"^note"):
                recorder.note(**odd[step])
        loss = DTensor.from_local(torch.tensor(float(step)), mesh, [Replicate()]) if step % 2 else np.float32(step)
        recorder.note(loss=loss, ids=np.array([step + 100 * rank]))

    with Recorder(clipper, folder, every=4) as recorder:
        norms = train(clipper, rig, 10, note)
    assert gather_from_ranks(norms) == [norms] * 2
    _, rows = read_lines(folder)
    assert [row["loss"] for row in rows] == list(range(10))
    assert rows[7]["ids"] == [7, 107]


@on_ranks(2)
def test_failing_sink_does_not_stop_training() -> None:
    """The sink raises on the rank that writes. The file and the other sink still get all lines."""
    folder, received = make_shared_folder(), []

    def fail(numbers: dict[str, float], step: int) -> None:
        raise OSError("no space left")

    rig = build_rig("fsdp2")
    clipper = rig.clipper(POLICIES["groups"]())
    recorder = Recorder(clipper, folder, every=5, sinks=[fail, lambda numbers, step: received.append((step, numbers))])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 12):
            rig.fill(step)
            clipper.clip()
        recorder.flush()
    texts = [str(warning.message) for warning in caught]
    if dist.get_rank() == 0:
        assert texts == ["recorder: OSError: no space left. This destination gets no more lines. Training continues."]
        assert [step for step, _ in received] == list(range(1, 12))
        assert {"norm", "coef", "norms/weights", "norms/rest"} <= received[0][1].keys()
    else:
        assert not texts
        assert not received
    assert len(read_lines(folder)[1]) == 11


@on_ranks(2)
def test_replicas_that_clip_alone_write_one_file() -> None:
    """The parameters are plain tensors, so each rank clips without communication."""
    folder = make_shared_folder()
    weight = torch.nn.Parameter(torch.zeros(3))
    clipper = GradClipper([weight], distclip.global_norm(1.0))
    with Recorder(clipper, folder):
        weight.grad = torch.ones(3)
        clipper.clip()
    headers, rows = read_lines(folder)
    assert (len(headers), len(rows)) == (1, 1)


@on_ranks()
@pytest.mark.parametrize("policy", ["global", "rows"])
@each_rig
def test_update_ratio_of_whole_parameters(name: str, policy: str) -> None:
    rig = build_rig(name)
    clipper = rig.clipper(POLICIES[policy]())
    optimizer = rig.optimizer("sgd")
    rig.fill(1)
    before = rig.gather_whole(lambda param: param)
    with UpdateRatio(clipper) as update:
        clipper.step(optimizer)
    after = rig.gather_whole(lambda param: param)
    updates = torch.cat([(after[key] - before[key]).reshape(-1) for key in before])
    weights = torch.cat([value.reshape(-1) for value in before.values()])
    torch.testing.assert_close(update.ratio, updates.norm() / weights.norm(), rtol=1e-6, atol=0)
    if dist.get_rank() == 0:
        with pytest.raises(KeyError), UpdateRatio(clipper):
            raise KeyError  # on one rank only: there is no collective to wait in
