"""Replay the steps of outliers within the run, and name the cause: data, numerics, hardware or optimizer state."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..clipper import GradClipper
from ..comm import global_ranks
from ..errors import ArgumentError
from ..norms.measure import measure
from ..norms.per_tensor import PerTensorPowers
from ..norms.reduce import reduce
from ..norms.spec import NormSpec
from ..outcome import Outcome
from .alerts import MIN_RATIO
from .jsonl import finite
from .outliers import OutlierDetector
from .sample_norms import PerSample, Precision, per_sample, without_autocast

__all__ = ["BatchFunction", "Examination", "Examiner", "judge", "with_ids", "write_examination"]

TOLERANCE = 1e-3
"""Maximum relative difference between the norms of a step and its replay if only the order of sums differs."""

NUMERICS_FACTOR = 2.0
"""Minimum factor between the norms in the run's precision and in float32 for the precision to be the cause."""

DATA_FACTOR = 4.0
"""Minimum ratio of the largest part of a sample to the median part for the sample to be the cause."""

ALL_FACTOR = 2.0
"""Minimum ratio of the norm that median samples would give to the usual norm for all samples to count as large."""

ONE_FACTOR = 16.0
"""Minimum ratio of the largest part to the median part for the sample to be the cause although all parts are large.

Through a batch norm, one sample affects the gradients of the others.
"""

NUM_SAMPLES = 10
"""Number of samples that the file of a step lists."""

BatchFunction = Callable[[int], Tensor]
"""Function of the number of a step that computes the loss of its batch again, with gradients."""


@dataclass(frozen=True)
class Sample:
    """A sample's part of the gradient.

    Args:
        index: index in the batch of its rank.
        norm: norm of its part; NaN or infinite if the part is not finite.
        position: position with the largest part, such as that of a token; None without positions.
        token: input at that position, if inputs are integers.
        tensor: tensor with the largest part of the sample.
        rank: rank that had the sample.
        id: id that the run noted.
    """

    index: int
    norm: float
    position: int | None
    token: int | None
    tensor: str | None
    rank: int | None = None
    id: Any = None


@dataclass(frozen=True)
class Examination:
    """Replay of a step on one rank.

    Args:
        step: number of the clipper call.
        norm: norm of the step; NaN if it was not finite.
        ratio: ratio of the norm to the running median; NaN if it was not finite.
        replayed: norm of the replay in the precision of the run; NaN if it was not finite.
        float32: norm of the replay without autocast; None if the run had none.
        is_faithful: whether the replay used as many random numbers as the step.
        changed: tensor whose norm on this rank differs most between step and replay, and the relative difference.
        samples: the samples of this rank with the largest parts, in descending order.
        median: median of the norms of this rank's samples.
        total: sum of the norms of this rank's samples.
        num_samples: number of samples on this rank.
        missing: share of the squared norm of each tensor without norms per sample.
        error: text of an exception that ended the replay; empty if none did.
    """

    step: int
    norm: float
    ratio: float
    replayed: float = math.nan
    float32: float | None = None
    is_faithful: bool = True
    changed: tuple[str, float] | None = None
    samples: tuple[Sample, ...] = ()
    median: float = math.nan
    total: float = math.nan
    num_samples: int = 0
    missing: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


