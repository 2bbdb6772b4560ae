"""Run the stages of a call in order: shards, norms, policy, non-finite rule, gradients and optimizers.

`engine` has the steps of a clipper, and `measuring` the stages up to the sums over all ranks, which functions share.
The others are named after what an engine leaves to them:

- `setup`: what the ranks agree on before the first step.
- `arguments`: checks of what users pass.
- `calls`: comparison of the calls of all ranks.
- `execution`: gradients and optimizers, once the decision is made.
- `deferred`: host reads, and errors that one rank has alone, which come one step late.
- `stages`: a step cut in two at its all-reduce.
"""

from .engine import Engine
from .measuring import measure_all_ranks
from .stages import begin, run

__all__ = ["Engine", "begin", "measure_all_ranks", "run"]
