"""Where distclip meets other programs: the only folder that may import a framework, and nothing imports it.

`deepspeed`: `attach` a policy to an engine, from ZeRO stage 0 to 3. `mpi`: torch.distributed inside of an MPI job.
`lightning`: a callback for the Trainer, a line for Fabric. `accelerate`, `transformers`: `patch` an Accelerator, a
Trainer. `megatron`: `attach` a policy to an optimizer of Megatron-core, or its two functions replaced. `torchtitan`:
its `clip_grad_norm_`. `hydra`: policies as a config group of any app. `late`, `patches`: what several of them need.
"""
