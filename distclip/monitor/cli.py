"""`distclip report`, `suggest`, `diagnose` and `blame`; `--help` says what each does."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .._version import __version__

if TYPE_CHECKING:
    from .analysis.log import Log
    from .terminal import Terminal

__all__ = ["main"]

NEEDED = {"numpy", "rich", "plotly", "matplotlib"}
"""What the extra brings."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line; None for the process' own.

    Returns:
        The exit status: 0, or 1 where a run is not one or something is missing, with a line on stderr that says so.
    """
    asked = _parser().parse_args(arguments)
    try:
        return _run(asked)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `| head` has seen enough. What is still buffered has nowhere to go when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in NEEDED:
            raise
        return _fail(f"distclip {asked.command} needs {missing}: pip install 'distclip[report]'")


def _run(asked: argparse.Namespace) -> int:
    from .analysis.errors import RunError, TornWarning
    from .analysis.log import read_all
    from .terminal import Terminal

    do: Callable[[argparse.Namespace, list[Log], Terminal], None] = asked.do
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TornWarning)
            logs = read_all(_meant(asked))
        for warning in caught:
            print(f"distclip {asked.command}: {warning.message}", file=sys.stderr)
        do(asked, logs, Terminal())
    except RunError as error:
        return _fail(f"distclip {asked.command}: {error}")
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"distclip {asked.command}: {error.filename} cannot be written: {error.strerror}")
    sys.stdout.flush()
    return 0


def _meant(asked: argparse.Namespace) -> list[Path]:
    from .analysis.errors import RunError
    from .analysis.log import find_runs

    runs = find_runs(asked.runs)
    if len(runs) > 1 and not asked.several:
        raise RunError(f"{len(runs)} runs are in {asked.runs[0]}, and it looks at one: write {runs[0]}, say")
    return runs


def _report(asked: argparse.Namespace, logs: list[Log], terminal: Terminal) -> None:
    from .dashboard import overview, verdicts, write_page, write_pictures

    path = asked.out
    if path is None:
        directories = [log.path.parent.resolve() for log in logs]
        path = Path(os.path.relpath(os.path.commonpath(directories))) / "report.html"
    judged = verdicts(logs)
    overview(logs, terminal.console, judged)
    write_page(logs, path, judged)
    terminal.line(f"page: {path}")
    if asked.png is not None:
        for picture in write_pictures(logs, asked.png):
            terminal.line(f"picture: {picture}")


def _suggest(asked: argparse.Namespace, logs: list[Log], terminal: Terminal) -> None:
    from .analysis.threshold import suggest

    (log,) = logs
    terminal.suggestion(log, suggest(log, asked.batch))


def _diagnose(asked: argparse.Namespace, logs: list[Log], terminal: Terminal) -> None:
    from .analysis.diagnosis import diagnose

    terminal.diagnosis([(log, diagnose(log)) for log in logs])


def _blame(asked: argparse.Namespace, logs: list[Log], terminal: Terminal) -> None:
    from .analysis.blame import blame

    (log,) = logs
    terminal.blame(log, blame(log))


def _fail(line: str) -> int:
    print(line, file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distclip", description="Look at the gradient norms that distclip.monitor.Recorder wrote."
    )
    parser.add_argument("--version", action="version", version=f"distclip {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, do: Callable[..., None], text: str, several: bool) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        run = "a directory with metrics.jsonl, or a file of such lines"
        if several:
            run += "; a directory of runs stands for all of them"
        one.add_argument("runs", nargs="+" if several else 1, type=Path, metavar="RUN", help=run)
        one.set_defaults(do=do, several=several)
        return one

    report = command("report", _report, "write a page that shows runs side by side", several=True)
    report.add_argument("--out", type=Path, metavar="PATH", help="of the page (default: report.html beside the runs)")
    report.add_argument("--png", type=Path, metavar="DIR", help="write its pictures there too, for papers")
    suggest = command("suggest", _suggest, "find the bound that a run's norms speak for", several=False)
    suggest.add_argument("--batch", type=_positive, metavar="N", help="samples of a step in the run to come")
    command("diagnose", _diagnose, "say what is wrong with runs, and why", several=True)
    command("blame", _blame, "find the samples, ranks and tensors that spikes have in common", several=False)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: write 1 or more")
    return int(text)
