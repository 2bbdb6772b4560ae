"""Exchange the layouts that some ranks cannot know, and keep what the ranks of a communicator have exchanged.

The functions exchange layouts in the first call, and again when a rank comes with other layouts. Until then every call
checks by identity that this rank has what it had in the last exchange. A clipper exchanges once, when it is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..comm import Comm, global_ranks
from ..comm.discovery import global_rank, is_dry_run, memory_of
from .holders import Inventory, count_meshes
from .table import ShardTable

__all__ = ["exchange_layouts", "inventory_of", "knows_holders", "set_holders"]

_KEY = "inventories"


def inventory_of(table: ShardTable, comm: Comm) -> Inventory:
    """Describe the parameters of this rank to those ranks that cannot know their meshes."""
    # Members of one process have no global ranks, so that no mesh can be compared with them. In a dry run there are no
    # other ranks.
    if comm.ranks is None or is_dry_run():
        return Inventory()
    return table.metadata.inventory(comm.size, global_rank(comm))


def set_holders(table: ShardTable, comm: Comm, inventories: Sequence[Inventory]) -> None:
    """Set the numbers of ranks that hold the parameters of a table.

    Args:
        table: of this rank.
        comm: all ranks concerned.
        inventories: `inventory_of` every rank, by rank.

    Raises:
        LayoutError: see `count_meshes`; on every rank.
    """
    counts = count_meshes(dict(zip(global_ranks(comm), inventories, strict=True)))
    table.holders = table.metadata.find_holders(comm.size, counts[global_ranks(comm)[comm.rank]])


def knows_holders(table: ShardTable, comm: Comm) -> bool:
    """Set the numbers of ranks that hold the parameters, from what the ranks have exchanged before.

    Returns:
        False if this rank has other layouts than in the last exchange, so that all ranks must exchange theirs.

    Collectives: none. Host syncs: none.
    """
    if table.has_final_holders or comm.size == 1 or comm.ranks is None:
        return True
    memory, holdings = memory_of(comm), inventory_of(table, comm).holdings
    exchanged: dict[str, Any] = memory.get(_KEY, {"holdings": ()})
    # The usual case: the layouts of this rank reach all ranks, and did so before.
    if not holdings and not exchanged["holdings"]:
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

    Collectives: one gather over `comm`.
    """
    own = inventory_of(table, comm)
    gathered = comm.gather_objects(own)
    counts = count_meshes(dict(zip(global_ranks(comm), gathered, strict=True)))
    # A new object, which the tables of later calls compare by identity.
    memory_of(comm)[_KEY] = {
        "holdings": own.holdings,
        "num_meshes": counts[global_ranks(comm)[comm.rank]],
    }