class Examiner:
    """Detects the first outliers of a run, and replays each before the optimizer moves parameters.

    Args:
        clipper: clipper that makes the steps.
        batch_fn: computes the loss of a step's batch again.
        limit: maximum number of replays.
    """

    def __init__(self, clipper: GradClipper, batch_fn: BatchFunction, limit: int) -> None:
        self._clipper, self._batch_fn, self._left = clipper, batch_fn, limit
        self._detector = OutlierDetector(limit)
        self._random_states = _random_states()
        self.pending: dict[int, Examination] = {}
        """Examinations by the number of their step, until they are written."""

    @property
    def is_done(self) -> bool:
        """True if no further outlier will be replayed."""
        return self._left == 0

    def observe(self, outcome: Outcome, may_replay: Callable[[], bool]) -> None:
        """Replay this step if it is an outlier.

        Args:
            outcome: outcome of the step.
            may_replay: returns whether all ranks have this examiner.

        Collectives: none for an ordinary step. An outlier has those of two forward and backward passes, and of up to
        two norms. Host syncs: one on an accelerator.
        """
        if self.is_done:
            return
        norm = float(outcome.totals.norm)
        found = [ratio for _, ratio in self._detector.detect([norm]) if not ratio < MIN_RATIO]
        # The norm is equal on all ranks, so either all of them replay the step or none does.
        if found and may_replay():
            self._left -= 1
            self.pending[outcome.step] = self._replay(outcome, norm, found[0])
        self._random_states = _random_states()

    def _replay(self, outcome: Outcome, norm: float, ratio: float) -> Examination:
        scale = outcome.totals.loss_scale
        after = _random_states()
        examination = Examination(outcome.step, norm, ratio)
        with _keeping_gradients(self._clipper.table.selected()), torch.enable_grad():
            try:
                samples, used_autocast = self._pass(outcome.step, scale, in_float32=False)
                examination = replace(
                    examination,
                    replayed=self._norm(scale),
                    changed=self._find_change(outcome.per_tensor_powers),
                    is_faithful=all(map(torch.equal, _random_states(), after)),
                )
                if used_autocast:
                    samples, _ = self._pass(outcome.step, scale, in_float32=True)
                    examination = replace(examination, float32=self._norm(scale))
                examination = _add_samples(examination, samples, 1.0 if scale is None else float(scale))
            except Exception as error:
                # Either all ranks raise here or none does.
                examination = replace(examination, error=f"{type(error).__name__}: {error}"[:500])
            finally:
                _restore(after)
        return examination

    def _pass(self, step: int, scale: Tensor | None, *, in_float32: bool) -> tuple[PerSample, bool]:
        """Run the forward and backward pass of a step, and measure its samples.

        Returns:
            The measurement, and whether any rank used autocast.

        Raises:
            RuntimeError: the function failed on some rank. It is raised on every rank.

        Collectives: those of the model, and one gather.
        """
        for tensor in self._clipper.table.selected():
            tensor.grad = None
        _restore(self._random_states)
        samples, error, precision = None, "", Precision()
        try:
            with _measuring_samples() as find_samples, without_autocast(only_watch=not in_float32) as precision:
                loss = self._batch_fn(step)
                if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                    raise ArgumentError(f"the function returned {loss!r:.80}. Return the loss, with its graph.")
                (loss if scale is None else loss * scale).backward()  # type: ignore[no-untyped-call]
                samples = find_samples()
                if samples is None:
                    raise ArgumentError("the function called no module with parameters. Call the model in it.")
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"[:400]
        answers = self._clipper.comm.gather_objects((error, precision.used_autocast))
        ranks = global_ranks(self._clipper.comm)
        failed = [f"rank {rank}: {text}" for rank, (text, _) in zip(ranks, answers, strict=True) if text]
        if failed or samples is None:
            raise RuntimeError(f"examine failed on {failed[0]}")
        return samples, any(used for _, used in answers)

    def _norm(self, scale: Tensor | None) -> float:
        """Return the norm of the gradients. Collectives: one all-reduce."""
        spec = NormSpec(norm_type=self._clipper.policy.spec.norm_type)
        shards = self._clipper.table.gradients()
        device = shards.grads[0].device if shards.grads else torch.device("cpu")
        with torch.no_grad():
            self._powers = measure(shards, spec, device, self._clipper.measured_slots)
            totals = reduce(self._powers, spec, self._clipper.comm, read_facts=False)
        return float(totals.norm) / (1.0 if scale is None else float(scale))

    def _find_change(self, before: Sequence[PerTensorPowers]) -> tuple[str, float] | None:
        """Return the tensor of this rank whose norm changed most, and the relative change."""
        old = _powers_by_name(before)
        changes = {
            name: abs(power - old[name]) / max(power, old[name], 1e-300)
            if math.isfinite(power - old[name])
            else math.inf
            for name, power in _powers_by_name(self._powers.per_tensor_powers).items()
            if name in old
        }
        name = max(changes, key=lambda name: changes[name], default=None)
        return None if name is None else (name, changes[name])


