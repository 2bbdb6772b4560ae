"""Send the numbers of a step to other libraries.

A sink is a function of a dictionary and a step. Steps arrive in order, but late and many at a time. A number that is
not finite is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import ArgumentError

__all__ = ["Sink", "mlflow", "tensorboard", "trackio", "wandb"]

Sink: TypeAlias = Callable[[dict[str, float], int], None]
"""Function of the numbers of a step, and of its number.

The names are those of `distclip.monitor.jsonl`. The norm of a slot is called norms/NAME, and that of a tensor
tensor_norms/NAME."""


def tensorboard(target: str | Path | Any) -> Sink:
    """Send numbers to TensorBoard as clip/NAME.

    Args:
        target: a directory, or a `torch.utils.tensorboard.SummaryWriter`, which the caller closes.
    """
    if isinstance(target, str | Path):
        from torch.utils.tensorboard import SummaryWriter

        target = SummaryWriter(str(target))

    def sink(numbers: dict[str, float], step: int) -> None:
        for key, value in _add_prefix(numbers).items():
            target.add_scalar(key, value, step)
        target.flush()

    return sink


def wandb(run: Any = None) -> Sink:
    """Send numbers to Weights & Biases as clip/NAME, over the separate axis clip/step.

    W&B drops numbers of a step before its latest one, so the numbers cannot share the run's own steps.

    Args:
        run: run of `wandb.init`; None for the active run.

    Raises:
        ArgumentError: no run is active, or `run` is text.
    """
    _check_run("wandb", run)
    if run is None:
        import wandb as library

        run = _require_active("wandb", library.run, "wandb.init(…)")
    run.define_metric("clip/step")
    run.define_metric("clip/*", step_metric="clip/step")

    def sink(numbers: dict[str, float], step: int) -> None:
        run.log({**_drop_nonfinite(_add_prefix(numbers)), "clip/step": step})

    return sink


def mlflow(run_id: str | None = None) -> Sink:
    """Send numbers to MLflow as clip/NAME.

    Args:
        run_id: id of a run; None for the active run.

    Raises:
        ArgumentError: no run is active.
    """
    import mlflow as library

    if run_id is None:
        run_id = _require_active("mlflow", library.active_run(), "mlflow.start_run()").info.run_id

    def sink(numbers: dict[str, float], step: int) -> None:
        library.log_metrics(_drop_nonfinite(_add_prefix(numbers)), step=step, run_id=run_id, synchronous=True)

    return sink


def trackio(run: Any = None) -> Sink:
    """Send numbers to Trackio as clip/NAME.

    Args:
        run: run of `trackio.init`; None for the active run.

    Raises:
        ArgumentError: `run` is text.
    """
    _check_run("trackio", run)
    log = run.log if run is not None else None
    if log is None:
        import trackio as library

        log = library.log

    def sink(numbers: dict[str, float], step: int) -> None:
        log(_drop_nonfinite(_add_prefix(numbers)), step=step)

    return sink


def _add_prefix(numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"clip/{key}": float(value) for key, value in numbers.items()}


def _drop_nonfinite(numbers: Mapping[str, float]) -> dict[str, float]:
    """Remove numbers that these libraries cannot store."""
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def _check_run(name: str, run: Any) -> None:
    if isinstance(run, str):
        raise ArgumentError(f"run={run!r:.60}: text, not a run. Pass what {name}.init(…) returned.")


def _require_active(name: str, run: Any, call: str) -> Any:
    if run is None:
        raise ArgumentError(f"{name}(): no run is active. Call {call} first, or pass the run.")
    return run
