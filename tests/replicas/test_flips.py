"""Flip bits in simulated jobs, which `flips.py` runs in large numbers, and compare what a step costs."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distclip
from distclip import ReplicaWarning
from distclip.errors import ReplicaError
from distclip.monitor import Recorder
from tests.replicas.flips import LAYOUTS, InTurn, Job, flip, run_clean, run_flips


@pytest.mark.parametrize(
    ("layout", "size", "dtype"),
    [
        (layout, 4 if layout == "hsdp" else size, dtype)
        for layout in LAYOUTS
        for size, dtype in ((2, torch.bfloat16), (3, torch.float32))
    ],
)
def test_every_flip_is_found(layout: str, size: int, dtype: torch.dtype) -> None:
    job = Job(layout, size, dtype)
    assert Counter(run_flips(job, 6, random.Random(0))) == {"found": 6}
    assert run_clean(job, 10) == 0
    job.close()


# Replicas that one collective has written, and replicas that each rank computes itself.
each_kind = pytest.mark.parametrize("layout", ["ddp", "tp"])


@each_kind
@pytest.mark.parametrize("norm_type", [1.0, 3.0, float("inf")])
def test_every_norm_type_compares_replicas(layout: str, norm_type: float) -> None:
    job = Job(layout, 3, policy=distclip.global_norm(1.0, norm_type))
    assert Counter(run_flips(job, 3, random.Random(1))) == {"found": 3}
    assert run_clean(job, 3) == 0
    job.close()


@each_kind
@pytest.mark.parametrize("make", [lambda: distclip.per_tensor_norm(1.0), lambda: distclip.agc(0.1)])
def test_every_granularity_compares_replicas(layout: str, make: Any) -> None:
    job = Job(layout, 3, policy=make())
    assert Counter(run_flips(job, 3, random.Random(2))) == {"found": 3}
    assert run_clean(job, 3) == 0
    job.close()


def test_flat_gradients_are_compared() -> None:
    job = Job("ddp", 3, flat_grads=True)
    job.clip()
    name, param = job.param(1, "w0")
    assert param.grad is not None
    flip(param.grad, 3, 5)
    assert all(isinstance(answer, ReplicaError) and f"{name} on rank 1" in str(answer) for answer in job.clip())
    job.close()


def test_repair_overwrites_the_minority_bit_by_bit() -> None:
    for kind, dtypes in (
        ("gradient", (torch.float32, torch.bfloat16, torch.float64)),
        ("parameter", (torch.bfloat16,)),
    ):
        for dtype in dtypes:
            job = Job("ddp", 3, dtype, replicas="repair", policy=distclip.global_norm(1e9))
            params = [job.param(rank, "w2")[1] for rank in range(3)]
            tensors = [param if kind == "parameter" else param.grad for param in params]
            whole = tensors[0].detach().clone()  # type: ignore[union-attr]
            flip(tensors[2], 1, 7)  # type: ignore[arg-type]
            with warnings.catch_warnings(record=True):
                warnings.simplefilter("always")
                reports = [job.clip() for _ in range(64 if kind == "parameter" else 2)]
            assert sum(bool(report.replicas_differ) for report, *_ in reports) == 1
            assert all(torch.equal(tensor.detach(), whole) for tensor in tensors)  # type: ignore[union-attr]
            assert [incident.action for incident in job.clippers[0].incidents] == ["repair"]
            job.close()


def test_warning_is_the_default_and_off_compares_nothing() -> None:
    for replicas, found in (("warn", True), ("off", False)):
        job = Job("ddp", 3, replicas=replicas)
        _, param = job.param(0, "w1")
        assert param.grad is not None
        flip(param.grad, 0, 0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            reports = job.clip()
        assert [bool(report.replicas_differ) for report in reports] == [found] * 3
        assert {str(w.message).split(" differs")[0] for w in caught if w.category is ReplicaWarning} == (
            {"step 1: replicas differ: the gradient of w1 on rank 0"} if found else set()
        )
        job.close()


def test_ranks_must_pass_the_same_rule() -> None:
    comms = distclip.comm.threads(1)
    with pytest.raises(distclip.ArgumentError, match="replicas='never'"):
        distclip.GradClipper([], distclip.global_norm(1.0), comm=comms[0], replicas="never")  # type: ignore[arg-type]


def test_step_has_one_all_reduce_of_the_same_length(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: dict[str, list[int]] = {}
    real = InTurn.sum_
    for replicas in ("off", "warn"):
        job = Job("ddp", 2, replicas=replicas)
        calls = lengths.setdefault(replicas, [])

        def count(self: InTurn, tensor: Tensor, calls: list[int] = calls) -> None:
            calls.append(len(tensor))
            real(self, tensor)

        monkeypatch.setattr(InTurn, "sum_", count)
        job.clip()
        monkeypatch.setattr(InTurn, "sum_", real)
        job.close()
    assert lengths["off"] == lengths["warn"]
    assert len(lengths["warn"]) == 2


def test_recorder_writes_the_replicas_that_differ(tmp_path: Path) -> None:
    job = Job("ddp", 3, replicas="warn")
    recorders = job.on_ranks(lambda rank: Recorder(job.clippers[rank], tmp_path))
    for step in range(4):
        job.fill()
        if step == 2:
            grad = job.param(1, "w0")[1].grad
            assert grad is not None
            flip(grad, 0, 30)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReplicaWarning)
            job.clip()
    job.on_ranks(lambda rank: recorders[rank].flush())
    job.close()
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (line,) = [line for line in text if '"replicas"' in line]
    assert '"step": 3' in line
    assert '"name": "w0", "ranks": [1], "group": [0, 1, 2]' in line