def judge(by_rank: Sequence[Examination], ranks: Sequence[int], replicas_differ: bool = False) -> dict[str, Any]:
    """Name the cause of an outlier from its replays on all ranks.

    Returns:
        `verdict` ("data", "numerics", "hardware", "optimizer state" or "unknown"), `evidence`, `rank`, `tensor`,
        `sample` and the numbers behind them.

    >>> one = Examination(7, 90.0, 30.0, 90.0, samples=(Sample(3, 88.0, None, None, "head"),), median=1.0, total=103.0)
    >>> found = judge([one], [0])
    >>> found["verdict"], found["sample"]["index"]
    ('data', 3)
    """
    first = by_rank[0]
    samples = sorted(
        (
            Sample(**{**vars(sample), "rank": rank})
            for one, rank in zip(by_rank, ranks, strict=True)
            for sample in one.samples
        ),
        key=lambda sample: math.inf if not math.isfinite(sample.norm) else sample.norm,
        reverse=True,
    )
    document: dict[str, Any] = {
        "schema": 1,
        "step": first.step,
        "norm": first.norm,
        "ratio": first.ratio,
        "replayed_norm": first.replayed,
        "float32_norm": first.float32,
        "rank": None,
        "tensor": None,
        "sample": None,
        "samples": [vars(sample) for sample in samples[:NUM_SAMPLES]],
        "median_sample_norm": _median([one.median for one in by_rank]),
        "num_samples": sum(one.num_samples for one in by_rank),
        "without_rule": dict(sorted(first.missing.items(), key=lambda item: -item[1])[:100]),
    }
    errors = [f"rank {rank}: {one.error}" for one, rank in zip(by_rank, ranks, strict=True) if one.error]
    if errors:
        return document | {"verdict": "unknown", "evidence": f"The replay failed: {errors[0]}"}
    changed = [(one.changed[1], rank, one.changed[0]) for one, rank in zip(by_rank, ranks, strict=True) if one.changed]
    if replicas_differ or (not _is_close(first.norm, first.replayed) and first.is_faithful):
        _, rank, tensor = max(changed, default=(math.nan, None, None))
        reason = (
            "Replicas of the same tensor differ between ranks" if replicas_differ else "The step is not reproducible"
        )
        evidence = (
            f"{reason}: its norm was {first.norm:.4g}, and {first.replayed:.4g} in a replay with the same parameters, "
            f"batch and random numbers. The largest difference is in {tensor} on rank {rank}."
        )
        return document | {"verdict": "hardware", "evidence": evidence, "rank": rank, "tensor": tensor}
    if not _is_close(first.norm, first.replayed):
        evidence = (
            f"The replay used other random numbers than the step (norm {first.norm:.4g}, now {first.replayed:.4g}), so "
            "that it shows nothing. Let the function of examine= draw the same random numbers as the training loop."
        )
        return document | {"verdict": "unknown", "evidence": evidence}
    if first.float32 is not None and _is_numerics(first):
        evidence = (
            f"The norm is {first.norm:.4g} in the precision of the run, and {first.float32:.4g} without autocast, for "
            "the same parameters and batch."
        )
        return document | {"verdict": "numerics", "evidence": evidence}
    if not samples:
        return document | {"verdict": "unknown", "evidence": "No layer has a rule for norms per sample."}
    worst, median = samples[0], document["median_sample_norm"]
    rest = sum(one.total for one in by_rank) - worst.norm
    fields = {"rank": worst.rank, "tensor": worst.tensor, "sample": vars(worst)}
    where = f"Sample {worst.index} of rank {worst.rank}" + (f" (id {worst.id})" if worst.id is not None else "")
    where += f" at position {worst.position}" if worst.position is not None else ""
    where += f" with token {worst.token}" if worst.token is not None else ""
    if not math.isfinite(worst.norm) and math.isfinite(median):
        evidence = f"{where} has a part of the gradient that is not finite. The median sample has {median:.3g}."
        return document | {"verdict": "data", "evidence": evidence} | fields
    # If one sample is the cause, the other samples have parts of the usual size. If the parameters are the cause, all
    # parts are larger, and differ more than usual.
    usual = first.norm / first.ratio
    median_norm = median * math.sqrt(document["num_samples"]) / len(by_rank)
    are_all_large = median_norm >= ALL_FACTOR * usual
    is_one = worst.norm >= DATA_FACTOR * median or worst.norm > rest
    if worst.norm >= ONE_FACTOR * median if are_all_large else is_one:
        evidence = f"{where} has a part of the gradient of norm {worst.norm:.3g}. The median sample has {median:.3g}."
        return document | {"verdict": "data", "evidence": evidence} | fields
    evidence = (
        f"All samples have large gradients: the largest part has norm {worst.norm:.3g}, and the median {median:.3g}. "
        "The replay is the same, so the parameters that earlier steps of the optimizer left are the cause."
    )
    return document | {"verdict": "optimizer state", "evidence": evidence, "tensor": worst.tensor}


