"""Run the stages of a call in order: shards, norms, policy, non-finite rule, gradients and optimizers.

`engine` has the steps of a clipper, `measuring` the stages up to the sums over all ranks, which functions share, and
`stages` cuts a step in two at its all-reduce. `arguments` checks what users pass, and `deferred` counts steps whose
numbers the host reads one step late.
"""

from .engine import Engine
from .measuring import measure_all_ranks
from .stages import begin, run

__all__ = ["Engine", "begin", "measure_all_ranks", "run"]
