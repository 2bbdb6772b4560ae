"""Read the repository's own files: Python modules, docstrings, comments, and the imports between modules."""

from __future__ import annotations

import ast
import io
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Text(NamedTuple):
    """A piece of prose and its position."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


class Docstring(NamedTuple):
    """A docstring, and the kind of object it documents: module, class, function, property or constant."""

    path: str
    line: int
    kind: str
    name: str
    text: str

    @property
    def first_line(self) -> str:
        """First line of the text."""
        return self.text.strip().partition("\n")[0].strip()

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.name}: {self.first_line}"


@cache
def tracked() -> list[Path]:
    """List the files of the repository: those that git tracks or could track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(path for line in done.stdout.splitlines() if (path := ROOT / line).is_file())


def files(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    """List the tracked files in folders that have one of the suffixes."""
    chosen = [path for path in tracked() if path.suffix in suffixes]
    return [path for path in chosen if path.relative_to(ROOT).parts[0] in folders]


def relative(path: Path) -> str:
    """Return a path as it is written in the repository."""
    return path.relative_to(ROOT).as_posix()


@cache
def parse(path: Path) -> ast.Module:
    """Parse a module once."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def docstrings(path: Path) -> tuple[Docstring, ...]:
    """Return all docstrings of a module, including those below constants and dataclass fields."""
    return tuple(_find_docstrings(path))


def _find_docstrings(path: Path) -> Iterator[Docstring]:
    for node in ast.walk(parse(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=True)
            if text is not None:
                name = "module" if isinstance(node, ast.Module) else node.name
                yield Docstring(relative(path), node.body[0].lineno, _kind(node), name, text)
        body = getattr(node, "body", [])
        for before, after in zip(body, body[1:], strict=False) if isinstance(body, list) else ():
            if isinstance(before, (ast.Assign, ast.AnnAssign)) and _is_string(after):
                target = before.targets[0] if isinstance(before, ast.Assign) else before.target
                yield Docstring(relative(path), after.lineno, "constant", ast.unparse(target), after.value.value)


def comments(path: Path) -> Iterator[Text]:
    """Yield the comments of a module."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.COMMENT:
            yield Text(relative(path), token.start[0], token.string.lstrip("# "))


def messages(path: Path) -> Iterator[Text]:
    """Yield the string literals of a module that read as prose: those with a space, docstrings excluded."""
    documented = {id(node.body[0].value) for node in ast.walk(parse(path)) if _has_docstring(node)}
    for node in ast.walk(parse(path)):
        if id(node) in documented:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield Text(relative(path), node.lineno, node.value)


def imports(path: Path, package: tuple[str, ...]) -> set[str]:
    """Return the absolute names that a module imports at any level.

    Args:
        path: of the module.
        package: names of the packages that contain the module.
    """
    names: set[str] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names.add(".".join([*base, *([node.module] if node.module else [])]))
    return names


def module_imports(top: str) -> dict[str, set[str]]:
    """Map each module of a package to the modules of the same package that it imports when it is imported.

    Args:
        top: folder at the top of the repository, whose files are imported by paths below it (`launch`) or including it
            (`distclip`).
    """
    modules: dict[str, Path] = {}
    for path in files(top):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if top == "launch":
            parts = parts[1:]
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for name, path in modules.items():
        package = tuple(name.split(".")) if path.name == "__init__.py" else tuple(name.split(".")[:-1])
        graph[name] = _resolve(path, package, set(modules)) - {name}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other (strongly connected components of more than one)."""
    reach = {name: _reachable(graph, name) for name in graph}
    groups = {frozenset(m for m in reach[name] if name in reach[m]) for name in graph if name in reach[name]}
    return sorted(sorted(group) for group in groups)


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    stack = list(graph[start])
    while stack:
        name = stack.pop()
        if name not in seen:
            seen.add(name)
            stack += graph[name]
    return seen


def _resolve(path: Path, package: tuple[str, ...], modules: set[str]) -> set[str]:
    """Resolve `from a import b` to the module a.b if it exists. Imports under TYPE_CHECKING count too."""
    found: set[str] = set()
    for node in parse(path).body:
        for part in ast.walk(node) if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ():
            if isinstance(part, ast.Import):
                found |= {alias.name for alias in part.names}
            elif isinstance(part, ast.ImportFrom):
                base = [*(package[: len(package) - part.level + 1] if part.level else ())]
                base += [part.module] if part.module else []
                for alias in part.names:
                    inner = ".".join([*base, alias.name])
                    found.add(inner if inner in modules else ".".join(base))
    return found & modules


def _kind(node: ast.AST) -> str:
    if isinstance(node, ast.Module):
        return "module"
    if isinstance(node, ast.ClassDef):
        return "class"
    decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
    is_property = any("property" in decorator or decorator == "lazy" for decorator in decorators)
    return "property" if is_property else "function"


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _has_docstring(node: ast.AST) -> bool:
    body = getattr(node, "body", None)
    return isinstance(body, list) and bool(body) and _is_string(body[0])
