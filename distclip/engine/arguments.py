"""Check the arguments of a clipper, and that the arguments of `finish` match those of `start`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias, get_args

from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..apply.grad_scaler import enabled
from ..apply.optimizers import as_list
from ..errors import ArgumentError, short_repr
from ..nonfinite.rules import OnNonFinite
from ..norms.spec import NormSpec
from ..policies import Policy
from ..policies.description import describe
from ..replicas.rules import Replicas

__all__ = ["Passed", "check_arguments", "check_passed"]

Passed: TypeAlias = "tuple[Optimizer | Iterable[Optimizer] | None, GradScaler | None]"
"""Arguments of `Engine.finish`."""


def check_passed(passed: Passed, optimizers: list[Optimizer], *, has_scaler: bool) -> None:
    """Raise unless the arguments of `finish` match those of `start`.

    Args:
        passed: arguments of `finish`.
        optimizers: optimizers of the step.
        has_scaler: whether `start` got an enabled scaler.

    Raises:
        ArgumentError: see above.
    """
    optimizer, scaler = passed
    if optimizer is not None and list(map(id, as_list(optimizer))) != list(map(id, optimizers)):
        raise ArgumentError("optimizer: start was called with another one. Pass the same to start and finish.")
    if (enabled(scaler) is not None) != has_scaler:
        raise ArgumentError(
            "scaler: start and finish need the same one, because the norms must be free of its scale. Call "
            "clipper.start(optimizer, scaler) and clipper.finish(optimizer, scaler)."
        )


def check_arguments(policy: Any, on_nonfinite: Any, max_skips: Any, replicas: Any) -> None:
    """Raise unless the arguments of a clipper are valid.

    Raises:
        ArgumentError: see above.
    """
    if isinstance(policy, type) or not isinstance(policy, Policy):
        raise ArgumentError(
            f"policy={short_repr(policy)}: not a policy. Pass distclip.global_norm(1.0), distclip.value(0.5) or another"
            " one."
        )
    if type(policy.spec) is not NormSpec:
        raise ArgumentError(
            f"policy={short_repr(policy)}: its spec is {policy.spec!r:.60}. Return a distclip.policies.NormSpec."
        )
    if not policy.spec.norm_type > 0:
        raise ArgumentError(
            f"norm_type={policy.spec.norm_type}: a norm of order <= 0 hides NaN and Inf. Use a p above 0, or inf."
        )
    if policy.spec.moment_eps is not None and (policy.spec.per == "row" or policy.spec.norm_type != 2):
        raise ArgumentError(
            f"policy={describe(policy)}: second moments are compared by model, group or tensor, with Euclidean norms. "
            'Use per="tensor" and norm_type=2.0.'
        )
    if on_nonfinite not in get_args(OnNonFinite):
        raise ArgumentError(f"on_nonfinite={on_nonfinite!r}: unknown. Use one of {', '.join(get_args(OnNonFinite))}.")
    if replicas not in get_args(Replicas):
        raise ArgumentError(f"replicas={replicas!r}: unknown. Use one of {', '.join(get_args(Replicas))}.")
    if max_skips is not None and (not isinstance(max_skips, int) or max_skips is True or max_skips < 1):
        raise ArgumentError(
            f"max_skips={max_skips!r}: not a number of steps ≥ 1. Pass how many skipped steps in a row are too many, "
            "or None."
        )
