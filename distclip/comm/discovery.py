"""Find out which ranks take part in a call, and choose the communicator that the call reduces over.

A rank has the meshes of its parameters and the axes of its `split_over=`. A pipeline stage does not have the mesh of
the next stage, and a rank without parameters has no mesh at all. So the first call with new meshes or axes runs a
rendezvous through the key-value store of torch.distributed (`rendezvous`). The resulting communicator is cached, and
later calls exchange nothing. The rendezvous uses no collective, so that an invalid argument on one rank, or a
contradiction between ranks, raises on all of them instead of hanging some.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeAlias

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import distributed_c10d

from ..devices import simulated_ranks
from ..errors import ArgumentError, DistclipError, LayoutError, to_wire
from . import Comm, missing_members
from .agreement import CallCounter
from .consensus import FirstError
from .local import DryRunComm, LocalComm
from .mpi import mpi_size
from .process_group import ProcessGroupComm
from .ranks import Axis, Ranks, ascending, component_around
from .rendezvous import Post, Rendezvous, derive_component
from .waiting import call_to_first_call, is_left, note_left_groups

__all__ = [
    "call_counter",
    "check_covered",
    "forget_all",
    "global_rank",
    "is_current",
    "is_dry_run",
    "is_mixed",
    "job_size",
    "job_store",
    "memory_of",
    "posting_store",
    "raise_in_first_call",
    "rejoined",
    "resolve_comm",
    "uncovered_ranks",
    "widened",
    "widens_as_before",
    "world_comm",
]


def resolve_comm(
    groups: Collection[Ranks],
    axes: Sequence[Axis],
    comm: Comm | None,
    errors: FirstError,
    num_reached: Collection[float] = (),
) -> Comm:
    """Return the communicator of a call: `comm`, or one derived from meshes and axes.

    Args:
        groups: rank groups that this rank's parameters span, from their layouts.
        axes: axes of `split_over=`.
        comm: communicator given by the caller, or None. An error is added to `errors` if it misses ranks.
        errors: errors of this rank so far. Without `comm`, all ranks of a first call raise its error here. Otherwise
            the next collective lets all ranks raise together (see `gather_or_raise`).
        num_reached: number of ranks that each layout of this rank reaches, see `is_mixed`.

    Returns:
        `comm`, or a derived communicator. The derived one is `LocalComm` if nothing is spread over ranks (one process,
        or plain tensors without `split_over=`).

    Raises:
        ArgumentError: `comm` is not a communicator.
        DistclipError: see `Rendezvous.join`; or the error of this rank, if nothing is spread over ranks.

    Collectives: none over `comm`. Without `comm` the first call with new meshes or axes exchanges messages through the
    store, and creates a process group if the ranks share none yet. Host syncs: none.
    """
    if comm is not None:
        if missing := missing_members(comm):
            raise ArgumentError(
                f"comm={comm!r:.120}: expected a communicator, and {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing. Pass comm=ProcessGroupComm(group) for a process "
                "group, or comm=MPIComm(comm) for a communicator of mpi4py."
            )
        # The error is not raised here, because the ranks of `comm` can raise it together in the first collective over
        # it.
        with errors:
            check_covered(comm, groups, axes)
        return comm
    derived = _derived(groups, axes, errors, num_reached)
    if errors.error is not None and derived.size == 1:
        raise errors.error  # No other rank takes part, so there is no collective to raise in.
    return derived


def widened(
    comm: Comm,
    groups: Collection[Ranks],
    axes: Sequence[Axis],
    num_reached: Collection[float] = (),
    *,
    as_before: bool = False,
) -> Comm:
    """Derive a wider communicator, because a rank has a mesh that `comm` does not cover.

    Args:
        comm: derived communicator that is too small. All of its ranks call this function together.
        groups, axes, num_reached: those of this rank, see `resolve_comm`.
        as_before: whether `widens_as_before` holds on all ranks of `comm`.

    Collectives: none with `as_before`. Otherwise a gather over `comm`, and those of `resolve_comm`.
    """
    assert comm.ranks is not None, "only a derived communicator can be widened"
    session = _session()
    if as_before:
        return session.last_wider[tuple(comm.ranks)][1]
    outside: list[frozenset[Ranks]] = comm.gather_objects(_outside(comm, groups, axes))
    key = tuple(comm.ranks), frozenset[Ranks]().union(*outside)
    if key not in session.wider or session.wider[key].is_left:
        # The ranks of `comm` whose own mesh is no wider take part because `comm` itself is one of the spans.
        session.wider[key] = _rendezvous(groups, axes, None, num_reached, also=tuple(comm.ranks))
    # The next such call begins over `comm` again, because a rank whose meshes are the same in both calls cannot
    # distinguish it from a call without the wider mesh.
    session.last_wider[tuple(comm.ranks)] = _outside(comm, groups, axes), session.wider[key]
    return session.wider[key]


def widens_as_before(comm: Comm, groups: Collection[Ranks], axes: Sequence[Axis]) -> bool:
    """Return whether this rank has the same meshes outside of `comm` as when `comm` was last widened."""
    last = None if comm.ranks is None else _memory_of_session().last_wider.get(tuple(comm.ranks))
    return last is not None and not last[1].is_left and last[0] == _outside(comm, groups, axes)


def _outside(comm: Comm, groups: Collection[Ranks], axes: Sequence[Axis]) -> frozenset[Ranks]:
    """Return the meshes and axes that a communicator does not cover."""
    assert comm.ranks is not None, "only a derived communicator can be widened"
    return frozenset(span for span in _spans(groups, axes) if not set(span) <= set(comm.ranks))


def rejoined(comm: ProcessGroupComm) -> ProcessGroupComm:
    """Move a derived communicator to a new process group, after a rank has left the old one.

    Collectives: messages through the store, and a new group. All ranks of the communicator call this function, sooner
    or later.
    """
    groups = _session().groups
    if comm.ranks not in groups or is_left(groups[comm.ranks]):
        _rendezvous([comm.ranks], (), None, ())
    comm.move_to(groups[comm.ranks], _session().number)
    return comm


def raise_in_first_call(ranks: Ranks, error: BaseException) -> NoReturn:
    """Raise an error on all ranks of a first call, which wait for this rank.

    Collectives: none, only messages through the store.
    """
    _rendezvous([ranks], (), error, ())
    raise error


def is_current(comm: Comm) -> bool:
    """Return whether a derived communicator belongs to the present initialization of torch.distributed."""
    if not _is_initialized():
        return False
    session = _session()
    return any(one is comm for one in (*session.comms.values(), *session.wider.values()))


def is_mixed(comm: Comm) -> bool:
    """Return whether some rank has parameters on only a part of a derived communicator's ranks.

    Such ranks may find in any call that their layouts have changed, so that the host must read the facts of the call.
    """
    return comm.ranks is not None and _is_initialized() and tuple(comm.ranks) in _memory_of_session().mixed


def memory_of(comm: Comm) -> dict[str, Any]:
    """Return a dict for exchanged facts, which lasts as long as torch.distributed is initialized."""
    memory = _memory_of_session().memory if _is_initialized() else _memory
    return memory.setdefault(() if comm.ranks is None else tuple(comm.ranks), {})


_memory: dict[Ranks, dict[str, Any]] = {}


def world_comm() -> Comm:
    """Return a communicator over all ranks of torch.distributed, or `LocalComm` without torch.distributed.

    Collectives: all ranks create a process group the first time.
    """
    if not _is_initialized():
        return LocalComm()
    if is_dry_run():
        return DryRunComm(dist.get_rank(), range(dist.get_world_size()))
    ranks = tuple(range(dist.get_world_size()))
    if ranks not in _session().groups or is_left(_session().groups[ranks]):
        # The rendezvous creates the group, after the ranks have compared how many groups each of them has.
        _rendezvous([ranks], (), None, ())
    return ProcessGroupComm(_session().groups[ranks])


def call_counter(comm: Comm) -> CallCounter:
    """Return the counter of the calls over a communicator.

    A caller's communicator has no lasting counter, and gets a new one.
    """
    if not comm.covers_holders or comm.ranks is None:
        return CallCounter()
    counters, ranks = _memory_of_session().counters, tuple(comm.ranks)
    if (counter := counters.get(ranks)) is None:
        counter = counters[ranks] = CallCounter()
    return counter


def check_covered(comm: Comm, groups: Collection[Ranks], axes: Sequence[Axis]) -> None:
    """Raise if a caller's communicator does not contain every rank that holds parameters.

    Args:
        comm: the communicator.
        groups, axes: those of this rank, see `resolve_comm`.

    Raises:
        LayoutError: `comm` misses ranks, or its global ranks are not those of the meshes.
    """
    if groups and comm.ranks is not None and _is_initialized() and comm.ranks[comm.rank] != dist.get_rank():
        raise LayoutError(
            f"comm= numbers this process as rank {comm.ranks[comm.rank]}, and torch.distributed, whose meshes hold the "
            f"parameters, as rank {dist.get_rank()}. With MPI, call distclip.integrations.mpi.init_process_group() to "
            "start torch.distributed with the ranks of MPI."
        )
    # A norm over `comm` would miss the shards of these ranks.
    if missing := uncovered_ranks(comm, groups, axes):
        raise LayoutError(
            f"comm= does not contain ranks {sorted(missing)}, which hold parameters according to their meshes or to "
            "split_over=. Pass a communicator over all ranks that hold parameters, or omit comm=."
        )


def _check_ranks(groups: Collection[Ranks]) -> None:
    """Raise if parameters are on meshes of another job.

    Raises:
        LayoutError: see above.
    """
    size, here = job_size(), dist.get_rank() if _is_initialized() else 0
    for ranks in groups:
        if here not in ranks or max(ranks) >= size:
            # An annotated parameter was loaded in another job, or before torch.distributed was initialized.
            raise LayoutError(
                f"a parameter is a shard or replica on ranks {sorted(ranks)}, and this process is rank {here} of "
                f"{size}. Call distclip.annotate_(param, mesh, placements) with a mesh of this job."
            )


def uncovered_ranks(comm: Comm, groups: Collection[Ranks], axes: Sequence[Axis]) -> frozenset[int]:
    """Return the ranks that hold parameters, according to meshes and axes, and are not in `comm`."""
    if comm.ranks is None or not (groups or axes):
        return frozenset()
    return frozenset().union(*groups, *(axis.ranks for axis in axes)).difference(comm.ranks)


def global_rank(comm: Comm) -> int:
    """Return the global rank of this process, from `comm` or, if that has none, from torch.distributed."""
    if comm.ranks is not None:
        return comm.ranks[comm.rank]
    return dist.get_rank() if _is_initialized() else 0


def is_dry_run() -> bool:
    """Return whether the ranks are torch's fake process group: there are no other processes."""
    return _is_initialized() and "fake" in dist.get_backend(dist.group.WORLD)


