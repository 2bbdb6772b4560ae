"""Compare ranks that no communicator connects: nothing links them, or DDP gives each of them all gradients.

Ranks that nothing links have plain tensors, or DTensors on meshes over a part of the job, and pass no `split_over=`. A
rank may call when others do not. So the comparison goes through the store of torch.distributed, only in the first
calls, and no rank waits for another one.
"""

from __future__ import annotations

import base64
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Sequence

from .. import devices
from ..comm import Comm
from ..comm.discovery import job_size
from ..comm.postings import Posting, posting_of
from ..comm.ranks import Ranks
from ..errors import ReplicaWarning, warn_user
from ..norms.kernels import checksums, power_sums
from ..sharding.annotations import whole_shape
from ..sharding.shard import Shards
from ..sharding.table import ShardTable
from .compare import ReplicaInfo, compare_replicas
from .incidents import describe_differences
from .scrubber import scrubbed_positions

__all__ = ["compare", "compare_ddp_gradients", "compare_tensors", "is_unlinked"]

_NUMBERED = re.compile(r"^(parameters|tensors|gradients)(\[\d+\])?$")
"""Names that only contain a position in the caller's list."""

_RECORD = struct.Struct("<Id")
"""A checksum and a power sum."""


def is_unlinked(table: ShardTable, comm: Comm) -> bool:
    """Return whether neither a mesh nor `split_over=` connects this rank with all ranks of the job.

    Args:
        table: of this rank.
        comm: communicator that was derived from the table.
    """
    return bool(table.tensors) and not table.axes and comm.size < job_size()


def compare_tensors(function: str, table: ShardTable, comm: Comm, *, may_call_alone: bool = True) -> bool:
    """Compare names and shapes of whole tensors with those of other ranks, and warn if they differ.

    Args:
        function: function that the user called. Only calls of the same function are compared.
        table, comm: of this rank, see `is_unlinked`.
        may_call_alone: whether a rank may also call with a part of its tensors while other ranks do not call, for
            example to log a norm.

    Returns:
        Whether nothing is left to compare in later calls.

    Collectives: none. Host syncs: none.
    """
    return compare(
        f"{function} of unlinked tensors", lambda posting: _compare_tensors(posting, table, comm, may_call_alone)
    )


def _compare_tensors(posting: Posting, table: ShardTable, comm: Comm, may_call_alone: bool) -> str | None:
    """Return how this rank differs from the first one that posted, or None."""
    reads, is_first_call = posting.begin_call(), posting.num_calls == 1
    if posting.is_settled or not (is_first_call or may_call_alone or reads):
        return None
    named = _describe_tensors(table, comm)
    entries = sorted(f"{zlib.crc32(text.encode()):08x}" for text in named)
    digest = f"{zlib.crc32(''.join(entries).encode()):08x}"
    if is_first_call:
        posting.post(" ".join(entries))
    was_listed = posting.list_entry(digest)
    if posting.other is None:
        return posting.read_difference() if reads else None

    rank, first = posting.other
    other_entries = first.split(" ")
    # Ranks of one communicator have already compared more than this.
    is_linked = comm.ranks is not None and rank in comm.ranks
    if is_linked or entries == other_entries or posting.has_entry(rank, digest):
        posting.settle_equal()
        return None
    more, fewer = Counter(entries) - Counter(other_entries), Counter(other_entries) - Counter(entries)
    # One of the ranks may have first logged the norm of some tensors. By its next call it has passed all of them.
    if may_call_alone and not (more and fewer) and not was_listed:
        return None
    only = [text for text in named if f"{zlib.crc32(text.encode()):08x}" in more]
    example = f"{only[0]} is among them on rank {posting.rank} only" if only else f"rank {rank} has more of them"
    others = "distclip.LocalComm()" if comm.size == 1 else "distclip.ProcessGroupComm(group) with the ranks of a model"
    text = (
        f"parameters: ranks {min(rank, posting.rank)} and {max(rank, posting.rank)} pass different tensors "
        f"({example}) and no split_over=, and no mesh connects them, so that they clip by different norms. Pass the "
        'axis along which ranks hold different parameters, as in split_over=mesh["pp"], or annotate_ the parameters. '
        f"If the ranks train different models, pass comm={others}."
    )
    posting.settle_different(text)
    return text


