"""Train every experiment under every policy with three seeds, and print the held-out losses as a Markdown table.

`python launch/comparison/policies.py` makes all runs, which takes about two hours of one core. `--experiments`,
`--policies` and `--seeds` select some of them. A run of `rescue` takes about 15 s of one core. Runs that are already in
`--out` are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

EXPERIMENTS = ("rescue", "lstm", "gpt", "regression", "bad_label")
"""Experiments whose result is a held-out loss. The others measure something else."""

POLICIES = tuple(sorted(path.stem for path in (ROOT / "conf/clip").glob("*.yaml")))


def main() -> None:
    """Train the missing runs, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("outputs/policies"))
    options = parser.parse_args()
    rows = [["policy", *options.experiments]]
    for policy in options.policies:
        runs = [[train(options.out, one, policy, seed) for seed in options.seeds] for one in options.experiments]
        rows.append([f"`{policy}`", *map(describe, runs)])
    seeds = ", ".join(map(str, options.seeds))
    print(f"held-out loss with seeds {seeds}, and the mean share of clipped steps\n")
    print(to_markdown(rows))


def train(directory: Path, experiment: str, policy: str, seed: int) -> dict[str, float | None] | None:
    """Return the summary of a run, or None if training stopped with an error."""
    run = (directory / experiment / policy / f"seed_{seed}").resolve()
    if not (run / "summary.json").exists():
        settings = [f"experiment={experiment}", "compare=null", f"clip={policy}", f"seed={seed}", "parallel=single"]
        command = [sys.executable, str(ROOT / "launch/train.py"), *settings, "log=quiet", f"hydra.run.dir={run}"]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    try:
        summary: dict[str, float | None] = json.loads((run / "summary.json").read_text())
    except FileNotFoundError:
        return None
    return summary


def describe(runs: Sequence[dict[str, float | None] | None]) -> str:
    """Return the loss of each run, and their mean clip rate."""
    losses = [describe_loss(run) for run in runs]
    rates = [rate for run in runs if run is not None and (rate := run.get("clip_rate")) is not None]
    text = losses[0] if len(set(losses)) == 1 else " / ".join(losses)
    return f"{text} ({100 * statistics.mean(rates):.0f} %)" if rates else text


def describe_loss(summary: dict[str, float | None] | None) -> str:
    """Return the loss of a run. A loss above chance level has no further meaning."""
    if summary is None:
        return "stopped"
    loss, guess = summary.get("held_out"), summary.get("guess")
    if loss is None or not math.isfinite(loss):
        return "not finite"
    return f"> {guess:.3g}" if guess is not None and loss > guess else f"{loss:.3g}"


def to_markdown(rows: list[list[str]]) -> str:
    """Return a table whose first row is its head."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---|" + "--:|" * (len(rows[0]) - 1), *body])


if __name__ == "__main__":
    main()
