"""Build the closing table: only rows with numbers, as wide as the terminal."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from rich.console import Console

from distclip import Culprit, Incident
from job import table
from job.log import Summary
from job.probes.probe import Metric

pytestmark = pytest.mark.quick

PLAIN = Summary(
    steps=3,
    held_out=0.5,
    guess=2.0,
    norms={"p50": 1.0, "max": 2.0},
    nonfinite=0,
    first_nonfinite=None,
    skipped=0,
    zeroed=0,
    incidents=[],
    r2=None,
    measures=[],
    clip_rate=0.25,
    seconds=1.0,
    directory="",
)


def test_omits_rows_without_numbers() -> None:
    assert [title for title, _ in table.build_rows([PLAIN])] == [
        "steps",
        "held-out loss",
        "  at chance level",
        "norm p50",
        "norm max",
        "clip rate",
        "time",
    ]


def test_leaves_cells_empty_for_runs_without_a_number() -> None:
    solved = replace(PLAIN, guess=math.nan, measures=[Metric("solved", "solved", 0.954, "{:.1%}")])
    diverged = replace(
        PLAIN, held_out=1.2e30, nonfinite=2, first_nonfinite=5, measures=[Metric("recovery", "recovery", math.inf)]
    )
    cells = dict(table.build_rows([PLAIN, solved, diverged]))
    assert cells["recovery"] == ["", "", "-"]
    assert cells["solved"] == ["", "95.4%", ""]
    assert cells["held-out loss"] == ["0.500", "0.500", "1.2e+30"]
    assert cells["non-finite norm"] == ["0 steps", "0 steps", "2 steps"]
    assert cells["  first at step"] == ["", "", "5"]
    assert "  at chance level" not in dict(table.build_rows([solved]))


def test_splits_the_table_if_the_terminal_is_narrow() -> None:
    runs = {f"run with a long name {i}": PLAIN for i in range(7)}
    tables = table.build_tables(runs, Console(width=80))
    assert sum(len(part.columns) - 1 for part in tables) == 7
    assert 1 < len(tables) < 7
    assert len(table.build_tables(runs, Console(width=300))) == 1


def test_describes_the_first_culprits() -> None:
    first = Incident(2, "skip", (Culprit("0.weight", 3, 0, (1,)), Culprit("1.bias", 0, 1, ())))
    run = replace(PLAIN, incidents=[first, Incident(5, "skip", (Culprit("0.weight", 1, 0, (0,)),))])
    texts = [f"{culprit} at step 2" for culprit in first.culprits]
    assert table.describe_culprits(run, limit=2) == [*texts, "and 1 more"]
    assert texts[0] == "0.weight (3 NaN on rank 1) at step 2"
    assert len(table.describe_culprits(run, limit=3)) == 3
