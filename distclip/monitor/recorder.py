"""Record the numbers of a clipper step by step (`Recorder`)."""

from __future__ import annotations

import atexit
import copy
import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist

from ..clipper import GradClipper
from ..comm import global_ranks
from ..comm.consensus import FirstError, wire_of
from ..devices import is_capturing
from ..errors import ArgumentError, DisagreementError, from_wire, short_repr, warn_user
from ..outcome import Outcome
from .alerts import MIN_RATIO, Alert, to_alerts
from .analysis.errors import RunError
from .examine import BatchFunction, Examiner, judge, with_ids, write_examination
from .jsonl import COLUMNS, JsonLines
from .live.marker import mark_ended, mark_running
from .notes import convert_ids, convert_note, convert_step
from .outliers import OutlierDetector, RankDetails, merge_details
from .roster import Entry, Roster
from .sinks import Sink
from .step_buffer import Step, read_steps
from .writer import Writer, step_number

__all__ = ["Recorder"]

_PATIENCE = 3.0
"""Seconds to wait for the recorders of other ranks, so that errors are raised on all of them."""

_LONG_PATIENCE = 60.0
"""Seconds to wait for other ranks before a collective that some of them may not enter."""

_RESERVED = {"norm", "bound", "coef", "clipped", "finite", "skipped", "scale", "norms", "tensor_norms"}
_RESERVED |= {"time", "nonfinite", "culprits", "replicas", "spike", "worst", "distclip"}
"""Fields of a line that the recorder itself writes."""