def job_size() -> int:
    """Return the number of processes in the job, by torch.distributed or MPI."""
    return dist.get_world_size() if _is_initialized() else mpi_size()


def job_store(comm: Comm) -> Store | None:
    """Return the key-value store that the ranks of a communicator share, or None if they share none."""
    if comm.ranks is None or not _is_initialized() or comm.ranks[comm.rank] != dist.get_rank():
        return None
    return PrefixStore("distclip", _store())


def posting_store() -> Store | None:
    """Return a store for messages that no rank waits for, or None if this process is the only one.

    It holds no message of an earlier initialization of torch.distributed.
    """
    if not _is_initialized() or dist.get_world_size() == 1 or is_dry_run():
        return None
    # A program that initializes again may get the same store, so the name has the number of the session, which is equal
    # on all ranks.
    return PrefixStore(f"distclip/postings/{_session().number}/{_num_forgotten}", _store())


def forget_all() -> None:
    """Drop all cached communicators, so that the next call runs a rendezvous. For tests."""
    global _num_forgotten
    _num_forgotten += 1
    for session in _sessions:
        # The process groups stay, because each new one costs several threads until torch.distributed is destroyed.
        for cache in (
            session.comms,
            session.wider,
            session.last_wider,
            session.mixed,
            session.memory,
            session.counters,
        ):
            cache.clear()


