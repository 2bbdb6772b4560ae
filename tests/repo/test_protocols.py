"""Check that the library reads only attributes that its own protocols declare, and that its stages are commented."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repo.source import ROOT, files, parse, relative

NOT_CONVERTED: tuple[str, ...] = ()
"""Prefixes of paths that these tests skip. It must become empty, and stay empty."""

FOREIGN = (
    "distclip/integrations/",  # objects of the frameworks
    "distclip/comm/__init__.py",  # the communicator of a user
    "distclip/comm/mpi.py",  # mpi4py, if it was imported
    "distclip/sharding/annotations.py",  # attributes of tensors
    "distclip/sharding/dtensor.py",  # placements of third parties
    "distclip/sharding/fsdp1.py",
    "distclip/sharding/ddp.py",
    "distclip/sharding/megatron.py",
    "distclip/policies/custom.py",  # the threshold of a user
    "distclip/apply/",  # optimizers of any library
    "distclip/clipper.py",  # attributes that a GradScaler sets on an attached optimizer
    "distclip/checkpoint.py",  # a loaded value, and a policy of any class
    "distclip/monitor/writer.py",  # a policy of any class is described by its fields
    "distclip/norms/kernels/native_library.py",  # torch.Tensor has no DLPack API up to torch 2.10
)
"""Modules that read attributes which a foreign object may lack, with getattr or hasattr."""

ARGUMENTS: dict[str, set[str]] = {
    "distclip/engine.py": {"Policy"},
    "distclip/integrations/attachment.py": {"Attachment", "GradClipper", "Policy"},
    "distclip/integrations/deepspeed/attachment.py": {"GradClipper"},
    "distclip/integrations/deepspeed/native_clipping.py": {"Fixed", "NormPolicy"},
    "distclip/monitor/recorder.py": {"GradClipper"},
    "distclip/policies/custom.py": {"Rule"},
    "distclip/sharding/shard.py": {"Shards"},
}
"""Classes that a module may test for with isinstance, because it checks the argument of a caller."""

DENSE = ("distclip/engine.py", "distclip/sharding/", "distclip/norms/", "distclip/comm/")
"""Parts of the library whose lines most often need a reason."""

COMMENTS_PER_100_LINES = 6


def library() -> list[Path]:
    """List the converted modules of the library."""
    return [path for path in files("distclip") if not relative(path).startswith(NOT_CONVERTED)]


def calls(path: Path, *names: str) -> Iterator[ast.Call]:
    """Yield the calls of builtin functions in a module."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            yield node


def own_classes() -> set[str]:
    """Return the names of all classes that the library defines."""
    return {node.name for path in files("distclip") for node in ast.walk(parse(path)) if isinstance(node, ast.ClassDef)}


def test_attributes_are_declared() -> None:
    wrong = [
        f"{relative(path)}:{call.lineno}: {ast.unparse(call)}"
        for path in library()
        if not relative(path).startswith(FOREIGN)
        for call in calls(path, "getattr", "hasattr", "setattr", "delattr")
    ]
    assert not wrong, "\n".join(wrong)


def test_own_classes_are_not_told_apart_by_isinstance() -> None:
    """Our classes share a protocol instead. Checking the argument of a caller is listed in ARGUMENTS."""
    own = own_classes()
    wrong = []
    for path in library():
        for call in calls(path, "isinstance", "issubclass"):
            named = {node.id for node in ast.walk(call.args[1]) if isinstance(node, ast.Name)}
            named |= {node.attr for node in ast.walk(call.args[1]) if isinstance(node, ast.Attribute)}
            if (named & own) - ARGUMENTS.get(relative(path), set()):
                wrong.append(f"{relative(path)}:{call.lineno}: {ast.unparse(call)}")
    assert not wrong, "\n".join(wrong)


def test_the_list_of_arguments_is_exact() -> None:
    """An entry whose check is gone is removed."""
    for name, classes in ARGUMENTS.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert all(word in text for word in ("isinstance(", *classes)), name


@pytest.mark.parametrize("place", DENSE)
def test_stages_are_commented(place: str) -> None:
    comments = code = 0
    for path in library():
        if relative(path).startswith(place):
            in_file = count_lines(path)
            comments, code = comments + in_file[0], code + in_file[1]
    assert 100 * comments >= COMMENTS_PER_100_LINES * code, f"{comments} comments for {code} lines of code"


def count_lines(path: Path) -> tuple[int, int]:
    """Count the lines that have nothing but a comment, and the lines of code without docstrings."""
    text = path.read_text(encoding="utf-8")
    comments = sum(line.lstrip().startswith("#") for line in text.splitlines())
    strings: set[int] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            code |= set(range(token.start[0], token.end[0] + 1))
    return comments, len(code - strings)
