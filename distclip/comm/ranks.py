"""Define groups of ranks: `Ranks`, the named `Axis` of `split_over=`, and the `Grid` of a mesh."""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import math
import re
import zlib
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

__all__ = [
    "EXPERTS",
    "STAGES",
    "TENSORS",
    "Axis",
    "Grid",
    "Ranks",
    "ascending",
    "common_grid",
    "component_around",
    "decode_ranks",
    "digest_of",
    "encode_ranks",
    "grid_of_lines",
    "is_data_axis",
    "is_model_axis",
    "is_stage_axis",
    "is_tensor_axis",
    "pack_ranks",
    "rank_list",
    "rank_set",
    "shifted",
    "unpack_ranks",
]

Ranks = tuple[int, ...]
"""Global ranks, in the order of their process group."""

T = TypeVar("T")

_MAX_TEXT = 500
"""Number of characters up to which ranks are always written as ranges."""


class Grid:
    """Ranks of a mesh as an array, so that the coordinates of a rank give the ranks along any dim.

    Args:
        shape: number of ranks along each dim.
        ranks: global ranks in row-major order.

    >>> grid = Grid((2, 3), tuple(range(6)))
    >>> grid.dims_of(4, (3, 4, 5)), grid.dims_of(4, (1, 4)), grid.dims_of(4, (0, 4))
    ((1,), (0,), None)
    >>> grid.slice_of(4, (0,)), grid.slice_of(4, (0, 1))
    ((1, 4), (0, 1, 2, 3, 4, 5))
    """

    def __init__(self, shape: Sequence[int], ranks: Ranks) -> None:
        self.shape, self.ranks = tuple(shape), ranks
        self._strides = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        self._slices: dict[tuple[int, tuple[int, ...]], Ranks] = {}

    @cached_property
    def digest(self) -> str:
        """Text that is equal for equal grids only."""
        return f"{self.shape}{digest_of(self.ranks)}"

    @cached_property
    def _positions(self) -> dict[int, int] | range:
        ordered = range(len(self.ranks))
        return ordered if self.ranks == tuple(ordered) else {rank: i for i, rank in enumerate(self.ranks)}

    def dims_of(self, rank: int, ranks: Sequence[int]) -> tuple[int, ...] | None:
        """Return the dims along which `ranks` are all ranks through `rank`, in order.

        Args:
            rank: global rank.
            ranks: some ranks.

        Returns:
            The dims, or None if there are no such dims.
        """
        positions = self._positions
        if rank not in positions or ranks[0] not in positions or ranks[-1] not in positions:
            return None
        # The first and the last rank of a slice differ in every dim that has more than one rank.
        first, last = positions[ranks[0]], positions[ranks[-1]]
        dims = tuple(d for d in range(len(self.shape)) if self._at(first, d) != self._at(last, d))
        if math.prod(self.shape[dim] for dim in dims) != len(ranks):
            return None
        return dims if self._line(positions[rank], dims) == tuple(ranks) else None

    def line(self, rank: int, dims: tuple[int, ...]) -> Ranks:
        """Return the ranks along some dims through `rank`, in order."""
        return self._line(self._positions[rank], dims)

    def slice_of(self, rank: int, dims: Sequence[int]) -> Ranks:
        """Return the ranks along some dims through `rank`, ascending."""
        return ascending(self.line(rank, tuple(dims)))

    def _at(self, position: int, dim: int) -> int:
        return position // self._strides[dim] % self.shape[dim]

    def _line(self, position: int, dims: tuple[int, ...]) -> Ranks:
        start = position - sum(self._at(position, dim) * self._strides[dim] for dim in dims)
        # All ranks of the slice share one tuple, because a slice can contain all ranks of a large job.
        if (start, dims) not in self._slices:
            offsets = [0]
            for dim in dims:
                offsets = [offset + i * self._strides[dim] for offset in offsets for i in range(self.shape[dim])]
            self._slices[start, dims] = tuple(self.ranks[start + offset] for offset in offsets)
        return self._slices[start, dims]


