"""Run the benchmark from the command line: `python -m distclip.bench --list` and `--help`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from .cases import CASES, Case
from .competitors import OTHERS
from .errors import BenchError
from .gpu_model import model_table
from .machine import machine, versions
from .race import Options
from .report import Report
from .scale import SCALE, Costs, measure_scale
from .world import default_size

__all__ = ["main"]

DEFAULT = ["gpt2", "gpt2_clipped", "gpt2_bf16", "small", "adamw", "fsdp2_100", "fsdp2_tp_100"]
"""Cases of a command without `--cases`, which take a minute or two."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its tables.

    Args:
        arguments: arguments of the command line. None for those of the process.

    Returns:
        The exit status.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.model:
        print(model_table())
        return 0
    try:
        from .table import Terminal, markdown
    except ModuleNotFoundError as error:
        parser.exit(1, f"{parser.prog} needs {error.name}: pip install 'distclip[bench]'\n")
    terminal = Terminal()
    if options.list:
        for case in CASES.values():
            terminal.line(f"{case.name:<18} {case.title}")
        for name in SCALE:
            terminal.line(f"{name:<18} messages and costs of each rank of large jobs, simulated; --ranks")
        return 0
    simulated = [name for name in options.cases or () if name in SCALE]
    try:
        _check(options)
        if simulated:
            if len(simulated) < len(options.cases):
                raise BenchError(
                    f"--cases: {', '.join(simulated)} simulate ranks. Pass other cases in another command."
                )
            return _simulate(simulated, options.ranks, terminal.line)
        names = options.cases or default_cases(options.world or default_size(options.device))
        cases = choose_cases(names, options.device)
        report = Report(options.json, machine(options.device), versions())
        report.save()
    except BenchError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    terminal.header(report.machine, report.versions)
    terminal.line(report.command)
    failed = False
    try:
        with terminal.bar() as bar:
            task = bar.add_task("", total=len(cases) * options.rounds)
            for number, case in enumerate(cases):
                bar.update(task, description=case.name)
                try:
                    report.outcomes.append(case.measure(_race_options(options), lambda: bar.advance(task)))
                except BenchError as error:
                    failed = True
                    terminal.line(f"\n{case.name}: {error}")
                    continue
                finally:
                    bar.update(task, completed=(number + 1) * options.rounds)
                report.save()
                if not options.markdown:
                    terminal.outcome(report.outcomes[-1])
    except KeyboardInterrupt:
        return 130
    if options.markdown:
        for line in ("", *markdown(report.outcomes).splitlines()):
            terminal.line(line)
    return int(failed)


def _simulate(cases: Sequence[str], sizes: Sequence[int], print_line: Callable[[str], object]) -> int:
    """Print the costs of simulated jobs, and return 1 if any rank exceeds its budget."""
    names = ["ranks", "store ops", "sent", "received", "CPU ms", "peak MB", "all ops", "all MB", "simulated in s"]
    print_line(f"{'case':<11}{'layout':<17}" + "".join(f"{name:>15}" for name in names))
    is_within = True
    for costs in measure_scale(cases, sizes):
        print_line(_scale_row(costs))
        is_within = is_within and costs.is_within_budget
    return int(not is_within)


def _scale_row(costs: Costs) -> str:
    cells: list[object] = [costs.num_ranks, costs.operations, costs.sent, costs.received]
    cells += [f"{1e3 * costs.cpu_seconds:.1f}", f"{1e-6 * costs.peak_bytes:.1f}", costs.store_operations]
    cells += [f"{1e-6 * costs.store_bytes:.1f}", f"{costs.wall_seconds:.1f}"]
    over = "" if costs.is_within_budget else "  over budget"
    return f"{costs.case:<11}{costs.layout:<17}" + "".join(f"{cell:>15}" for cell in cells) + over


def default_cases(world_size: int) -> list[str]:
    """Return the names of the cases that run without `--cases`.

    Args:
        world_size: number of ranks. Cases that need a multiple of another number are omitted.
    """
    return [name for name in DEFAULT if world_size % CASES[name].divisor == 0]


def choose_cases(patterns: Sequence[str], device: str) -> list[Case]:
    """Return the cases that match a pattern and run on this device, in the order of `--list`.

    Args:
        patterns: names, or shell patterns.
        device: "cpu" or "cuda".

    Raises:
        BenchError: no case of this device matches a pattern.
    """
    available = {name: case for name, case in CASES.items() if device in case.devices}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in available):
            raise BenchError(f"--cases {pattern}: no such case on {device}. Use one of {', '.join(available)}.")
    return [case for name, case in available.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _race_options(options: argparse.Namespace) -> Options:
    against = tuple(options.against)
    return Options(options.device, options.rounds, options.seed, options.world, options.threads, against, options.scale)


def _check(options: argparse.Namespace) -> None:
    for name in ("rounds", "world", "threads"):
        number = vars(options)[name]
        if number is not None and number < 1:
            raise BenchError(f"--{name} {number}: below 1. Pass a positive number.")
    for name in options.against:
        if importlib.util.find_spec(name) is None:
            raise BenchError(f"--against {name}: it is not installed. Install it, or omit the option.")
    if not options.scale > 0:
        raise BenchError(f"--scale {options.scale}: not positive. Pass a number above 0, at most 1.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda: torch finds no GPU. Pass --device cpu.")
    num_gpus = torch.cuda.device_count()
    if options.device == "cuda" and (options.world or 1) > num_gpus:
        raise BenchError(f"--world {options.world}: this machine has {num_gpus} GPUs. Pass at most one rank per GPU.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m distclip.bench",
        description="Benchmark distclip against torch on this machine: interleaved rounds, medians of the ratios.",
    )
    installed = [name for name in OTHERS if importlib.util.find_spec(name) is not None]
    add = parser.add_argument
    add("--cases", nargs="+", metavar="NAME", help="names or shell patterns, '*' for all (default: a few)")
    add("--list", action="store_true", help="list the cases and exit")
    add("--model", action="store_true", help="print a table of ten GPUs, computed from data sheets, and exit")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add(
        "--ranks",
        nargs="+",
        type=int,
        default=[256, 1024],
        metavar="N",
        help="sizes of the simulated jobs of the cases rendezvous, search and slots (default: 256 1024)",
    )
    add("--world", type=int, metavar="N", help="number of ranks of the sharded cases (default: 4, or one per GPU)")
    add("--rounds", type=int, default=15, metavar="R", help="number of timed calls of each competitor (default: 15)")
    add(
        "--threads",
        type=int,
        metavar="N",
        help="torch threads per process (default: all processors, shared by ranks)",
    )
    add("--seed", type=int, default=0, metavar="N", help="random seed of the gradients and of the order of competitors")
    add("--scale", type=float, default=1.0, metavar="X", help="shrink the models (below 1, titles no longer apply)")
    add(
        "--against",
        nargs="+",
        choices=list(OTHERS),
        default=[],
        metavar="NAME",
        help=f"other libraries to include: {', '.join(OTHERS)} (installed: {', '.join(installed) or 'none'})",
    )
    add("--json", type=Path, metavar="PATH", help="write all results and samples to this file")
    add("--markdown", action="store_true", help="print one Markdown table instead")
    return parser


if __name__ == "__main__":
    sys.exit(main())
