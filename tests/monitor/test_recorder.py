"""A recorder in one process: its file after crashes and errors, its host syncs, and the sinks."""

from __future__ import annotations

import json
import subprocess
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
from tests.interpreter import forked_python

SIZE = 4


def make_clipper(policy: Any = None, **options: Any) -> tuple[GradClipper, torch.nn.Parameter]:
    weight = torch.nn.Parameter(torch.zeros(SIZE))
    return GradClipper([("weight", weight)], policy or distclip.global_norm(1.0), **options), weight


def clip_norms(clipper: GradClipper, weight: torch.nn.Parameter, norms: list[float]) -> Iterator[float]:
    """Clip a gradient with each of these norms."""
    for norm in norms:
        weight.grad = torch.full((SIZE,), norm / SIZE**0.5)
        clipper.clip()
        yield norm


def read_steps(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "step" in line]


def test_one_line_per_step(tmp_path: Path) -> None:
    clipper, weight = make_clipper()
    with Recorder(clipper, tmp_path, every=3) as recorder:
        for norm in clip_norms(clipper, weight, [0.5, 2.0, 4.0, 8.0]):
            recorder.note(loss=torch.tensor(norm, dtype=torch.bfloat16), lr=0.1, tokens=torch.tensor(7), ids=["a", "b"])
    rows = read_steps(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["norm"] for row in rows] == [0.5, 2.0, 4.0, 8.0]
    assert [row["clipped"] for row in rows] == [False, True, True, True]
    assert [row["coef"] for row in rows] == pytest.approx([1, 0.5, 0.25, 0.125], rel=1e-5)
    assert all(row["loss"] == row["norm"] and row["bound"] == 1.0 and row["tokens"] == 7 for row in rows)
    assert not any("ids" in row for row in rows), "no step stands out"


def test_records_attached_and_direct_steps(tmp_path: Path) -> None:
    clipper, weight = make_clipper()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    clipper.attach(optimizer)
    with Recorder(clipper, tmp_path):
        weight.grad = torch.ones(SIZE)
        optimizer.step()
        weight.grad = torch.ones(SIZE)
        clipper.step(optimizer)
    assert [row["norm"] for row in read_steps(tmp_path)] == [2.0, 2.0]


def test_loss_scale_is_recorded_and_divided_out(tmp_path: Path) -> None:
    clipper, weight = make_clipper()
    optimizer, scaler = torch.optim.SGD([weight], lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    with Recorder(clipper, tmp_path, per_tensor=True):
        for overflows in (False, True, False):
            scaler.scale((weight * (float("inf") if overflows else 1.0)).sum()).backward()
            clipper.step(optimizer, scaler)
            scaler.update()
            optimizer.zero_grad()
    rows = read_steps(tmp_path)
    assert [row["norm"] for row in rows] == [2.0, None, 2.0]
    assert [row["tensor_norms"] for row in rows] == [[2.0], [None], [2.0]]
    assert [row["scale"] for row in rows] == [8.0, 8.0, 4.0]
    assert rows[1]["nonfinite"] == SIZE


def test_noted_loss_does_not_keep_its_graph(tmp_path: Path) -> None:
    clipper, weight = make_clipper()
    recorder = Recorder(clipper, tmp_path)
    data = torch.ones(SIZE)
    reference = weakref.ref(data)
    loss = (weight * data).sum()
    loss.backward(retain_graph=True)
    clipper.clip()
    recorder.note(loss=loss)
    del loss, data
    assert reference() is None


class HostReadCounter(TorchDispatchMode):
    """Counts operators that copy a number to the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
        return func(*args, **(kwargs or {}))


def test_no_host_reads_between_two_writes(tmp_path: Path) -> None:
    clipper, weight = make_clipper()
    with HostReadCounter() as without_recorder:
        list(clip_norms(clipper, weight, [2.0] * 5))
    clipper, weight = make_clipper()
    recorder = Recorder(clipper, tmp_path, every=5)
    with HostReadCounter() as with_recorder:
        for _ in clip_norms(clipper, weight, [2.0] * 5):
            recorder.note(loss=torch.ones(()), lr=0.1)
    assert with_recorder.count == without_recorder.count
    recorder.flush()


def test_crash_loses_few_steps_and_file_can_be_appended_to(tmp_path: Path) -> None:
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
    done = subprocess.run([str(forked_python()), "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == 1
    assert [row["step"] for row in read_steps(tmp_path)] == list(range(1, 9))
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 9, "no')
    clipper, weight = make_clipper()
    with Recorder(clipper, tmp_path):
        list(clip_norms(clipper, weight, [1.0]))
    # The line that the crash has torn is gone.
    last, header, row = file.read_text().splitlines()[-3:]
    assert json.loads(last)["step"] == 8
    assert "distclip" in json.loads(header)
    assert json.loads(row)["step"] == 1


def test_exit_of_the_process_writes_remaining_steps(tmp_path: Path) -> None:
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
    subprocess.run([str(forked_python()), "-c", textwrap.dedent(code)], check=False, stderr=subprocess.DEVNULL)
    assert len(read_steps(tmp_path)) == 1


def test_steps_before_an_exception_are_written(tmp_path: Path) -> None:
    clipper, weight = make_clipper(on_nonfinite="raise")
    with pytest.raises(distclip.NonFiniteError), Recorder(clipper, tmp_path):
        list(clip_norms(clipper, weight, [1.0, 2.0, float("nan")]))
    assert [row["norm"] for row in read_steps(tmp_path)] == [1.0, 2.0]


def test_records_after_rebind(tmp_path: Path) -> None:
    clipper, weight = make_clipper()
    with Recorder(clipper, tmp_path, per_tensor=True):
        list(clip_norms(clipper, weight, [1.0]))
        other = torch.nn.Parameter(torch.zeros(SIZE))
        clipper.rebind([("weight", other)])
        list(clip_norms(clipper, other, [3.0]))
    assert [row["tensor_norms"] for row in read_steps(tmp_path)] == [[1.0], [3.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"top": -1}, "top=-1"),
        ({"sinks": [3]}, "sinks"),
        ({"facts": ["batch"]}, "facts"),
    ],
)
def test_invalid_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(distclip.ArgumentError, match=message):
        Recorder(make_clipper()[0], tmp_path, **arguments)
    assert not list(tmp_path.iterdir())
    with pytest.raises(distclip.ArgumentError, match="GradClipper"):
        Recorder(torch.nn.Linear(1, 1), tmp_path)  # type: ignore[arg-type]


def record_three_steps(tmp_path: Path, sink: sinks.Sink) -> None:
    clipper, weight = make_clipper()
    with Recorder(clipper, tmp_path, per_tensor=True, sinks=[sink]) as recorder:
        for _ in clip_norms(clipper, weight, [2.0, float("nan"), 4.0]):
            recorder.note(lr=0.1)


@pytest.mark.filterwarnings("ignore::distclip.NonFiniteWarning")
def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    record_three_steps(tmp_path, sinks.tensorboard(tmp_path / "events"))
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
            run.log({"other": 1.0}, step=step)
        record_three_steps(tmp_path, sinks.wandb())
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
        record_three_steps(tmp_path, sinks.mlflow())
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "clip/norm")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.0), (3, 4.0)]


@pytest.mark.filterwarnings("ignore")
def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    logged: list[tuple[dict[str, float], int]] = []
    monkeypatch.setattr(trackio, "log", lambda numbers, step: logged.append((numbers, step)))
    record_three_steps(tmp_path, sinks.trackio())
    assert [(step, numbers.get("clip/norm")) for numbers, step in logged] == [(1, 2.0), (2, None), (3, 4.0)]
