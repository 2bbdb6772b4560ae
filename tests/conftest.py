"""Provide worlds of ranks, the wheel as it would be published, and the quick subset."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings

from tests.ranks import World, raise_if_replicas_differ, rewrite_asserts, worlds

# Before the first import of Triton, whose kernels run in an interpreter on CPU tensors if there is no GPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Processes that run tests side by side take all cores. Threads of torch that wait for each other would take most of the
# time.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# The same cases in every run, with any load of the machine.
settings.register_profile("tests", deadline=None, database=None, derandomize=True)
settings.load_profile("tests")

# Before the first import of such a module.
rewrite_asserts()

raise_if_replicas_differ()

from tests.commands import output  # noqa: E402
from tests.quick import mark_quick  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the quick subset, before `-m quick` selects it."""
    mark_quick(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one process run all tests of a framework."""
    if config.getoption("dist") != "loadfile":
        return None
    # Tests run without pytest-xdist too.
    from tests.schedule import Schedule

    return Schedule(config, log)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start each test from the same random state, as `World` does on its ranks."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """Return the world of a size, `world(4)`, which lives until the session ends."""
    with worlds() as world_of:
        yield world_of


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], World]]:
    """Return the world of a size, `ranks(2)`, which lives until the module ends."""
    with worlds() as world_of:
        yield world_of


EPOCH = 1_700_000_000
"""Time that the files of `built` have, in seconds."""


class Built(NamedTuple):
    """The two files that would be published, and an environment with the wheel."""

    sdist: Path
    wheel: Path
    python: Path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build the sdist from tracked kinds of files and the wheel from the sdist, and install the wheel."""
    pytest.importorskip("build")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return _build(tmp_path_factory.mktemp("built"))
    # Processes that run tests side by side share the files.
    folder = tmp_path_factory.getbasetemp().parent / "built"
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            _build(folder)
    return _files_in(folder)


def _build(folder: Path) -> Built:
    """Build and install in a folder."""
    source = folder / "source"
    for part in ("distclip", "conf", "docs", "tests"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    environ = os.environ | {"SOURCE_DATE_EPOCH": str(EPOCH)}
    output(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source), env=environ)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    files = _files_in(folder)
    pip = (sys.executable, "-m", "pip", "--python", str(files.python))
    output(*pip, "install", "--no-deps", "--no-index", str(files.wheel))
    # Dependencies are those of the tests. A path file does not run the hook of the editable install.
    site = output(str(files.python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "needed.pth").write_text(sysconfig.get_path("purelib"))
    return files


def _files_in(folder: Path) -> Built:
    """Return the files that `_build` has made in a folder."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Built(sdist, wheel, folder / "venv" / "bin" / "python")