# ---- The cache of derived communicators ----


class _Session:
    """State that lives as long as one initialization of torch.distributed."""

    def __init__(self, world: dist.ProcessGroup) -> None:
        self.world, self.number = weakref.ref(world), next(_numbers)
        self.comms: dict[_Key, ProcessGroupComm] = {}
        # The keys are the ranks of a narrower communicator, and the meshes that it does not cover.
        self.wider: dict[tuple[Ranks, frozenset[Ranks]], ProcessGroupComm] = {}
        # The keys are the ranks of a narrower communicator. The values are the meshes of this rank outside of it, and
        # the last wider communicator.
        self.last_wider: dict[Ranks, tuple[frozenset[Ranks], ProcessGroupComm]] = {}
        self.mixed: set[Ranks] = set()
        self.memory: dict[Ranks, dict[str, Any]] = {}
        # The keys are the ranks of a component.
        self.groups: dict[Ranks, dist.ProcessGroup] = {}
        self.counters: dict[Ranks, CallCounter] = {}
        self.rendezvous = Rendezvous(PrefixStore("distclip", _store()), dist.get_rank(), call=call_to_first_call)


_sessions: list[_Session] = []  # At most one.
_numbers = itertools.count()
_num_forgotten = 0


def _memory_of_session() -> _Session:
    """Return the present session, and drop the process groups of an earlier one."""
    world = dist.group.WORLD
    assert world is not None
    # A program may destroy its process groups and initialize again: the old groups are unusable then.
    if not _sessions or _sessions[0].world() is not world:
        _sessions[:] = [_Session(world)]
    return _sessions[0]


