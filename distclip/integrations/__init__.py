"""Connect distclip to training frameworks. Only this package imports a framework, and no other part imports it.

Every integration has one verb, `attach(thing, policy) -> Attachment`, and its inverse `detach(thing)`:

- `deepspeed`: an engine, ZeRO stages 0 to 3.
- `megatron`: an optimizer of Megatron-core. Two drop-in functions replace Megatron's norm and clipping alone.
- `accelerate`: an Accelerator.
- `transformers`: a Trainer.

Frameworks that offer a hook need no `attach`:

- `lightning`: a callback for the Trainer, a function for Fabric.
- `torchtitan`: a drop-in `clip_grad_norm_`.
- `mpi`: starts torch.distributed in an MPI job.
- `hydra`: registers the policies as a config group.

An integration is built from three modules. `attachment` has the base class, `deferred` a clipper that is bound when the
framework has wrapped the model, and `monkeypatch` replaces methods and restores them.
"""