def grid_of_lines(rank: int, lines: Sequence[Ranks]) -> Grid | None:
    """Return the row-major grid in which some groups of ranks can be lines or planes.

    `Grid.dims_of` finds out whether they are, which is so in most jobs.

    Args:
        rank: global rank in every group.
        lines: the groups, each ascending.

    Returns:
        The smallest such grid, or None if there is none.

    >>> grid_of_lines(5, [(1, 5), (4, 5, 6, 7)]).shape
    (2, 4)
    >>> grid_of_lines(1, [(1, 3, 4)])
    """
    # A line of n ranks with step s varies the digits of a rank between s and n · s.
    steps: set[int] = set()
    for line in lines:
        if len(line) > 1:
            if line != _progression(line):
                return None
            steps |= {line[1] - line[0], (line[1] - line[0]) * len(line)}
    ends = sorted(steps)
    if not ends or any(two % one for one, two in itertools.pairwise(ends)):
        return None
    # Grids begin at multiples of their size, as those of all stages of one job do.
    base = rank // ends[-1] * ends[-1] + rank % ends[0]
    shape = tuple(two // one for one, two in itertools.pairwise(ends))[::-1]
    return _regular_grid(shape, base, ends[0])


@functools.lru_cache(64)
def _regular_grid(shape: tuple[int, ...], base: int, step: int) -> Grid:
    return Grid(shape, tuple(range(base, base + step * math.prod(shape), step)))


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of `split_over=`: the ranks along it, including this rank, hold different parameters.

    Args:
        ranks: the global ranks along the axis, through this rank.
        name: name of the axis ("pp", "tp" ...), or None if the caller gave none.
        identity: text that is equal on all of `ranks`, and on no other group of ranks.
        grid: the root mesh that the axis was sliced from, or None. It is not sent to other ranks.
    """

    ranks: Ranks
    name: str | None = None
    identity: str = ""
    grid: Grid | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.name or 'an unnamed group'} over ranks {rank_set(self.ranks)}"

    def __reduce__(self) -> tuple[Any, ...]:
        # The grid is as large as the job, and every rank has it already.
        return Axis, (self.ranks, self.name, self.identity)


def common_grid(axes: Sequence[Axis], rank: int) -> tuple[Grid, tuple[tuple[int, ...], ...]] | None:
    """Return a grid in which all axes of a rank are lines, and the dims of each axis, or None.

    >>> found = common_grid([Axis((1, 3), "pp")], 1)
    >>> found[0].ranks, found[1]
    ((1, 3), ((0,),))
    """
    root = axes[0].grid if axes else None
    # The mesh of the caller comes first, because its ranks can be in any order.
    for grid in (root, grid_of_lines(rank, [ascending(axis.ranks) for axis in axes])):
        dims = [None if grid is None else grid.dims_of(rank, axis.ranks) for axis in axes]
        if grid is not None and all(one is not None for one in dims):
            return grid, tuple(one for one in dims if one is not None)
    return None


def is_tensor_axis(name: str | None) -> bool:
    """Return whether the name of an axis is one of tensor parallelism.

    >>> is_tensor_axis("tp"), is_tensor_axis("tensor_model_parallel"), is_tensor_axis("pp"), is_tensor_axis(None)
    (True, True, False, False)
    """
    return name is not None and (name == "tp" or "tensor" in name)


STAGES = r"(^|_)(pp|pipe\w*|stages?)(_|$)"
"""Pattern of the names of axes of pipeline stages."""
EXPERTS = r"(^|_)(ep|experts?|moe)(_|$)"
"""Pattern of the names of axes of expert parallelism."""
TENSORS = r"(^|_)(tp|tensor\w*|mp|model\w*)(_|$)"
"""Pattern of the names of axes of tensor parallelism."""
_DATA = r"(^|_)(dp|ddp|data\w*|fsdp|hsdp|replicate|replicas?)(_|$)"
"""Pattern of the names of axes of data parallelism."""


def is_stage_axis(name: str | None) -> bool:
    """Return whether the name of an axis is one of pipeline stages.

    >>> is_stage_axis("pp"), is_stage_axis("pipeline_model_parallel"), is_stage_axis("dp"), is_stage_axis(None)
    (True, True, False, False)
    """
    return name is not None and bool(re.search(STAGES, name))


def is_model_axis(name: str | None) -> bool:
    """Return whether the name of an axis is one of model parallelism: stages, experts, tensors.

    >>> is_model_axis("ep"), is_model_axis("pp"), is_model_axis("dp"), is_model_axis(None)
    (True, True, False, False)
    """
    return name is not None and any(re.search(pattern, name) for pattern in (STAGES, EXPERTS, TENSORS))


def is_data_axis(name: str | None) -> bool:
    """Return whether the name of an axis is one of data parallelism, with replicas or shards.

    >>> is_data_axis("dp_replicate"), is_data_axis("fsdp"), is_data_axis("pp"), is_data_axis(None)
    (True, True, False, False)
    """
    return name is not None and bool(re.search(_DATA, name))


def rank_list(ranks: Sequence[int]) -> str:
    """Return the first ranks as text, for messages.

    >>> rank_list([3]), rank_list(range(10))
    ('rank 3', 'ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more')
    """
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{more}"


def rank_set(ranks: Sequence[int]) -> str:
    """Return ranks as a list of limited length, for messages.

    >>> rank_set((0, 2)), rank_set(range(100))
    ('[0, 2]', '[0, 1, 2, 3, 4, 5, 6, 7, ... 100 ranks]')
    """
    if len(ranks) <= 16:
        return str(list(ranks))
    return f"[{', '.join(map(str, ranks[:8]))}, ... {len(ranks)} ranks]"


# ---- Groups of many ranks ----


class _ByIdentity:
    """Cache of a function of tuples, compared by identity because hashing a tuple reads all of it."""

    def __init__(self, function: Callable[[Ranks], Any], size: int = 512) -> None:
        self._function, self._size = function, size
        self._entries: dict[int, tuple[Ranks, Any]] = {}

    def __call__(self, ranks: Ranks) -> Any:
        entry = self._entries.get(id(ranks))
        if entry is None:
            while len(self._entries) >= self._size:
                self._entries.pop(next(iter(self._entries)), None)
            # The entry keeps the tuple, so that no other one gets its id.
            entry = self._entries[id(ranks)] = ranks, self._function(ranks)
        return entry[1]


def _ascending(ranks: Ranks) -> Ranks:
    in_order = tuple(sorted(ranks))
    return ranks if in_order == ranks else in_order


def _digest(ranks: Ranks) -> str:
    return hashlib.sha1(array("q", ranks).tobytes(), usedforsecurity=False).hexdigest()[:16]


_cached_ascending = _ByIdentity(_ascending)
_cached_digest = _ByIdentity(_digest)


def ascending(ranks: Ranks) -> Ranks:
    """Return ranks in ascending order, as one tuple for all calls with the same tuple.

    >>> ascending((1, 0))
    (0, 1)
    """
    in_order: Ranks = _cached_ascending(ranks)
    return in_order


def digest_of(ranks: Ranks) -> str:
    """Return a short name of some ranks and their order.

    >>> digest_of((0, 1)) == digest_of((1, 0))
    False
    """
    digest: str = _cached_digest(ranks)
    return digest


def encode_ranks(ranks: Sequence[int]) -> str:
    """Write ranks as ranges, so that a regular group takes constant space.

    >>> encode_ranks((0, 1, 2, 3)), encode_ranks((1, 5, 9, 13)), encode_ranks((7, 2))
    ('0-3', '1-13:4', '7,2')
    """
    if len(ranks) > 2 and ranks[0] < ranks[1] and tuple(ranks) == (whole := _progression(ranks)):
        # This is the usual case, and much faster for all ranks of a large job.
        return f"{ranks[0]}-{ranks[-1]}{f':{whole[1] - whole[0]}' * (whole[1] - whole[0] > 1)}"
    return ",".join(_ranges(ranks))


def _progression(ranks: Sequence[int]) -> Ranks:
    """Return the ranks from the first to the last one, in steps of the first difference."""
    return tuple(range(ranks[0], ranks[-1] + 1, ranks[1] - ranks[0]))


def _ranges(ranks: Sequence[int]) -> Iterator[str]:
    i = 0
    while i < len(ranks):
        step, end = 0, i + 1
        if end < len(ranks) and ranks[end] > ranks[i]:
            step = ranks[end] - ranks[i]
            while end < len(ranks) and ranks[end] - ranks[end - 1] == step:
                end += 1
        # A range of two ranks is no shorter than the two ranks themselves.
        if end - i < 3:
            yield str(ranks[i])
            i += 1
            continue
        yield f"{ranks[i]}-{ranks[end - 1]}{f':{step}' * (step > 1)}"
        i = end


def decode_ranks(text: str) -> Ranks:
    """Read ranks that `encode_ranks` has written.

    >>> decode_ranks("0-3"), decode_ranks("1-13:4,7,2"), decode_ranks("")
    ((0, 1, 2, 3), (1, 5, 9, 13, 7, 2), ())
    """
    ranks: list[int] = []
    for part in text.split(",") if text else ():
        first, _, rest = part.partition("-")
        last, _, step = rest.partition(":")
        ranks.extend(range(int(first), int(last or first) + 1, int(step or 1)))
    return tuple(ranks)


def pack_ranks(ranks: Ranks | Sequence[int]) -> str:
    """Write ascending ranks as ranges, or as one bit for each rank up to the last one if that is shorter.

    >>> pack_ranks((0, 1, 2, 3)), unpack_ranks(pack_ranks([i * i for i in range(200)]))[-1]
    ('0-3', 39601)
    """
    text = encode_ranks(ranks)
    if len(text) < _MAX_TEXT:
        return text
    bits = bytearray(ranks[-1] // 8 + 1)
    for rank in ranks:
        bits[rank >> 3] |= 1 << (rank & 7)
    packed = "*" + base64.b85encode(zlib.compress(bytes(bits))).decode()
    return min(text, packed, key=len)


def unpack_ranks(text: str) -> Ranks:
    """Read ranks that `pack_ranks` has written."""
    if not text.startswith("*"):
        return decode_ranks(text)
    bits = zlib.decompress(base64.b85decode(text[1:]))
    return tuple(8 * i + bit for i, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1)


def shifted(span: Ranks, ranks: Collection[int]) -> list[Ranks]:
    """Return shifted copies of a group that together contain every rank once, or the group alone.

    >>> shifted((0, 2), range(4))
    [(0, 2), (1, 3)]
    """
    rest, lines, first = set(ranks), list[Ranks](), min(span)
    for low in sorted(ranks):
        if low in rest:
            line = tuple(rank - first + low for rank in span)
            if not rest.issuperset(line):
                return [span]
            rest.difference_update(line)
            lines.append(line)
    return lines if span in lines else [span]


def component_around(rank: int, spans: Collection[Ranks], ranks: Collection[int]) -> Ranks:
    """Return the ranks that take part in the call of one rank, if all ranks run the same program.

    Args:
        rank: the rank.
        spans: ranks of its meshes and axes. The other ranks have the same ones, shifted.
        ranks: all ranks.

    >>> component_around(0, [(0, 1), (0, 4)], range(8))
    (0, 1, 4, 5)
    """
    lines_of: dict[int, list[Ranks]] = {}
    for line in (line for span in spans for line in shifted(span, ranks)):
        for member in line:
            lines_of.setdefault(member, []).append(line)
    found, waiting = {rank}, [rank]
    while waiting:
        new = {other for line in lines_of.get(waiting.pop(), ()) for other in line} - found
        found |= new
        waiting += new
    return tuple(sorted(found))
