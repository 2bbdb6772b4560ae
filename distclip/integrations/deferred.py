"""Construct a clipper once a framework has wrapped the model. Its state can be loaded before that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from ..extend import (
    ArgumentError,
    Comm,
    FirstError,
    GradClipper,
    OnNonFinite,
    Outcome,
    Parameters,
    Policy,
    Report,
    SplitOver,
)

__all__ = ["DeferredClipper", "OnBind", "find_ids"]

OnBind = Callable[[GradClipper], object]
"""Function that is called on every rank with a new clipper, for example to attach a Recorder.

If it returns the Recorder, the integration adds the loss, the learning rate and the sample ids of each step."""


ID_KEYS = ("ids", "id", "sample_ids", "sample_id", "idx", "index")
"""Keys under which a batch may have the ids of its samples."""


def find_ids(batch: Any) -> Any:
    """Return the sample ids of a batch, or None if it is not a dictionary with one of `ID_KEYS`.

    >>> find_ids({"x": [0.5, 0.25], "idx": [7, 4]})
    [7, 4]
    """
    found = [batch[key] for key in ID_KEYS if key in batch] if isinstance(batch, Mapping) else []
    is_flat = found and (found[0].dim() == 1 if isinstance(found[0], Tensor) else isinstance(found[0], (list, tuple)))
    return found[0] if is_flat else None


class DeferredClipper:
    """The arguments of a clipper, and the clipper once it is bound to parameters.

    Args:
        policy, split_over, on_nonfinite, max_skips: see `GradClipper`.
        on_bind: see `OnBind`. None calls nothing.

    >>> import torch, distclip
    >>> deferred = DeferredClipper(distclip.global_norm(1.0))
    >>> deferred.bind(torch.nn.Linear(2, 1)).parameters
    ('weight', 'bias')
    """

    def __init__(
        self,
        policy: Policy,
        split_over: SplitOver = None,
        on_nonfinite: OnNonFinite = "skip",
        max_skips: int | None = None,
        on_bind: OnBind | None = None,
    ) -> None:
        self.clipper: GradClipper | None = None
        self.report: Report | None = None
        """Report of the last step, or None before the first step."""
        self.skipped = False
        """True if the last step was skipped, as a bool on the host."""
        self.found_inf: Tensor | None = None
        """0-d bool, True if a gradient of the last step was non-finite."""
        self._recorder: Any = None
        """Result of `on_bind`, if it can note values of a step."""
        self._policy, self._split_over, self._on_bind = policy, split_over, on_bind
        self._on_nonfinite, self._max_skips = on_nonfinite, max_skips
        self._pending_state: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the arguments and the clipper's state, without the clipper, which belongs to its process."""
        absent = {
            "clipper": None,
            "report": None,
            "found_inf": None,
            "_pending_state": self.state_dict(),
            "_recorder": None,
        }
        return {**self.__dict__, **absent}

    def bind(self, parameters: Parameters, comm: Comm | None = None) -> GradClipper:
        """Construct the clipper over these parameters, or rebind it to them. Rebinding keeps the state.

        Args:
            parameters: the parameters of this rank.
            comm: all ranks that step together. They then decide and raise together even where nothing is sharded.
                None lets `GradClipper` find the ranks.

        Raises, Collectives: see `GradClipper`.
        """
        if self.clipper is not None:
            self.clipper.rebind(parameters, split_over=self._split_over, comm=comm)
            return self.clipper
        clipper = GradClipper(
            parameters,
            self._policy,
            split_over=self._split_over,
            comm=comm,
            on_nonfinite=self._on_nonfinite,
            max_skips=self._max_skips,
        )
        if self._pending_state:
            clipper.load_state_dict(self._pending_state)
        clipper.observe(self._observe)
        self.clipper = clipper
        if self._on_bind is not None:
            recorder = self._on_bind(clipper)
            self._recorder = recorder if callable(getattr(recorder, "note", None)) else None
        return clipper

    def restart(self) -> None:
        """Forget the clipper and its state. The next `bind` constructs another clipper, without history."""
        self.clipper, self.report, self.skipped, self.found_inf, self._pending_state = None, None, False, None, {}
        self._recorder = None

    @property
    def may_note(self) -> bool:
        """True if `on_bind` may return a Recorder, so that values of steps are worth collecting."""
        return self._on_bind is not None

    def note(self, optimizer: Any = None, **values: Any) -> None:
        """Add values to the step that was clipped last, if `on_bind` returned a Recorder.

        Args:
            optimizer: the optimizer whose learning rate to add. If it has several parameter groups, the first one's is
                added.
            values: numbers or tensors of one element, and `ids`, see `distclip.monitor.Recorder.note`. Values of None
                are ignored.
        """
        if self._recorder is None:
            return
        groups = getattr(optimizer, "param_groups", None) or [{}]
        found = {"lr": groups[0].get("lr"), **values}
        # The program may have already written the step with flush().
        with suppress(ArgumentError):
            self._recorder.note(**{key: value for key, value in found.items() if value is not None})

    def clip(
        self,
        optimizers: Any,
        scaler: Any,
        errors: FirstError | None = None,
        only: Sequence[Tensor] | None = None,
    ) -> Report:
        """Clip in place. Raises, Collectives, Host syncs: see `GradClipper.clip`.

        Args:
            optimizers, scaler, errors, only: see `GradClipper.clip`.
        """
        assert self.clipper is not None
        self.report = self.clipper.clip(optimizers, scaler, only=only, errors=errors)
        return self.report

    def state_dict(self) -> dict[str, Any]:
        """Return the clipper's state, or the state that was loaded for it. Collectives: none."""
        return self._pending_state if self.clipper is None else self.clipper.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the clipper's state, now or when the clipper is bound."""
        if self.clipper is None:
            self._pending_state = state_dict
        elif state_dict:
            self.clipper.load_state_dict(state_dict)

    def _observe(self, outcome: Outcome) -> None:
        self.skipped, self.found_inf = bool(outcome.skip.host), outcome.overflow.on(outcome.coefs.device)
