"""Count the meshes that hold one parameter, where its layout alone does not show their number.

A layout names the ranks of one mesh, and the axes of `split_over=` name ranks with other parameters. If both together
reach every rank of the communicator, the number of replicas follows from them. Otherwise the other ranks may hold
replicas on other meshes (FSDP2 on slices of a mesh, with DDP around it), or no part of the parameter (experts on some
ranks). So the ranks exchange `Holding` descriptions, once, and count the meshes:

1. A parameter of one name and one shape on disjoint meshes is one parameter, and the meshes hold replicas.
2. Parameters without names are matched by their order within the mesh. Meshes whose lists differ hold different
   parameters if the lists have no shape in common. Otherwise the layout is ambiguous, and it is refused.
3. A mesh that overlaps another one holds another parameter, because a rank holds one shard of a parameter.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from ..comm.ranks import Axis, Ranks, decode_ranks, encode_ranks
from ..errors import LayoutError
from .layout import Layout
from .parameters import is_position

__all__ = [
    "Coords",
    "Holders",
    "Holding",
    "Inventory",
    "coords_of",
    "count_meshes",
    "decode_inventory",
    "encode_inventory",
]

Coords: TypeAlias = tuple[tuple[int, ...], ...]
"""For each axis of `split_over=`, the coordinates of the ranks that hold one parameter. Empty for all coordinates."""


@dataclass(frozen=True, slots=True, eq=False)
class Holders:
    """Numbers of ranks that hold the parameters of a table.

    Args:
        world_size: number of ranks in the communicator.
        num_meshes: for each parameter, the number of meshes that hold it. None where its layout and `split_over=` reach
            every rank. An empty tuple means None for every parameter.
    """

    world_size: int
    num_meshes: tuple[int | None, ...] = ()

    def meshes_of(self, position: int) -> int | None:
        """Return the number of meshes of one parameter."""
        return self.num_meshes[position] if self.num_meshes else None


@dataclass(frozen=True, slots=True)
class Holding:
    """Description of one parameter on one rank, for ranks that cannot derive its mesh.

    Args:
        name: name of the parameter.
        shape: shape of the whole parameter, with -1 for a dim of unknown size.
        members: global ranks of its mesh, ascending, as far as this rank's layout contains them.
        num_members: number of ranks of its mesh.
        num_pieces: number of shards on its mesh.
        coords: coordinates of its mesh along `split_over=`.
    """

    name: str
    shape: tuple[int, ...]
    members: Ranks
    num_members: int
    num_pieces: int
    coords: Coords = ()


@dataclass(frozen=True, slots=True)
class Inventory:
    """Description of all parameters of one rank.

    Args:
        holdings: those whose layout and `split_over=` do not reach every rank, in order.
        plain: (name, coordinates) of the plain tensors without any layout.
    """

    holdings: tuple[Holding, ...] = ()
    plain: frozenset[tuple[str, Coords]] = frozenset()


def coords_of(layout: Layout, axes: Sequence[Axis], rank: int) -> Coords:
    """Return the coordinates along `split_over=` of the ranks that hold a parameter."""
    members, coords = layout.members, []
    for axis, split in zip(axes, layout.split, strict=True):
        along = tuple(i for i, other in enumerate(axis.ranks) if other in members or other == rank)
        coords.append(along if split and len(along) < len(axis.ranks) else ())
    return tuple(coords)


def encode_inventory(inventory: Inventory) -> Any:
    """Convert an inventory to lists that are equal as JSON if and only if the inventories are.

    Thousands of parameters share one mesh, whose ranks are written once.
    """
    # In the order of the parameters, which is the same on all ranks of a mesh.
    meshes = dict.fromkeys(h.members for h in inventory.holdings)
    numbers = {members: i for i, members in enumerate(meshes)}
    holdings = [
        [h.name, h.shape, numbers[h.members], h.num_members, h.num_pieces, h.coords] for h in inventory.holdings
    ]
    return [list(map(encode_ranks, meshes)), holdings, sorted(inventory.plain)]


def decode_inventory(lists: Any) -> Inventory:
    """Convert the lists of `encode_inventory`, which may have been through JSON, to an inventory.

    >>> one = Inventory((Holding("w", (4, 4), (0, 1), 2, 2, ((0,),)),), frozenset({("b", ((), (1,)))}))
    >>> decode_inventory(encode_inventory(one)) == one
    True
    """
    texts, holdings, plain = lists
    meshes = list(map(decode_ranks, texts))
    return Inventory(
        tuple(
            Holding(name, tuple(shape), meshes[mesh], num_members, num_pieces, _coords(coords))
            for name, shape, mesh, num_members, num_pieces, coords in holdings
        ),
        frozenset((name, _coords(coords)) for name, coords in plain),
    )


def _coords(lists: Any) -> Coords:
    return tuple(map(tuple, lists))


def count_meshes(by_rank: Mapping[int, Inventory]) -> dict[int, tuple[int, ...]]:
    """Count the meshes that hold replicas of each parameter.

    Args:
        by_rank: descriptions, by global rank. One rank is enough for each distinct description.

    Returns:
        For each rank, the number of meshes of each of its holdings.

    Raises:
        LayoutError: the meshes contradict each other, or parameters without names cannot be matched. All ranks with the
            same arguments raise the same error.

    >>> left, right = (Holding("w", (4, 4), ranks, 2, 2) for ranks in ((0, 1), (2, 3)))
    >>> count_meshes({0: Inventory((left,)), 2: Inventory()})  # experts on some ranks
    {0: (1,), 2: ()}
    >>> count_meshes({0: Inventory((left,)), 2: Inventory((right,))})  # replicas on two meshes
    {0: (2,), 2: (2,)}
    """
    _check_plain(by_rank)
    everything = [h for inventory in by_rank.values() for h in inventory.holdings]
    counts = _count_named([h for h in everything if not is_position(h.name)])
    counts |= _count_unnamed(by_rank)
    return {rank: tuple(map(counts.__getitem__, inventory.holdings)) for rank, inventory in by_rank.items()}


def _check_plain(by_rank: Mapping[int, Inventory]) -> None:
    """Raise if a parameter is a shard on some ranks and a plain tensor on others."""
    plain = {one: rank for rank, inventory in by_rank.items() for one in inventory.plain if not is_position(one[0])}
    for inventory in by_rank.values():
        for h in inventory.holdings:
            if (rank := plain.get((h.name, h.coords))) is not None:
                raise LayoutError(
                    f"{h.name} spans a mesh of ranks {list(h.members)}, and is a plain tensor without any layout on "
                    f"rank {rank}. Use distclip.annotate_(param, mesh, placements) there, or pass different parameters "
                    "under different names."
                )


def _count_named(holdings: Sequence[Holding]) -> dict[Holding, int]:
    """Return the number of meshes of each parameter that has a name."""
    by_name: dict[tuple[str, Coords], dict[Holding, None]] = {}
    for h in holdings:
        by_name.setdefault((h.name, h.coords), {})[h] = None
    # Ranks of one mesh have equal descriptions, so only a few are left for each name.
    counts: dict[Holding, int] = {}
    for distinct in by_name.values():
        meshes = _connected(list(distinct))
        for mesh in meshes:
            num_ranks = len(frozenset[int]().union(*(h.members for h in mesh)))
            # If several groups describe a mesh, one rank's description contains only part of its ranks, and the
            # descriptions of all ranks contain all of them.
            if num_ranks > max(h.num_members for h in mesh) or len({h.shape for h in mesh}) > 1:
                _raise_contradiction(mesh)
        # A tensor of another shape on a disjoint mesh is another parameter.
        shapes = [mesh[0].shape for mesh in meshes]
        counts |= {h: shapes.count(h.shape) for h in distinct}
    return counts


def _connected(holdings: Sequence[Holding]) -> list[list[Holding]]:
    """Group descriptions whose ranks overlap, because they describe one mesh."""
    meshes: list[list[Holding]] = []
    for holding in holdings:
        touching = [mesh for mesh in meshes if any(not set(h.members).isdisjoint(holding.members) for h in mesh)]
        meshes = [mesh for mesh in meshes if mesh not in touching]
        meshes.append([*itertools.chain.from_iterable(touching), holding])
    return meshes


def _count_unnamed(by_rank: Mapping[int, Inventory]) -> dict[Holding, int]:
    """Return the number of meshes of each parameter without a name."""
    # For each mesh, the lists of its ranks: the shapes of their parameters, in order.
    lists: dict[tuple[Coords, Ranks], set[tuple[object, ...]]] = {}
    unnamed: list[Holding] = []
    for inventory in by_rank.values():
        own: dict[tuple[Coords, Ranks], list[object]] = {}
        for h in inventory.holdings:
            if is_position(h.name):
                unnamed.append(h)
                own.setdefault((h.coords, h.members), []).append(h.shape)
        for mesh, shapes in own.items():
            lists.setdefault(mesh, set()).add(tuple(shapes))
    # Each mesh counts itself, and the other meshes with the same list.
    counts = dict.fromkeys(lists, 1)
    for one, two in itertools.permutations(lists, 2):
        if one[0] != two[0] or not set(one[1]).isdisjoint(two[1]):
            continue
        if lists[one] == lists[two] and len(lists[one]) == 1:
            counts[one] += 1
        elif set(itertools.chain(*lists[one])) & set(itertools.chain(*lists[two])):
            raise LayoutError(
                f"parameters on a mesh of ranks {list(one[1])} were passed without names, and so were others of the "
                f"same shapes on ranks {list(two[1])}, in another order or number, so that it is unknown which of them "
                "are replicas. Pass model.named_parameters() or the module. If ranks hold different parameters under "
                "one name, pass split_over=mesh[...] too."
            )
    for h in unnamed:
        if len(h.members) != h.num_members:
            raise LayoutError(
                f"{h.name} spans several groups of ranks and was passed without a name, so that the ranks cannot match "
                "it. Pass model.named_parameters(), or the module."
            )
    return {h: counts[h.coords, h.members] for h in unnamed}


def _raise_contradiction(mesh: Sequence[Holding]) -> NoReturn:
    one = mesh[0]
    two = next(h for h in mesh if (h.members, h.shape) != (one.members, one.shape))
    raise LayoutError(
        f"{one.name} has shape {one.shape} on ranks {list(one.members)}, and shape {two.shape} on ranks "
        f"{list(two.members)}, so that some rank would hold shards of both. Pass different parameters under different "
        "names, or declare the axis along which ranks hold different parameters: split_over=mesh[...]."
    )
