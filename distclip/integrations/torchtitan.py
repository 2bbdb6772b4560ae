"""Replace torchtitan's `clip_grad_norm_`.

::

    from torchtitan.distributed import utils as dist_utils

    from distclip.integrations.torchtitan import clip_grad_norm_

    dist_utils.clip_grad_norm_ = clip_grad_norm_  # before the Trainer runs; it reads the attribute at every step

torchtitan is not imported, and need not be installed. For a policy other than a fixed norm, pass the Trainer's model
parts and optimizers to a `GradClipper` with `split_over=parallel_dims.get_optional_mesh("pp")`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from ..extend import clip_grad_norm_ as _clip_grad_norm_

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["clip_grad_norm_"]


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    pp_mesh: DeviceMesh | None = None,
    ep_enabled: bool = False,
) -> Tensor:
    r"""Clip the norm of the whole gradient of a model, with the signature of torchtitan 0.3.

    .. math:: g \leftarrow g \cdot \min\left(1, \frac{max\_norm}{\lVert g \rVert_p + 10^{-6}}\right)

    It is also correct where torchtitan's function raises, hangs or is wrong: plain parameters next to DTensors,
    DTensors on several meshes, one mesh with an "ep" axis, stages whose gradients differ in dtype, a rank of a stage
    without a gradient, fp16 gradients whose squares overflow, a parameter that is listed twice.

    Args:
        parameters: the parameters of this rank's stage, or of its model parts together. May be empty with `pp_mesh`.
        max_norm: see `distclip.clip_grad_norm_`.
        norm_type: see `distclip.clip_grad_norm_`.
        error_if_nonfinite: see `distclip.clip_grad_norm_`. Raises on the ranks of all stages.
        foreach: False scales gradients one by one. None and True use the fastest kernel.
        pp_mesh: the mesh of the pipeline stages. Pass it on every rank or on none.
        ep_enabled: ignored, because placements show which parameters are experts.

    Returns:
        The norm before clipping, 0-d, float32 or wider for any dtype of the gradients, the same bits on every rank.

    Raises, Collectives, Host syncs: see `distclip.clip_grad_norm_`, called with `split_over=pp_mesh`.

    Source: the signature is that of `torchtitan.distributed.utils.clip_grad_norm_`.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([weight], max_norm=1.0, foreach=True)
    tensor(5.)
    >>> weight.grad
    tensor([0.6000, 0.8000])
    """
    # torchtitan's Trainer passes foreach=True for speed. For distclip it would mean torch's foreach kernels.
    foreach = None if foreach else foreach
    return _clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach, split_over=pp_mesh)
