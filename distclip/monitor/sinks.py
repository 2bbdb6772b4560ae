"""Where numbers of a step may go besides the file: functions of a dictionary and a step.

Steps come in order, many at a time, some after they happened. NaN stands for what is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import ArgumentError

__all__ = ["Sink", "mlflow", "tensorboard", "trackio", "wandb"]

Sink: TypeAlias = Callable[[dict[str, float], int], None]
"""Is given the numbers of a step, by the names of `distclip.monitor.lines` (a slot's as norms/NAME, a tensor's as
tensor_norms/NAME), and which step it was."""


def tensorboard(target: str | Path | Any) -> Sink:
    """To TensorBoard, under clip/.

    Args:
        target: a directory, or a `torch.utils.tensorboard.SummaryWriter`, which stays yours to close.
    """
    if isinstance(target, str | Path):
        from torch.utils.tensorboard import SummaryWriter

        target = SummaryWriter(str(target))

    def sink(numbers: dict[str, float], step: int) -> None:
        for key, value in _prefixed(numbers).items():
            target.add_scalar(key, value, step)
        target.flush()

    return sink


def wandb(run: Any = None) -> Sink:
    """To Weights & Biases, under clip/, over an axis of its own, clip/step: W&B drops what comes after a later step.

    Args:
        run: of `wandb.init`; None for the one that is active.

    Raises:
        ArgumentError: none is.
    """
    if run is None:
        import wandb as library

        run = _active("wandb", library.run, "wandb.init(…)")
    run.define_metric("clip/step")
    run.define_metric("clip/*", step_metric="clip/step")

    def sink(numbers: dict[str, float], step: int) -> None:
        run.log({**_finite(_prefixed(numbers)), "clip/step": step})

    return sink


def mlflow(run_id: str | None = None) -> Sink:
    """To MLflow, under clip/.

    Args:
        run_id: of a run; None for the one that is active.

    Raises:
        ArgumentError: none is.
    """
    import mlflow as library

    if run_id is None:
        run_id = _active("mlflow", library.active_run(), "mlflow.start_run()").info.run_id

    def sink(numbers: dict[str, float], step: int) -> None:
        library.log_metrics(_finite(_prefixed(numbers)), step=step, run_id=run_id, synchronous=True)

    return sink


def trackio(run: Any = None) -> Sink:
    """To Trackio, under clip/.

    Args:
        run: of `trackio.init`; None for the one that is active.
    """
    log = run.log if run is not None else None
    if log is None:
        import trackio as library

        log = library.log

    def sink(numbers: dict[str, float], step: int) -> None:
        log(_finite(_prefixed(numbers)), step=step)

    return sink


def _prefixed(numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"clip/{key}": float(value) for key, value in numbers.items()}


def _finite(numbers: Mapping[str, float]) -> dict[str, float]:
    """What these libraries can store."""
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def _active(name: str, run: Any, how: str) -> Any:
    if run is None:
        raise ArgumentError(f"{name}(): no run is active. Write {how} first, or pass the run.")
    return run
