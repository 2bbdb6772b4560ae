"""`GradClipper`: a policy bound to a model; composition, no algorithm of its own."""

from __future__ import annotations

from functools import partial

import torch

from .apply import clamp_, outside, scale_
from .call import Attempt, agree, total
from .comm import Comm
from .errors import ArgumentError
from .policies import Policy, Scale, Value
from .report import Report
from .sources import Plan, parameter_plan, split_axes
from .sources.arguments import Parameters
from .sources.split import SplitOver

__all__ = ["GradClipper"]


class GradClipper:
    """A policy bound to the parameters of a model: who holds what is found out once, at construction.

    Args:
        parameters: see `clip_grad_norm_`.
        policy: what to do, for example `distclip.global_norm(1.0)`.
        split_over: see `clip_grad_norm_`.
        comm: see `clip_grad_norm_`.

    Raises:
        ArgumentError, LayoutError, DisagreementError: see `clip_grad_norm_`; on every rank that takes part.

    Collectives: construct it on every rank that holds something of the model; ranks find each other through the store
    of torch.distributed. With `comm`, one gather.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> from distclip import global_norm
    >>> clipper = GradClipper([("weight", weight)], global_norm(1.0))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clipper.clip().as_dict()
    {'norm': 5.0, 'coef': 0.199999960000008, 'clipped': True, 'finite': True}
    """

    @torch.no_grad()
    def __init__(
        self,
        parameters: Parameters,
        policy: Policy,
        *,
        split_over: SplitOver = None,
        comm: Comm | None = None,
    ) -> None:
        attempt = Attempt()
        attempt(_check_policy, policy)
        axes = attempt(split_axes, split_over) or ()
        self._plan = attempt(parameter_plan, parameters, axes) or Plan([], axes)
        self._comm = agree(self._plan, comm, attempt.failure)
        self.policy = policy

    @torch.no_grad()
    def clip(self) -> Report:
        """Measure, decide and apply, once, in place; call it after backward on every rank.

        A norm that is not finite gives a coefficient of NaN or 0, as in `clip_grad_norm_`: `report.finite` says so.

        Returns:
            What was seen and done, as device scalars.

        Raises:
            LayoutError: gradients that the policy cannot deal with; on every rank.

        Collectives: one all-reduce of two float64 numbers; see `clip_grad_norm_`. Host syncs: see `clip_grad_norm_`.
        """
        policy = self.policy
        inspect = partial(outside, low=policy.low, high=policy.high) if isinstance(policy, Value) else None
        measured = total(self._plan, policy.norm_type, self._comm, inspect=inspect)
        verdict = policy.decide(measured.norm)
        coef = torch.ones_like(measured.norm)
        if isinstance(verdict, Scale):
            coef = measured.guard(verdict.coef)
            scale_(measured.shards, coef)
        else:
            clamp_(measured.shards, verdict.low, verdict.high)
        return Report(
            norm=measured.presented(),
            coef=coef,
            clipped=(coef != 1.0) | measured.outside,
            finite=measured.norm.isfinite(),
        )


def _check_policy(policy: object) -> None:
    if not isinstance(policy, Policy):
        raise ArgumentError(
            f"policy={policy!r:.80}: expected a policy. Write distclip.global_norm(1.0) or distclip.value(0.5)."
        )
