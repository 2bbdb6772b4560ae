"""Compare the calls of all ranks, within the all-reduce of a step or in an additional one before a gather."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from ..comm import Comm
from ..comm.agreement import Call, CallCounter
from ..comm.consensus import FirstError
from ..comm.discovery import is_current
from ..comm.process_group import MisplacedError
from ..nonfinite.skip_counter import SkipCounter
from ..norms.measure import Partials
from ..norms.reduce import Totals, gather_facts, reduce
from ..norms.spec import NormSpec
from ..norms.watch import NO_WATCH, Watch
from ..policies import State
from ..sharding.annotations import whole_shape
from ..sharding.table import ShardTable

__all__ = ["Calls"]


class MakesCalls(Protocol):
    """Part of an engine that the comparison of its calls needs."""

    table: ShardTable
    comm: Comm
    spec: NormSpec
    state: State
    counter: SkipCounter

    @property
    def step_comm(self) -> Comm:
        """Communicator of a step."""

    @property
    def num_measured_slots(self) -> int:
        """Number of norms in the all-reduce."""


class Calls:
    """Describe the calls of an engine to the other ranks, and compare them.

    Args:
        engine: the engine that makes the calls.

    Attributes:
        last_coefs: (slots,) coefficients of the last step, which the ranks compare in the next one.
    """

    def __init__(self, engine: MakesCalls) -> None:
        self._engine = engine
        self._counter = CallCounter()
        self.last_coefs: Tensor | None = None
        # These are the names and reductions of watched scalars that the ranks have agreed on, and the number of
        # elements that every message has reserved for them since then.
        self._known_watches, self._watch_length = {NO_WATCH.kinds}, 0

    def describe(self, function: str, loss_scale: Tensor | None, watch: Watch = NO_WATCH) -> Call:
        """Describe a step, with everything that determines its decision except the gradients.

        Args:
            function: name of the function that the user called.
            loss_scale: factor that the gradients carry, 0-d. None for 1.
            watch: scalars of the user.
        """
        engine = self._engine
        if engine.step_comm.size == 1:
            # There is no other rank to compare with.
            return Call(function, self._counter)
        # The order begins with what is on the device in the first step already.
        state: list[tuple[str, Sequence[Tensor]]] = []
        if loss_scale is not None:
            state.append(("loss scale", [loss_scale]))
        if self.last_coefs is not None:
            state.append(("coefficients of the last step", [self.last_coefs]))
        if engine.state:
            state.append(("state of the policy", list(engine.state.values())))
        facts: tuple[tuple[str, Any], ...] = (
            ("number of steps so far", engine.counter.steps),
            ("has a loss scale", loss_scale is not None),
        )
        if watch.kinds:
            facts += (("watch", watch.kinds),)
        if engine.table.only is not None:
            facts += (("only", self._selection(engine.table.only)),)
        return Call(function, self._counter.next(), facts, tuple(state))

    def agree_on_watch(self, watch: Any, function: str, loss_scale: Tensor | None, errors: FirstError) -> Watch:
        """Return the watched scalars of a step, for a message whose length is the same on all ranks.

        A message gets longer only once all ranks have agreed on its length. A rank that has failed skips this
        comparison and makes the call that follows, whose message is as long, so that all ranks raise its error.

        Args:
            watch: scalars that the user passed.
            function, loss_scale: see `describe`.
            errors: this rank's errors so far.

        Collectives: one all-reduce the first time with these names.
        """
        watched = Watch.of(watch, errors)
        size = self._engine.step_comm.size
        if size == 1:
            return watched
        if errors.error is None and watched.kinds not in self._known_watches:
            self._compare(self.describe(f"{function} with new watched scalars", loss_scale, watched), None, errors)
            self._known_watches.add(watched.kinds)
            self._watch_length = max(self._watch_length, watched.num_elements(size))
        return watched if watched.length == self._watch_length else replace(watched, length=self._watch_length)

    def agree(self, function: str, errors: FirstError) -> None:
        """Check that every rank calls a function that is about to gather.

        A rank that called another function would enter another collective, because a step sums and does not gather.

        Args:
            function: name of the function, as the user knows it.
            errors: this rank's errors so far. All ranks raise them together.

        Raises:
            DisagreementError: another rank calls another function; on every rank.

        Collectives: one all-reduce of the size of a step's. Host syncs: one on an accelerator.
        """
        self._compare(Call(function, self._counter.next()), None, errors)

    def agree_to_end(self, function: str, comm: Comm | None, errors: FirstError) -> None:
        """Check that every rank replaces the engine, over the communicator of the old engine.

        There is no check if that communicator is gone, because torch.distributed was initialized again or the caller
        has passed another communicator.

        Args:
            function: name of the function, as the user knows it.
            comm: communicator for the next engine that the caller has passed, or None.
            errors: this rank's errors so far. All ranks raise them together.

        Raises, Collectives, Host syncs: see `agree`.
        """
        old = self._engine.comm
        lasts = old is comm if comm is not None else is_current(old)
        if old.size > 1 and lasts:
            # If a rank left this group in an earlier call, a new group replaces it.
            with suppress(MisplacedError):
                self.agree(function, errors)
        if errors.error is not None:
            raise errors.error

    def add_powers(self, function: str, powers: Tensor, errors: FirstError) -> Totals:
        """Sum power sums that each rank has measured itself, and raise the errors of all ranks.

        Args:
            function: name of the function, as the user knows it.
            powers: (measured slots,), each divided by its number of replicas.
            errors: this rank's errors so far.

        Raises:
            DistclipError: the first error of this rank, or of the lowest other rank with one; on every rank.
            DisagreementError: the ranks make different calls, or differ in the state of the policy; on every rank.

        Collectives: one all-reduce of the size of a step's. Host syncs: one on an accelerator.
        """
        return self._compare(self.describe(function, None), powers, errors)

    def _compare(self, call: Call, powers: Tensor | None, errors: FirstError) -> Totals:
        """Compare a call in an all-reduce without gradients, and raise the errors of all ranks."""
        engine = self._engine
        device = engine.comm.device or engine.table.device
        # The message is as long as that of a step, because another rank may be in a step.
        partials = Partials.empty(engine.spec, device, engine.num_measured_slots)
        if powers is not None:
            partials.powers = powers.to(partials.powers)
        partials.call, partials.failed = call, errors.error is not None
        partials.watch = Watch(length=self._watch_length)
        totals = reduce(partials, engine.spec, engine.comm)
        if totals.same_call.host is False:
            # A rank made another call or has an error, which the gather finds and raises on all ranks.
            totals = gather_facts(totals, partials, engine.spec, errors.error, engine.comm)
        if errors.error is not None:
            raise errors.error
        return totals

    def _selection(self, only: frozenset[int]) -> str:
        """Describe the parameters that a call clips, among those that all ranks hold.

        Args:
            only: ids of the parameters that the call clips.
        """
        table, size = self._engine.table, self._engine.comm.size
        selected = [(t, layout) for t, layout in zip(table.tensors, table.layouts, strict=True) if id(t) in only]
        # Parameters that only some ranks have are left out. Names can be mere numbers, so shapes identify the others.
        shapes = sorted(whole_shape(t, layout) for t, layout in selected if layout.num_members == size)
        return f"{len(shapes)} of the parameters of all ranks ({zlib.crc32(repr(shapes).encode()):08x})"
