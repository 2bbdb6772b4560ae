"""Exchange layouts that a rank alone cannot derive, and keep what the ranks of a communicator have exchanged.

Functions such as `clip_grad_norm_` exchange layouts in their first call, and again when a rank has other layouts. Until
then every call checks by identity that this rank's layouts are those of the last exchange. A clipper exchanges once,
when it is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..comm import Comm, global_ranks
from ..comm.consensus import check_same_axes
from ..comm.discovery import global_rank, is_dry_run, memory_of
from ..comm.distinct import Distinct, exchange_texts
from ..comm.ranks import Axis, Grid, common_grid
from ..errors import DisagreementError
from .holders import Inventory, count_meshes, decode_inventory, encode_inventory
from .replicas import assumed_groups
from .table import ShardTable

__all__ = ["exchange_layouts", "exchange_setup", "inventory_of", "knows_holders"]

_KEY = "inventories"


def inventory_of(table: ShardTable, comm: Comm) -> Inventory:
    """Describe the parameters of this rank to ranks that cannot derive their meshes."""
    # Members of one process have no global ranks to compare with a mesh. In a dry run there are no other ranks.
    if comm.ranks is None or is_dry_run():
        return Inventory()
    return table.metadata.inventory(comm.size, global_rank(comm))


def exchange_setup(table: ShardTable, comm: Comm, error: BaseException | None, arguments: str) -> str:
    """Compare the arguments of a clipper between its ranks, and set how many ranks hold its parameters.

    Args:
        table: of this rank.
        comm: all ranks concerned, all of which call this function.
        error: error of this rank, or None. All ranks raise it.
        arguments: text about the arguments that must be equal.

    Returns:
        A random text that is equal on all ranks.

    Raises:
        DisagreementError: the arguments or the axes of `split_over=` differ; on every rank.
        LayoutError: see `count_meshes`; on every rank.

    Collectives: those of `exchange_texts`, and a gather if the axes are not lines of a common grid.
    """
    found = common_grid(table.axes, global_rank(comm))
    grid_text = _grid_text(table.axes, comm, found)
    own = [arguments, grid_text, encode_inventory(inventory_of(table, comm))]
    distinct = exchange_texts(comm, error, json.dumps(own))
    decoded = [json.loads(text) for text in distinct.texts]
    if len(different := {arguments for arguments, _, _ in decoded}) > 1:
        raise DisagreementError(
            f"policy: the ranks were given different policies, {sorted(different)}. Pass the same policy, "
            "on_nonfinite, max_skips and replicas on every rank."
        )
    ranks = global_ranks(comm)
    # Usually every rank can compute the axes of all ranks. Otherwise the axes are gathered.
    axes_by_rank: Mapping[int, tuple[Axis, ...]]
    if {text for _, text, _ in decoded} == {grid_text} and grid_text != _NO_GRID:
        axes_by_rank = dict.fromkeys(ranks, ()) if found is None else _axes_in_grid(ranks, table.axes, *found)
    else:
        gathered = comm.gather_objects(table.axes)
        check_same_axes(gathered, comm)
        axes_by_rank = dict(zip(ranks, gathered, strict=True))
    table.metadata.assume_replicas(assumed_groups(axes_by_rank, ranks[comm.rank]))
    _set_holders(table, comm, distinct, [inventory for _, _, inventory in decoded])
    table.has_final_holders = True
    return distinct.nonce


_NO_GRID = "?"
"""Text that replaces a grid which not all ranks can derive."""


def _grid_text(axes: Sequence[Axis], comm: Comm, found: tuple[Grid, Sequence[Sequence[int]]] | None) -> str:
    """Return a text that describes axes. If it is equal on all ranks, their axes are consistent."""
    if not axes:
        return ""
    # A grid numbers global ranks, which the members of one process do not have.
    if found is None or comm.ranks is None or not set(comm.ranks) <= set(found[0].ranks):
        return _NO_GRID
    return repr((found[0].digest, [axis.name for axis in axes], found[1]))


def _axes_in_grid(
    ranks: Sequence[int], axes: Sequence[Axis], grid: Grid, dims: Sequence[tuple[int, ...]]
) -> dict[int, tuple[Axis, ...]]:
    """Return the axes of every rank, computed from those of this rank."""
    names = [axis.name for axis in axes]
    pairs = list(zip(names, dims, strict=True))
    return {rank: tuple(Axis(grid.line(rank, along), name) for name, along in pairs) for rank in ranks}


def _set_holders(table: ShardTable, comm: Comm, distinct: Distinct, inventories: Sequence[Any]) -> tuple[int, ...]:
    """Set how many ranks hold the parameters, and return the number of meshes of each."""
    ranks = global_ranks(comm)
    # Ranks with equal inventories count as one.
    owners = [ranks[owner] for owner in distinct.owners]
    counts = count_meshes(dict(zip(owners, map(decode_inventory, inventories), strict=True)))
    num_meshes = counts[owners[distinct.own]]
    table.holders = table.metadata.find_holders(comm.size, num_meshes)
    return num_meshes


def knows_holders(table: ShardTable, comm: Comm) -> bool:
    """Set the numbers of ranks that hold the parameters, from what the ranks have exchanged before.

    Returns:
        False if the layouts of this rank differ from those in the last exchange, so that all ranks must exchange
        theirs.

    Collectives: none. Host syncs: none.
    """
    if table.has_final_holders or comm.size == 1 or comm.ranks is None:
        return True
    metadata = table.metadata
    # In the usual case, the layouts of this rank reach all ranks, as in the last call, and no rank has exchanged any.
    if metadata.reached_ranks is comm.ranks and _KEY not in metadata.memory:
        return True
    memory, holdings = memory_of(comm), inventory_of(table, comm).holdings
    exchanged: dict[str, Any] = memory.get(_KEY, {"holdings": ()})
    if not holdings and not exchanged["holdings"]:
        metadata.reached_ranks, metadata.memory = comm.ranks, memory
        return True
    if holdings != exchanged["holdings"]:
        return False
    # Another rank may have started an exchange since the last call with this table.
    if table.metadata.exchanged is not exchanged:
        table.metadata.exchanged = exchanged
        table.metadata.exchanged_holders = table.metadata.find_holders(comm.size, exchanged["num_meshes"])
    table.holders = table.metadata.exchanged_holders
    return True


def exchange_layouts(table: ShardTable, comm: Comm) -> None:
    """Exchange the layouts of all ranks, so that `knows_holders` is true from now on.

    Args:
        table: of this rank.
        comm: all ranks concerned, all of which call this function.

    Raises:
        LayoutError: see `count_meshes`; on every rank.

    Collectives: those of `exchange_texts`.
    """
    own = inventory_of(table, comm)
    distinct = exchange_texts(comm, None, json.dumps(encode_inventory(own)))
    num_meshes = _set_holders(table, comm, distinct, [json.loads(text) for text in distinct.texts])
    # A new object, which the tables of later calls compare by identity.
    memory_of(comm)[_KEY] = {"holdings": own.holdings, "num_meshes": num_meshes}
