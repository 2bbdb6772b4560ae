"""What a caller may pass as `parameters` or `tensors`, made into one list of (name, tensor)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ArgumentError

__all__ = ["Named", "Parameters", "named"]

Parameters: TypeAlias = nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
"""A module, one tensor, an iterable of tensors, or of (name, tensor) pairs."""

Named: TypeAlias = list[tuple[str, Tensor]]

_WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|_forward_module)\.")
"""What FSDP1, torch.compile, activation checkpointing and Lightning's Fabric put into the names of what they wrap: a
parameter is called the same with and without them, so that what is remembered of it finds it again."""


def named(parameters: Parameters, argument: str = "parameters") -> Named:
    """Every tensor of the argument once, with a name.

    Args:
        parameters: a module, a tensor, or an iterable (a generator too) of tensors or (name, tensor) pairs.
        argument: what the caller calls it, for messages.

    Returns:
        (name, tensor) in the order given; a tensor listed twice, or tied within a module, only once. A module's names
        are those of the bare module, whatever wraps it.

    Raises:
        ArgumentError: it is none of these.

    >>> import torch
    >>> w = torch.ones(2)
    >>> [name for name, _ in named([w, w])]
    ['parameters[0]']
    """
    seen: set[int] = set()
    unique: Named = []
    for name, tensor in _pairs(parameters, argument):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique.append((name, tensor))
    return unique


def _pairs(parameters: Any, argument: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(parameters, nn.Module):
        yield from _bare(parameters)
        return
    if isinstance(parameters, Tensor):
        yield argument, parameters
        return
    try:
        items = iter(parameters)
    except TypeError:
        raise _refused(f"{argument}={parameters!r}", argument) from None
    for index, item in enumerate(items):
        if isinstance(item, Tensor):
            yield f"{argument}[{index}]", item
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Tensor):
            yield item
        else:
            raise _refused(f"{argument}[{index}] is {item!r:.80}", argument)


def _bare(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Its parameters, by the names they have without what wraps them."""
    pairs = list(module.named_parameters())
    could_be = any("module." in name for name, _ in pairs)
    modules = module.named_modules() if could_be else ()
    inside = [f"{path}.module.".lstrip(".") for path, one in modules if isinstance(one, DistributedDataParallel)]
    for name, tensor in pairs:
        # The innermost first: the names of the outer ones stay as they are until then.
        for prefix in reversed(inside):
            if name.startswith(prefix):
                name = prefix.removesuffix("module.") + name.removeprefix(prefix)
        yield _WRAPPERS.sub("", name), tensor


def _refused(seen: str, argument: str) -> ArgumentError:
    return ArgumentError(
        f"{seen}: expected a torch.nn.Module, a tensor, or an iterable of tensors or of (name, tensor) pairs. "
        f"Write {argument}=model, {argument}=model.parameters() or {argument}=model.named_parameters()."
    )
