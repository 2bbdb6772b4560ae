"""The charts of a page, in plotly."""

from .distribution import distribution
from .steps import over_steps
from .tensors import tensor_norms

__all__ = ["distribution", "over_steps", "tensor_norms"]
