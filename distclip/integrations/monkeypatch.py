"""Replace methods of objects that belong to a framework, and restore them."""

from __future__ import annotations

from typing import Any

__all__ = ["MethodPatches"]

_ABSENT = object()


class MethodPatches:
    """Record of replaced attributes, and of their original values.

    >>> class Engine:
    ...     def step(self):
    ...         return "framework"
    >>> engine, patches = Engine(), MethodPatches()
    >>> patches.replace(engine, "step", lambda: "distclip")
    >>> engine.step()
    'distclip'
    >>> patches.restore()
    >>> engine.step()
    'framework'
    """

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any]] = []

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Replace an attribute on this one object. Other objects of its class keep theirs."""
        self._originals.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def restore(self) -> None:
        """Restore all originals, in reverse order of replacement."""
        while self._originals:
            owner, name, value = self._originals.pop()
            if value is _ABSENT:
                # The object itself had no such attribute, only its class.
                delattr(owner, name)
            else:
                setattr(owner, name, value)
