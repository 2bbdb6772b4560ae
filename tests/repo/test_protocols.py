"""Check that the library reads only attributes that its own protocols declare, and that its stages are commented."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repo.source import ROOT, files, parse, relative

FOREIGN = {
    "distclip/apply/fused.py": 1,  # an optimizer of any library
    "distclip/apply/optimizers.py": 3,  # an optimizer of any library
    "distclip/apply/updates.py": 1,  # an optimizer of any library
    "distclip/checkpoint.py": 2,  # a policy of any class, a loaded value
    "distclip/clipper.py": 2,  # what a GradScaler sets on an attached optimizer
    "distclip/apply/declined.py": 1,  # the optimizer of a caller
    "distclip/comm/__init__.py": 2,  # the communicator of a caller
    "distclip/comm/mpi.py": 1,  # mpi4py, if it was imported
    "distclip/norms/memory.py": 2,  # tensors of any class
    "distclip/norms/moments.py": 2,  # an optimizer of any library
    "distclip/norms/kernels/native_library.py": 1,  # torch.Tensor has no DLPack API up to torch 2.10
    "distclip/policies/custom.py": 8,  # the threshold of a caller
    "distclip/policies/lagged.py": 1,  # the policy of a caller
    "distclip/sharding/annotations.py": 4,  # an attribute of tensors, placements of any library
    "distclip/sharding/dtensor.py": 1,  # placements of any library
    "distclip/sharding/fsdp1.py": 2,
    "distclip/sharding/megatron.py": 6,
    "distclip/sharding/parameters.py": 1,  # an attribute that Megatron sets on parameters
}
"""Number of getattr, hasattr and setattr calls of a module, all on foreign objects. Integrations are not limited."""

ARGUMENTS: dict[str, set[str]] = {
    "distclip/apply/declined.py": {"Optimizer"},
    "distclip/auditing/audit.py": {"GradClipper"},
    "distclip/backward/in_backward.py": {"BackwardPolicy"},
    "distclip/engine/arguments.py": {"Policy"},
    "distclip/integrations/attachment.py": {"Attachment", "GradClipper", "Policy"},
    "distclip/integrations/deepspeed/attachment.py": {"GradClipper"},
    "distclip/integrations/deepspeed/native_clipping.py": {"Fixed", "NormPolicy"},
    "distclip/integrations/torchft.py": {"GradClipper"},
    "distclip/monitor/recorder.py": {"GradClipper"},
    "distclip/monitor/update_rms.py": {"GradClipper", "Optimizer"},
    "distclip/policies/custom.py": {"Rule"},
    "distclip/policies/fixed.py": {"NormPolicy"},
    "distclip/policies/isolated.py": {"Policy"},
    "distclip/policies/lagged.py": {"Budget", "Policy"},
    "distclip/sharding/attributes.py": {"Parameter"},
}
"""Classes that a module may test for with isinstance, because it checks the argument of a caller."""

DENSE = ("distclip/engine/", "distclip/sharding/", "distclip/norms/", "distclip/comm/")
"""Parts of the library whose lines most often need a reason."""

COMMENTS_PER_100_LINES = 6


def calls(path: Path, *names: str) -> Iterator[ast.Call]:
    """Yield the calls of builtin functions in a module."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            yield node


def own_classes() -> set[str]:
    """Return the names of all classes that the library defines."""
    return {node.name for path in files("distclip") for node in ast.walk(parse(path)) if isinstance(node, ast.ClassDef)}


def test_attributes_are_declared() -> None:
    """Our own objects have the attributes that their protocols declare, so that nothing needs to look for them."""
    found = {
        relative(path): [f"{relative(path)}:{call.lineno}: {ast.unparse(call)}" for call in lookups]
        for path in files("distclip")
        if not relative(path).startswith("distclip/integrations/")
        if (lookups := list(calls(path, "getattr", "hasattr", "setattr", "delattr")))
    }
    wrong = [line for name, lines in found.items() if len(lines) > FOREIGN.get(name, 0) for line in lines]
    assert not wrong, "\n".join(wrong)
    assert {name: len(lines) for name, lines in found.items()} == FOREIGN, (
        "lower the number of a module with fewer calls"
    )


def test_own_classes_are_not_told_apart_by_isinstance() -> None:
    """Our classes share a protocol instead. Checking the argument of a caller is listed in ARGUMENTS."""
    own = own_classes()
    wrong = []
    for path in files("distclip"):
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
    for path in files("distclip"):
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
