"""Every integration runs the checks of `tests.tables.integrations`."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from unittest import mock

import pytest

import distclip
from distclip.integrations import accelerate
from tests.tables.integrations import CHECKS, INTEGRATIONS, Integration


@pytest.mark.parametrize("framework", INTEGRATIONS)
def test_integration_runs_every_check(framework: str) -> None:
    file = Path(__file__).parent / framework / f"test_{framework}.py"
    functions = {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert set(CHECKS.values()) <= functions


def test_every_check_has_a_test() -> None:
    assert Integration.__abstractmethods__ == CHECKS.keys()


def test_missing_lightning_is_named_with_its_extra() -> None:
    missing = dict.fromkeys(("lightning", "lightning.pytorch", "pytorch_lightning"))
    name = "distclip.integrations.lightning.base_callback"
    with mock.patch.dict(sys.modules, missing):
        sys.modules.pop(name, None)
        with pytest.raises(ImportError, match=r"Lightning is not installed. Use pip install 'distclip\[lightning\]'"):
            importlib.import_module(name)


def test_object_that_is_no_accelerator_is_refused() -> None:
    with pytest.raises(distclip.ArgumentError, match=r"accelerator=dict: expected an accelerate.Accelerator"):
        accelerate.attach({}, distclip.global_norm(1.0))
