"""Methods of somebody else's objects, replaced and given back."""

from __future__ import annotations

from typing import Any

__all__ = ["Patches"]

_NOTHING = object()


class Patches:
    """What was replaced on which object.

    >>> class Engine:
    ...     def step(self):
    ...         return "its own"
    >>> engine, patches = Engine(), Patches()
    >>> patches.put(engine, "step", lambda: "ours")
    >>> engine.step()
    'ours'
    >>> patches.restore()
    >>> engine.step()
    'its own'
    """

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Replace an attribute of one object, and of no other of its class."""
        self._before.append((owner, name, vars(owner).get(name, _NOTHING)))
        setattr(owner, name, value)

    def restore(self) -> None:
        """Give back everything, the last replaced first."""
        while self._before:
            owner, name, value = self._before.pop()
            if value is _NOTHING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
