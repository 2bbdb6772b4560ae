"""Clip the gradients of a DeepSpeed engine by any policy, inside `engine.step()`.

Start it with `torchrun --nproc-per-node 2 example.py`, or with `deepspeed example.py`. Without a launcher DeepSpeed
looks for MPI, and fails with "No module named 'mpi4py'".

::

    import deepspeed
    import torch
    from distclip import zclip
    from distclip.integrations.deepspeed import attach

    model = torch.nn.Linear(4, 2)
    config = {"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 2}}
    config["zero_allow_untested_optimizer"] = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    attachment = attach(engine, zclip(cap=1.0), on_nonfinite="skip")
    for x in torch.ones(2, 3, 4):
        engine.backward(engine(x).sum())
        engine.step()
        print(attachment.report.as_dict())

An engine keeps its gradients in buffers that depend on its optimizer. `adapter` has the interface that each kind of
optimizer implements: where the gradients are, when they are complete, and where the step reads its copies of them.

- `stage_0`: plain data parallelism in float32, or in float16 and bfloat16 with float32 copies.
- `stage_1_2`, `stage_3`: ZeRO.
- `bf16`: ZeRO stage 1 that accumulates bfloat16 gradients in float32.

`topology` reads the process groups, and `foreign` declares the private attributes of DeepSpeed that are used.

This integration fixes four errors of DeepSpeed 0.19:

- Norms of experts are averaged, although their squares must be added.
- Stage 0 in float32 takes a mean of norms, and steps with infinite gradients.
- Stage 0 in float16 divides by a loss scale that it never multiplied by.
- Stages 1 to 3 in float16 halve the update of a step at which the loss scale grows.
"""

from ..attachment import detach
from .attachment import Attachment, attach
from .native_clipping import config

__all__ = ["Attachment", "attach", "config", "detach"]
