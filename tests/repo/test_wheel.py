"""What users install: the wheel, from the sdist, in an environment that has never seen the checkout."""

from __future__ import annotations

import os
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import distclip
from tests.commands import output
from tests.conftest import ROOT, Built


def run(built: Built, folder: Path, *command: str) -> str:
    """What a command of that environment prints, in a folder of its own."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return output(str(built.python.with_name(command[0])), *command[1:], cwd=folder, env=environ)


def test_everything_is_inside_and_nothing_else(built: Built) -> None:
    kinds = {".py", ".yaml", ".css", ".html", ".md", ".typed"}
    wanted = {f"distclip/{p.relative_to(ROOT / 'distclip')}" for p in (ROOT / "distclip").rglob("*")}
    wanted |= {f"distclip/conf/{p.relative_to(ROOT / 'conf')}" for p in (ROOT / "conf").rglob("*")}
    wanted = {name for name in wanted if Path(name).suffix in kinds or Path(name).name == "py.typed"}
    names = [name for name in zipfile.ZipFile(built.wheel).namelist() if ".dist-info/" not in name]
    assert {name for name in names if not name.endswith(".so")} == wanted
    with tarfile.open(built.sdist) as sdist:
        inner = {name.partition("/")[2] for name in sdist.getnames()}
    sources = {name.replace("distclip/conf/", "conf/") for name in wanted} | {"README.md", "LICENSE", "pyproject.toml"}
    assert sources | {"distclip/norms/kernels/native.c", "distclip/norms/kernels/native_loops.h"} <= inner


def test_importing_loads_torch_only(built: Built, tmp_path: Path) -> None:
    code = """
import sys, torch, torch.distributed
before = set(sys.modules)
import distclip
print(distclip.__file__)
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""
    where, loaded = run(built, tmp_path, "python", "-c", code).splitlines()
    assert Path(where).is_relative_to(built.python.parents[1])
    assert loaded == "['distclip']"


def test_the_version_is_one(built: Built, tmp_path: Path) -> None:
    assert run(built, tmp_path, "distclip", "--version") == f"distclip {distclip.__version__}\n"
    assert f"-{distclip.__version__}-" in built.wheel.name
    assert built.sdist.name == f"distclip-{distclip.__version__}.tar.gz"


def test_all_is_every_extra_for_users(built: Built) -> None:
    text = zipfile.ZipFile(built.wheel).read(f"distclip-{distclip.__version__}.dist-info/METADATA").decode()
    found = metadata.PathDistribution(zipfile.Path(built.wheel, f"distclip-{distclip.__version__}.dist-info/"))
    extras = set(found.metadata.get_all("Provides-Extra") or ())
    assert {"bench", "deepspeed", "hf", "lightning", "mpi", "report", "train"} == extras - {"all", "dev"}
    assert f'distclip[{",".join(sorted(extras - {"all", "dev"}))}]; extra == "all"' in text


RECORDED = """
import torch, distclip
from distclip.monitor import Recorder

model = torch.nn.Linear(4, 1)
clipper = distclip.GradClipper(model, distclip.global_norm(1.0))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
with Recorder(clipper, "runs/first") as recorder:
    for step in range(300):
        model(torch.randn(8, 4)).square().mean().backward()
        clipper.step(optimizer)
        optimizer.zero_grad()
"""


def test_its_commands_run(built: Built, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    run(built, tmp_path, "python", "-c", RECORDED)
    for command in (["suggest"], ["diagnose"], ["report", "--png", "pictures"]):
        assert run(built, tmp_path, "distclip", *command, "runs/first")
    assert list(tmp_path.rglob("*.html")) and list(tmp_path.rglob("*.png"))
    assert "gpt2" in run(built, tmp_path, "python", "-m", "distclip.bench", "--list")
