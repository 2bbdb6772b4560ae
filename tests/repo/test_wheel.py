"""Test the wheel, built from the sdist, in an environment that does not contain the checkout."""

from __future__ import annotations

import os
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import distclip
from tests.commands import output
from tests.conftest import EPOCH, ROOT, Built


def run(built: Built, folder: Path, *command: str) -> str:
    """Run a command of that environment in a folder, and return its output."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return output(str(built.python.with_name(command[0])), *command[1:], cwd=folder, env=environ)


# They build a wheel and install it.
pytestmark = pytest.mark.slow


def test_wheel_has_all_files_and_no_others(built: Built) -> None:
    suffixes = {".py", ".yaml", ".css", ".html", ".js", ".md", ".typed"}
    expected = {f"distclip/{p.relative_to(ROOT / 'distclip')}" for p in (ROOT / "distclip").rglob("*")}
    expected |= {f"distclip/conf/{p.relative_to(ROOT / 'conf')}" for p in (ROOT / "conf").rglob("*")}
    expected = {name for name in expected if Path(name).suffix in suffixes or Path(name).name == "py.typed"}
    names = [name for name in zipfile.ZipFile(built.wheel).namelist() if ".dist-info/" not in name]
    assert {name for name in names if not name.endswith(".so")} == expected
    with tarfile.open(built.sdist) as sdist:
        members = {name.partition("/")[2] for name in sdist.getnames()}
    sources = {name.replace("distclip/conf/", "conf/") for name in expected} | {
        "README.md",
        "LICENSE",
        "pyproject.toml",
    }
    sources |= {f"distclip/norms/kernels/{name}" for name in ("native.c", "native_loops.h", "build_wheel.py")}
    assert sources | {"docs/index.md", "docs/images/rescue-light.svg", "tests/conftest.py"} <= members
    assert not any("__pycache__" in name for name in members)


def test_wheel_is_for_any_python(built: Built) -> None:
    tag = built.wheel.stem.split("-")[2:]
    assert tag[:2] == ["py3", "none"]
    kernels = [name for name in zipfile.ZipFile(built.wheel).namelist() if name.endswith(".so")]
    # Without a C compiler there is no kernel, and the wheel is for any platform.
    assert (kernels, tag[2] == "any") in [(["distclip/norms/kernels/_native.so"], False), ([], True)]


def test_files_do_not_depend_on_when_and_where_they_are_built(built: Built) -> None:
    assert int.from_bytes(built.sdist.read_bytes()[4:8], "little") == EPOCH
    with tarfile.open(built.sdist) as sdist:
        assert {(member.mtime, member.uname) for member in sdist.getmembers()} == {(EPOCH, "root")}
    wheel = zipfile.ZipFile(built.wheel)
    assert len({entry.date_time for entry in wheel.infolist()}) == 1
    # The wheel is built in a temporary folder, whose path debug information would contain.
    assert all(b".debug_info" not in wheel.read(name) for name in wheel.namelist() if name.endswith(".so"))


def test_wheel_without_a_compiler_is_pure_and_clips(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    # An earlier build with a compiler.
    for folder in ("lib", f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"):
        kernel = source / "build" / folder / "distclip" / "norms" / "kernels" / "_native.so"
        kernel.parent.mkdir(parents=True)
        kernel.touch()
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source))
    output(*command, env=os.environ | {"CC": "false"})
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"distclip-{distclip.__version__}-py3-none-any.whl"
    code = """
import torch, distclip
from distclip.norms.kernels.native_library import load_library

weight = torch.nn.Parameter(torch.zeros(2))
weight.grad = torch.tensor([3.0, 4.0])
print(distclip.__file__, load_library(), float(distclip.clip_grad_norm_([weight], 1.0)))
"""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    # The environment of the other wheel has no editable install, which would win over the path.
    clipped = output(str(built.python), "-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)})
    assert clipped.split() == [str(site / "distclip" / "__init__.py"), "None", "5.0"]


def test_importing_loads_torch_only(built: Built, tmp_path: Path) -> None:
    code = """
import sys, torch, torch.distributed
before = set(sys.modules)
import distclip
print(distclip.__file__)
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""
    path, loaded = run(built, tmp_path, "python", "-c", code).splitlines()
    assert Path(path).is_relative_to(built.python.parents[1])
    assert loaded == "['distclip']"


def test_version_is_the_same_everywhere(built: Built, tmp_path: Path) -> None:
    assert run(built, tmp_path, "distclip", "--version") == f"distclip {distclip.__version__}\n"
    assert f"-{distclip.__version__}-" in built.wheel.name
    assert built.sdist.name == f"distclip-{distclip.__version__}.tar.gz"


def test_extra_all_includes_every_user_extra(built: Built) -> None:
    text = zipfile.ZipFile(built.wheel).read(f"distclip-{distclip.__version__}.dist-info/METADATA").decode()
    distribution = metadata.PathDistribution(zipfile.Path(built.wheel, f"distclip-{distclip.__version__}.dist-info/"))
    extras = set(distribution.metadata.get_all("Provides-Extra") or ())
    user_extras = extras - {"all", "dev", "docs"}
    names = {"bench", "columnar", "deepspeed", "hf", "keras", "lightning", "mpi", "report", "serve", "train"}
    assert names == user_extras
    assert f'distclip[{",".join(sorted(user_extras))}]; extra == "all"' in text


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
COMMANDS = """
from distclip.bench.__main__ import main as bench
from distclip.monitor.cli import main

for command in (["suggest"], ["diagnose"], ["report", "--png", "pictures"]):
    assert main([*command, "runs/first"]) == 0
    print("--")
assert bench(["--list"]) == 0
"""


def test_commands_of_the_wheel_run(built: Built, tmp_path: Path) -> None:
    """Record and analyze a run in one process, which takes seconds to start."""
    pytest.importorskip("plotly")
    *analyses, listing = run(built, tmp_path, "python", "-c", RECORDED + COMMANDS).split("--\n")
    assert len(analyses) == 3
    assert all(analyses)
    assert list(tmp_path.rglob("*.html"))
    assert list(tmp_path.rglob("*.png"))
    assert "gpt2" in listing
