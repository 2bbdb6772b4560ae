"""Implement the checks for frameworks in which a training loop clips and steps."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import distclip
from tests.integrations.one_process import (
    OUTLIER,
    SKIPPING,
    bitwise_equal,
    check_equal_on_ranks,
    check_run,
    error_of,
    framework_environment,
)
from tests.ranks import replicas_may_differ
from tests.tables.integrations import Integration


@dataclass
class Run:
    """A run of a training loop.

    Args:
        norms: the norm that the framework shows, of every step.
        params: full parameters after every step that the framework counts.
        attached: the attachment, or the callback.
    """

    norms: list[float]
    params: list[dict[str, Tensor]]
    attached: Any


class TrainingLoop(Integration):
    """An integration whose checks train `one_process.Net` on `one_process.Samples`."""

    @abstractmethod
    def train(
        self,
        setting: str,
        policy: Any,
        *,
        num_micro_batches: int = 1,
        poisoned_step: int | None = None,
        on_nonfinite: Any = "skip",
    ) -> Run:
        """Train with a policy.

        Args:
            setting: the kind of sharding.
            policy: the policy.
            num_micro_batches: number of micro-batches that each step accumulates.
            poisoned_step: step at which a gradient on one rank gets a NaN or Inf.
            on_nonfinite: see `GradClipper`.
        """

    def steps_as_one_process(self, setting: str, policy: Any, num_micro_batches: int = 1) -> None:
        with framework_environment():
            run = self.train(setting, policy, num_micro_batches=num_micro_batches)
        check_run(run.params[-1], run.norms, policy, num_micro_batches)
        names = {name.removeprefix("net.") for name in run.attached.clipper.parameters}
        assert names >= {"first.weight", "last.bias"}
        check_equal_on_ranks(run.norms, run.attached.report.as_dict())

    def nonfinite_on_one_rank(self, setting: str, rule: str) -> None:
        policy, runs = distclip.zclip(cap=1.0, warmup=1), []
        with framework_environment() as caught, replicas_may_differ():
            error = error_of(lambda: runs.append(self.train(setting, policy, poisoned_step=OUTLIER, on_nonfinite=rule)))
        if rule == "raise":
            assert error.startswith("NonFiniteError: step 3")
            return
        assert error == ""
        (run,) = runs
        assert sum(warning.category is distclip.NonFiniteWarning for warning in caught) == 1
        assert run.attached.clipper.skipped == 1
        self.check_skipped(run)
        check_equal_on_ranks(run.attached.clipper.incidents)

    def skipped_by_policy(self, setting: str) -> None:
        with framework_environment() as caught:
            run = self.train(setting, SKIPPING)
        check_run(run.params[-1], run.norms, SKIPPING)
        assert not [warning for warning in caught if warning.category is distclip.NonFiniteWarning]
        assert run.attached.clipper.skipped == 1
        self.check_skipped(run)

    def check_skipped(self, run: Run) -> None:
        """Check that only the step of the outlier has changed nothing."""
        before, at, after = (run.params[step] for step in (OUTLIER - 1, OUTLIER, OUTLIER + 1))
        assert bitwise_equal(before, at)
        assert not bitwise_equal(at, after)
        assert all(bool(param.isfinite().all()) for param in run.params[-1].values())
