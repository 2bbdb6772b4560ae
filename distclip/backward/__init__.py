"""Clip and step each parameter within backward, as soon as its gradient exists, so that the gradient can be freed."""

from .in_backward import InBackward

__all__ = ["InBackward"]
