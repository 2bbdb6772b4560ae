"""Megatron-core: its optimizers step as ever, with distclip's norm, policy and decision in place of their own clipping.

::

    from distclip.integrations.megatron import attach

    optimizer = get_megatron_optimizer(config, model_chunks)
    attached = attach(optimizer, distclip.zclip(cap=1.0), model=model_chunks)
    success, grad_norm, num_zeros = optimizer.step()  # in the training loop, as ever; attached.report has the rest

Or the two functions that Megatron clips with, where only the norm is to be right::

    from megatron.core.optimizer import optimizer as theirs

    from distclip.integrations.megatron import clip_grad_by_total_norm_fp32, get_grad_norm_fp32

    theirs.get_grad_norm_fp32 = get_grad_norm_fp32
    theirs.clip_grad_by_total_norm_fp32 = clip_grad_by_total_norm_fp32

What is wrong in megatron-core 0.16 and right here: the inf-norm of a rank without gradients raises, and any p but 2 and
inf does on such a rank; a plain gradient after a DTensor loses the DTensor's group; in bfloat16 and float32 a step with
NaN is made; experts that overflow make only their own loss scale back off, while the loss goes on being multiplied by
the other, and without a distributed optimizer the ranks of other experts make the step that theirs leave out. Norm and
overflow are one reduction here, over all ranks.
"""

from .attachment import Attachment, attach, detach
from .drop_in import clip_grad_by_total_norm_fp32, get_grad_norm_fp32

__all__ = ["Attachment", "attach", "clip_grad_by_total_norm_fp32", "detach", "get_grad_norm_fp32"]
