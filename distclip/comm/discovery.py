"""From meshes and `split_over=` to the one communicator that a call reduces over."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, _resolve_process_group
from torch.distributed import distributed_c10d

from ..errors import DistclipError, to_wire
from .local import LocalComm
from .process_group import ProcessGroupComm
from .ranks import Axis, Ranks
from .rendezvous import Agreement, Meeting, Post, key

__all__ = ["communicator", "widened", "world_comm"]


class _Known:
    """What was agreed on so far within one life of torch.distributed."""

    def __init__(self, world: dist.ProcessGroup) -> None:
        self.world = weakref.ref(world)
        self.comms: dict[tuple[str, ...], ProcessGroupComm] = {}
        self.meeting = Meeting(PrefixStore("distclip", _store()), dist.get_rank())


_lives: list[_Known] = []


def _known() -> _Known:
    """The present life's; process groups of an earlier one are forgotten."""
    world = dist.group.WORLD
    assert world is not None
    if not _lives or _lives[0].world() is not world:
        _lives[:] = [_Known(world)]
    return _lives[0]


def communicator(
    groups: Collection[Ranks], axes: Sequence[Axis], failure: Exception | None = None
) -> LocalComm | ProcessGroupComm:
    """The communicator of everybody who holds something of the same model.

    With `split_over=` it is looked up by those axes alone: they are the same on all ranks concerned, whichever of
    them holds parameters, so that either all of them find it or all of them agree on it. Meshes are looked up by their
    ranks and not by identity: torch's DTensor operators exchange equal meshes for one another.

    Args:
        groups: what this rank's parameters span, from their layouts.
        axes: of `split_over=`.
        failure: what this rank found wrong with its arguments. Every rank then raises, if this is the first call.

    Returns:
        `LocalComm` where nothing is spread over ranks (one process, or plain tensors of which nothing is said).

    Raises:
        DistclipError: see `Meeting.agree`.

    Collectives: none; the first time an exchange through the store, and the creation of a process group where the
    component is neither the world nor one of the groups at hand. Host syncs: none.
    """
    spans = _spans(groups, axes)
    if not (dist.is_available() and dist.is_initialized()) or all(len(ranks) == 1 for ranks in spans):
        return LocalComm()
    comms = _known().comms
    place = _place(groups, axes)
    if place not in comms:
        comms[place] = _agree(spans, axes, failure)
    return comms[place]


def widened(comm: ProcessGroupComm, groups: Collection[Ranks], axes: Sequence[Axis]) -> ProcessGroupComm:
    """Agree anew after a rank came with a mesh that reaches beyond `comm`; all ranks of `comm` call this together."""
    wider = _agree(_spans(groups, axes) | {tuple(sorted(comm.ranks))}, axes, None)
    _known().comms[_place(groups, axes)] = wider
    return wider


def world_comm() -> LocalComm | ProcessGroupComm:
    """Of torch.distributed, where it has been started. Collectives: none."""
    return ProcessGroupComm(dist.group.WORLD) if dist.group.WORLD is not None else LocalComm()


def _place(groups: Collection[Ranks], axes: Sequence[Axis]) -> tuple[str, ...]:
    return tuple(axis.identity for axis in axes) if axes else tuple(sorted(map(str, groups)))


def _spans(groups: Collection[Ranks], axes: Sequence[Axis]) -> set[Ranks]:
    return {tuple(sorted(ranks)) for ranks in (*groups, *(axis.ranks for axis in axes))}


def _agree(spans: set[Ranks], axes: Sequence[Axis], failure: Exception | None) -> ProcessGroupComm:
    post = Post(
        groups=tuple(sorted(spans)),
        axes=tuple(axes),
        named=_groups_at_hand(),
        pg_count=_pg_count(),
        failure=None if failure is None else to_wire(failure),
    )
    try:
        agreed = _known().meeting.agree(post, _timeout())
    except DistclipError:
        if failure is not None:
            raise failure from None
        raise
    return ProcessGroupComm(_process_group(agreed), agreed=True)


def _process_group(agreed: Agreement) -> dist.ProcessGroup:
    """The world, a group that all ranks have already, or a new one: the same choice on all of them."""
    assert dist.group.WORLD is not None
    if len(agreed.ranks) == dist.get_world_size():
        return dist.group.WORLD
    if agreed.group is not None:
        return _resolve_process_group(agreed.group)  # type: ignore[arg-type]
    # A group made by its own members alone takes its name from how many groups each of them has seen:
    # make that number the same first, or the members would wait for each other under different names.
    for _ in range(agreed.pg_count - _pg_count()):
        dist.new_group([dist.get_rank()], use_local_synchronization=True)
    group = dist.new_group(list(agreed.ranks), timeout=_timeout(), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _groups_at_hand() -> dict[str, list[str]]:
    """Names of the process groups that this rank belongs to, by the `key` of their ranks."""
    names: dict[str, list[str]] = {}
    for group, ranks in distributed_c10d._world.pg_group_ranks.items():
        if isinstance(group, dist.ProcessGroup):
            names.setdefault(key(ranks), []).append(group.group_name)
    return names


def _pg_count() -> int:
    return len(distributed_c10d._world.pg_names)


def _store() -> Store:
    return distributed_c10d._get_default_store()


def _timeout() -> timedelta:
    """What the job gave its process group: the store has the same."""
    timeout: timedelta = _store().timeout  # type: ignore[attr-defined]
    return timeout
