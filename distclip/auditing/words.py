"""Write layouts, ranks and numbers in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

from ..comm.ranks import Ranks
from .facts import Facts
from .instances import Instance, Member

__all__ = [
    "attribute_code",
    "describe_bytes",
    "describe_count",
    "describe_layout",
    "describe_names",
    "describe_ranks",
    "describe_source",
    "on_ranks",
    "parameter_code",
    "placement_code",
]


def describe_ranks(ranks: Iterable[int]) -> str:
    """Write ranks in ranges.

    >>> describe_ranks([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7, 8'
    """
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = (f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return ", ".join(texts)


def on_ranks(ranks: Iterable[int]) -> str:
    """Write ranks with their noun.

    >>> on_ranks([2]), on_ranks((0, 1))
    ('rank 2', 'ranks 0, 1')
    """
    unique = set(ranks)
    return f"{'rank' if len(unique) == 1 else 'ranks'} {describe_ranks(unique)}"


def parameter_code(name: str) -> str:
    """Return the expression for a parameter of the model.

    >>> parameter_code("embed.weight"), parameter_code("parameters[0]")
    ('model.get_parameter("embed.weight")', 'parameters[0]')
    """
    return name if name.startswith("parameters") else f'model.get_parameter("{name}")'


def attribute_code(name: str) -> str:
    """Return the path of a parameter as a Python expression.

    >>> attribute_code("layers.0.weight")
    'model.layers[0].weight'
    """
    if name.startswith("parameters"):
        return name
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split("."))


def placement_code(member: Member) -> str:
    """Return the last placement of a layout as code."""
    spreads = member.holding.spreads
    if not spreads or spreads[-1].kind == "replica":
        return "Replicate()"
    return (
        "Partial()"
        if spreads[-1].kind == "partial"
        else f"Shard({'dim' if spreads[-1].dim is None else spreads[-1].dim})"
    )


def describe_names(names: Sequence[str], limit: int = 4) -> str:
    """Write names, at most `limit` of them.

    >>> describe_names(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - limit} more" if len(unique) > limit else ""
    return ", ".join(unique[:limit]) + more


def describe_bytes(number: int) -> str:
    """Write a number of bytes.

    >>> describe_bytes(512), describe_bytes(3 * 2**20)
    ('512 B', '3.0 MiB')
    """
    size, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{number} B" if number < 1024 else f"{size:.1f} {units[0]}"


def describe_count(count: Fraction) -> str:
    """Write how often elements count.

    >>> describe_count(Fraction(2)), describe_count(Fraction(1, 2)), describe_count(Fraction(0))
    ('2 times', '1/2 times', 'never')
    """
    return "never" if count == 0 else "once" if count == 1 else f"{count} times"


def describe_layout(instance: Instance, facts: Facts) -> str:
    """Write the layout of a parameter in words.

    Args:
        instance: the parameter.
        facts: facts of its first rank.
    """
    member = instance.members[0]
    holding = member.holding
    if not holding.layout.counted and all(not m.holding.layout.counted for m in instance.members):
        return "shared with another stage, not counted here"
    parts = []
    for spread in holding.spreads:
        over = _over(spread.over, spread.ranks)
        if spread.kind == "shard":
            dim = "" if spread.dim is None else f" on dim {spread.dim}"
            count = "" if spread.num_pieces == len(spread.ranks) else f", {spread.num_pieces} shards"
            parts.append(f"sharded{dim} over {over}{count}")
        elif spread.kind == "slice":
            parts.append(f"slices of the flattened parameter over {over}")
        elif spread.kind == "partial":
            parts.append(f"partial gradient, summed over {over}")
        else:
            parts.append(f"replicated over {over}")
    members = holding.layout.members
    axes = zip(facts.axes, holding.layout.split, holding.layout.cut, strict=True)
    for axis, split, cut in axes:
        if split and not cut and len(members.intersection(axis.ranks)) <= 1 and len(axis.ranks) > 1:
            parts.append(f"different over {_over(axis.name or '', axis.ranks)}")
    if instance.is_assumed:
        parts.append(f"replicated over ranks {describe_ranks(instance.ranks)}" if not holding.spreads else "replicated")
        parts[-1] += " (assumed)"
    return ", ".join(parts) or "on one rank"


def describe_source(instance: Instance, facts: Facts) -> str:
    """Write the origin of the layout, and whether replicas are assumed."""
    sources = [member.holding.source for member in instance.members if member.holding.source]
    known = [sources[0]] if sources else []
    split = instance.members[0].holding.layout.split
    if not sources and facts.axes and any(split):
        known.append("split_over")
    if instance.is_assumed:
        known.append("assumed")
    return " + ".join(known) or "one rank"


def _over(name: str, ranks: Ranks) -> str:
    if name:
        return f"{name} ({len(ranks)} {'rank' if len(ranks) == 1 else 'ranks'})"
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {describe_ranks(ranks)}"