def _session() -> _Session:
    """Return the present session, whose process groups are about to be used.

    Raises:
        DistclipError: one of them was destroyed.
    """
    session = _memory_of_session()
    # A new group would get the name of the old one, and with it the addresses that the old one has left in the store.
    if not distributed_c10d._world.pg_map.keys() >= set(session.groups.values()):
        raise DistclipError(
            "a process group of distclip was destroyed, and torch.distributed is still initialized. Leave groups whose "
            'group_desc is "distclip" alone, or call dist.destroy_process_group() without a group and initialize again.'
        )
    return session


def _derived(
    groups: Collection[Ranks], axes: Sequence[Axis], errors: FirstError, num_reached: Collection[float]
) -> LocalComm | DryRunComm | ProcessGroupComm:
    """Look up the communicator of these groups and axes, or run a rendezvous for it."""
    key, is_initialized = _cache_key(groups, axes), _is_initialized()
    if is_initialized and _sessions and (comm := _session().comms.get(key)) is not None and not comm.is_left:
        return comm
    spans = _spans(groups, axes)
    # A program may use DTensors on a mesh of one rank, or name a pipeline of one stage.
    if not is_initialized or all(len(ranks) == 1 for ranks in spans):
        with errors:
            _check_ranks(groups)
        return LocalComm()
    if is_dry_run():
        everybody = range(dist.get_world_size())
        simulated = simulated_ranks()
        ranks = everybody if simulated is None else component_around(dist.get_rank(), spans, simulated)
        return DryRunComm(dist.get_rank(), ranks)
    comms = _session().comms
    with errors:
        _check_ranks(groups)
    comm = comms[key] = _known(key) or _rendezvous(groups, axes, errors.error, num_reached)
    alone = _cache_key((), axes)
    if axes and (alone not in comms or comms[alone].is_left):
        comms[alone] = comm
    return comm


_Key: TypeAlias = tuple[tuple[str, ...], frozenset[Ranks]]
"""Identities of the axes of a call, and the ranks of its meshes."""


def _cache_key(groups: Collection[Ranks], axes: Sequence[Axis]) -> _Key:
    """Return the cache key of a call."""
    # Meshes are compared by their ranks, because torch's DTensor operators replace meshes by equal ones.
    return tuple(axis.identity for axis in axes), frozenset(map(ascending, groups))


