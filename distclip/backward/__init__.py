"""Clip and step within backward: each parameter as soon as its gradient exists, so that the gradient can be freed."""

from .in_backward import InBackward

__all__ = ["InBackward"]
