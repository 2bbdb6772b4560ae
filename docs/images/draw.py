"""Draw the picture of the README: `python docs/images/draw.py RUN`, after `bash launch/run.sh experiment=rescue`.

RUN is the directory that this command prints. The picture is written for light and for dark pages.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

FOLDER = Path(__file__).parent
CHANCE_LEVEL = "chance level"
STYLES = {
    "light": {"text": "#1f2328", "faint": "#818b98", "clipped": "#0a6ebd", "unclipped": "#c4540a"},
    "dark": {"text": "#e6edf3", "faint": "#848d97", "clipped": "#58a6ff", "unclipped": "#f0883e"},
}


def read_steps(run: Path) -> list[dict[str, Any]]:
    """Return the recorded steps of a run that have a norm."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "norm" in line and "step" in line]


def draw(run: Path, style: dict[str, str], file: Path) -> None:
    """Draw loss and norm of the two runs next to each other."""
    plain = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), style["text"])
    settings = plain | {"axes.edgecolor": style["faint"], "font.size": 10, "svg.hashsalt": "distclip"}
    with mpl.rc_context(settings):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.1), layout="constrained")
        for name in ("unclipped", "clipped"):
            steps = read_steps(run / name)
            index = [step["step"] for step in steps]
            for axes, key in ((left, "loss"), (right, "norm")):
                axes.plot(index, [step[key] for step in steps], color=style[name], linewidth=1.1, label=name)
        summary = json.loads((run / "clipped" / "summary.json").read_text(encoding="utf-8"))
        add_line(left, summary["guess"], CHANCE_LEVEL, style["faint"])
        add_line(right, 1.0, "max_norm", style["faint"])
        for axes, title, ticks in (
            (left, "training loss", [2, 5, 10, 20, 50]),
            (right, "gradient norm before clipping", [0.5, 1, 5, 10, 50, 100]),
        ):
            axes.set(yscale="log", title=title, xlabel="step", xlim=(0, None))
            axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_yticks([], minor=True)
            axes.spines[["top", "right"]].set_visible(False)
        for name, height in (("unclipped", 15), ("clipped", 3.2)):
            left.text(150, height, name, color=style[name])
        figure.savefig(file, transparent=True, metadata={"Date": None})
        plt.close(figure)


def add_line(axes: Axes, y: float, label: str, colour: str) -> None:
    """Draw a dashed horizontal line with a label at its right end."""
    axes.axhline(y, color=colour, linewidth=1, linestyle="--")
    axes.text(1.0, y, label, color=colour, ha="right", va="bottom", transform=axes.get_yaxis_transform())


def main() -> None:
    """Draw the picture in both styles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of experiment=rescue")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the pictures")
    options = parser.parse_args()
    for name, style in STYLES.items():
        draw(options.run, style, options.out / f"rescue-{name}.svg")


if __name__ == "__main__":
    main()
