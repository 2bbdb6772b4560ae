"""`python -m distclip.bench --list` shows the cases, `--help` the rest."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from .cases import LOCAL, LocalCase
from .competitors import OTHERS
from .errors import BenchError
from .machine import machine, versions
from .race import Options
from .report import Report
from .sharded import SHARDED, FirstCalls, ShardedCase
from .world import default_size

__all__ = ["main"]

CASES: dict[str, LocalCase | ShardedCase | FirstCalls] = {**LOCAL, **SHARDED}
USUAL = ["gpt2", "gpt2_clipped", "gpt2_bf16", "small", "adamw", "fsdp2_100", "fsdp2_tp_100"]
"""A minute or two; all of them take several."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print.

    Args:
        arguments: of the command line; None for the process' own.

    Returns:
        The exit status.
    """
    parser = _parser()
    asked = parser.parse_args(arguments)
    try:
        from .table import Terminal, markdown
    except ModuleNotFoundError as error:
        parser.exit(1, f"{parser.prog} needs {error.name}: pip install 'distclip[bench]'\n")
    terminal = Terminal()
    if asked.list:
        for case in CASES.values():
            terminal.line(f"{case.name:<18} {case.title}")
        return 0
    try:
        _check(asked)
        cases = chosen(asked.cases or usual(asked.world or default_size(asked.device)), asked.device)
        report = Report(asked.json, machine(asked.device), versions())
        report.save()
    except BenchError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    terminal.header(report.machine, report.versions)
    terminal.line(report.command)
    failed = False
    try:
        with terminal.bar() as bar:
            task = bar.add_task("", total=len(cases) * asked.rounds)
            for number, case in enumerate(cases):
                bar.update(task, description=case.name)
                try:
                    report.outcomes.append(case.measure(_options(asked), lambda: bar.advance(task)))
                except BenchError as error:
                    failed = True
                    terminal.line(f"\n{case.name}: {error}")
                    continue
                finally:
                    bar.update(task, completed=(number + 1) * asked.rounds)
                report.save()
                if not asked.markdown:
                    terminal.outcome(report.outcomes[-1])
    except KeyboardInterrupt:
        return 130
    if asked.markdown:
        terminal.line(f"\n{markdown(report.outcomes)}")
    return int(failed)


def usual(size: int) -> list[str]:
    """The cases of a call that names none.

    Args:
        size: of the world; what needs a multiple of something else is left out.
    """
    sharded = ((name, SHARDED.get(name)) for name in USUAL)
    return [name for name, case in sharded if not (isinstance(case, ShardedCase) and size % case.divisor)]


def chosen(patterns: Sequence[str], device: str) -> list[LocalCase | ShardedCase | FirstCalls]:
    """The cases that are asked for and run on this device, in the order of `--list`.

    Args:
        patterns: names, or patterns of them as a shell has them.
        device: "cpu" or "cuda".

    Raises:
        BenchError: a pattern that no case of this device matches.
    """
    here = {name: case for name, case in CASES.items() if device in case.devices}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in here):
            raise BenchError(f"--cases {pattern}: no such case on {device}. There are {', '.join(here)}.")
    return [case for name, case in here.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _options(asked: argparse.Namespace) -> Options:
    against = tuple(asked.against)
    return Options(asked.device, asked.rounds, asked.seed, asked.world, asked.threads, against, asked.scale)


def _check(asked: argparse.Namespace) -> None:
    for name in ("rounds", "world", "threads"):
        number = getattr(asked, name)
        if number is not None and number < 1:
            raise BenchError(f"--{name} {number}: write a number from 1 on.")
    for name in asked.against:
        if importlib.util.find_spec(name) is None:
            raise BenchError(f"--against {name}: it is not installed here. Install it, or leave it out.")
    if not asked.scale > 0:
        raise BenchError(f"--scale {asked.scale}: write a number above 0, at most 1.")
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda: torch finds no GPU here. Write --device cpu.")
    if asked.device == "cuda" and (asked.world or 1) > torch.cuda.device_count():
        raise BenchError(f"--world {asked.world}: there are {torch.cuda.device_count()} GPUs, one for each rank.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m distclip.bench",
        description="distclip's clipping against torch's, on this machine: interleaved, with medians of the ratios.",
    )
    there = [name for name in OTHERS if importlib.util.find_spec(name) is not None]
    add = parser.add_argument
    add("--cases", nargs="+", metavar="NAME", help="names or patterns, '*' for all (default: a few)")
    add("--list", action="store_true", help="show the cases and end")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--world", type=int, metavar="N", help="ranks of the sharded cases (default: 4, or one per GPU)")
    add("--rounds", type=int, default=15, metavar="R", help="how often each contestant is timed (default: 15)")
    add("--threads", type=int, metavar="N", help="of torch, in each process (default: all processors, shared by ranks)")
    add("--seed", type=int, default=0, metavar="N", help="of the gradients, and of the order of contestants")
    add("--scale", type=float, default=1.0, metavar="X", help="shrink models; below 1 it is no longer the named case")
    add(
        "--against",
        nargs="+",
        choices=list(OTHERS),
        default=[],
        metavar="NAME",
        help=f"other libraries that take part: {', '.join(OTHERS)} (installed: {', '.join(there) or 'none'})",
    )
    add("--json", type=Path, metavar="PATH", help="write everything there, with all samples")
    add("--markdown", action="store_true", help="print one table for a README instead")
    return parser


if __name__ == "__main__":
    sys.exit(main())
