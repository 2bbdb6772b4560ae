"""Print the norms that torch and distclip report for one gradient in each layout, next to the true norm.

`python launch/truth.py [--markdown]` starts gloo ranks on this machine and measures everything.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from comparison.layouts import CASES
from comparison.measurement import measure
from comparison.table import to_markdown, to_table


def main() -> None:
    """Measure every layout, print the table, and exit with an error if distclip is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all measurements to FILE")
    options = parser.parse_args()
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    with Console(stderr=True).status("measuring") as status:
        rows = []
        for index, case in enumerate(CASES):
            status.update(f"measuring {case.name}")
            rows.append(measure(index))
    if options.markdown:
        print(to_markdown(rows))
    else:
        Console().print(to_table(rows))
    if options.json:
        # JSON has no inf, so it is written as a string.
        plain = json.loads(json.dumps([asdict(row) for row in rows]), parse_constant=str)
        options.json.write_text(json.dumps(plain, indent=2) + "\n")
    wrong = [row.layout for row in rows if not row.distclip.right or row.distclip.gradients != "right"]
    if wrong:
        raise SystemExit(f"distclip is wrong under: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
