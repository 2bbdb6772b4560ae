"""The README's Python runs, its commands exist, and it stays short."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python_block_runs(code: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_commands_name_files_that_exist() -> None:
    commands = " ".join(code for language, code in BLOCKS if language == "bash")
    named = re.findall(r"(?:launch|docker|tests|conf)/[\w./-]+\w", commands)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_length() -> None:
    assert len(README.splitlines()) <= 200
