"""Run the Python of README, docs/ and the integrations' docstrings, and check that the paths they name exist."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from _pytest.mark import ParameterSet

from distclip import NonFiniteWarning
from tests.conftest import ROOT
from tests.forks import run_forked
from tests.ranks import World
from tests.repo.source import relative, tracked

README = ROOT / "README.md"
PAGES = [README, ROOT / ".github" / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
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


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    """Return the cells of a notebook that have code."""
    cells: list[dict[str, Any]] = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def blocks() -> Iterator[ParameterSet]:
    """Yield (code, number of ranks, files) of each Python block in pages, notebooks and the integrations' docstrings.

    The files are the blocks of the page that have a name, as {name: text}.
    """
    for page in PAGES:
        fenced = FENCED.findall(page.read_text(encoding="utf-8"))
        files = {name[1]: code for _, more, code in fenced if (name := re.search(r"file=(\S+)", more))}
        for i, (language, more, code) in enumerate(fenced):
            if language == "python":
                ranks = re.search(r"ranks=(\d+)", more)
                yield pytest.param(code, int(ranks[1]) if ranks else 1, files, id=f"{page.stem}-{i}")
    for notebook in NOTEBOOKS:
        code = "\n\n".join("".join(cell["source"]) for cell in code_cells(notebook))
        yield pytest.param(code, 1, {}, id=notebook.name)
    for module in sorted((ROOT / "distclip" / "integrations").rglob("*.py")):
        text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
        for i, block in enumerate(re.findall(r"::\n\n((?:    .*\n|\n)+)", text + "\n")):
            code = dedent(block)
            name = module.relative_to(ROOT / "distclip" / "integrations").with_suffix("")
            # Megatron trains on GPUs only, and DeepSpeed needs a launcher.
            if name.parts[0] != "megatron":
                yield pytest.param(code, 1 + ("deepspeed" in imported_packages(code)), {}, id=f"{name}-{i}")


def run_on_rank(code: str, folder: str) -> None:
    """Run code on a rank of an initialized world, in a folder.

    torch 2.13 sometimes aborts when a gloo process ends soon after a collective.
    """
    with warnings.catch_warnings(), ExitStack() as stack:
        if "deepspeed" in imported_packages(code):
            warnings.simplefilter("ignore")
        for name in ("init_process_group", "destroy_process_group"):
            stack.enter_context(mock.patch.object(dist, name))
        # Later blocks run in the same process.
        stack.callback(os.chdir, Path.cwd())
        os.chdir(folder)
        # A block that shows a warning lets it pass.
        warnings.simplefilter("ignore", NonFiniteWarning)
        exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize(("code", "size", "files"), list(blocks()))
def test_python_runs(
    code: str, size: int, files: dict[str, str], ranks: Callable[[int], World], tmp_path: Path
) -> None:
    packages = imported_packages(code)
    if "torchtitan.models" in code:
        packages |= {"torchdata", "datasets"}  # .ci/run installs torchtitan without its dependencies
    if missing := sorted(name for name in packages if find_spec(name) is None):
        pytest.skip(f"not installed: {', '.join(missing)}")
    if size > 1 or (packages <= {"torch", "distclip", *sys.stdlib_module_names} and "torch.distributed" not in code):
        # A rank has imported torch already.
        code = DEEPSPEED_PREAMBLE * ("deepspeed" in packages) + code
        ranks(size).run(run_on_rank, code=code, folder=str(tmp_path))
        return
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")
    # Frameworks emit warnings that we do not control.
    strict = packages <= {"torch", "distclip", *sys.stdlib_module_names} and "start_processes" not in code
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    done = run_forked(script, tmp_path, [environ], strict=strict)
    assert done.returncode == 0, done.stdout + done.stderr


def test_notebooks_have_outputs() -> None:
    """Notebooks are stored as executed from top to bottom, so that the site and GitHub show outputs."""
    assert len(NOTEBOOKS) == 2
    for notebook in NOTEBOOKS:
        cells = code_cells(notebook)
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        assert all(cell["outputs"] for cell in cells[1:]), notebook


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


def repository() -> str:
    """Return the address of the repository, from the metadata of the package."""
    # Python 3.10 has no tomllib.
    found = re.search(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert found is not None
    return found[1]


def test_links_of_the_readme_work_on_pypi() -> None:
    """Every link is absolute, names a file of the repository, and is used."""
    text = README.read_text(encoding="utf-8")
    patterns = (r"^\[[^]]+\]: (\S+)$", r"\]\(([^)]+)\)", r'(?:src|srcset)="([^"]+)"')
    links = [link for pattern in patterns for link in re.findall(pattern, text, flags=re.MULTILINE)]
    raw = repository().replace("github.com", "raw.githubusercontent.com")
    assert links
    for link in links:
        path = re.match(rf"(?:{repository()}/blob|{raw})/main/([^#]+)", link)
        assert path is not None, link
        assert (ROOT / path[1]).exists(), link
    named = set(re.findall(r"^\[([^]]+)\]:", text, flags=re.MULTILINE))
    used = {(second or first).lower() for first, second in re.findall(r"\[([^]]+)\]\[([^]]*)\]", text)}
    assert named == used


def test_addresses_lead_to_the_repository() -> None:
    """Every link to the repository has its address and an existing file, and no text waits to be replaced."""
    owner = repository().rpartition("/")[0].removeprefix("https://github.com/")
    kept = re.compile(rf"https://(?:raw\.githubusercontent|github)\.com/{owner}/[^\s)\"'>`}}]*")
    waiting = re.compile(r"\b(?:TODO|FIXME|XXX|CHANGEME|YOUR[-_][A-Z]+|your-(?:name|org|username|repo)|USERNAME)\b")
    num_links = 0
    for path in tracked():
        name = relative(path)
        if path.suffix in (".ipynb", ".svg", ".png") or name.startswith("tests/"):
            continue
        text = path.read_text(encoding="utf-8")
        assert waiting.findall(text) == [], name
        for link in kept.findall(text):
            num_links += 1
            address = link.replace("raw.githubusercontent.com", "github.com").rstrip(".,")
            assert address.startswith(repository()), (name, link)
            page = address.removeprefix(repository()).lstrip("/")
            known = re.fullmatch(r"(?:issues|commits/main|security/advisories/new)?", page)
            assert known or (ROOT / re.sub("^(?:blob/|tree/)?main/", "", page).partition("#")[0]).exists(), (name, link)
    assert num_links > 20


def test_readme_shows_the_two_commands() -> None:
    commands = "".join(code for language, _, code in FENCED.findall(README.read_text()) if language == "bash")
    assert "bash launch/run.sh" in commands
    assert "bash launch/test.sh" in commands


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


def test_table_of_the_readme_is_part_of_the_whole_table() -> None:
    """The README rounds no number of docs/wrong-norms.md, which is checked against what `launch/truth.py` prints."""
    whole = {row[0]: row[1:] for row in rows_of(ROOT / "docs" / "wrong-norms.md")}
    shown = [row for row in rows_of(README) if row[0] in whole]
    assert len(shown) == 6
    for layout, *cells in shown:
        for cell, complete in zip(cells, whole[layout], strict=False):
            assert complete.startswith(cell), layout


def rows_of(page: Path) -> list[list[str]]:
    """Return the cells of every row of the tables of a page, without bold type."""
    lines = page.read_text(encoding="utf-8").replace("**", "").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows if row[0] not in ("layout", "---")]


@pytest.mark.slow
def test_site_builds_without_a_warning() -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    environ = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(["bash", "docs/build.sh"], cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "build/site/index.html").read_text(encoding="utf-8")
    stylesheets = re.findall(r'<link rel="stylesheet" href="([^"]+)"', page)
    assert "site/site.css" in stylesheets
    assert [name for name in stylesheets if not (ROOT / "build/site" / name).is_file()] == []
