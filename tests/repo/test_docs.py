"""What README, docs/ and docstrings of integrations show runs, what they name exists, and the README is short."""

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
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
# Otherwise it compiles an operator for shared memory, for half a minute.
FOR_DEEPSPEED = 'import deepspeed.ops\n\ndeepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False\n'


def imported(code: str) -> set[str]:
    """Top-level names of packages."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def blocks() -> Iterator[ParameterSet]:
    """(code, number of ranks): fenced as python, or behind `::` in the docstring of an integration's module."""
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
            # Megatron trains on GPUs alone, and DeepSpeed wants a launcher.
            if name.parts[0] != "megatron":
                yield pytest.param(code, 1 + ("deepspeed" in imported(code)), id=f"{name}-{i}")


def run_here(code: str) -> None:
    """In ranks that have met: torch 2.13 aborts now and then where a gloo process ends soon after a collective."""
    with warnings.catch_warnings(), ExitStack() as stack:
        if "deepspeed" in imported(code):
            warnings.simplefilter("ignore")
        for name in ("init_process_group", "destroy_process_group"):
            stack.enter_context(mock.patch.object(dist, name))
        exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize(("code", "size"), list(blocks()))
def test_python_runs(code: str, size: int, ranks: Callable[[int], World], tmp_path: Path) -> None:
    needed = imported(code)
    if missing := sorted(name for name in needed if find_spec(name) is None):
        pytest.skip(f"not installed: {', '.join(missing)}")
    if size > 1:
        ranks(size).run(run_here, code=FOR_DEEPSPEED * ("deepspeed" in needed) + code)
        return
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")
    # Frameworks have warnings of their own.
    strict = ["-W", "error"] if needed <= {"torch", "distclip", *sys.stdlib_module_names} else []
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    output(sys.executable, *strict, str(script), cwd=tmp_path, env=environ, timeout=300)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/])(?:launch|docker|docs|tests|conf|distclip)/[\w./-]*\w", text)
    targets = re.findall(r"\]\((?!https://)([^)#]+)[^)]*\)", text)
    links = [str(page.parent.relative_to(ROOT) / target) for target in targets]
    missing = [name for name in (*named, *links) if not list(ROOT.glob(name)) and not list(ROOT.glob(f"{name}.*"))]
    assert missing == []


def test_the_readme_shows_commands() -> None:
    commands = "".join(code for language, _, code in FENCED.findall(README.read_text()) if language == "bash")
    assert "bash launch/run.sh" in commands and "bash launch/test.sh" in commands


def test_length() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200
