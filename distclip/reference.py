"""The formulas on whole gradients in float64, in the order in which they are written: what everything else must equal.

Nothing here knows of ranks. It is the oracle of the tests, public so that anyone can check a layout of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["clip_coefficient", "total_norm"]


def total_norm(grads: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    r"""The p-norm of all elements together, :math:`(\sum_i |g_i|^p)^{1/p}`.

    Args:
        grads: every whole gradient of the model once; dense, of any floating or complex dtype.
        norm_type: p > 0, or `inf`.

    Returns:
        0-d float64.

    Collectives: none. Host syncs: none.

    >>> total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    tensor(5., dtype=torch.float64)
    """
    wide = [(g.to(torch.complex128) if g.is_complex() else g.double()).abs().reshape(-1) for g in grads]
    elements = torch.cat([torch.zeros(1, dtype=torch.float64), *wide])
    if math.isinf(norm_type):
        return elements.amax()
    # A power of the largest element may not fit where the norm does.
    largest = elements.amax().clamp(min=torch.finfo(torch.float64).tiny)
    return largest * (elements / largest).pow(norm_type).sum().pow(1.0 / norm_type)


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    r"""What a gradient is multiplied by, :math:`\min(1, max\_norm / (norm + 10^{-6}))`.

    Source: Pascanu, Mikolov, Bengio 2013, algorithm 1, with the 1e-6 of torch.nn.utils.clip_grad_norm_.

    >>> clip_coefficient(torch.tensor(4.0, dtype=torch.float64), 1.0)
    tensor(0.2500, dtype=torch.float64)
    """
    return torch.minimum(torch.ones_like(norm), max_norm / (norm + 1e-6))
