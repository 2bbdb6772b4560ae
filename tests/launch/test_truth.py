"""Measure the table of docs/wrong-norms.md. distclip must be right in each of its rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.launch.jobs import ROOT, run_command, succeed


def test_table_of_the_documentation(tmp_path: Path) -> None:
    # The command fails if distclip is wrong.
    file = tmp_path / "truth.json"
    done = run_command(tmp_path, sys.executable, str(ROOT / "launch/truth.py"), "--markdown", "--json", str(file))
    rows = [line for line in succeed(done).splitlines() if line.startswith("| ")][2:]
    page = (ROOT / "docs" / "wrong-norms.md").read_text()
    assert len(rows) == len(json.loads(file.read_text()))
    # The page shows the same layouts and true norms.
    missing = [row for row in rows if "|".join(row.split("|")[:3]) not in page]
    assert not missing
