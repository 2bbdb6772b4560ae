"""Compute an attribute when it is first read.

Before Python 3.12, `functools.cached_property` takes a lock each time, which costs more than most of these attributes.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

__all__ = ["lazy"]

T = TypeVar("T")


class lazy(cached_property[T]):
    """Attribute that is computed when it is first read, like `functools.cached_property`, without a lock.

    Two threads that read it at the same time may both compute it.

    >>> class Square:
    ...     @lazy
    ...     def area(self) -> int:
    ...         return 4
    >>> square = Square()
    >>> square.area, vars(square)
    (4, {'area': 4})
    """

    if not TYPE_CHECKING:

        def __get__(self, instance: Any, owner: Any = None) -> Any:
            if instance is None:
                return self
            # From now on Python finds the value in the instance, and does not call this method.
            value = vars(instance)[self.attrname] = self.func(instance)
            return value
