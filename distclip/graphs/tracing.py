"""Choose between a function and its version for graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..devices import is_tracing
from ..errors import ArgumentError

__all__ = ["in_graph", "is_tracing", "leave_graph"]

P = ParamSpec("P")
R = TypeVar("R")


def in_graph(
    traced: Callable[P, R], reason_against: Callable[P, str | None]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Replace a function by another one while a graph is traced.

    Args:
        traced: the version for graphs, with the same arguments.
        reason_against: returns the reason why a call cannot be in a graph, or None.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        eager = _disable_dynamo(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if is_tracing():
                # An iterator can be read only once, and the version outside of the graph may have to read it too.
                if args and not isinstance(args[0], Tensor | nn.Module | list | tuple):
                    args = (list(args[0]), *args[1:])  # type: ignore[assignment, call-overload]
                reason = reason_against(*args, **kwargs)
                if reason is None:
                    return traced(*args, **kwargs)
                leave_graph(f"{function.__name__}: {reason}")
            return eager(*args, **kwargs)

        return call

    return decorate


def leave_graph(reason: str) -> None:
    """End the graph that is being traced, so that the call runs outside of it.

    With `fullgraph=True` torch.compile raises an error with the reason.

    Args:
        reason: why the call cannot be in a graph, and what to change.

    Raises:
        ArgumentError: the graph is one of make_fx, which cannot be broken.
    """
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break(msg=reason)
    else:
        raise ArgumentError(f"{reason}. Call it outside of the graph.")
