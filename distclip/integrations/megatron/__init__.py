"""Clip the gradients of a Megatron-core optimizer by any policy, inside `optimizer.step()`.

::

    from distclip.integrations.megatron import attach

    optimizer = get_megatron_optimizer(config, model_chunks)
    attachment = attach(optimizer, distclip.zclip(cap=1.0), model=model_chunks)
    success, grad_norm, num_zeros = optimizer.step()  # unchanged training loop; attachment.report has the details

If you only need a correct norm, replace the two functions that Megatron clips with::

    from megatron.core.optimizer import optimizer as megatron_optimizer

    from distclip.integrations.megatron import clip_grad_by_total_norm_fp32, get_grad_norm_fp32

    megatron_optimizer.get_grad_norm_fp32 = get_grad_norm_fp32
    megatron_optimizer.clip_grad_by_total_norm_fp32 = clip_grad_by_total_norm_fp32

With `attach`, the norm and the overflow check take one all-reduce over all ranks. It fixes these errors of
megatron-core 0.16:

- On a rank without gradients the inf-norm raises, and so does every p except 2 and inf.
- A plain gradient after a DTensor discards the DTensor's group.
- In bfloat16 and float32, a step with NaN gradients is not skipped.
- If experts overflow, only their own loss scale is lowered, although the loss is multiplied by the other one.
- Without a distributed optimizer, ranks with other experts make the step that the overflowing ranks skip.
- Megatron-FSDP's strategy `no_shard` counts each parameter once for every data-parallel rank. Without
  `overlap_grad_reduce` it also leaves gradients unreduced, and the step raises `ReplicaError`.
"""

from ..attachment import detach
from .attachment import Attachment, attach
from .drop_in import clip_grad_by_total_norm_fp32, get_grad_norm_fp32

__all__ = ["Attachment", "attach", "clip_grad_by_total_norm_fp32", "detach", "get_grad_norm_fp32"]
