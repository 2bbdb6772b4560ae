"""`Recorder`: what a clipper sees, step by step, on its way to a file."""

from __future__ import annotations

import atexit
import copy
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..clipper import GradClipper
from ..comm import global_ranks
from ..comm.consensus import FirstError, gather_or_raise
from ..errors import ArgumentError, DisagreementError
from ..outcome import Outcome
from .extremes import Extremes
from .jsonl import Lines
from .sinks import Sink
from .step_buffer import Step, read
from .told import Told
from .writer import Writer

__all__ = ["Recorder"]

_OWN = {"norm", "bound", "coef", "clipped", "finite", "skipped", "scale", "norms", "tensor_norms"}
_OWN |= {"time", "nonfinite", "culprits", "spike", "worst", "distclip"}
"""Fields of a line that are the clipper's."""


class Recorder:
    """Keeps what a clipper sees at every step, and writes it down every so often, on one rank.

    Between two writes everything stays where it is, on the device: a step costs a few references. A write is one copy
    to the host. What is kept of every step, and in which words: see `distclip.monitor.lines`. What cannot be written (a
    full disk, a sink that raises) is given up with a warning: training goes on. As a context manager it writes the rest
    at the end. A step that a CUDA graph replays is not seen.

    Args:
        clipper: whose steps, however they come about: `clip`, `step`, `attach`, an engine of DeepSpeed.
        directory: where `metrics.jsonl` goes, to be gone on with if it is there already; None for runs/TIME.
        every: steps between two writes, ≥ 1; a crash loses at most so many.
        sinks: where the numbers go besides (see `distclip.monitor.sinks`); only those of the rank that writes.
        per_tensor: record the norm of every parameter's gradient too, see `GradClipper.measure_tensors`.
        top: of how many steps that stood out most to keep sample ids, worst rank and worst tensor, ≥ 0.
        facts: of the run, for its first line: {"batch": 512, "precision": "fp16"}.

    Raises:
        ArgumentError: one of them cannot be meant. DisagreementError: ranks were given different ones. On every rank.

    Collectives: construct it on every rank of the clipper; one gather, and one more with `per_tensor`. A step has none
    of its own; every `every` steps one all-reduce of 2 · every float64 numbers (losses), and a gather if a step among
    them stands out. Host syncs: one every `every` steps.

    >>> import tempfile, distclip
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> clipper = distclip.GradClipper([("weight", weight)], distclip.global_norm(1.0))
    >>> with tempfile.TemporaryDirectory() as run, Recorder(clipper, run) as recorder:
    ...     weight.grad = torch.tensor([3.0, 4.0])
    ...     report = clipper.clip()
    ...     recorder.note(loss=0.5, lr=0.1, ids=[17, 4])
    ...     recorder.flush()
    ...     print(recorder.path.read_text().splitlines()[1][:24])
    {"step": 1, "time": 1...
    """

    def __init__(
        self,
        clipper: GradClipper,
        directory: str | os.PathLike[str] | None = None,
        *,
        every: int = 50,
        sinks: Sequence[Sink] = (),
        per_tensor: bool = False,
        top: int = 20,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(clipper, GradClipper):
            raise ArgumentError(f"clipper={clipper!r:.80}: expected a GradClipper, whose steps are to be recorded.")
        self._clipper, self.every = clipper, every
        self.path = Path(directory or f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}_{os.getpid()}") / "metrics.jsonl"
        """Of the file, on the rank that writes."""
        attempt = FirstError()
        attempt.run(_check, every, sinks, top, facts)
        lines = attempt.run(Lines, self.path) if _writes(clipper) and attempt.error is None else None
        told = gather_or_raise(clipper.comm, attempt.error, (every, bool(per_tensor), top))
        if len(set(told)) > 1:
            raise DisagreementError(
                f"the ranks of one recorder were given different (every, per_tensor, top): {sorted(set(told))}. "
                "Write the same on each."
            )
        if per_tensor:
            clipper.measure_tensors()
        self._writer = None if lines is None else Writer(clipper, lines, sinks, every, facts or {})
        self._by_slot = len(clipper.slots) > 1 and clipper.policy.spec.per != "row"
        self._extremes = Extremes(top)
        self._steps: list[Step] = []
        clipper.observe(self._observe)
        atexit.register(_close, weakref.ref(self))

    def note(self, **values: Any) -> None:
        """Add to what is known of the step that was just made: call it after `clipper.step` or `clip`.

        Args:
            values: numbers, or 0-d tensors, which may stay on their device and must not be written to afterwards; those
                named in `distclip.monitor.lines` mean what it says. `ids`: this rank's samples, a sequence or 1-D
                tensor of numbers or strings. `step`: the number to record it under, if not the clipper's own count.

        Raises:
            ArgumentError: something else; no step yet, or it is written already.

        Collectives: none. Host syncs: none.
        """
        if taken := _OWN & values.keys():
            raise ArgumentError(
                f"note: {', '.join(sorted(taken))} would hide what the clipper saw. Write another name."
            )
        for key, value in values.items():
            if not _fits(key, value):
                raise ArgumentError(
                    f"note({key}={value!r:.60}): expected a number or a 0-d tensor, and for ids a sequence of numbers "
                    "or strings. Write the mean, or one name for each."
                )
        if not self._steps:
            raise ArgumentError(
                "note: no step to add to. Write it after clipper.step(optimizer), before the next flush()."
            )
        step = self._steps[-1]
        step.ids = values.pop("ids", step.ids)
        step.noted |= {key: value.detach() if isinstance(value, Tensor) else value for key, value in values.items()}

    @torch.no_grad()
    def flush(self) -> None:
        """Write everything there is; call it on every rank.

        Collectives and host syncs: see `Recorder`.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        comm, rows = self._clipper.comm, read(steps)
        losses = torch.zeros(2, len(rows), dtype=torch.float64)
        for i, row in enumerate(rows):
            if "loss" in row:
                losses[:, i] = torch.tensor([row["loss"], 1.0])
        comm.sum_(losses)
        for row, loss, n in zip(rows, *losses.tolist(), strict=True):
            if n:
                row["loss"] = loss / n
        found = self._extremes.among([row["norm"] for row in rows])
        own = [Told.of(steps[i]) for i, _ in found]
        told = comm.gather_objects(own) if found else [own]
        if self._writer is not None:
            self._writer.write(steps, rows, found, told, global_ranks(comm))

    @torch.no_grad()
    def close(self) -> None:
        """Write what this rank knows alone, and nothing more after that; at the exit of the process it comes by itself.

        Collectives: none: it is for a rank whose others may not come.
        """
        if self._steps and self._writer is not None:
            rows = read(self._steps)
            # What ranks decide from together is left as it is: the others may go on.
            found = copy.deepcopy(self._extremes).among([row["norm"] for row in rows])
            comm = self._clipper.comm
            told = [[Told.of(self._steps[i]) for i, _ in found]]
            self._writer.write(self._steps, rows, found, told, global_ranks(comm)[comm.rank : comm.rank + 1])
        self._writer = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.flush()
        self.close()

    def _observe(self, outcome: Outcome) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        if len(self._steps) >= self.every:
            self.flush()
        self._steps.append(Step.of(outcome, self._by_slot))


def _close(recorder: weakref.ref[Recorder]) -> None:
    if (alive := recorder()) is not None:
        alive.close()


def _writes(clipper: GradClipper) -> bool:
    """One rank of those that clip together; where ranks clip alone with plain tensors, they are copies."""
    alone = clipper.comm.ranks is None and dist.is_available() and dist.is_initialized()
    return clipper.comm.rank == 0 and not (alone and dist.get_rank() > 0)


def _check(every: Any, sinks: Any, top: Any, facts: Any) -> None:
    for name, value, least in (("every", every, 1), ("top", top, 0)):
        if not isinstance(value, int) or value < least:
            raise ArgumentError(f"{name}={value!r}: expected a whole number ≥ {least}. Write {name}={max(least, 20)}.")
    if not all(map(callable, sinks)):
        raise ArgumentError(
            f"sinks={sinks!r:.80}: expected functions of a dictionary and a step. Write sinks=[wandb()]."
        )
    if facts is not None and not isinstance(facts, Mapping):
        raise ArgumentError(f'facts={facts!r:.80}: expected a dictionary. Write facts={{"batch": 512}}.')


def _fits(key: str, value: Any) -> bool:
    if key == "ids":
        return getattr(value, "ndim", 1) == 1 and not isinstance(value, str) and hasattr(value, "__len__")
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, int | float) or hasattr(value, "__float__")
