"""The well-known policies by their names: those with bounds that never move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ArgumentError
from .agc import RelativeToWeight
from .fixed import Fixed
from .norm_policy import NormPolicy

__all__ = ["agc", "global_norm", "group_norm", "per_tensor_norm"]


def global_norm(max_norm: float = 1.0, norm_type: float = 2.0) -> NormPolicy:
    r"""The standard: one fixed bound on the norm of the whole gradient.

    .. math:: coef = \min\left(1, \frac{max\_norm}{\lVert g \rVert_p + 10^{-6}}\right)

    Args:
        max_norm: ≥ 0; `inf` measures and never clips.
        norm_type: p of the norm.

    Raises:
        ArgumentError: a negative or NaN bound, a norm type that is no number.

    Source: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", ICML 2013,
    algorithm 1, with the 1e-6 of torch.nn.utils.clip_grad_norm_.

    >>> global_norm(1.0).threshold
    Fixed(max_norm=1.0)
    """
    return NormPolicy(Fixed(max_norm), norm_type)


def per_tensor_norm(max_norm: float = 1.0, norm_type: float = 2.0) -> NormPolicy:
    r"""One fixed bound on the norm of each parameter's gradient alone.

    .. math:: coef_i = \min\left(1, \frac{max\_norm}{\lVert g_i \rVert_p}\right)

    Args:
        max_norm: ≥ 0.
        norm_type: p of the norm.

    Raises:
        ArgumentError: a negative or NaN bound, a norm type that is no number.

    Source: the `clipnorm` of Keras' optimizers.

    >>> per_tensor_norm(0.5).per
    'tensor'
    """
    return NormPolicy(Fixed(max_norm), norm_type, per="tensor", eps=0.0)


def group_norm(
    groups: Mapping[str, Mapping[str, Any] | Sequence[Any]], max_norm: float = 1.0, norm_type: float = 2.0
) -> NormPolicy:
    r"""A fixed bound on the norm of each named group of parameters, and one for all the rest together.

    .. math:: coef_k = \min\left(1, \frac{max\_norm_k}{\lVert g_k \rVert_p + 10^{-6}}\right)

    Args:
        groups: {name: {"pattern": regular expression, "max_norm": bound ≥ 0}}, or {name: (pattern, bound)}; the
            pattern is searched in parameter names, and the first group that matches takes a parameter.
        max_norm: ≥ 0, of those that no group takes.
        norm_type: p of the norm.

    Raises:
        ArgumentError: no group, a group without pattern or bound, a negative or NaN bound, a norm type that is no
            number.

    Source: the groups of Megatron-LM's optimizer whose norm is taken and clipped apart (`grad_norm_group`).

    >>> group_norm({"embedding": ("embed", 0.1)}, max_norm=1.0).threshold
    Fixed(max_norm=(0.1, 1.0))
    """
    patterns: dict[str, str] = {}
    bounds: list[Any] = []
    for name, group in dict(groups).items():
        try:
            pattern, bound = (group["pattern"], group["max_norm"]) if isinstance(group, Mapping) else group
        except (KeyError, TypeError, ValueError):
            pattern = bound = None
        if not isinstance(pattern, str) or isinstance(group, str):
            raise ArgumentError(
                f"groups[{name!r}]={group!r}: a group is a regular expression and a bound. "
                f'Write groups={{{name!r}: {{"pattern": "embed", "max_norm": 1.0}}}}.'
            )
        patterns[name] = pattern
        bounds.append(bound)
    return NormPolicy(Fixed((*bounds, max_norm)), norm_type, per="group", groups=patterns)


def agc(ratio: float = 0.01, eps: float = 1e-3, exclude: Sequence[str] = (), norm_type: float = 2.0) -> NormPolicy:
    r"""Adaptive gradient clipping: each row of a gradient is bounded relative to the same row of the weights.

    .. math:: coef_i = \min\left(1, ratio \frac{\max(\lVert w_i \rVert, \varepsilon)}{\lVert g_i \rVert}\right)

    A row is a place along dim 0, an output unit of a linear layer or a convolution; a parameter of a single dim is one.

    Args:
        ratio: > 0.
        eps: ε, > 0: weights that start at zero would otherwise never leave it.
        exclude: regular expressions that are searched in parameter names: those are not clipped. The paper excludes
            the final linear layer.
        norm_type: p of both norms.

    Raises:
        ArgumentError: a number outside of its range, a norm type that is no number.

    Source: Brock, De, Smith, Simonyan, "High-performance large-scale image recognition without normalization",
    ICML 2021, arXiv 2102.06171, equation 3.

    >>> agc(exclude=["head"]).threshold
    RelativeToWeight(ratio=0.01, eps=0.001)
    """
    return NormPolicy(RelativeToWeight(ratio, eps), norm_type, per="row", exclude=exclude, eps=0.0)
