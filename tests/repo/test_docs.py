"""Run the Python of README, docs/ and the integrations' docstrings, and check that the paths they name exist."""

from __future__ import annotations

import ast
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from unittest import mock

import pytest
import torch.distributed as dist
from _pytest.mark import ParameterSet

from tests.commands import output
from tests.conftest import ROOT
from tests.ranks import World

README = ROOT / "README.md"
PAGES = [README, ROOT / ".github" / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
# Without this line DeepSpeed compiles an operator for shared memory, which takes half a minute.
DEEPSPEED_PREAMBLE = 'import deepspeed.ops\n\ndeepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False\n'


def imported_packages(code: str) -> set[str]:
    """Return the names of the top-level packages that code imports."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def blocks() -> Iterator[ParameterSet]:
    """Yield (code, number of ranks) of each Python block in the pages and in the integrations' module docstrings."""
    for page in PAGES:
        for i, (language, more, code) in enumerate(FENCED.findall(page.read_text(encoding="utf-8"))):
            if language == "python":
                ranks = re.search(r"ranks=(\d+)", more)
                yield pytest.param(code, int(ranks[1]) if ranks else 1, id=f"{page.stem}-{i}")
    for module in sorted((ROOT / "distclip" / "integrations").rglob("*.py")):
        text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
        for i, block in enumerate(re.findall(r"::\n\n((?:    .*\n|\n)+)", text + "\n")):
            code = dedent(block)
            name = module.relative_to(ROOT / "distclip" / "integrations").with_suffix("")
            # Megatron trains on GPUs only, and DeepSpeed needs a launcher.
            if name.parts[0] != "megatron":
                yield pytest.param(code, 1 + ("deepspeed" in imported_packages(code)), id=f"{name}-{i}")


def run_on_rank(code: str) -> None:
    """Run code on a rank of an initialized world.

    torch 2.13 sometimes aborts when a gloo process ends soon after a collective.
    """
    with warnings.catch_warnings(), ExitStack() as stack:
        if "deepspeed" in imported_packages(code):
            warnings.simplefilter("ignore")
        for name in ("init_process_group", "destroy_process_group"):
            stack.enter_context(mock.patch.object(dist, name))
        exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize(("code", "size"), list(blocks()))
def test_python_runs(code: str, size: int, ranks: Callable[[int], World], tmp_path: Path) -> None:
    packages = imported_packages(code)
    if missing := sorted(name for name in packages if find_spec(name) is None):
        pytest.skip(f"not installed: {', '.join(missing)}")
    if size > 1:
        ranks(size).run(run_on_rank, code=DEEPSPEED_PREAMBLE * ("deepspeed" in packages) + code)
        return
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")
    # Frameworks emit warnings that we do not control.
    strict = ["-W", "error"] if packages <= {"torch", "distclip", *sys.stdlib_module_names} else []
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    output(sys.executable, *strict, str(script), cwd=tmp_path, env=environ, timeout=300)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/])(?:launch|docker|docs|tests|conf|distclip)/[\w./-]*\w", text)
    targets = re.findall(r"\]\((?!https://)([^)#]+)[^)]*\)", text)
    links = [str(page.parent.relative_to(ROOT) / target) for target in targets]
    # Recipes name a file that does not exist yet NAME.
    paths = [name.rpartition("NAME")[0] or name for name in (*named, *links)]
    missing = [name for name in paths if not list(ROOT.glob(name)) and not list(ROOT.glob(f"{name}.*"))]
    assert missing == []


def test_readme_shows_the_two_commands() -> None:
    commands = "".join(code for language, _, code in FENCED.findall(README.read_text()) if language == "bash")
    assert "bash launch/run.sh" in commands
    assert "bash launch/test.sh" in commands


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200
