"""Load runs from elsewhere: nothing that they name is executed, and damage is found."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from distclip import GradClipper, LocalComm, ema
from job import checkpoint, untrusted
from job.checkpoint import ShardedState, Source
from job.mesh import OneProcess
from job.untrusted import UnsafeError, load_weights, read_config, weights_only
from tests.launch.jobs import train

# torch warns at every call in one process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MARK = "executed"


class Evil:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (MARK,)


class State(ShardedState):
    """State of a small model."""

    @classmethod
    def make(cls, value: float) -> State:
        model = nn.Linear(3, 1)
        nn.init.constant_(model.weight, value)
        optimizer = torch.optim.Adam(model.parameters())
        clipper = GradClipper(model, ema(), comm=LocalComm())
        model(torch.ones(2, 3)).sum().backward()
        clipper.step(optimizer)
        return cls(model, optimizer, clipper, None, OneProcess(), 2)

    @property
    def value(self) -> float:
        return float(self.module.weight.detach().flatten()[0])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with the checkpoints of two steps, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "_reported", set())
    for step in (1, 2):
        checkpoint.save(State.make(step), tmp_path, step)
    OmegaConf.save({"clip": {"_target_": "distclip.ema"}}, tmp_path / "config.yaml")
    return tmp_path


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    """Change one bit of the weights of step 2."""
    data, weights = bytearray(file.read_bytes()), State.make(2).module.weight.detach().numpy().tobytes()
    data[data.index(weights) + 2] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no metadata": lambda path: (path / ".metadata").unlink(),
    "empty metadata": lambda path: (path / ".metadata").write_bytes(b""),
    "torn metadata": lambda path: truncate(path / ".metadata"),
    "other metadata": lambda path: (path / ".metadata").write_bytes(pickle.dumps({"a": 1})),
    "text as metadata": lambda path: (path / ".metadata").write_text("hello"),
    "no data": lambda path: (path / "__0_0.distcp").unlink(),
    "torn data": lambda path: truncate(path / "__0_0.distcp"),
    "zeros": lambda path: (path / "__0_0.distcp").write_bytes(bytes((path / "__0_0.distcp").stat().st_size)),
    "one bit": lambda path: flip(path / "__0_0.distcp"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_falls_back(run: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object]) -> None:
    state = State.make(0)
    assert Source(run).load(state) == 2
    expected = State.make(1).value
    damage(run / "checkpoints/step_000002")
    assert Source(run).load(state) == 1
    assert state.value == expected
    assert "step_000002 is damaged" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints/step_000001")
    with pytest.raises(SystemExit, match="no checkpoint there is whole"):
        Source(run).load(state)


def evil_metadata(path: Path) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))


def evil_part_of_metadata(path: Path) -> None:
    metadata: Metadata = FileSystemReader(path).read_metadata()
    metadata.planner_data = Evil()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def nested_name(path: Path) -> None:
    # Protocol 4 allows attributes of attributes.
    name = b"Metadata.__init__.__globals__"
    module = b"torch.distributed.checkpoint.metadata"
    text = b"\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name
    (path / ".metadata").write_bytes(b"\x80\x04" + text + b"\x93.")


def file_elsewhere(path: Path) -> None:
    metadata: Metadata = FileSystemReader(path).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = "../step_000001/__0_0.distcp"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def evil_value(path: Path) -> None:
    """Replace a value that is no tensor, such as a learning rate."""
    metadata: Metadata = FileSystemReader(path).read_metadata()
    info = next(info for index, info in metadata.storage_data.items() if index.fqn.endswith("lr"))
    value = io.BytesIO()
    torch.save(Evil(), value)
    info.relative_path, info.offset, info.length = "evil.distcp", 0, len(value.getvalue())
    (path / "evil.distcp").write_bytes(value.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


ATTACKS = [evil_metadata, evil_part_of_metadata, nested_name, file_elsewhere, evil_value]


@pytest.mark.parametrize("attack", ATTACKS)
def test_refuses_what_could_run_code(run: Path, attack: Callable[[Path], None]) -> None:
    attack(run / "checkpoints/step_000002")
    with pytest.raises(SystemExit, match=r"step_000002 is not loaded, because it could run code: .*\. Use a run"):
        Source(run).load(State.make(0))
    assert not Path(MARK).exists()


@settings(max_examples=60)
@given(data=st.data())
def test_any_bytes_as_metadata(data: st.DataObject) -> None:
    whole = pickle.dumps(Metadata({}, storage_data={}))
    changed = bytearray(whole)
    for position in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
        changed[position] = data.draw(st.integers(0, 255))
    try:
        untrusted._Unpickler(io.BytesIO(bytes(changed))).load()
    except Exception:
        return


def test_torch_load_of_a_library_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed asks for `weights_only=False`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(Evil(), "evil.pt")
    with weights_only([]), pytest.raises(pickle.UnpicklingError):
        torch.load("evil.pt", weights_only=False)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    with pytest.raises(UnsafeError):
        load_weights("evil.pt")
    assert not Path(MARK).exists()


CONFIGS: dict[str, Any] = {
    "policy": {"clip": {"_target_": "os.mkdir", "path": MARK}},
    "argument": {"clip": {"_target_": "distclip.ema", "decay": {"_target_": "os.mkdir", "path": MARK}}},
    "in a list": {"data": [{"_target_": "builtins.exec"}]},
    "of Hydra": {"model": {"_target_": "hydra.utils.get_method", "path": "os.mkdir"}},
    "interpolation": {"clip": "${oc.create:{_target_:os.mkdir,path:executed}}"},
    "part of a name": {"clip": {"_target_": "distclip.ema.x"}},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_refuses_targets_of_others(tmp_path: Path, config: dict[str, Any]) -> None:
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
    cfg = OmegaConf.create({"clip": {"_target_": "my.policy"}})
    with pytest.raises(SystemExit, match=r"its config\.yaml (names|has interpolations)"):
        read_config(tmp_path, cfg)


def test_accepts_targets_of_the_command_line(tmp_path: Path) -> None:
    cfg = OmegaConf.create({"clip": {"_target_": "my.policy"}})
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    assert read_config(tmp_path, cfg) == cfg


def test_job_refuses_a_crafted_run(run: Path) -> None:
    evil_metadata(run / "checkpoints/step_000002")
    done = train(run, 1, "parallel=single", f"resume={run}", "hydra.run.dir=out")
    assert done.returncode == 2
    assert "step_000002 is not loaded, because it could run code" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run / MARK).exists()
