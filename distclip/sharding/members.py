"""Define groups of parameters by reference: to an optimizer, a parameter group, a module, or a list of tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..comm import Comm
from ..comm.consensus import FirstError, gather_or_raise
from ..errors import ArgumentError
from .parameters import is_frozen
from .table import ShardTable

__all__ = ["Members", "are_references", "members_of", "name_groups", "resolve_groups"]


class Members(str):
    """Text that replaces the pattern of a group whose parameters were passed by reference.

    The text is equal on every rank, although the parameters are not. `resolve_groups` replaces it by a pattern of
    names.
    """

    params: tuple[Any, ...]

    def __new__(cls, text: str, params: Iterable[Any] = ()) -> Members:
        """Return the text with the objects that have the parameters."""
        members = super().__new__(cls, text)
        members.params = tuple(params)
        return members

    def __deepcopy__(self, memo: object) -> Members:
        return self


def members_of(given: Any) -> Members | None:
    """Return the members of a group that was passed by reference, or None for another object.

    Args:
        given: an optimizer, one of its parameter groups, a module, or an iterable of tensors.

    >>> import torch
    >>> members_of(torch.optim.SGD([torch.zeros(1)], lr=1.0))
    'parameters of SGD'
    """
    if isinstance(given, str | bytes | Tensor):
        return None
    # A module may also be iterable, over modules.
    if isinstance(given, nn.Module):
        return Members(f"parameters of {type(given).__name__}", [given])
    if isinstance(given, Mapping):
        return Members("parameter group", [given]) if "params" in given else None
    # The object may be an optimizer of any library.
    if "param_groups" in dir(given):
        return Members(f"parameters of {type(given).__name__}", [given])
    tensors = list(given) if isinstance(given, Iterable) else []
    if tensors and all(isinstance(tensor, Tensor) for tensor in tensors):
        return Members(f"{len(tensors)} tensors", [{"params": tensors}])
    return None


def name_groups(groups: Sequence[Any]) -> dict[str, Any]:
    """Return a list of optimizers or parameter groups as a dictionary by name.

    The name is the entry "name" of a parameter group, or the name of the optimizer's class, with a number where it is
    not unique.
    """
    names = []
    for i, group in enumerate(groups):
        given = group.get("name") if isinstance(group, Mapping) else type(group).__name__
        names.append(given if isinstance(given, str) else f"group {i}")
    return {
        f"{name} {i}" if names.count(name) > 1 else name: group
        for i, (name, group) in enumerate(zip(names, groups, strict=True))
    }


def are_references(groups: Mapping[str, str]) -> bool:
    """Return whether all groups are references. Then there is no group "rest"."""
    return bool(groups) and all(type(pattern) is Members for pattern in groups.values())


def resolve_groups(groups: Mapping[str, str], table: ShardTable, comm: Comm, errors: FirstError) -> dict[str, str]:
    """Replace references by patterns that match the names of the parameters on all ranks.

    Args:
        groups: the same names on every rank.
        table: parameters of this rank.
        comm: all ranks concerned.
        errors: of this rank so far.

    Raises:
        ArgumentError: a parameter is in two groups, a group has no parameter on any rank, or (if all groups are
            references) a parameter is in no group; on every rank.

    Collectives: one gather.
    """
    own: dict[str, list[str]] = {}
    missing: list[str] = []
    with errors:
        own, missing = _own_names(groups, table)
    gathered = gather_or_raise(comm, errors.error, (own, missing))
    names = {group: sorted({n for by_group, _ in gathered for n in by_group.get(group, ())}) for group in groups}
    # The names of all ranks are compared, because a pipeline stage has only some of them, and a name may be in
    # different groups on two ranks.
    owner: dict[str, str] = {}
    for group, members in names.items():
        if type(groups[group]) is Members and not members:
            raise ArgumentError(
                f"groups[{group!r}]={groups[group]}: the clipper has none of them. Construct it with the parameters of "
                "the group, or leave the group out."
            )
        for name in members:
            if owner.setdefault(name, group) != group:
                raise ArgumentError(
                    f"groups: {name} is in {owner[name]!r} and in {group!r}. Pass each parameter in one group."
                )
    # If one of the groups is a pattern, parameters in no group form "rest".
    lacking = sorted({name for _, some in gathered for name in some})
    if are_references(groups) and lacking:
        raise ArgumentError(
            f"groups: no group has {', '.join(lacking[:3])}{' …' * (len(lacking) > 3)}. Pass all optimizers, with "
            "the bound inf for a group that is only measured, or construct the clipper without these parameters."
        )
    return {
        group: Members(f"^(?:{'|'.join(map(re.escape, names[group]))})$") if type(pattern) is Members else pattern
        for group, pattern in groups.items()
    }


def _own_names(groups: Mapping[str, str], table: ShardTable) -> tuple[dict[str, list[str]], list[str]]:
    """Return this rank's names in each group by reference, and names of trained parameters in none."""
    found: dict[str, list[str]] = {}
    taken: set[int] = set()
    for group, pattern in groups.items():
        if type(pattern) is not Members:
            continue
        # By identity, because == compares the elements of tensors.
        ids = {id(param) for given in pattern.params for param in _params(given)}
        pairs = list(zip(table.names, table.tensors, strict=True))
        found[group] = [name for name, tensor in pairs if id(tensor) in ids]
        taken |= ids
    pairs = list(zip(table.names, table.tensors, strict=True))
    return found, [name for name, tensor in pairs if id(tensor) not in taken and not is_frozen(tensor)]


def _params(given: Any) -> list[Tensor]:
    if isinstance(given, nn.Module):
        return list(given.parameters())
    groups = [given] if isinstance(given, Mapping) else given.param_groups
    return [param for group in groups for param in group["params"]]
