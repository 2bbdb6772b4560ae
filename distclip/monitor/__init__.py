"""Record the decisions of a clipper at every step, for people to look at.

`Recorder` writes one line per step and passes the numbers to sinks: `tensorboard`, `wandb`, `mlflow`, `trackio`, or any
function of a dictionary and a step. `UpdateRatio` measures how far a step moves the parameters. Both need only torch.
`analysis` draws conclusions from the lines of a run. `dashboard` and the command `distclip` (`report`, `suggest`,
`diagnose`, `blame`) show them. These need `distclip[report]`.
"""

from .recorder import Recorder
from .sinks import Sink, mlflow, tensorboard, trackio, wandb
from .update_ratio import UpdateRatio

__all__ = ["Recorder", "Sink", "UpdateRatio", "mlflow", "tensorboard", "trackio", "wandb"]
