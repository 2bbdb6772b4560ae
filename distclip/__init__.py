"""Clip gradients correctly when a model is spread over many processes.

::

    gradients ─▶ sharding ────▶ norms ────────────────────────▶ policies ─▶ nonfinite ──▶ apply
                 Shards         Partials       Totals           Verdict     Outcome       gradients
                 which rank     Σ|g|^p of the  ONE all-reduce,  norms to    skip, zero,   scale, step
                 has what       local shards   same bits        coefs       or raise      or skip

    comm          torch.distributed, MPI, one process       devices    differences between devices
    engine        one step, all stages in order             outcome    Outcome, and Report for the user
    functional    torch's four functions                    clipper    GradClipper: step, clip, attach
    recipes       published recipes, as policies
    checkpoint    state of a policy by slot name            extend     building blocks for integrations
    auditing      audit: prove that a layout counts right   monitor    record and explain runs
    integrations  DeepSpeed, Megatron, Lightning, …         bench      speed against torch
    reference     the oracle of the tests

A gradient of the model is spread over many processes. Some processes have different shards of it, others have replicas
of the same shard. Clipping is right only if every element counts exactly once and every process applies the same
coefficient. A package imports only from packages to its left, and `engine` is the only one that uses all stages.

Glossary:

- **rank**, **mesh**, **placements**, **world size**: as in torch.distributed. An *axis* belongs to a mesh, a *dim* to a
  tensor.
- **shard**: one rank's part of a gradient. **Replicas** are the ranks that have the same shard.
- **layout**: the ranks that a parameter spans, and the number of its shards on them.
- **partial gradient**: a gradient in Partial placement, which must be summed over a mesh axis first.
- **power sum**: Σ|g|^p, which can be added over ranks. A **norm** is its p-th root.
- **slot**: an element of the vector of norms: the model, a group of parameters, a parameter, or a row.
- **bound**: the largest norm that a policy allows, `max_norm` if it is fixed. **Limits** bound elements instead.
- **coefficient** (`coef`): factor of a gradient, ≤ 1 unless a policy scales small norms up.
- **verdict**: what a policy decides about the totals. **Outcome**: what happens to the gradients of a step.
- **skip**: leave parameters, optimizer and policy state unchanged in a step.
- **non-finite**: NaN or Inf. **found_inf** is GradScaler's flag for it, **loss scale** the factor of its gradients.
- **all-reduce**, **gather**: collectives that every rank of a communicator enters.
- **host sync**: a wait of the host for the accelerator.
- **fact**: a bool that all ranks share, and that the host may not have read yet.
- **rendezvous**: how ranks find each other through the store of torch.distributed before the first collective.
- A trailing underscore marks a function that changes its argument.
"""

import importlib.util
import typing

from ._version import __version__ as __version__

if typing.TYPE_CHECKING:
    from ._public import *  # noqa: F403
    from ._public import __all__ as __all__
    from ._public import recipes as recipes  # a module, and so not in __all__
    from .policies import *  # noqa: F403
else:

    def __getattr__(name: str) -> typing.Any:
        """Import torch and the public names at the first use of a public name.

        The command `distclip` needs neither, and starts at once.
        """
        module = f"{__name__}.{name}"
        # The import system looks up a submodule in this way, possibly during the import of another one.
        if name != "__all__" and importlib.util.find_spec(module) is not None:
            return importlib.import_module(module)
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = importlib.import_module("._public", __name__)
        globals().update({each: vars(public)[each] for each in public.__all__}, __all__=public.__all__)
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__() -> list[str]:
        modules = ("errors", "extend", "integrations", "monitor", "policies", "recipes", "reference", "testing")
        own = (name for name in globals() if name.startswith("__") and name.endswith("__"))
        return sorted({*own, *modules, *__getattr__("__all__")})
