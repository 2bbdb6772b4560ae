"""List what a caller passes as `parameters` or `tensors` as (name, tensor) pairs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn import Parameter as TorchParameter
from torch.nn.parallel import DistributedDataParallel

from ..errors import ArgumentError, short_repr

__all__ = ["Named", "Parameters", "check_names", "is_frozen", "is_position", "name_tensors"]

Parameters: TypeAlias = nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
"""A module, one tensor, an iterable of tensors, or of (name, tensor) pairs."""

Named: TypeAlias = list[tuple[str, Tensor]]
"""(name, tensor) pairs."""

_WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|_forward_module)\.")
"""Parts of parameter names that wrappers insert.

The wrappers are FSDP1, torch.compile, activation checkpointing and Lightning's Fabric. The parts are removed, so that
a checkpoint finds a parameter with and without its wrappers."""


_POSITION = re.compile(r"(parameters|tensors)(\[\d+\])?")


def is_position(name: str) -> bool:
    """Return whether `name_tensors` made the name, because the caller passed none.

    >>> is_position("parameters[3]"), is_position("layer.weight")
    (True, False)
    """
    return _POSITION.fullmatch(name) is not None


def name_tensors(parameters: Parameters, argument: str = "parameters") -> Named:
    """List every tensor of the argument once, with a name.

    Args:
        parameters: a module, a tensor, or an iterable (also a generator) of tensors or (name, tensor) pairs.
        argument: name of the caller's argument, for messages.

    Returns:
        (name, tensor) pairs in the order given. A tensor that is listed twice, or tied within a module, appears once.
        Parameters of a module have the names of the unwrapped module.

    Raises:
        ArgumentError: the argument is of another type.

    >>> import torch
    >>> w = torch.ones(2)
    >>> [name for name, _ in name_tensors([w, w])]
    ['parameters[0]']
    """
    # By identity, because == compares the elements of tensors.
    seen: set[int] = set()
    unique: Named = []
    for name, tensor in _pairs(parameters, argument):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique.append((name, tensor))
    return unique


def check_names(names: Sequence[str]) -> None:
    """Raise if two parameters of this rank have one name, in a call that finds their norms by name.

    Raises:
        ArgumentError: see above.

    >>> check_names(["weight", "bias"])
    """
    if len(set(names)) < len(names):
        twice = [name for name, count in Counter(names).items() if count > 1]
        raise ArgumentError(
            f"parameters: {', '.join(twice[:3])}{' …' if len(twice) > 3 else ''}: different parameters of this rank "
            "have this name, so that their norms cannot be distinguished. Pass a module that contains all of them, or "
            'pairs with different names: [(f"generator.{name}", param) for name, param in generator.named_parameters()]'
        )


def is_frozen(tensor: Tensor) -> bool:
    """Return whether a tensor is a parameter that does not train on this rank.

    Such a parameter requires no gradient, and has none.

    >>> import torch
    >>> is_frozen(nn.Parameter(torch.zeros(1), requires_grad=False)), is_frozen(torch.zeros(1))
    (True, False)
    """
    # A plain tensor may stand for a parameter whose gradient an integration attaches later.
    if tensor.requires_grad or not isinstance(tensor, TorchParameter):
        return False
    return tensor.grad is None and getattr(tensor, "main_grad", None) is None


def _pairs(parameters: Any, argument: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(parameters, nn.Module):
        yield from _unwrapped(parameters)
        return
    if isinstance(parameters, Tensor):
        yield argument, parameters
        return
    # An empty string would be an iterable without tensors.
    if isinstance(parameters, str | bytes):
        raise _type_error(f"{argument}={short_repr(parameters)}", argument)
    try:
        items = iter(parameters)
    except TypeError:
        raise _type_error(f"{argument}={short_repr(parameters)}", argument) from None
    for index, item in enumerate(items):
        if isinstance(item, Tensor):
            yield f"{argument}[{index}]", item
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Tensor):
            yield item
        else:
            raise _type_error(f"{argument}[{index}] is {short_repr(item)}", argument)


def _unwrapped(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a module, with the names that they have without wrappers."""
    pairs = list(module.named_parameters())
    # DDP names the module that it wraps "module", which can also be an ordinary name. So the DDP modules themselves are
    # looked up, unless no name contains "module".
    modules = module.named_modules() if any("module." in name for name, _ in pairs) else ()
    inside = [f"{path}.module.".lstrip(".") for path, one in modules if isinstance(one, DistributedDataParallel)]
    for name, tensor in pairs:
        # The innermost prefix is removed first, because the prefixes of the outer modules stay valid then.
        for prefix in reversed(inside):
            if name.startswith(prefix):
                name = prefix.removesuffix("module.") + name.removeprefix(prefix)
        yield _WRAPPERS.sub("", name), tensor


def _type_error(value: str, argument: str) -> ArgumentError:
    return ArgumentError(
        f"{value}: expected a torch.nn.Module, a tensor, or an iterable of tensors or of (name, tensor) pairs. "
        f"Pass {argument}=model, {argument}=model.parameters() or {argument}=model.named_parameters()."
    )