def with_ids(one: Examination, ids: Sequence[Any]) -> Examination:
    """Add the ids of samples, if the rank noted one id for each of its samples."""
    if len(ids) != one.num_samples:
        return one
    return replace(one, samples=tuple(replace(sample, id=ids[sample.index]) for sample in one.samples))


def write_examination(document: Mapping[str, Any], directory: Path) -> Path:
    """Write the result for a step to spikes/STEP.json in the directory of the run, in less than 100 kB."""
    path = directory / "spikes" / f"{document['step']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(document), indent=1, allow_nan=False, default=str) + "\n", encoding="utf-8")
    return path


def _add_samples(one: Examination, samples: PerSample, scale: float) -> Examination:
    """Add the norms of this rank's samples to an examination, without the loss scale."""
    norms = samples.norms / scale
    missing = samples.missing()
    if not len(norms):
        return replace(one, missing=missing)
    order = norms.nan_to_num(torch.inf, torch.inf).argsort(descending=True)[:NUM_SAMPLES].tolist()
    names, table = list(samples.by_tensor), torch.stack(list(samples.by_tensor.values()))
    largest = table.nan_to_num(torch.inf, torch.inf).argmax(0)
    listed = [Sample(i, float(norms[i]), samples.position(i), samples.token(i), names[int(largest[i])]) for i in order]
    return replace(
        one,
        samples=tuple(listed),
        median=float(norms.nan_to_num(torch.inf, torch.inf).median()),
        total=float(norms[norms.isfinite()].sum()),
        num_samples=len(norms),
        missing=missing,
    )


def _is_numerics(one: Examination) -> bool:
    assert one.float32 is not None
    if not math.isfinite(one.norm) or not math.isfinite(one.float32):
        return math.isfinite(one.norm) != math.isfinite(one.float32)
    high, low = max(one.norm, one.float32), min(one.norm, one.float32)
    return high > NUMERICS_FACTOR * low


def _is_close(old: float, new: float) -> bool:
    both = math.isfinite(old), math.isfinite(new)
    return both == (False, False) or (all(both) and math.isclose(old, new, rel_tol=TOLERANCE))


def _relative_change(old: float, new: float) -> float:
    if math.isfinite(old) and math.isfinite(new):
        return abs(new - old) / max(new, old, 1e-300)
    return 0.0 if math.isfinite(old) == math.isfinite(new) else math.inf


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _powers_by_name(per_tensor_powers: Sequence[PerTensorPowers]) -> dict[str, float]:
    return {
        name: float(power)
        for one in per_tensor_powers
        for name, power in zip(one.names, one.sums().tolist(), strict=True)
    }


@contextmanager
def _keeping_gradients(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restore the gradients at the end, in the same tensors, because a backward pass may write into them."""
    before = [(tensor, tensor.grad, None if tensor.grad is None else tensor.grad.clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, grad, values in before:
                tensor.grad = grad
                if grad is not None and values is not None:
                    grad.copy_(values)


@contextmanager
def _measuring_samples() -> Iterator[Callable[[], PerSample | None]]:
    """Measure the samples of the first module with parameters, and restore buffers at the end."""
    found: list[PerSample] = []
    buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def enter(module: nn.Module, args: Any) -> None:
        for buffer in module.buffers(recurse=False):
            buffers.setdefault(id(buffer), (buffer, buffer.clone()))
        if not found and any(True for _ in module.parameters()):
            found.append(stack.enter_context(per_sample(module)))
        if found:
            found[0].read_inputs(args)

    handle = nn.modules.module.register_module_forward_pre_hook(enter)
    try:
        with ExitStack() as stack:
            yield lambda: found[0] if found else None
    finally:
        handle.remove()
        with torch.no_grad():
            for buffer, values in buffers.values():
                buffer.copy_(values)


def _random_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return states


def _restore(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
