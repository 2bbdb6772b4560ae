"""The table that opens the README can be measured anywhere, and distclip is right in each of its rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_truth(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/truth.py"), "--markdown", "--json", str(tmp_path / "truth.json")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads((tmp_path / "truth.json").read_text())
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    readme = (ROOT / "README.md").read_text()
    assert len(rows) == len(measured)
    # Layout and truth, as the README shows them.
    missing = [row for row in rows if "|".join(row.split("|")[:3]) not in readme]
    assert not missing
