"""Replays of outliers within a run name the cause that was built in, and leave the run as it was."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import ArgumentError
from distclip.monitor import Recorder
from distclip.monitor.analysis.diagnosis import diagnose
from distclip.monitor.analysis.log import read as read_log
from tests.ranks import gather_from_ranks, on_ranks

STEPS, SPIKE, SAMPLES = 16, 12, 8


class Net(nn.Module):
    """A network with dropout and a batch norm, which a second forward pass would change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16))
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (samples, 1)."""
        out: Tensor = self.head(self.body(x))
        return out


def small_net() -> nn.Module:
    """Return a network without state."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def batch_of(step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets of a step."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    inputs = torch.randn(SAMPLES, 6, generator=generator)
    return inputs, inputs.sum(1, keepdim=True) + 0.1 * torch.randn(SAMPLES, 1, generator=generator)


def train(
    directory: str | Path,
    kind: str,
    model: nn.Module | None = None,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    **options: Any,
) -> tuple[list[float], list[Tensor]]:
    """Train a model with an incident of a kind in one step. Return the norms and the parameters at the end."""
    model = wrap(model or Net())
    rank = dist.get_rank() if dist.is_initialized() else 0
    clipper = distclip.GradClipper(model, distclip.global_norm(5.0))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def loss_of(step: int) -> Tensor:
        inputs, targets = batch_of(step, rank)
        if (step, kind, rank) == (SPIKE, "data", dist.get_world_size() - 1 if dist.is_initialized() else 0):
            targets[5] = 3000.0
        loss: Tensor = nn.functional.mse_loss(model(inputs), targets)
        return loss

    norms = []
    torch.manual_seed(3)
    given = {"examine": loss_of, "examine_limit": 1} | options if options.pop("replays", True) else {}
    with Recorder(clipper, directory, every=5, **given) as recorder:
        for step in range(1, STEPS + 1):
            if (step, kind) == (SPIKE, "optimizer state"):
                with torch.no_grad():
                    list(model.parameters())[-1].add_(100.0)  # a bias
            optimizer.zero_grad()
            loss = loss_of(step)
            loss.backward()
            if (step, kind) == (SPIKE, "hardware") and rank == 0:
                grad = model.get_parameter("head.weight").grad
                assert grad is not None
                grad[0, 3] *= 1e5
            norms.append(float(clipper.step(optimizer).norm))
            recorder.note(loss=loss, ids=[f"s{step}-{rank}-{i}" for i in range(SAMPLES)])
    return norms, [parameter.detach().clone() for parameter in model.parameters()]


def read(directory: str | Path) -> dict[str, Any]:
    """Return the only file of a replay."""
    (path,) = (Path(directory) / "spikes").iterdir()
    assert path.name == f"{SPIKE}.json"
    assert path.stat().st_size < 100_000
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.mark.parametrize("kind", ["data", "hardware", "optimizer state"])
def test_cause(tmp_path: Path, kind: str) -> None:
    norms, parameters = train(tmp_path / "replayed", kind)
    found = read(tmp_path / "replayed")
    assert found["verdict"] == kind, found["evidence"]
    assert found["norm"] == pytest.approx(norms[SPIKE - 1])
    finding = diagnose(read_log(tmp_path / "replayed"))[0]
    assert (finding.rule, finding.title) == ("replay", f"A replay names the cause: {kind}")
    assert found["evidence"] in finding.evidence
    if kind == "data":
        assert (found["sample"]["index"], found["sample"]["id"]) == (5, f"s{SPIKE}-0-5")
    if kind == "hardware":
        assert (found["rank"], found["tensor"]) == (0, "head.weight")
    else:
        assert found["replayed_norm"] == pytest.approx(found["norm"])
    # The replay leaves the run as it was: gradients, buffers, random numbers.
    plain_norms, plain_parameters = train(tmp_path / "plain", kind, replays=False)
    assert norms == plain_norms
    assert all(map(torch.equal, parameters, plain_parameters))
    assert not (tmp_path / "plain/spikes").exists()


