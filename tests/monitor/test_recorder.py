"""A recorder of one process: its file whatever happens to it, one copy to the host, other people's libraries."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import distclip
from distclip import GradClipper
from distclip.monitor import Recorder, sinks

SIZE = 4


def clipper_of(policy: Any = None, **options: Any) -> tuple[GradClipper, torch.nn.Parameter]:
    weight = torch.nn.Parameter(torch.zeros(SIZE))
    return GradClipper([("weight", weight)], policy or distclip.global_norm(1.0), **options), weight


def steps_of(clipper: GradClipper, weight: torch.nn.Parameter, norms: list[float]) -> Iterator[float]:
    """Clips a gradient of each of these norms."""
    for norm in norms:
        weight.grad = torch.full((SIZE,), norm / SIZE**0.5)
        clipper.clip()
        yield norm


def rows_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "step" in line]


def test_a_line_a_step(tmp_path: Path) -> None:
    clipper, weight = clipper_of()
    with Recorder(clipper, tmp_path, every=3) as recorder:
        for norm in steps_of(clipper, weight, [0.5, 2.0, 4.0, 8.0]):
            recorder.note(loss=torch.tensor(norm, dtype=torch.bfloat16), lr=0.1, tokens=torch.tensor(7), ids=["a", "b"])
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["norm"] for row in rows] == [0.5, 2.0, 4.0, 8.0]
    assert [row["clipped"] for row in rows] == [False, True, True, True]
    assert [row["coef"] for row in rows] == pytest.approx([1, 0.5, 0.25, 0.125], rel=1e-5)
    assert all(row["loss"] == row["norm"] and row["bound"] == 1.0 and row["tokens"] == 7 for row in rows)
    assert not any("ids" in row for row in rows)  # none of them stands out


def test_whoever_steps_is_recorded(tmp_path: Path) -> None:
    clipper, weight = clipper_of()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    clipper.attach(optimizer)
    with Recorder(clipper, tmp_path):
        weight.grad = torch.ones(SIZE)
        optimizer.step()
        weight.grad = torch.ones(SIZE)
        clipper.step(optimizer)
    assert [row["norm"] for row in rows_of(tmp_path)] == [2.0, 2.0]


def test_a_loss_scale_is_taken_out_and_noted(tmp_path: Path) -> None:
    clipper, weight = clipper_of()
    optimizer, scaler = torch.optim.SGD([weight], lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    with Recorder(clipper, tmp_path, per_tensor=True):
        for bad in (False, True, False):
            scaler.scale((weight * (float("inf") if bad else 1.0)).sum()).backward()
            clipper.step(optimizer, scaler)
            scaler.update()
            optimizer.zero_grad()
    rows = rows_of(tmp_path)
    assert [row["norm"] for row in rows] == [2.0, None, 2.0]
    assert [row["tensor_norms"] for row in rows] == [[2.0], [None], [2.0]]
    assert [row["scale"] for row in rows] == [8.0, 8.0, 4.0]
    assert rows[1]["nonfinite"] == SIZE


def test_a_loss_does_not_keep_what_it_came_from(tmp_path: Path) -> None:
    clipper, weight = clipper_of()
    recorder = Recorder(clipper, tmp_path)
    data = torch.ones(SIZE)
    alive = weakref.ref(data)
    loss = (weight * data).sum()
    loss.backward(retain_graph=True)
    clipper.clip()
    recorder.note(loss=loss)
    del loss, data
    assert alive() is None


class Copies(TorchDispatchMode):
    """Counts what brings numbers to the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
        return func(*args, **(kwargs or {}))


def test_between_two_writes_a_step_reads_nothing(tmp_path: Path) -> None:
    alone, weight = clipper_of()
    with Copies() as without:
        list(steps_of(alone, weight, [2.0] * 5))
    recorded, weight = clipper_of()
    recorder = Recorder(recorded, tmp_path, every=5)
    with Copies() as with_it:
        for _ in steps_of(recorded, weight, [2.0] * 5):
            recorder.note(loss=torch.ones(()), lr=0.1)
    assert with_it.count == without.count
    recorder.flush()


