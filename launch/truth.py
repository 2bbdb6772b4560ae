"""What the usual call reports for one and the same gradient in each layout: `python launch/truth.py [--markdown]`.

Beside it what distclip reports, and the fp64 truth. Everything is measured, on gloo ranks that this starts by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing as mp
import os
import re
import signal
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

import distclip
from spread import SPREADS, Held, Spread

MAX_NORM = 1.0
TOLERANCE = 1e-6
CALLS = ("distclip", "torch")
PATIENCE = 5.0
"""Seconds that the other ranks may take once one of them is through a call, before that counts as hanging."""
PRELOAD = ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "rich.table", "distclip"]


@dataclass
class Outcome:
    """One call on one rank: the norm or the error, and by what factors (least, largest) gradients were multiplied."""

    norm: float | None
    error: str | None
    factors: tuple[float, float] | None


def call(who: str, held: Held, norm_type: float) -> Tensor:
    if who == "torch":
        return torch.nn.utils.clip_grad_norm_(held.parameters, MAX_NORM, norm_type)
    return distclip.clip_grad_norm_(held.module or held.parameters, MAX_NORM, norm_type, split_over=held.split_over)


def local_norms(held: Held) -> list[float]:
    """The norm of this rank's piece of each gradient."""
    grads = [p.grad for p in held.parameters if p.grad is not None]
    pieces = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
    return [float(torch.linalg.vector_norm(piece.double())) for piece in pieces]


def outcome(spread: Spread, who: str) -> Outcome:
    """Lay the gradient out on this rank, clip it, and see what came of it."""
    held = spread.place(spread.whole())
    before = local_norms(held)
    if dist.is_initialized():
        dist.barrier()
    norm = error = None
    try:
        norm = float(call(who, held, spread.norm_type))
    except Exception as raised:
        # The operator's name in front of the words, and the pages after them, are for torch's developers.
        words = re.split(r"[,\n]", re.sub(r"^aten\.\S+ ", "", str(raised)))[0]
        error = f"{type(raised).__name__}: {textwrap.shorten(words, 70, placeholder=' …')}"
    factors = [now / then for now, then in zip(local_norms(held), before, strict=True) if then]
    return Outcome(norm, error, (min(factors), max(factors)) if factors else None)


