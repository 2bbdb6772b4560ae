"""Frameworks leave much behind in a process: ranks that have met one meet no other. And what users install: a wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.ranks import World, worlds

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], World]]:
    """`ranks(2)`: as the fixture `world`, but of one file alone."""
    with worlds() as of:
        yield of


class Built(NamedTuple):
    """The two files that would be published, and an environment that has the second."""

    sdist: Path
    wheel: Path
    python: Path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """From tracked kinds of files alone, the wheel from the sdist; what distclip needs is that of these tests."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    for part in ("distclip", "conf"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    output(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source))
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    output(sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    # A path alone: what an editable install hooks in there stays out.
    site = output(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "needed.pth").write_text(sysconfig.get_path("purelib"))
    return Built(sdist, wheel, python)


def output(*command: str, **options: Any) -> str:
    """What a command prints that has to go well; `options` are those of `subprocess.run`."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