def test_a_crash_loses_no_more_than_it_may_and_leaves_a_file_that_can_be_gone_on_with(tmp_path: Path) -> None:
    code = f"""
        import os, torch, distclip
        from distclip.monitor import Recorder
        weight = torch.nn.Parameter(torch.zeros(4))
        clipper = distclip.GradClipper([weight], distclip.global_norm(1.0))
        recorder = Recorder(clipper, {str(tmp_path)!r}, every=4)
        for step in range(10):
            weight.grad = torch.ones(4)
            clipper.clip()
        os._exit(1)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == 1
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, 9))
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 9, "no')
    clipper, weight = clipper_of()
    with Recorder(clipper, tmp_path):
        list(steps_of(clipper, weight, [1.0]))
    torn, header, row = file.read_text().splitlines()[-3:]
    assert torn == '{"step": 9, "no'
    assert "distclip" in json.loads(header)
    assert json.loads(row)["step"] == 1


def test_a_process_that_ends_writes_the_rest(tmp_path: Path) -> None:
    code = f"""
        import torch, distclip
        from distclip.monitor import Recorder
        weight = torch.nn.Parameter(torch.zeros(4))
        clipper = distclip.GradClipper([weight], distclip.global_norm(1.0))
        recorder = Recorder(clipper, {str(tmp_path)!r})
        weight.grad = torch.ones(4)
        clipper.clip()
        raise ValueError
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, stderr=subprocess.DEVNULL)
    assert len(rows_of(tmp_path)) == 1


def test_a_step_that_raises_leaves_what_was_before_it(tmp_path: Path) -> None:
    clipper, weight = clipper_of(on_nonfinite="raise")
    with pytest.raises(distclip.NonFiniteError), Recorder(clipper, tmp_path):
        list(steps_of(clipper, weight, [1.0, 2.0, float("nan")]))
    assert [row["norm"] for row in rows_of(tmp_path)] == [1.0, 2.0]


def test_it_stays_with_a_clipper_that_is_bound_anew(tmp_path: Path) -> None:
    clipper, weight = clipper_of()
    with Recorder(clipper, tmp_path, per_tensor=True):
        list(steps_of(clipper, weight, [1.0]))
        other = torch.nn.Parameter(torch.zeros(SIZE))
        clipper.rebind([("weight", other)])
        list(steps_of(clipper, other, [3.0]))
    assert [row["tensor_norms"] for row in rows_of(tmp_path)] == [[1.0], [3.0]]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"every": 0}, "every=0"),
        ({"top": -1}, "top=-1"),
        ({"sinks": [3]}, "sinks"),
        ({"facts": ["batch"]}, "facts"),
    ],
)
def test_what_cannot_be_meant(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(distclip.ArgumentError, match=said):
        Recorder(clipper_of()[0], tmp_path, **wrong)
    assert not list(tmp_path.iterdir())
    with pytest.raises(distclip.ArgumentError, match="GradClipper"):
        Recorder(torch.nn.Linear(1, 1), tmp_path)  # type: ignore[arg-type]


def record(tmp_path: Path, sink: sinks.Sink) -> None:
    clipper, weight = clipper_of()
    with Recorder(clipper, tmp_path, per_tensor=True, sinks=[sink]) as recorder:
        for _ in steps_of(clipper, weight, [2.0, float("nan"), 4.0]):
            recorder.note(lr=0.1)


@pytest.mark.filterwarnings("ignore::distclip.NonFiniteWarning")
def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    record(tmp_path, sinks.tensorboard(tmp_path / "events"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert {"clip/norm", "clip/coef", "clip/lr", "clip/tensor_norms/weight"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("clip/norm")] == [1, 2, 3]
    norms = [event.value for event in events.Scalars("clip/norm")]
    assert norms == pytest.approx([2.0, float("nan"), 4.0], nan_ok=True)


@pytest.mark.filterwarnings("ignore")
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    with pytest.raises(distclip.ArgumentError, match="no run is active"):
        sinks.wandb()
    with wandb.init(mode="offline", dir=str(tmp_path), project="distclip") as run:
        for step in (5, 6):
            run.log({"its own": 1.0}, step=step)
        record(tmp_path, sinks.wandb())
        assert run.summary["clip/norm"] == 4.0
        assert run.summary["clip/step"] == 3


@pytest.mark.filterwarnings("ignore")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    mlflow.set_experiment("distclip")
    with pytest.raises(distclip.ArgumentError, match="no run is active"):
        sinks.mlflow()
    with mlflow.start_run() as run:
        record(tmp_path, sinks.mlflow())
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "clip/norm")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.0), (3, 4.0)]


@pytest.mark.filterwarnings("ignore")
def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    logged: list[tuple[dict[str, float], int]] = []
    monkeypatch.setattr(trackio, "log", lambda numbers, step: logged.append((numbers, step)))
    record(tmp_path, sinks.trackio())
    assert [(step, numbers.get("clip/norm")) for numbers, step in logged] == [(1, 2.0), (2, None), (3, 4.0)]