def serve(row: int, rank: int, folder: str, connection: Connection) -> None:
    """The life of a rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    size = SPREADS[row].ranks
    if size > 1:
        # The time-out only matters to ranks whose parent is gone.
        rendezvous, timeout = f"file://{folder}/store", timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size, timeout=timeout)
    for who in CALLS:
        connection.send(outcome(SPREADS[row], who))
    connection.recv()


@contextmanager
def ranks(row: int) -> Iterator[list[Connection]]:
    """Ranks that make each of the `CALLS` in turn and send the outcomes; killed in the end, whatever they do."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    pipes = [context.Pipe() for _ in range(SPREADS[row].ranks)]
    with tempfile.TemporaryDirectory() as folder:
        args = [(row, rank, folder, there) for rank, (_, there) in enumerate(pipes)]
        processes = [context.Process(target=serve, args=each, daemon=True) for each in args]
        try:
            for process, (_, there) in zip(processes, pipes, strict=True):
                process.start()
                there.close()
            yield [here for here, _ in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()


def received(connection: Connection) -> Outcome:
    try:
        answer: Outcome = connection.recv()
    except EOFError:
        return Outcome(None, "the process died", None)
    return answer


def collect(connections: list[Connection]) -> list[Outcome | None]:
    """The outcome of one call on each rank; None from a rank that hangs."""
    answers: dict[int, Outcome] = {}
    while len(answers) < len(connections):
        silent = {rank: connection for rank, connection in enumerate(connections) if rank not in answers}
        ready = wait(list(silent.values()), timeout=PATIENCE if answers else 60.0)
        if not ready:
            break
        answers.update((rank, received(connection)) for rank, connection in silent.items() if connection in ready)
    return [answers.get(rank) for rank in range(len(connections))]


@dataclass
class Reported:
    """What all ranks of one call say together, and what became of the gradients."""

    norms: list[float]
    text: str
    right: bool
    gradients: str

    @classmethod
    def of(cls, outcomes: list[Outcome | None], truth: float) -> Reported:
        there = [each for each in outcomes if each is not None]
        norms = [each.norm for each in there if each.norm is not None]
        errors = [each.error for each in there if each.error is not None]
        factors = [factor for each in there if each.factors for factor in each.factors]
        hung = len(outcomes) - len(there)
        said = [f"hangs ({hung} of {len(outcomes)} ranks)"] if hung else errors or [span(norms)]
        same = len(norms) == len(outcomes) and len(set(norms)) == 1
        right = same and abs(norms[0] - truth) <= TOLERANCE * truth
        return cls(norms, said[0], right, effect(factors, truth) if factors and not hung else "")


def effect(factors: list[float], truth: float) -> str:
    """How the factors that gradients were multiplied by compare to the right one; half precision rounds by 0.4 %."""
    right = min(1.0, MAX_NORM / (truth + 1e-6))
    if not all(map(math.isfinite, factors)):
        return "not finite"
    if all(abs(factor / right - 1) < 0.01 for factor in factors):
        return "right"
    for words, value in {"all zero": 0.0, "not clipped": 1.0}.items():
        if all(factor == value for factor in factors):
            return words
    return span([factor / right for factor in factors], 2) + " x right"


def span(values: list[float], digits: int = 6) -> str:
    """`least … largest`, or one of them if they look the same."""
    return " … ".join(dict.fromkeys(f"{value:.{digits}g}" for value in (min(values), max(values))))


@dataclass
class Row:
    """A line of the table."""

    layout: str
    truth: float
    torch: Reported
    distclip: Reported

    @classmethod
    def measured(cls, index: int) -> Row:
        spread = SPREADS[index]
        elements = torch.cat([grad.double().flatten() for grad in spread.whole().values()])
        truth = float(torch.linalg.vector_norm(elements, spread.norm_type))
        with ranks(index) as connections:
            seen = {who: Reported.of(collect(connections), truth) for who in CALLS}
        return cls(spread.layout, truth, **seen)

    def cells(self) -> list[tuple[str, bool]]:
        """What to print, and whether it is a wrong figure."""
        calls = [(each.text, not each.right) for each in (self.torch, self.distclip)]
        return [(self.layout, False), (f"{self.truth:.6g}", False), *calls, (self.torch.gradients, False)]


HEADER = ["one gradient under", "truth (fp64)", "torch reports", "distclip reports", "gradients after torch"]
NOTE = (
    "Four gloo ranks, max_norm=1, every norm read with float(). FSDP1: torch is given model.parameters(), distclip the "
    "model. Last column: what torch leaves, as a multiple of the right gradients; within 1 % is right."
)


def markdown(rows: list[Row]) -> str:
    lines = [[f"**{text}**" if wrong else text for text, wrong in row.cells()] for row in rows]
    head = [HEADER, ["---", "--:", "--:", "--:", "---"]]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in head + lines), "", NOTE])


def table(rows: list[Row]) -> Table:
    made = Table(box=SIMPLE_HEAD, pad_edge=False, caption=NOTE, caption_justify="left")
    for title in HEADER:
        made.add_column(title, justify="left" if title in (HEADER[0], HEADER[-1]) else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(text, style="red" if wrong else "") for text, wrong in row.cells()))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured to FILE")
    options = parser.parse_args()
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    with Console(stderr=True).status("measuring …") as status:
        rows = []
        for index, spread in enumerate(SPREADS):
            status.update(f"measuring: {spread.layout}")
            rows.append(Row.measured(index))
    if options.markdown:
        print(markdown(rows))
    else:
        Console().print(table(rows))
    if options.json:
        # JSON knows no inf: such a figure becomes a string.
        plain = json.loads(json.dumps([asdict(row) for row in rows]), parse_constant=str)
        options.json.write_text(json.dumps(plain, indent=2) + "\n")
    wrong = [row.layout for row in rows if not row.distclip.right or row.distclip.gradients != "right"]
    if wrong:
        raise SystemExit(f"distclip is wrong under: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
