"""Connect distclip to training frameworks. Only this package imports a framework, and no other part imports it.

Frameworks that clip inside their own code have `attach(thing, policy) -> Attachment`, which `detach(thing)` undoes:

- `deepspeed`: an engine, ZeRO stages 0 to 3.
- `megatron`: an optimizer of Megatron-core. Two drop-in functions replace only the norm and the clipping of Megatron.
- `accelerate`: an Accelerator.
- `transformers`: a Trainer.
- `keras`: an optimizer of Keras 3 on the torch backend.
- `torchft`: an optimizer of torchft.
- `torchtitan`: a Trainer.

Frameworks that offer a hook need no `attach`:

- `lightning`: a callback for the Trainer, a function for Fabric.
- `torchtitan`: a drop-in `clip_grad_norm_`, next to its `attach`.
- `mpi`: starts torch.distributed in an MPI job.
- `hydra`: registers the policies as a config group.

The integrations share three modules. `attachment` has the base class, `deferred` has a clipper that is bound once the
framework has wrapped the model, and `monkeypatch` replaces and restores methods.
"""
