"""Test `python -m distclip.bench`: every case runs, and its counts are right. No test asserts a time."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import distclip
from distclip.bench.__main__ import DEFAULT, default_cases, main
from distclip.bench.cases import CASES
from distclip.bench.cases.local import LOCAL
from distclip.bench.competitors import Competitor
from distclip.bench.gpu_model import GPUS, WORKS, model_rows, seconds_by_unit
from distclip.bench.race import Options
from distclip.bench.results import Outcome, Standing, merge
from distclip.bench.scale import SCALE
from distclip.bench.table import Terminal, amount, markdown
from distclip.bench.timing import WARM_UP, Sample, median_ratio, median_seconds, time_interleaved

ROOT = Path(distclip.__file__).parents[1]
CPU = torch.device("cpu")


def do_nothing() -> None:
    pass


def measure(name: str, **options: Any) -> Outcome:
    return LOCAL[name].measure(Options(rounds=2, scale=0.01, **options), do_nothing)


measure_once = cache(measure)


def find_standing(outcome: Outcome, name: str) -> Standing:
    return next(standing for standing in outcome.standings if standing.name == name)


@pytest.mark.parametrize("name", list(LOCAL))
def test_local_case(name: str) -> None:
    outcome = measure_once(name)
    for one in outcome.standings:
        assert one.error is None
        assert len(one.samples) == 2
        assert one.counts is not None
        if one.own:
            assert one.counts.norm_error is not None
            assert one.counts.norm_error < 1e-6
            assert one.counts.bytes_read >= outcome.bytes
    assert any(one.own for one in outcome.standings)
    assert outcome.ratio(outcome.standings[0]) == 1.0


def test_bytes_written() -> None:
    """torch writes every gradient, distclip only those that it clips, into views too."""
    for name, own in {"gpt2": 0, "gpt2_clipped": 1, "gpt2_bf16_clipped": 1, "gpt2_views": 0, "small_views": 0}.items():
        outcome = measure_once(name)
        written = {one.name: one.counts.bytes_written for one in outcome.standings if one.counts is not None}
        assert written == {"torch": outcome.bytes, "distclip": own * outcome.bytes, "read limit": 0}, name
    alone = find_standing(measure_once("adamw"), "the step alone").counts
    assert alone is not None
    assert alone.bytes_written == 0


def test_competitors_run_equally_often_in_random_order() -> None:
    calls: list[str] = []
    prepared: list[str] = []

    def competitor(name: str) -> Competitor:
        return Competitor(name, lambda: calls.append(name), lambda: prepared.append(name))

    names = list("abcd")
    rounds = 5
    samples = time_interleaved([competitor(name) for name in names], rounds, 0, CPU, do_nothing, do_nothing)
    assert {name: len(taken) for name, taken in samples.items()} == dict.fromkeys(names, rounds)
    assert calls == prepared
    turns = [calls[i : i + len(names)] for i in range(0, len(calls), len(names))]
    assert len(turns) == rounds + WARM_UP
    assert all(sorted(turn) == names for turn in turns)
    assert len(set(map(tuple, turns))) > 1
    calls.clear()
    time_interleaved([competitor(name) for name in names], rounds, 0, CPU, do_nothing, do_nothing)
    assert [name for turn in turns for name in turn] == calls, "the order differs between ranks"


def test_preempted_rounds_are_excluded_while_enough_are_left() -> None:
    samples = [Sample(1.0, False), Sample(1.0, False), Sample(1.0, False), Sample(9.0, True), Sample(9.0, True)]
    others = [Sample(2.0, False)] * 5
    assert median_seconds(samples) == 1.0
    assert median_ratio(samples, others) == 0.5
    assert median_seconds([*samples, *[Sample(9.0, True)] * 2]) == 9.0


def test_merge_takes_the_slowest_rank() -> None:
    def rank(seconds: float) -> Outcome:
        return Outcome("c", "", 2, 1, 1, 4, [Standing("torch", False, [Sample(seconds, seconds > 1)])])

    merged = merge([rank(1.0), rank(2.0)])
    assert merged.standings[0].samples == [Sample(2.0, True)]


def test_other_libraries_are_included(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("torchtitan.distributed.utils")
    module.clip_grad_norm_ = torch.nn.utils.clip_grad_norm_
    for name in ("torchtitan", "torchtitan.distributed", "torchtitan.distributed.utils"):
        monkeypatch.setitem(sys.modules, name, module)
    outcome = measure("small", against=("torchtitan",))
    assert len(find_standing(outcome, "torchtitan").samples) == 2

    def refuse(parameters: Any, max_norm: float) -> Tensor:
        raise RuntimeError("not here\nand more")

    module.clip_grad_norm_ = refuse
    failed = find_standing(measure("small", against=("torchtitan",)), "torchtitan")
    assert failed.error == "RuntimeError: not here"
    assert not failed.samples


def test_unknown_case_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--cases", "gpt7"])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "gpt7" in message
    assert "gpt2_clipped" in message
    assert "fsdp2_tp_100" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], "--rounds 0"),
        (["--cases", "1b"], "no such case on cpu"),
        (["--cases", "small", "--scale", "0"], "--scale 0"),
        (["--cases", "small", "--against", "deepspeed"], "--against deepspeed"),
        (["--cases", "small", "--json", "/dev/null/x.json"], "--json"),
    ],
)
def test_invalid_options_are_rejected(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(SystemExit):
        main(["--scale", "0.01", "--rounds", "1", *arguments])
    assert words in capsys.readouterr().err


def test_case_that_does_not_fit_the_world_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cases", "fsdp2_tp_100", "small", "--world", "3", "--rounds", "1", "--scale", "0.01"]) == 1
    output = capsys.readouterr().out
    assert "fsdp2_tp_100: --world 3" in output
    assert "median ms" in output
    assert "fsdp2_tp_100" in default_cases(4)
    assert "fsdp2_tp_100" not in default_cases(1)


def test_without_rich(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "rich" or name.startswith("rich."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "distclip.bench.table")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit):
        main(["--list"])
    assert "pip install 'distclip[bench]'" in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [*CASES, *SCALE]
    assert set(DEFAULT) <= set(CASES)


def test_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cases", "gpt2", "polic*", "--rounds", "1", "--scale", "0.01", "--markdown"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[0] == "| case | torch ms | distclip ms | ratio |"
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        "| `gpt2`",
        *(f"| `policies`, {policy}" for policy in ("global_norm", "per_tensor_norm", "zclip", "agc")),
    ]


def test_model_of_ten_gpus_is_marked_as_computed(capsys: pytest.CaptureFixture[str]) -> None:
    """Print times by unit. None of them may exceed that of the memory, and squares in float64 would."""
    assert main(["--model"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "not measured" in lines[0]
    assert "not measured" in lines[-1]
    assert len(GPUS) == len({gpu.name for gpu in GPUS}) == 10
    assert sum(line.startswith("| B300 |") for line in lines) == len(WORKS) + 1
    for gpu, work, times in model_rows():
        assert gpu.source
        assert max(times, key=times.__getitem__) == "memory", (gpu.name, work)
    b300 = next(gpu for gpu in GPUS if gpu.name == "B300")
    squares = replace(WORKS[1], float64=1.0, conversions=1.0)
    assert seconds_by_unit(b300, squares)["float64"] > 3 * seconds_by_unit(b300, squares)["memory"]


def test_failed_competitor_has_blank_cells() -> None:
    failed = Outcome(
        "c", "", 1, 1, 1, 4, [Standing("torch", False, error="no"), Standing("distclip", True, error="no")]
    )
    assert markdown([failed]).splitlines()[-1] == "| `c` |  |  |  |"


@pytest.mark.parametrize(("width", "columns"), [(40, ["median ms"]), (200, ["median ms", "extra memory"])])
def test_narrow_terminal_shows_fewer_columns(width: int, columns: list[str]) -> None:
    output = StringIO()
    Terminal(Console(file=output, width=width, force_terminal=True, color_system=None)).outcome(measure_once("gpt2"))
    table = output.getvalue().splitlines()[3:]
    assert [name for name in ("median ms", "extra memory") if name in table[1]] == columns
    assert all(len(line) <= width for line in table)


def test_amount_formats_bytes() -> None:
    assert [amount(size) for size in (12, 1200, 5_000_000, 498_000_000)] == ["12 B", "1.2 kB", "5 MB", "498 MB"]


@pytest.mark.slow
def test_sharded_cases_on_two_ranks(tmp_path: Path) -> None:
    """Run the command on a pipe. It prints whole tables without control characters, and writes all results."""
    path = tmp_path / "out.json"
    cases = ["small", "fsdp2_tp_100", "first_call"]
    options = ["--rounds", "1", "--scale", "0.05", "--world", "2", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "distclip.bench", "--cases", *cases, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    assert all(word in done.stdout for word in (*cases, "torch", "GradClipper.clip", "collectives"))
    report = json.loads(path.read_text())
    assert set(report) == {"machine", "versions", "command", "cases"}
    assert [case["name"] for case in report["cases"]] == cases
    for case in report["cases"]:
        assert set(case) == {"name", "title", "world", "threads", "tensors", "bytes", "competitors"}
        for entry in case["competitors"]:
            assert entry["error"] is None
            assert entry["ratio"] > 0
            assert len(entry["samples_ms"]) == len(entry["preempted"]) == 1
    sharded = report["cases"][1]
    counts = {entry["name"]: entry["counts"] for entry in sharded["competitors"]}
    assert sharded["world"] == 2
    assert counts["distclip"]["collectives"] == 1
    assert counts["distclip"]["bytes_written"] == 0
    assert counts["torch"]["bytes_written"] == sharded["bytes"]
    assert counts["distclip"]["norm_error"] < 1e-6
