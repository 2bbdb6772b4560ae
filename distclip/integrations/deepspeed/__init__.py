"""DeepSpeed: its engine steps as ever, with distclip's norm, policy and decision in place of its own clipping.

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
    attached = attach(engine, zclip(cap=1.0), on_nonfinite="skip")
    for x in torch.ones(2, 3, 4):
        engine.backward(engine(x).sum())
        engine.step()
        print(attached.report.as_dict())

An engine keeps its gradients in places of its own. One module for each kind of its optimizers knows where they are,
when they are complete, and where the copies lie that the step will take (`holds`): `stage_0` (plain data parallelism in
float32, or with float32 copies of float16 and bfloat16), `stage_1_2`, `bf16` (stage 1 that accumulates bfloat16 in
float32), `stage_3`. `ranks` has the process groups.

What is wrong in DeepSpeed 0.19 and right here: norms of experts are averaged instead of added in squares; stage 0 in
float32 takes a mean of norms and steps with infinite gradients; stage 0 in float16 divides by a loss scale that it
never multiplied with; stages 1 to 3 in float16 halve the update of a step at which the loss scale grows.
"""

from .attachment import Attachment, attach, detach
from .config_file import config

__all__ = ["Attachment", "attach", "config", "detach"]
