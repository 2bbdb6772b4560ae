"""Connect a clipper to a framework's object, from `attach` until `detach`.

Each integration derives its `Attachment` from the one here, and replaces methods of the object through `_patches`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..extend import ArgumentError, Comm, FirstError, GradClipper, OnNonFinite, Outcome, Policy, Report, SplitOver
from .monkeypatch import MethodPatches

__all__ = ["Attachment", "bind", "check_not_attached", "check_policy", "detach"]

_ATTRIBUTE = "distclip"


class Attachment:
    """A policy that clips or skips the steps of a framework's object.

    The object holds it in its attribute `distclip`.

    Args:
        owners: the framework's objects. `detach` takes any of them.
        clipper: the clipper that decides. None if the subclass constructs it later.

    >>> import torch
    >>> from distclip import GradClipper, global_norm
    >>> class Engine: ...
    >>> engine = Engine()
    >>> attachment = Attachment([engine], GradClipper(torch.nn.Linear(2, 1), global_norm(1.0)))
    >>> engine.distclip is attachment
    True
    >>> detach(engine)
    >>> hasattr(engine, "distclip")
    False
    """

    def __init__(self, owners: Sequence[Any], clipper: GradClipper | None) -> None:
        self._owners, self._clipper = list(owners), clipper
        self._patches = MethodPatches()
        self._report: Report | None = None
        self._outcome: Outcome | None = None
        for owner in owners:
            setattr(owner, _ATTRIBUTE, self)

    @property
    def clipper(self) -> GradClipper | None:
        """Clipper that decides, or None before it is constructed."""
        return self._clipper

    # With `Any`, type checkers accept `attachment.report.norm` after a step without a test for None.
    @property
    def report(self) -> Report | Any:
        """Report of the last step, or None before the first step."""
        return self._report

    def state_dict(self) -> dict[str, Any]:
        """Return the clipper's state. Collectives: none. Host syncs: see `GradClipper.state_dict`."""
        return {} if self.clipper is None else self.clipper.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the clipper's state. Collectives: none.

        Raises:
            ArgumentError: see `GradClipper.load_state_dict`.
        """
        if self.clipper is not None and state_dict:
            self.clipper.load_state_dict(state_dict)

    def detach(self) -> None:
        """Restore the framework's own methods. See `detach`."""
        self._patches.restore()
        for owner in self._owners:
            if vars(owner).get(_ATTRIBUTE) is self:
                delattr(owner, _ATTRIBUTE)

    def _replace_owner(self, old: Any, new: Any) -> None:
        """Attach to an object that the framework uses instead of an old one.

        Raises:
            ArgumentError: the new object has another attachment.
        """
        check_not_attached(new)
        self._owners[[owner is old for owner in self._owners].index(True)] = new
        if vars(old).get(_ATTRIBUTE) is self:
            delattr(old, _ATTRIBUTE)
        setattr(new, _ATTRIBUTE, self)

    # The methods below are for frameworks that measure and scale gradients at two different points of a step. In this
    # package only this class and `DeferredClipper` read an Outcome.

    @torch.no_grad()
    def _decide(self, errors: FirstError, loss_scale: float | None) -> bool:
        """Measure the gradients and decide, on all ranks together.

        Args:
            errors: the error of this rank, if there is one. It is raised on every rank.
            loss_scale: the factor that the gradients carry, or None without loss scaling.

        Returns:
            True if the step must be skipped.
        """
        assert self._clipper is not None
        outcome = self._clipper.decide(loss_scale, errors)
        self._report = outcome.report()
        # Frameworks free gradients group by group during a step, so an attachment must not keep them alive.
        self._outcome = outcome.without_gradients()
        return bool(outcome.skip.host)

    def _overflowed(self) -> bool:
        """Return True if the last decision found a non-finite gradient. Host syncs: one."""
        return self._outcome is not None and self._outcome.overflow.read()

    def _write(self, indices: Sequence[int], grads: Sequence[Tensor]) -> None:
        """Apply the last decision to gradients in place.

        Args:
            indices: for each gradient, the position of its parameter in the clipper.
            grads: local pieces, in the shapes that were measured.
        """
        assert self._clipper is not None
        assert self._outcome is not None
        self._clipper.write_(self._outcome, indices, grads)


def detach(owner: Any) -> None:
    """Detach the policy. From the next step on, the framework clips by its own settings again.

    Args:
        owner: the object that was passed to `attach`.

    Raises:
        ArgumentError: nothing is attached to it.

    Collectives: none. Call it on every rank.
    """
    attachment = _attachment_of(owner)
    if attachment is None:
        raise ArgumentError(
            f"detach({type(owner).__name__}): nothing is attached to this object. Pass what was passed to attach."
        )
    attachment.detach()


def check_not_attached(owner: Any) -> None:
    """Raise if the object already has an attachment.

    Raises:
        ArgumentError: it has one.
    """
    if _attachment_of(owner) is not None:
        raise ArgumentError(
            f"attach({type(owner).__name__}): this object has a policy already. Call detach with it first."
        )


def check_policy(policy: Any, call: str) -> None:
    """Raise if `policy` is not a policy.

    Args:
        policy: the argument of the caller.
        call: the name of the function or class that was called.

    Raises:
        ArgumentError: it is not a policy.
    """
    if not isinstance(policy, Policy):
        raise ArgumentError(
            f"{call}: policy={policy!r:.80}: expected a policy. Pass distclip.global_norm(1.0), for example."
        )


def bind(
    policy: Policy | GradClipper,
    params: Sequence[tuple[str, Tensor]],
    split_over: SplitOver,
    comm: Comm,
    on_nonfinite: OnNonFinite,
    max_skips: int | None,
) -> GradClipper:
    """Construct a clipper over stand-ins for parameters, or rebind the caller's clipper to them.

    Args:
        policy: a policy, or a clipper that keeps its own policy, rules and state.
        params: (name, stand-in) of every parameter that this rank has a piece of.
        split_over: the axes along which ranks have different parameters.
        comm: all ranks that step together.
        on_nonfinite: see `GradClipper`. Ignored for a clipper.
        max_skips: see `GradClipper`. Ignored for a clipper.

    Raises, Collectives: see `GradClipper`.
    """
    if isinstance(policy, GradClipper):
        policy.rebind(params, split_over=split_over, comm=comm)
        return policy
    return GradClipper(params, policy, split_over=split_over, comm=comm, on_nonfinite=on_nonfinite, max_skips=max_skips)


def _attachment_of(owner: Any) -> Attachment | None:
    # `getattr` would not do, because a DeepSpeed engine looks up missing attributes in its module.
    attachment = getattr(owner, "__dict__", {}).get(_ATTRIBUTE)
    return attachment if isinstance(attachment, Attachment) else None
