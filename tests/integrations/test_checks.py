"""Every integration runs the checks of `tests.tables.integrations`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.tables.integrations import CHECKS, INTEGRATIONS, Integration


@pytest.mark.parametrize("framework", INTEGRATIONS)
def test_integration_runs_every_check(framework: str) -> None:
    file = Path(__file__).parent / framework / f"test_{framework}.py"
    functions = {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert set(CHECKS.values()) <= functions


def test_every_check_has_a_test() -> None:
    assert Integration.__abstractmethods__ == CHECKS.keys()
