"""Check the verdicts of a user's policy, so that no invalid coefficient reaches a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import devices
from ..errors import ArgumentError
from ..norms.reduce import Totals
from ..norms.spec import NormSpec
from .bi2clip import BiClip
from .budget import Budget
from .custom import as_vector, check_first_state, check_next_state
from .isolated import Isolated
from .norm_policy import NormPolicy
from .policy import CheckedPolicy, Policy, State, Verdict, mask_known
from .value import Value

__all__ = ["as_checked"]


def as_checked(policy: Policy) -> CheckedPolicy:
    """Return one of distclip's policies unchanged, or wrap any other into one that checks its verdicts.

    Args:
        policy: any object with the members of `Policy`.

    >>> from distclip import zclip
    >>> as_checked(zclip()) == zclip()
    True
    """
    # A subclass can return anything, so only the exact class is trusted.
    if type(policy) is Value or type(policy) is BiClip or type(policy) is Budget or type(policy) is Isolated:
        return policy
    if type(policy) is NormPolicy and policy.has_own_rule:
        return policy
    return _CheckedPolicy(policy)


class _CheckedPolicy:
    """Wrapper around a user's policy, for one clipper.

    Args:
        policy: see `as_checked`.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy, self._who = policy, f"policy={policy!r:.120}"
        self._unread: tuple[Tensor, Callable[[], None]] | None = None

    @property
    def spec(self) -> NormSpec:
        """Norms that the policy needs."""
        return self._policy.spec

    def init(self, slots: int, device: torch.device) -> State:
        """Return the policy's state before the first step."""
        return check_first_state(self._who, self._policy.init(slots, device), slots)

    def decide(self, totals: Totals, state: State) -> tuple[Verdict, State]:
        """Return the policy's verdict and state.

        Raises:
            ArgumentError: the policy returned something else, or a coefficient is not in [0, max_coef]. All ranks
                compute the verdict from the same norms, so all of them raise. On an accelerator the host has not read
                the coefficients yet: an invalid one becomes 0, and the next step raises.
        """
        self._raise_due()
        result = self._policy.decide(totals, state)
        if not isinstance(result, tuple) or len(result) != 2 or type(result[0]) is not Verdict:
            raise ArgumentError(
                f"{self._who}: decide returned {result!r:.80}. Return (Verdict(coefs), state), see "
                "distclip.policies.Verdict."
            )
        verdict = self._check_verdict(result[0], totals)
        return verdict, check_next_state(self._who, result[1], state)

    def mask_valid(self, state: State) -> dict[str, Tensor]:
        """Return masks of the valid values of a loaded state, see `Rule.mask_valid`."""
        if type(self._policy) is NormPolicy:
            return self._policy.mask_valid(state)
        return mask_known(self.init, state)

    def _check_verdict(self, verdict: Verdict, totals: Totals) -> Verdict:
        norms, skip, limits = totals.norms, verdict.skip, verdict.limits
        coefs = as_vector(self._who, "coefs", verdict.coefs, norms)
        bounds = None if verdict.bounds is None else as_vector(self._who, "bounds", verdict.bounds, norms)
        is_flag = isinstance(skip, Tensor) and skip.shape == () and skip.dtype == torch.bool
        if not (skip is None or isinstance(skip, bool) or (is_flag and skip.device == norms.device)):
            raise ArgumentError(f"{self._who}: skip={skip!r:.60}. Return a 0-d bool tensor on the device of the norms.")
        if limits is not None and (self.spec.limits is None or not _is_interval(limits)):
            raise ArgumentError(
                f"{self._who}: limits={limits!r:.60}. Return two numbers, the lower one first, and set limits in the "
                "NormSpec of the policy too."
            )
        if not verdict.max_coef < math.inf:
            raise ArgumentError(f"{self._who}: max_coef={verdict.max_coef}. Return a finite number ≥ 1.")
        is_valid = (coefs >= 0) & (coefs <= verdict.max_coef)
        if not devices.host_reads_free(norms.device):
            # A norm that is not finite may have any coefficient: the step is skipped, or the user wants a NaN.
            self._read_later((is_valid | ~norms.isfinite().all()).all())
            return replace(verdict, coefs=coefs.where(is_valid | (coefs.isnan() & norms.isnan()), 0.0), bounds=bounds)
        if totals.finite.read() and not bool(is_valid.all()):
            slot = int((~is_valid).nonzero()[0])
            raise self._error(f"norm {float(norms[slot]):g} of slot {slot} got the coefficient {float(coefs[slot]):g}")
        return replace(verdict, coefs=coefs, bounds=bounds)

    def _read_later(self, is_valid: Tensor) -> None:
        # The host takes no part in the replays of a graph.
        if not devices.is_capturing():
            self._unread = devices.copy_to_host_async(is_valid)

    def _raise_due(self) -> None:
        """Raise if the previous step had an invalid coefficient that the host did not read at the time."""
        if self._unread is None or devices.is_capturing():
            return
        (is_valid, wait), self._unread = self._unread, None
        wait()
        if not bool(is_valid):
            raise self._error("a norm of the last step got an invalid coefficient, in place of which 0 was used")

    def _error(self, what: str) -> ArgumentError:
        return ArgumentError(
            f"{self._who}: {what}. A coefficient must be in [0, 1], or in [0, max_coef] with Verdict(max_coef=…), and "
            "so a bound must be a number ≥ 0. Return inf for a norm without a bound."
        )


def _is_interval(limits: Any) -> bool:
    try:
        low, high = map(float, limits)
    except (TypeError, ValueError):
        return False
    return low <= high
