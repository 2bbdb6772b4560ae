"""The closing table of our own job: what applies, and as wide as the terminal."""

from __future__ import annotations

import math
from dataclasses import replace

from rich.console import Console

import closing
from probe import Measure
from record import Outcome

PLAIN = Outcome(
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


def test_only_lines_that_apply() -> None:
    assert [title for title, _ in closing.lines([PLAIN])] == [
        "steps",
        "held-out loss",
        "  of a blind guess",
        "norm p50",
        "norm max",
        "clip rate",
        "time",
    ]


def test_what_one_run_has_the_others_leave_empty() -> None:
    solved = replace(PLAIN, guess=math.nan, measures=[Measure("solved", "solved", 0.954, "{:.1%}")])
    never = replace(
        PLAIN, held_out=1.2e30, nonfinite=2, first_nonfinite=5, measures=[Measure("back", "back", math.inf)]
    )
    lines = dict(closing.lines([PLAIN, solved, never]))
    assert lines["solved"] == ["", "95.4%", ""]
    assert lines["back"] == ["", "", "-"]
    assert lines["held-out loss"] == ["0.500", "0.500", "1.2e+30"]
    assert lines["norm not finite"] == ["0 steps", "0 steps", "2 steps"]
    assert lines["  first at step"] == ["", "", "5"]
    assert "  of a blind guess" not in dict(closing.lines([solved]))


def test_columns_that_do_not_fit_go_below() -> None:
    runs = {f"a run of some length {i}": PLAIN for i in range(7)}
    tables = list(closing.tables(runs, Console(width=80)))
    assert sum(len(table.columns) - 1 for table in tables) == 7
    assert 1 < len(tables) < 7
    assert len(list(closing.tables(runs, Console(width=300)))) == 1
