"""List the checks that every integration owes.

A new integration needs three things: a row in `INTEGRATIONS`, a class that derives from `Integration`, and a file
`tests/integrations/<name>/test_<name>.py` that runs every check in `CHECKS`. `tests/integrations/test_checks.py` fails
otherwise. If the framework trains by a loop that calls the integration, derive from
`tests.integrations.training_loop.TrainingLoop` instead, which implements four checks by one method `train`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

INTEGRATIONS = ["accelerate", "deepspeed", "lightning", "megatron", "torchft", "transformers"]
"""Frameworks whose steps a policy decides. Each has a folder in `tests/integrations`."""

CHECKS = {
    "steps_as_one_process": "test_steps_as_one_process",
    "nonfinite_on_one_rank": "test_nonfinite_on_one_rank",
    "skipped_by_policy": "test_step_skipped_by_policy",
    "checkpoint": "test_checkpoint",
    "invalid_input": "test_invalid_input",
    "detach": "test_detach",
}
"""Test that runs each check of an `Integration`."""


class Integration(ABC):
    """The checks of one integration. All ranks of a world call them together.

    `setting` is whatever the integration is parametrized by, such as a kind of sharding or a precision.
    """

    @abstractmethod
    def steps_as_one_process(self, setting: Any, policy: Any) -> None:
        """Compare steps with one process in float64 that has the global batch.

        Norms, coefficients and parameters agree within the rounding of the setting's precision, and all ranks have the
        same bits of the norms.
        """

    @abstractmethod
    def nonfinite_on_one_rank(self, setting: Any, rule: str) -> None:
        """Make an element non-finite on one rank. All ranks do what `on_nonfinite=rule` means.

        - "skip": parameters, optimizer and policy keep their bits, one warning per rank, and the next step is made.
        - "raise": `NonFiniteError` on every rank, and nothing has changed.
        - "zero", if supported: the step is made and all parameters stay finite.
        - "propagate", if supported: the step is made with the non-finite norm.

        With a loss scale, every rule skips without a warning and the scale backs off.
        """

    @abstractmethod
    def skipped_by_policy(self, setting: Any) -> None:
        """Let the policy skip an outlier. Nothing changes, the report is finite, and no loss scale moves."""

    @abstractmethod
    def checkpoint(self, setting: Any, folder: str) -> None:
        """Save with the framework, load, and go on with the same bits as without the interruption."""

    @abstractmethod
    def invalid_input(self, setting: Any) -> None:
        """Pass invalid input on one rank or on all. Every rank raises, and nothing has changed."""

    @abstractmethod
    def detach(self, setting: Any) -> None:
        """Detach. The framework has its own methods back, and clips by its own settings again."""
