"""Run the command `distclip`, which has the subcommands `report`, `suggest`, `diagnose` and `blame`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .._version import __version__
from ..errors import printable

if TYPE_CHECKING:
    from .analysis.log import Log
    from .terminal import Terminal

__all__ = ["main"]

EXTRA_PACKAGES = {"numpy", "rich", "plotly", "matplotlib", "jinja2"}
"""Packages that `distclip[report]` installs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line; None for those of the process.

    Returns:
        The exit status: 0; 1 with a line on stderr if a run cannot be analyzed or a package is missing; 130 if the user
        interrupted it.
    """
    args = _make_parser().parse_args(arguments)
    try:
        return _run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of the pipe, such as `| head`, is gone. Python would fail to flush stdout at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA_PACKAGES:
            raise
        return _fail(args, f"{missing} is not installed. Use pip install 'distclip[report]'")


def _run(args: argparse.Namespace) -> int:
    from .analysis.errors import RunError, UnreadableLinesWarning
    from .analysis.log import read_all
    from .terminal import Terminal

    command: Callable[[argparse.Namespace, list[Log], Terminal], None] = args.function
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UnreadableLinesWarning)
            logs = read_all(_select_runs(args))
        for warning in caught:
            _fail(args, str(warning.message))
        command(args, logs, Terminal())
    except RunError as error:
        return _fail(args, str(error))
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(args, f"{error.filename} cannot be written: {error.strerror}")
    sys.stdout.flush()
    return 0


def _select_runs(args: argparse.Namespace) -> list[Path]:
    from .analysis.errors import RunError
    from .analysis.log import find_runs

    runs = find_runs(args.runs)
    if len(runs) > 1 and not args.several:
        raise RunError(f"{args.runs[0]} contains {len(runs)} runs, but this command takes one. Pass {runs[0]}")
    return runs


def _report(args: argparse.Namespace, logs: list[Log], terminal: Terminal) -> None:
    from .dashboard import assess, print_summary, write_page, write_pngs

    path = args.out
    if path is None:
        directories = [log.path.parent.resolve() for log in logs]
        path = Path(os.path.relpath(os.path.commonpath(directories))) / "report.html"
    assessments = assess(logs)
    print_summary(logs, terminal.console, assessments)
    write_page(logs, path, assessments)
    terminal.line(f"page: {path}")
    if args.png is not None:
        for png in write_pngs(logs, args.png):
            terminal.line(f"png: {png}")


def _suggest(args: argparse.Namespace, logs: list[Log], terminal: Terminal) -> None:
    from .analysis.suggest import suggest

    (log,) = logs
    terminal.suggestion(log, suggest(log, args.batch))


def _diagnose(args: argparse.Namespace, logs: list[Log], terminal: Terminal) -> None:
    from .analysis.diagnosis import diagnose

    terminal.diagnosis([(log, diagnose(log)) for log in logs])


def _blame(args: argparse.Namespace, logs: list[Log], terminal: Terminal) -> None:
    from .analysis.blame import blame

    (log,) = logs
    terminal.blame(log, blame(log))


def _fail(args: argparse.Namespace, text: str) -> int:
    print(f"distclip {args.command}: {printable(text)}", file=sys.stderr)
    return 1


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distclip", description="Analyze the gradient norms that distclip.monitor.Recorder wrote."
    )
    parser.add_argument("--version", action="version", version=f"distclip {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(name: str, function: Callable[..., None], text: str, several: bool) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        run = "directory with a metrics.jsonl, or file of JSON lines"
        if several:
            run += ". A directory of runs stands for all of them"
        command.add_argument("runs", nargs="+" if several else 1, type=Path, metavar="RUN", help=run)
        command.set_defaults(function=function, several=several)
        return command

    report = add_command("report", _report, "write an HTML page that compares runs", several=True)
    report.add_argument(
        "--out", type=Path, metavar="PATH", help="path of the page (default: report.html in the runs' directory)"
    )
    report.add_argument("--png", type=Path, metavar="DIR", help="also write the charts as PNG files for papers")
    suggest = add_command("suggest", _suggest, "suggest a bound from the norms of a run", several=False)
    suggest.add_argument("--batch", type=_positive, metavar="N", help="number of samples per step in the next run")
    add_command("diagnose", _diagnose, "find problems of runs, with evidence and advice", several=True)
    add_command("blame", _blame, "find the samples, ranks and tensors that spikes have in common", several=False)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: not a positive integer. Pass 1 or more.")
    return int(text)
