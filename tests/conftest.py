"""Fixtures: warm worlds of ranks, and the wheel as it would be published."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.ranks import World, rewrite_asserts, worlds

# Before the first import of such a module.
rewrite_asserts()

from tests.commands import output  # noqa: E402

ROOT = Path(__file__).parents[1]

# Before anything imports Triton: where there is no GPU, its kernels run in an interpreter, on tensors of the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """`world(4)`: four gloo ranks that stay."""
    with worlds() as of:
        yield of


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