def _known(key: _Key) -> ProcessGroupComm | None:
    """Return the communicator that a call with new meshes must begin with, or None.

    Either all ranks of a call must find a communicator here or none, although a rank does not have the meshes of the
    others. If a communicator turns out to be too small, all of its ranks widen it together.
    """
    axes, spans = key
    session = _session()
    if axes:
        # The axes are equal on all ranks that take part, even on ranks without parameters.
        comm = session.comms.get((axes, frozenset()))
        return None if comm is None or comm.is_left else comm
    # Other ranks, all of whose meshes were in an earlier call, may begin this call over the communicator of that call.
    earlier = [comm for (old_axes, old), comm in session.comms.items() if not old_axes and old <= spans]
    # Also, a mesh over all ranks of a communicator shows that all of them make this call, because all of them have it.
    earlier += [comm for comm in (*session.comms.values(), *session.wider.values()) if comm.ranks in spans]
    return max((comm for comm in earlier if not comm.is_left), key=lambda comm: comm.size, default=None)


def _spans(groups: Collection[Ranks], axes: Sequence[Axis]) -> set[Ranks]:
    return {ascending(ranks) for ranks in (*groups, *(axis.ranks for axis in axes))}


def _rendezvous(
    groups: Collection[Ranks],
    axes: Sequence[Axis],
    error: BaseException | None,
    num_reached: Collection[float],
    also: Ranks = (),
) -> ProcessGroupComm:
    """Run a rendezvous, and return a communicator over the ranks that it found.

    Args:
        groups, axes, error, num_reached: those of this rank, see `resolve_comm`.
        also: further ranks that take part.
    """
    spans = _spans((*groups, also) if also else groups, axes)
    known = derive_component(list(map(ascending, groups)), axes, dist.get_rank(), dist.get_world_size())
    post = Post(
        groups=tuple(sorted(spans)),
        axes=tuple(axes),
        num_groups=_num_groups(),
        error=None if error is None else to_wire(error),
        num_reached=tuple(sorted(num_reached)),
        known=known if known is not None and set(also) <= set(known.ranks) else None,
    )
    try:
        component = _session().rendezvous.join(post, _timeout())
    except DistclipError:
        if error is not None:
            raise error from None  # With its traceback, which did not travel through the store.
        raise
    finally:
        note_left_groups()
    if component.is_mixed:
        _session().mixed.add(component.ranks)
    group = _process_group(component.ranks, component.num_groups)
    return ProcessGroupComm(group, covers_holders=True, session=_session().number)


def _process_group(ranks: Ranks, num_groups: int) -> dist.ProcessGroup:
    """Return the process group of distclip over these ranks, all of which call this function.

    Args:
        ranks: global ranks of the group, ascending.
        num_groups: largest number of process groups that any of the ranks belongs to.
    """
    # On a process group of the program, if a rank left out a call, the program's own numbers would be added to those of
    # distclip. So distclip has one group for each component, for as long as torch.distributed is initialized.
    groups = _session().groups
    if ranks not in groups or is_left(groups[ranks]):
        # Calls over a new group are counted from 1.
        _session().counters.pop(ranks, None)
        # If only its members create a group, torch names it by the number of groups that each of them has seen. Members
        # with different numbers would wait for each other under different names, so the numbers are made equal.
        for _ in range(num_groups - _num_groups()):
            dist.new_group([dist.get_rank()], use_local_synchronization=True)
        group = dist.new_group(list(ranks), timeout=_timeout(), use_local_synchronization=True, group_desc="distclip")
        assert isinstance(group, dist.ProcessGroup)
        groups[ranks] = group
    return groups[ranks]


def _num_groups() -> int:
    return len(distributed_c10d._world.pg_names)


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _store() -> Store:
    return distributed_c10d._get_default_store()


def _timeout() -> timedelta:
    """Return the timeout of the store, which is the one that the job gave its process group."""
    timeout: timedelta = _store().timeout  # type: ignore[attr-defined]
    return timeout
