"""`Late`: a clipper that is bound when a framework has wrapped the model, and may be given its memory before that."""

from __future__ import annotations

from collections.abc import Callable
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

__all__ = ["Late", "OnBind"]

OnBind = Callable[[GradClipper], object]
"""Is called with a clipper when it has been bound, on every rank: a place to attach a Recorder."""


class Late:
    """What a clipper is to be constructed with, and the clipper once there is one.

    Args:
        policy, split_over, on_nonfinite, max_skips: see `GradClipper`.
        on_bind: see `OnBind`; None for nothing.

    >>> import torch, distclip
    >>> late = Late(distclip.global_norm(1.0))
    >>> late.bind(torch.nn.Linear(2, 1)).parameters
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
        """Of the last step; None before the first."""
        self.skipped = False
        """Whether that step is left out, on the host."""
        self.found_inf: Tensor | None = None
        """0-d, whether because something in it was not finite."""
        self._policy, self._split_over, self._on_bind = policy, split_over, on_bind
        self._on_nonfinite, self._max_skips = on_nonfinite, max_skips
        self._memory: dict[str, Any] = {}

    def bind(self, parameters: Parameters, comm: Comm | None = None) -> GradClipper:
        """The clipper over these parameters, which has kept what it remembered of others of the same names.

        Args:
            parameters: of this rank.
            comm: everybody who steps together, so that all decide and refuse together, also where nothing is spread.
                None for who is found by `GradClipper`.

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
        if self._memory:
            clipper.load_state_dict(self._memory)
        clipper.observe(self._observe)
        self.clipper = clipper
        if self._on_bind is not None:
            self._on_bind(clipper)
        return clipper

    def clip(self, optimizers: Any, scaler: Any, errors: FirstError | None = None) -> Report:
        """See `GradClipper.clip`. Collectives and host syncs: the same."""
        assert self.clipper is not None
        self.report = self.clipper.clip(optimizers, scaler, errors=errors)
        return self.report

    def state_dict(self) -> dict[str, Any]:
        """The clipper's; before there is one, what was loaded. Collectives: none."""
        return self._memory if self.clipper is None else self.clipper.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, now or once there is a clipper."""
        if self.clipper is None:
            self._memory = state_dict
        elif state_dict:
            self.clipper.load_state_dict(state_dict)

    def _observe(self, outcome: Outcome) -> None:
        self.skipped, self.found_inf = bool(outcome.skip.host), outcome.overflow.on(outcome.coefs.device)


def check_policy(policy: Any, where: str) -> None:
    """Refuse what is no policy at once, not at the first step.

    Raises:
        ArgumentError: it is none.
    """
    if not isinstance(policy, Policy):
        raise ArgumentError(
            f"{where}: policy={policy!r:.80}: expected a policy. Write distclip.global_norm(1.0), for example."
        )
