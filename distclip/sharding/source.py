"""Define `Source`, which every kind of sharding implements.

A new kind of sharding is a module with a `Source` in this package, and one line in `SOURCES` of table.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor, nn

from ..comm.consensus import FirstError
from ..comm.ranks import Axis
from .layout import Layout
from .parameters import Named
from .shard import Rows

__all__ = ["LayoutReader", "Request", "Slice", "Source"]


@dataclass(frozen=True, slots=True)
class Request:
    """Tensors whose layouts are looked up.

    Args:
        tensors: (name, tensor) pairs.
        module: module that the caller passed, or None if the caller passed tensors.
        axes: axes of `split_over=`.
        errors: errors that do not belong to a single tensor. A source adds an error here instead of raising it.
    """

    tensors: Named
    module: nn.Module | None
    axes: tuple[Axis, ...]
    errors: FirstError


@dataclass(frozen=True, slots=True)
class Slice:
    """Position of a local tensor in a flattened parameter.

    Args:
        shape: shape of the whole parameter.
        start: index of the first local element in the flattened parameter.
    """

    shape: tuple[int, ...]
    start: int


LayoutReader: TypeAlias = Callable[[str, Tensor, Layout | None], Layout | None]
"""Function of a name, a tensor, and the layout that earlier sources have found, if any.

It returns the layout with what this source adds, or the given layout for a tensor that the source does not recognize.
It raises a `LayoutError` for a tensor whose layout cannot be determined."""


class Source(Protocol):
    """A kind of sharding.

    It reads from tensors, or from the module around them, how parameters are distributed over ranks. Every method
    except `layout_reader` is optional.
    """

    title: str = "another source"
    """Name of the source in the table of `distclip.audit`, as the origin of layouts."""
    attributes: frozenset[str] = frozenset()
    """Names of the tensor attributes that the source reads. A cached table is dropped when one of them changes."""
    dict_attributes: frozenset[str] = frozenset()
    """Names of those attributes that are dictionaries, which can change in place."""

    def layout_reader(self, request: Request) -> LayoutReader | None:
        """Prepare to read the layouts of a request.

        Args:
            request: the tensors.

        Returns:
            A function that is called once for every tensor. None if the source recognizes none of them.

        Collectives: none. Host syncs: none.
        """
        ...

    def find_slices(self, request: Request) -> Mapping[int, Slice]:
        """Return the position of every tensor that is a slice of a flattened parameter, by `id` of the tensor.

        Raises:
            LayoutError: the parameters cannot be distinguished any more.
        """
        return {}

    def find_checks(self, request: Request) -> Sequence[Callable[[], None]]:
        """Return functions that raise a `LayoutError` while gradients cannot be read.

        They are called in every step, before the gradients are read. They must hold no strong reference to a module or
        tensor, because tables are cached.
        """
        return ()

    def find_rows(self, tensor: Tensor) -> Rows | None:
        """Return the rows of the whole parameter that a tensor holds, or None if they are unknown.

        Raises:
            LayoutError: the rows cannot be determined.
        """
        return None

    def dim0_coords(
        self, name: str, tensor: Tensor, layout: Layout, axes: tuple[Axis, ...], rank: int
    ) -> tuple[int, ...]:
        """Return this rank's coordinates along the axes that cut dim 0 of a parameter.

        If the pieces are sorted by these coordinates, their rows must be in order.

        Args:
            name: name of the parameter, for errors.
            tensor: the local tensor.
            layout: its layout.
            axes: axes of `split_over=`.
            rank: global rank of this process.

        Raises:
            LayoutError: the parameter is cut along an unknown dim.
        """
        return ()