class Recorder:
    """Records the numbers of every step of a clipper, and writes them periodically on one rank.

    Between two writes all numbers stay on the device, so a step only stores a few references. A write copies all of
    them to the host at once. `distclip.monitor.jsonl` describes the lines. If a line cannot be written (a full disk, a
    sink that raises), the recorder warns and stops writing to that destination, and training continues. As a context
    manager it writes the remaining steps at the end. Steps that a CUDA graph replays are not recorded.

    Args:
        clipper: the clipper whose steps to record, made by `clip`, `step`, `attach` or a DeepSpeed engine.
        directory: the directory of `metrics.jsonl`. An existing file is appended to. None for runs/TIME.
        every: number of steps between two writes, ≥ 1; a crash loses at most that many.
        sinks: one more destination (see `distclip.monitor.sinks`), or several. Only those of the rank that writes are
            used.
        per_tensor: whether to record the norm of every parameter's gradient, see `GradClipper.measure_tensors`.
        top: how many of the most extreme steps to record with their sample ids, worst rank and worst tensor, ≥ 0.
        facts: facts about the run for the header of the file, for example {"batch": 512, "precision": "fp16"}.
        alerts: a function of a dictionary, the URL of a webhook, or several of them. They are called for each step
            whose norm is not finite, or is at least three times the running median.
            `distclip.monitor.alerts.make_alert` lists the fields. Only those of the rank that writes are used. A
            webhook never delays training.
        on_spike: a function of a dictionary with `step`, `norm`, `ratio` (NaN if the norm is not finite), `ids` and
            `worst`, for the same steps as `alerts`. All ranks call it within the same later step, when the recorder
            writes, so that it may communicate. With `every=1` that is the next step, before its optimizer runs. An
            exception becomes a warning, so that the ranks stay in step.
        examine: a function of a step's number. It repeats the forward pass of this rank's batch of that step, and
            returns the loss as the training loop computed it. It is called for the first outliers of the run, within
            the step of each. spikes/STEP.json then has the likely cause: sample, numerics, hardware or optimizer state.
            On an accelerator, each step waits for its norm until `examine_limit` outliers have been replayed.
        examine_limit: maximum number of outliers to replay, ≥ 0.
        updates: whether to compare gradients with Adam's second moments, see `GradClipper.measure_updates`. Lines then
            have the largest RMS of their step, and `alerts` are called if it is 3.0 or more, which is mostly before the
            loss rises.
        log: "jsonl" for one JSON line per step. "columnar" for runs with so many steps and tensors that lines would be
            too large: `distclip.monitor.columnar` describes this format, which needs `distclip[columnar]`.

    Raises:
        ArgumentError: an argument is invalid. DisagreementError: an argument differs between ranks. Both are raised on
            every rank that makes a recorder within seconds of the others.

    Construct a recorder on every rank of the clipper. If some ranks have none, or if arguments differ, those that have
    one warn and record without communication. The lowest of them writes, without the losses and samples of the other
    ranks.

    Collectives: none at construction, or one gather with `per_tensor`. The recorder adds none to a step. Every `every`
    steps there is one all-reduce of 2 · every float64 numbers (losses), and a gather if one of these steps is an
    outlier. Host syncs: one every `every` steps.

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
        sinks: Sink | Sequence[Sink] = (),
        per_tensor: bool = False,
        top: int = 20,
        facts: Mapping[str, Any] | None = None,
        alerts: Alert | str | Sequence[Alert | str] = (),
        on_spike: Callable[[dict[str, Any]], None] | None = None,
        examine: BatchFunction | None = None,
        examine_limit: int = 3,
        updates: bool = False,
        log: Literal["jsonl", "columnar"] = "jsonl",
    ) -> None:
        if not isinstance(clipper, GradClipper):
            raise ArgumentError(
                f"clipper={short_repr(clipper)}: not a GradClipper. Pass the clipper whose steps to record."
            )
        self._clipper = clipper
        self.path = Path(f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}_{os.getpid()}") / "metrics.jsonl"
        """Path of the file, on the rank that writes."""
        # A rank that cannot open the file still enters itself in the roster, so that all ranks raise.
        errors = FirstError()
        lines = None
        all_sinks: tuple[Sink, ...] = ()
        all_alerts: tuple[Alert, ...] = ()
        options = None
        with errors:
            if directory is not None:
                self.path = Path(directory) / self.path.name
            every, top = _to_int("every", every, 1), _to_int("top", top, 0)
            all_sinks, all_alerts = _to_sinks(sinks), to_alerts(alerts)
            if on_spike is not None and not callable(on_spike):
                raise ArgumentError(
                    f"on_spike={short_repr(on_spike)}: not a function. Pass a function of a dictionary."
                )
            if facts is not None and not isinstance(facts, Mapping):
                raise ArgumentError(f'facts={short_repr(facts)}: not a dictionary. Use facts={{"batch": 512}}.')
            if log not in ("jsonl", "columnar"):
                raise ArgumentError(f'log={short_repr(log)}: not a format. Use log="jsonl" or log="columnar".')
            if _is_writer(clipper):
                lines = _open_log(self.path, log)
            if examine is not None and not callable(examine):
                raise ArgumentError(
                    f"examine={short_repr(examine)}: not a function. Pass one that returns a step's loss."
                )
            examine_limit = 0 if examine is None else _to_int("examine_limit", examine_limit, 0)
            options = every, bool(per_tensor), top, on_spike is not None, examine_limit, bool(updates)
        self._roster = Roster(clipper, Entry(options, wire_of(errors.error)))
        if errors.error is not None:
            raise errors.error
        # The program must not wait here for ranks without a recorder, which may wait for this one elsewhere.
        is_complete = self._roster.is_complete(_LONG_PATIENCE if per_tensor or updates else _PATIENCE)
        if is_complete:
            _check_entries(self._roster.entries())
        self._has_peers = True if is_complete else None
        """True if all ranks have the recorder, so that it may communicate. None before the first write finds out."""
        if per_tensor and self._roster.decide(is_complete):
            clipper.measure_tensors()
        elif per_tensor:
            warn_user(f"recorder: per_tensor=True is ignored. {self._describe_peers()}", RuntimeWarning)
        if updates and self._roster.decide(is_complete):
            clipper.measure_updates()
        elif updates:
            warn_user(f"recorder: updates=True is ignored. {self._describe_peers()}", RuntimeWarning)
        self.every, self._sinks, self._facts, self._log = every, all_sinks, facts or {}, log
        self._alerts, self._on_spike = all_alerts, on_spike
        self._examiner = None if examine is None else Examiner(clipper, examine, examine_limit)
        self._writer = None
        if lines is not None:
            self._roster.claim_file()
            mark_running(self.path.parent)
            self._writer = Writer(clipper, lines, all_sinks, every, self._facts, all_alerts)
        self._with_slots = len(clipper.slots) > 1 and clipper.policy.spec.per != "row"
        self._num_slots = len(clipper.slots)
        self._detector = OutlierDetector(top)
        self._steps: list[Step] = []
        self._is_closed = self._was_alone = False
        clipper.observe(self._observe, undo=self._undo)
        atexit.register(_close_if_alive, weakref.ref(self))

    def note(self, **values: Any) -> None:
        """Add values to the last step. Call it after `clipper.step` or `clip`.

        Args:
            values: numbers of Python or NumPy, or tensors of one element, which may stay on their device and must not
                be modified afterwards. Names that `distclip.monitor.jsonl` lists have the meaning given there. `ids`:
                this rank's samples, a sequence, array or 1-D tensor of numbers or strings. `step`: the step's number in
                the file, a whole number, if it differs from the clipper's count.

        Raises:
            ArgumentError: a value is invalid, there is no step yet, or the step is already written. No value is added.

        Collectives: none. Host syncs: none (one for a tensor of a subclass).
        """
        if reserved := _RESERVED & values.keys():
            raise ArgumentError(
                f"note: {', '.join(sorted(reserved))} would replace a number of the clipper. Use another name."
            )
        # All values are converted before any is added. A write communicates, and must not fail because of a bad value.
        converted = {key: _convert(key, value) for key, value in values.items()}
        if not self._steps:
            raise ArgumentError(
                "note: there is no step to add to. Call it after clipper.step(optimizer), before the next flush()."
            )
        step = self._steps[-1]
        step.ids = converted.pop("ids", step.ids)
        step.notes |= converted

    def flush(self) -> None:
        """Write all steps so far. Call it on every rank.

        If some ranks do not call it within a minute, the others warn, and keep the steps for the next write.

        Collectives and host syncs: see `Recorder`.
        """
        if self._steps and (not self._find_peers(self._steps[-1:]) or self._all_ranks_flush()):
            self._write()

    @torch.no_grad()
    def _write(self) -> None:
        """Write all steps so far. If all ranks have the recorder, all of them call it after the same step."""
        steps, self._steps = self._steps, []
        self.write_steps(steps)

    @torch.no_grad()
    def write_steps(self, steps: Sequence[Step]) -> None:
        """Write steps. If all ranks have the recorder, all of them call it with the same steps."""
        has_peers = self._find_peers(steps)
        comm, rows = self._clipper.comm, read_steps(steps)
        # Sum and number of the losses per step, because some ranks (of a pipeline) have no loss.
        losses = torch.zeros(2, len(rows), dtype=torch.float64)
        for i, row in enumerate(rows):
            if "loss" in row:
                losses[:, i] = torch.tensor([float(row["loss"]), 1.0], dtype=torch.float64)
        if has_peers:
            comm.sum_(losses)
        for row, loss, num_losses in zip(rows, *losses.tolist(), strict=True):
            if num_losses:
                row["loss"] = loss / num_losses
        # The norms are equal on all ranks, so either all ranks enter the gather or none does.
        outliers = self._detector.detect([row["norm"] for row in rows])
        parameters = set(self._clipper.parameters) if outliers else set()
        local = [RankDetails.of(steps[i], parameters) for i, _ in outliers]
        details, ranks = [local], global_ranks(comm)[comm.rank : comm.rank + 1]
        if outliers and has_peers:
            details, ranks = comm.gather_objects(local), global_ranks(comm)
        if self._examiner is not None and self._examiner.pending:
            self._write_examinations(steps, has_peers)
        spikes = self._describe_spikes(steps, rows, outliers, details, ranks) if self._on_spike is not None else []
        if self._writer is not None:
            self._writer.write(steps, rows, outliers, details, ranks)
        for spike in spikes:
            self._call_on_spike(spike)

    def _describe_spikes(
        self,
        steps: Sequence[Step],
        rows: Sequence[Mapping[str, Any]],
        outliers: Sequence[tuple[int, float]],
        details: Sequence[Sequence[RankDetails]],
        ranks: Sequence[int],
    ) -> list[dict[str, Any]]:
        """Return the fields for `on_spike` of each spike among the outliers. All ranks return equally many."""
        spikes = []
        for n, (i, ratio) in enumerate(outliers):
            if not ratio < MIN_RATIO:
                number = step_number(rows[i].get("step", steps[i].number), steps[i])
                merged = merge_details([by_rank[n] for by_rank in details], ranks, steps[i].power_sum)
                spikes.append(
                    {"step": number, "norm": rows[i]["norm"], "ratio": ratio, "ids": [], "worst": None} | merged
                )
        return spikes

    def _write_examinations(self, steps: Sequence[Step], has_peers: bool) -> None:
        """Write the results of the replays since the last write. All ranks have replayed the same steps."""
        assert self._examiner is not None
        comm = self._clipper.comm
        pending, self._examiner.pending = self._examiner.pending, {}
        ids = {step.number: step for step in steps if step.number in pending}
        local = {
            number: with_ids(one, ids[number].read_ids() if number in ids else ()) for number, one in pending.items()
        }
        by_rank, ranks = [local], global_ranks(comm)[comm.rank : comm.rank + 1]
        if has_peers:
            by_rank, ranks = comm.gather_objects(local), global_ranks(comm)
        if self._writer is None:
            return
        differ = {incident.step for incident in self._clipper.incidents if incident.as_fields().get("replicas")}
        try:
            for number in local:
                document = judge([examinations[number] for examinations in by_rank], ranks, number in differ)
                write_examination(document, self.path.parent)
        except Exception as error:
            warn_user(f"recorder: the result of examine= is lost: {type(error).__name__}: {error}", RuntimeWarning)

    def _call_on_spike(self, spike: dict[str, Any]) -> None:
        assert self._on_spike is not None
        try:
            with torch.enable_grad():
                self._on_spike(spike)
        except Exception as error:
            warn_user(
                f"recorder: on_spike raised {type(error).__name__}: {error}. Training continues. To stop it, let the "
                "function set a flag that the training loop reads.",
                RuntimeWarning,
            )

    @torch.no_grad()
    def close(self) -> None:
        """Write the steps so far with the details of this rank only, and stop writing.

        It is also called when the process exits.

        Collectives: none, because the other ranks may not call it.
        """
        if self._steps and self._writer is not None:
            rows = read_steps(self._steps)
            # This uses a copy, because the detectors of the other ranks do not advance here.
            outliers = copy.deepcopy(self._detector).detect([row["norm"] for row in rows])
            comm = self._clipper.comm
            parameters = set(self._clipper.parameters)
            details = [[RankDetails.of(self._steps[i], parameters) for i, _ in outliers]]
            self._writer.write(self._steps, rows, outliers, details, global_ranks(comm)[comm.rank : comm.rank + 1])
        if self._writer is not None:
            mark_ended(self.path.parent)
        self._writer, self._is_closed = None, True

    def __getstate__(self) -> Any:
        raise TypeError(
            "Recorder: cannot be pickled, because it has an open file and a clipper. Construct it in the process that "
            "trains. In Lightning pass on_bind=functools.partial(Recorder, directory=...) to GradientClipping."
        )

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an exception the other ranks may not reach the collectives of a flush.
        if kind is None:
            self.flush()
        self.close()

    def _find_peers(self, steps: Sequence[Step]) -> bool:
        """Return whether all ranks have the recorder. If not, choose the rank that writes.

        Args:
            steps: earlier steps, at least one.
        """
        comm = self._clipper.comm
        if self._has_peers and self._clipper.step_comm.size < comm.size:
            self._has_peers = False
            warn_user(
                "recorder: DDP joins uneven inputs, so that ranks make different numbers of steps. From now on, losses "
                "and samples of other ranks are missing. Use inputs of the same length on all ranks.",
                RuntimeWarning,
            )
        if self._has_peers is None:
            # Once the host has the numbers of a step, every rank has entered that step, and the roster is final.
            read_steps(steps)
            entries = self._roster.entries()
            self._has_peers = self._roster.is_complete() and len({entry.options for entry in entries.values()}) == 1
            if not self._has_peers:
                is_first = self._writer is None and global_ranks(comm)[comm.rank] == min(entries)
                if is_first and not self._is_closed and self._roster.claim_file():
                    mark_running(self.path.parent)
                    lines = _open_log(self.path, self._log)
                    self._writer = Writer(self._clipper, lines, self._sinks, self.every, self._facts, self._alerts)
                warn_user(f"recorder: {self._describe_peers()}", RuntimeWarning)
        return self._has_peers

    def _all_ranks_flush(self) -> bool:
        """Return whether every rank calls `flush` now."""
        roster = Roster(self._clipper, Entry(None), f"flush of {self._roster.name}")
        if roster.decide(roster.is_complete(_PATIENCE if self._was_alone else _LONG_PATIENCE)):
            return True
        self._was_alone = True
        warn_user(
            f"recorder: only ranks {list(roster.entries())} called flush(), so the steps stay for the next write. Call "
            "it on every rank.",
            RuntimeWarning,
        )
        return False

    def _describe_peers(self) -> str:
        options = {rank: entry.options for rank, entry in self._roster.entries().items()}
        return (
            f"of the ranks {list(global_ranks(self._clipper.comm))}, these have made it with the arguments (every, "
            f"per_tensor, top, on_spike, examine_limit, updates): {options}. Losses and samples of other ranks are "
            "missing. Construct it on every rank with the same arguments."
        )

    def _observe(self, outcome: Outcome) -> None:
        if is_capturing():
            return
        if len(self._steps) >= self.every:
            self._write()
        # The header names the slots, and groups may have been added or removed since it was written.
        with_slots = self._with_slots and len(outcome.coefs) == self._num_slots
        self._steps.append(Step.of(outcome, with_slots))
        if self._examiner is not None:
            self._examiner.observe(outcome, self._may_replay)

    def _may_replay(self) -> bool:
        """Return whether all ranks replay the last step, or this rank is alone."""
        return self._clipper.comm.size == 1 or self._find_peers(self._steps[-1:])

    def _undo(self, last: int) -> None:
        # The step stays in the list, because the number of steps decides when all ranks communicate.
        if self._steps and self._steps[-1].number > last:
            self._steps[-1].is_undone = True


def _close_if_alive(reference: weakref.ref[Recorder]) -> None:
    if (recorder := reference()) is not None:
        recorder.close()


def _check_entries(entries: Mapping[int, Entry]) -> None:
    """Raise the error of the lowest rank that has one, or an error if arguments differ between ranks."""
    for rank, entry in entries.items():
        if entry.error is not None:
            raise from_wire(rank, *entry.error)
    all_options = {entry.options for entry in entries.values()}
    if len(all_options) > 1:
        raise DisagreementError(
            "(every, per_tensor, top, on_spike, examine_limit, updates) of a recorder differ between ranks: "
            f"{sorted(all_options)}. Pass the same values on every rank."
        )


def _open_log(path: Path, log: str) -> JsonLines:
    """Open the log of a run, and create it if it does not exist."""
    if log == "jsonl":
        if path.with_name(COLUMNS).is_dir():
            raise ArgumentError(
                f'log="jsonl": {path.parent} has a columnar log. Use log="columnar", or another directory.'
            )
        return JsonLines(path)
    try:
        from .columnar.lines import ColumnarLines
    except ModuleNotFoundError as error:
        if error.name not in ("numpy", "pyarrow"):
            raise
        raise ArgumentError(
            f"log=\"columnar\": {error.name} is not installed. Use pip install 'distclip[columnar]'."
        ) from None
    try:
        return ColumnarLines(path)
    except RunError as error:
        raise ArgumentError(f'log="columnar": {error}.') from None


def _is_writer(clipper: GradClipper) -> bool:
    """Return whether this rank writes the file.

    Rank 0 of the communicator writes, or rank 0 of the world if every rank clips alone.
    """
    # Ranks that each clip plain tensors alone hold replicas, so one file for all of them is enough.
    alone = clipper.comm.ranks is None and dist.is_available() and dist.is_initialized()
    return clipper.comm.rank == 0 and not (alone and dist.get_rank() > 0)


def _convert(key: str, value: Any) -> Any:
    try:
        return convert_ids(value) if key == "ids" else convert_step(value) if key == "step" else convert_note(value)
    except Exception as error:
        raise ArgumentError(
            f"note({key}={short_repr(value)}): {error}. Pass a number or a 0-d tensor (the mean, or one name per "
            "element), and for ids a sequence of numbers or strings."
        ) from error


def _to_int(name: str, value: Any, least: int) -> int:
    try:
        number = index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ArgumentError(f"{name}={short_repr(value)}: not an integer ≥ {least}. Use {name}={max(least, 20)}.")
    return number


def _to_sinks(sinks: Any) -> tuple[Sink, ...]:
    several = isinstance(sinks, Iterable) and not isinstance(sinks, str | bytes)
    listed = tuple(sinks) if several and not callable(sinks) else (sinks,)
    if not all(map(callable, listed)):
        raise ArgumentError(f"sinks={short_repr(sinks)}: not functions of a dictionary and a step. Use [wandb()].")
    return listed