def _describe_tensors(table: ShardTable, comm: Comm) -> list[str]:
    """Describe tensors by the shapes of the whole tensors, and by names that are not positions."""
    entries = []
    for name, tensor, layout in zip(table.names, table.tensors, table.layouts, strict=True):
        # Ranks of one communicator have already exchanged their plain tensors.
        if comm.size == 1 or layout.groups:
            shape = whole_shape(tensor, layout) if layout.groups else tuple(tensor.shape)
            entries.append(f"{'' if _NUMBERED.match(name) else f'{name} '}{shape}")
    return entries


def compare_ddp_gradients(function: str, table: ShardTable, gradients: Shards) -> bool:
    """Compare gradients that DDP has averaged with those of another rank, and warn if they differ.

    Only the first call compares.

    Args:
        function: that the user called.
        table: of this rank, whose gradients are complete on each rank.
        gradients: of this rank, as they were measured.

    Returns:
        Whether nothing is left to compare in later calls.

    Collectives: none. Host syncs: one on an accelerator, in the first call.
    """
    if devices.is_capturing():
        return False
    return compare(f"{function} of gradients of DDP", lambda posting: _compare_gradients(posting, table, gradients))


def _compare_gradients(posting: Posting, table: ShardTable, gradients: Shards) -> str | None:
    """Return how the gradients of this rank differ from those of the first rank that posted, or None."""
    if posting.num_calls:
        reads = posting.begin_call()
        return posting.read_difference() if reads else None
    groups = [ranks for ranks in table.groups if len(ranks) > 1]
    if not gradients or len(groups) != 1:
        return None
    posting.begin_call()
    # Ranks may make their first call in different steps, which have different parameters.
    weights = table.local_weights(scrubbed_positions(table))
    version = checksums(weights, weights[0].device).sum() if weights else 0
    names = gradients.infos.names
    step = f"{sorted(groups[0])} {names} {int(version)}"
    powers, _, words = power_sums(gradients.grads, 2.0, gradients.grads[0].device, with_checksums=True)
    assert words is not None
    records = list(zip(words.tolist(), powers.tolist(), strict=True))
    packed = base64.b85encode(b"".join(_RECORD.pack(*record) for record in records)).decode()
    posting.name = f"{posting.name}/{zlib.crc32(step.encode()):08x}"
    if posting.post(packed) is None:
        return None
    assert posting.other is not None
    rank, first = posting.other
    others = [_RECORD.unpack_from(base64.b85decode(first), i * _RECORD.size) for i in range(len(names))]
    by_rank = {
        rank: _describe(gradients, others, (rank, posting.rank)),
        posting.rank: _describe(gradients, records, (rank, posting.rank)),
    }
    differences = compare_replicas(by_rank).differences
    if not differences:
        posting.settle_equal()
        return None
    text = f"first call of a function under DDP: {describe_differences(differences)} {differences[0].cause}"
    posting.settle_different(text)
    return text


def compare(name: str, difference: Callable[[Posting], str | None], size: int | None = None) -> bool:
    """Compare this rank with others through their postings, and warn if it differs.

    Args:
        name: of the postings.
        difference: returns how this rank differs from the first one that posted, or None.
        size: number of ranks that may compare. None for all ranks of the job.

    Returns:
        Whether nothing is left to compare in later calls.
    """
    try:
        posting = posting_of(name, size)
        if posting is None or posting.is_settled:
            return True
        text = difference(posting)
    except Exception:
        # The store may be gone, or may refuse a request. The call itself does not need it.
        return True
    if text is not None:
        warn_user(text, ReplicaWarning)
    return posting.is_settled


def _describe(gradients: Shards, records: Sequence[tuple[int, float]], ranks: Ranks) -> list[ReplicaInfo]:
    return [
        ReplicaInfo("gradient", name, tuple(grad.shape), ranks, True, grad.nbytes, checksum, power)
        for name, grad, (checksum, power) in zip(gradients.infos.names, gradients.grads, records, strict=True)
    ]
