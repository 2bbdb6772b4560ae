"""Run the command `distclip` with its subcommands: see `EXAMPLES`."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import warnings
import webbrowser
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .._version import __version__
from ..errors import printable

if TYPE_CHECKING:
    from .analysis.log import Log

__all__ = ["main"]

EXTRA_PACKAGES = {"numpy", "rich", "plotly", "matplotlib", "jinja2", "shtab"}
"""Packages that `distclip[report]` installs."""

SERVER_PACKAGES = {"starlette", "uvicorn"}
"""Packages that `distclip[serve]` installs as well."""

DIVERGED, FOUND = 3, 4
"""Exit statuses of `--check`.

The first means that a run diverged. The second means that no run diverged, but one recovered or has a finding."""

EXAMPLES = {
    "": """\
  distclip report runs/first --open             one page with all charts, in the browser
  distclip suggest runs/first                   a bound for the next run
  distclip diagnose runs --check                problems of all runs below a directory, for a script
  distclip blame runs/first --json              the samples behind the spikes, for a program
  distclip watch runs/first                     a running job in the terminal
  distclip serve runs                           running jobs in the browser
  distclip --print-completion bash              completion of commands and options, for the shell to evaluate""",
    "report": """\
  distclip report runs                          compare all runs below a directory
  distclip report runs/a runs/b --out ab.html   two runs on a page of another name
  distclip report runs/first --open --png charts
                                                show the page in the browser, and write charts for a paper""",
    "suggest": """\
  distclip suggest runs/first
  distclip suggest runs/first --batch 512       for a next run with 512 samples per step
  distclip suggest trainer_state.json           a log of another tool
  distclip suggest log.csv --norm gnorm --loss train_loss
  distclip suggest runs/first --json | jq .runs[0].max_norm""",
    "diagnose": """\
  distclip diagnose runs/a runs/b
  distclip diagnose runs/first --check || mail -s "run in trouble" me@example.org
  distclip diagnose runs --json | jq '.runs[] | [.name, .outcome.verdict]'""",
    "blame": """\
  distclip blame runs/first
  distclip blame runs/first --json | jq .runs[0].suspects""",
    "watch": """\
  distclip watch runs/first                     until the run ends, or Ctrl-C
  distclip watch runs/first --once              as it is now
  distclip watch runs/first --check && distclip report runs/first
  distclip watch runs/first --json | jq .new_alarms""",
    "serve": """\
  distclip serve runs/first --open              in the browser
  distclip serve runs --port 8080               all runs below a directory, on a fixed port
  ssh -L 8080:localhost:8080 login distclip serve runs --port 8080
                                                on a cluster, for a browser elsewhere""",
    "export": """\
  distclip export runs/first --to csv           steps.csv and tensors.csv in runs/first/export
  distclip export runs/first --to tensorboard --out logs/first
  WANDB_MODE=offline distclip export runs/first --to wandb""",
}
"""Examples at the end of the help, by command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Without arguments, print the help.

    Args:
        arguments: arguments of the command line; None for those of the process.

    Returns:
        The exit status: 0; 1 with a line on stderr if a run cannot be analyzed or a package is missing; with `--check`,
        3 if a run diverged, and otherwise 4 if a run recovered or has a finding; 130 if the user interrupted it.
    """
    parser = _make_parser()
    args = parser.parse_arguments(arguments)
    try:
        if args.print_completion is not None:
            print(import_module("shtab").complete(parser, args.print_completion), flush=True)
            return 0
        if args.command is None:
            parser.print_help()
            return 0
        return _run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of the pipe, such as `| head`, has exited. Python would then fail to flush stdout at its own exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "pyarrow":
            return _fail(args, "this run has a columnar log. Use pip install 'distclip[columnar]'")
        if missing not in EXTRA_PACKAGES | SERVER_PACKAGES:
            raise
        extra = "serve" if missing in SERVER_PACKAGES else "report"
        return _fail(args, f"{missing} is not installed. Use pip install 'distclip[{extra}]'")


def _run(args: argparse.Namespace) -> int:
    from .analysis.errors import RunError, UnreadableLinesWarning
    from .analysis.log import Keys, read_all

    command: Callable[[argparse.Namespace, list[Log]], None] = args.function
    logs: list[Log] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UnreadableLinesWarning)
            if not args.follows:
                logs = read_all(_select_runs(args), Keys(args.norm, args.loss))
        for warning in caught:
            _fail(args, str(warning.message))
        # A command that follows runs reads them itself, and adds its last log to the list.
        command(args, logs)
        sys.stdout.flush()
        return _check(logs) if args.check else 0
    except RunError as error:
        status = _fail(args, str(error))
        # A run that diverged has no bound, but it has a verdict.
        return (_check(logs) if args.check and logs else 0) or status
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(args, f"{error.filename} cannot be written: {error.strerror}")


def _check(logs: Sequence[Log]) -> int:
    """Return the exit status for the worst verdict on a run."""
    from .analysis.diagnosis import diagnose, find_outcome

    verdicts = {find_outcome(log).verdict for log in logs}
    if "diverged" in verdicts:
        return DIVERGED
    return FOUND if "recovered" in verdicts or any(diagnose(log) for log in logs) else 0


def _select_runs(args: argparse.Namespace) -> list[Path]:
    from .analysis.errors import RunError
    from .analysis.log import find_runs

    runs = find_runs(args.runs)
    if len(runs) > 1 and not args.several:
        raise RunError(f"{args.runs[0]} contains {len(runs)} runs, but this command takes one. Pass {runs[0]}")
    return runs


def _report(args: argparse.Namespace, logs: list[Log]) -> None:
    from .dashboard import assess, print_summary, write_page, write_pngs
    from .json_output import describe_diagnosis
    from .terminal import Terminal

    path = args.out
    if path is None:
        directories = [log.path.parent.resolve() for log in logs]
        path = Path(os.path.relpath(os.path.commonpath(directories))) / "report.html"
    assessments, terminal = assess(logs), Terminal()
    if not args.json:
        print_summary(logs, terminal.console, assessments)
    write_page(logs, path, assessments)
    if not args.json:
        terminal.line(f"page: {path}")
    pngs = write_pngs(logs, args.png) if args.png is not None else []
    if args.json:
        described = [
            describe_diagnosis(log, each.outcome, each.findings) for log, each in zip(logs, assessments, strict=True)
        ]
        texts = [{"suggestion": each.text} for each in assessments]
        _print_document(args, [a | b for a, b in zip(described, texts, strict=True)], page=path, pngs=pngs)
    else:
        for png in pngs:
            terminal.line(f"png: {png}")
    if args.open:
        webbrowser.open(path.resolve().as_uri())


def _suggest(args: argparse.Namespace, logs: list[Log]) -> None:
    from .analysis.suggest import suggest
    from .json_output import describe_suggestion
    from .terminal import Terminal

    (log,) = logs
    suggestion = suggest(log, args.batch)
    if args.json:
        _print_document(args, [describe_suggestion(log, suggestion)])
    else:
        Terminal().suggestion(log, suggestion)


def _diagnose(args: argparse.Namespace, logs: list[Log]) -> None:
    from .analysis.diagnosis import diagnose, find_outcome
    from .json_output import describe_diagnosis
    from .terminal import Terminal

    if args.json:
        _print_document(args, [describe_diagnosis(log, find_outcome(log), diagnose(log)) for log in logs])
    else:
        Terminal().diagnosis([(log, diagnose(log)) for log in logs])


def _blame(args: argparse.Namespace, logs: list[Log]) -> None:
    from .analysis.blame import blame
    from .json_output import describe_blame
    from .terminal import Terminal

    (log,) = logs
    if args.json:
        _print_document(args, [describe_blame(log, blame(log))])
    else:
        Terminal().blame(log, blame(log))


def _watch(args: argparse.Namespace, logs: list[Log]) -> None:
    from .analysis.log import Keys
    from .live.follow import Follower
    from .live.watch import watch
    from .terminal import Terminal

    (run,) = _select_runs(args)
    follower = Follower(run, Keys(args.norm, args.loss))
    watch(follower, Terminal(), once=args.once, as_json=args.json, interval=args.interval)
    if follower.log is not None:
        logs.append(follower.log)


def _serve(args: argparse.Namespace, logs: list[Log]) -> None:
    from .analysis.log import Keys
    from .live.serve import serve
    from .terminal import Terminal

    keys = Keys(args.norm, args.loss)
    serve(args.runs, keys, Terminal(), host=args.host, port=args.port, in_browser=args.open)


def _export(args: argparse.Namespace, logs: list[Log]) -> None:
    from .export import export
    from .terminal import Terminal

    (log,) = logs
    paths = export(log, args.to, args.out if args.out is not None else log.path.parent / "export")
    if args.json:
        from .json_output import describe_run

        _print_document(args, [describe_run(log)], files=paths)
    else:
        terminal = Terminal()
        for path in paths:
            terminal.line(f"{args.to}: {path}")


def _print_document(args: argparse.Namespace, runs: list[dict[str, Any]], **further: Any) -> None:
    from .json_output import format_document

    print(format_document(args.command, runs, further))


def _fail(args: argparse.Namespace, text: str) -> int:
    name = "distclip" if args.command is None else f"distclip {args.command}"
    print(f"{name}: {printable(text)}", file=sys.stderr)
    return 1


class _Parser(argparse.ArgumentParser):
    """Parser whose errors suggest the nearest valid word, as argparse itself does since Python 3.14."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and an error, and exit with 2."""
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += _hint(found[1], re.findall(r"[\w-]+", found[2]))
        super().error(message)

    def parse_arguments(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Parse arguments, or exit with an error about the first option that no command has."""
        args, unknown = self.parse_known_args(arguments)
        if unknown:
            options = re.findall(r"--[\w-]+", args.parser.format_help())
            args.parser.error(
                f"unrecognized arguments: {' '.join(unknown)}{_hint(unknown[0].partition('=')[0], options)}"
            )
        return args


def _hint(word: str, words: Sequence[str]) -> str:
    near = get_close_matches(word, words, n=1)
    return f". Did you mean {near[0]}?" if near else ""


def _make_parser() -> _Parser:
    parser = _Parser(
        prog="distclip",
        description="Analyze the gradient norms that distclip.monitor.Recorder wrote.",
        epilog=_format_examples(""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(parser=parser)
    parser.add_argument("--version", action="version", version=f"distclip {__version__}")
    parser.add_argument(
        "--print-completion",
        choices=("bash", "zsh", "tcsh"),
        help="print a script that completes commands and options in this shell",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add_command(name: str, function: Callable[..., None], text: str, several: bool) -> _Parser:
        command: _Parser = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=_format_examples(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        run = "directory with a metrics.jsonl, or a log of TensorBoard, W&B, Trackio, transformers, Lightning or others"
        if several:
            run += ". A directory of runs stands for all of them"
        command.add_argument("runs", nargs="+" if several else 1, type=Path, metavar="RUN", help=run)
        if name != "serve":
            command.add_argument("--json", action="store_true", help="print one JSON object, see docs/commands.md")
            command.add_argument(
                "--check",
                action="store_true",
                help=f"exit with {DIVERGED} if a run diverged, and with {FOUND} if one recovered or has a finding",
            )
        command.add_argument("--norm", metavar="KEY", help="column of the gradient norm in a log of another tool")
        command.add_argument("--loss", metavar="KEY", help="column of the training loss in such a log")
        command.set_defaults(function=function, several=several, follows=name in ("watch", "serve"), check=False)
        command.set_defaults(parser=command)
        return command

    report = add_command("report", _report, "write an HTML page that compares runs", several=True)
    report.add_argument(
        "--out", type=Path, metavar="PATH", help="path of the page (default: report.html in the runs' directory)"
    )
    report.add_argument("--png", type=Path, metavar="DIR", help="also write the charts as PNG files for papers")
    report.add_argument("--open", action="store_true", help="open the page in the browser")
    suggest = add_command("suggest", _suggest, "suggest a bound from the norms of a run", several=False)
    suggest.add_argument("--batch", type=_positive, metavar="N", help="number of samples per step in the next run")
    add_command("diagnose", _diagnose, "find problems of runs, with evidence and advice", several=True)
    add_command("blame", _blame, "find the samples, ranks and tensors that spikes have in common", several=False)
    watch = add_command("watch", _watch, "show a running job in the terminal until it ends", several=False)
    watch.add_argument("--once", action="store_true", help="show the run as it is now, and exit")
    watch.add_argument(
        "--interval",
        type=_seconds,
        default=2.0,
        metavar="S",
        help="seconds between two looks at the files (default: 2)",
    )
    serve = add_command("serve", _serve, "serve the report of running jobs to a browser on this machine", several=True)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    serve.add_argument("--port", type=_port, default=0, metavar="N", help="port to listen on (default: 0, a free one)")
    serve.add_argument("--open", action="store_true", help="open the page in the browser")
    export = add_command("export", _export, "write a run in a format of another tool", several=False)
    export.add_argument(
        "--to", required=True, choices=("parquet", "csv", "tensorboard", "wandb"), help="format to write"
    )
    export.add_argument(
        "--out", type=Path, metavar="DIR", help="directory to write to (default: export in the run's directory)"
    )
    return parser


def _format_examples(command: str) -> str:
    return f"examples:\n{EXAMPLES[command]}"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: not a positive integer. Pass 1 or more.")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: not a number of seconds above 0. Pass 2, for example.")
    return seconds


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 16:
        raise argparse.ArgumentTypeError(f"{text}: not a port. Pass a number from 1 to 65535, or 0 for a free one.")
    return int(text)
