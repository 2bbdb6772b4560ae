"""Run the stages of a call in order: shards, norms, policy, non-finite rule, gradients and optimizers.

`engine` has the steps of a clipper. `measuring` has the stages up to the sums over all ranks, which the functions
share. The other modules do parts of the engine's work:

- `setup`: facts that the ranks agree on before the first step.
- `arguments`: checks of what users pass.
- `calls`: comparison of the calls of all ranks.
- `execution`: writes to gradients and steps of optimizers, once the decision is made.
- `deferred`: host reads and errors of a single rank, both of which come one step late.
- `stages`: a step split in two at its all-reduce.
"""

from .engine import Engine
from .measuring import measure_all_ranks
from .stages import begin, run

__all__ = ["Engine", "begin", "measure_all_ranks", "run"]