def test_numerics(tmp_path: Path) -> None:
    """The activations of a step overflow float16, and not float32."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1))
    clipper = distclip.GradClipper(model, distclip.global_norm(5.0))
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)

    def loss_of(step: int) -> Tensor:
        inputs, targets = batch_of(step)
        with torch.autocast("cpu", torch.float16):
            hidden = model[0](inputs) * (1e6 if step == SPIKE else 1.0)
            return nn.functional.mse_loss(model[1](hidden / hidden.norm()).float(), targets)

    with warnings.catch_warnings(), Recorder(clipper, tmp_path, examine=loss_of, examine_limit=1) as recorder:
        warnings.simplefilter("ignore", distclip.NonFiniteWarning)
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            loss_of(step).backward()
            clipper.step(optimizer)
            recorder.note(ids=range(SAMPLES))
    found = read(tmp_path)
    assert found["verdict"] == "numerics", found["evidence"]
    assert found["norm"] is None
    assert found["float32_norm"] > 0


def test_at_most_the_limit(tmp_path: Path) -> None:
    calls: list[int] = []
    weight = nn.Linear(1, 1)
    clipper = distclip.GradClipper(weight, distclip.global_norm(1.0))

    def loss_of(step: int) -> Tensor:
        loss: Tensor = weight(torch.full((2, 1), 100.0 if step > 8 and step % 3 == 0 else 1.0)).sum()
        return loss

    def examine(step: int) -> Tensor:
        calls.append(step)
        return loss_of(step)

    with Recorder(clipper, tmp_path, examine=examine, examine_limit=2) as recorder:
        for step in range(1, 30):
            weight.zero_grad()
            loss_of(step).backward()
            clipper.clip()
            recorder.note(ids=[1, 2])
    assert calls == [9, 12]
    assert {path.name for path in (tmp_path / "spikes").iterdir()} == {"9.json", "12.json"}


@pytest.mark.parametrize(
    ("function", "excerpt"),
    [
        (lambda step: 3.0, "Return the loss"),
        (lambda step: 1 / 0, "division by zero"),
        (lambda step: torch.ones(1, requires_grad=True).sum(), "Call the model"),
    ],
)
def test_function_that_fails(tmp_path: Path, function: Callable[[int], Any], excerpt: str) -> None:
    norms, _ = train(tmp_path, "data", examine=function)
    found = read(tmp_path)
    assert found["verdict"] == "unknown"
    assert excerpt in found["evidence"]
    assert len(norms) == STEPS


def test_invalid_arguments(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="examine=3: not a function"):
        train(tmp_path, "none", examine=3)
    with pytest.raises(ArgumentError, match="examine_limit=-1"):
        train(tmp_path, "none", examine_limit=-1)


@on_ranks(2)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ["data", "optimizer state"])
def test_cause_on_ranks(layout: str, kind: str) -> None:
    """The file names the rank of the sample. Without the replay, the run has the same norms."""

    def wrap(model: nn.Module) -> nn.Module:
        if layout == "ddp":
            return DistributedDataParallel(model, gradient_as_bucket_view=True)
        return fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))

    with tempfile.TemporaryDirectory() as folder:
        (shared, _) = gather_from_ranks(folder)
        norms, _ = train(shared, kind, small_net(), wrap)
        plain_norms, _ = train(f"{shared}/plain", kind, small_net(), wrap, replays=False)
        assert norms == plain_norms
        found = gather_from_ranks(read(shared) if dist.get_rank() == 0 else None)[0]
    assert found["verdict"] == kind, found["evidence"]
    assert found["num_samples"] == 2 * SAMPLES
    if kind == "data":
        assert (found["rank"], found["sample"]["index"], found["sample"]["id"]) == (1, 5, f"s{SPIKE}-1-5")
