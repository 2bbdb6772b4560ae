"""Watching a clipper: what it saw and did at every step, kept for people to look at.

`Recorder` writes a line a step, and tells sinks: `tensorboard`, `wandb`, `mlflow`, `trackio`, or any function of a
dictionary and a step; `UpdateRatio` measures what else may be noted of it. They need nothing but torch. What the lines
say of a run is worked out by `analysis`, shown by `page` and the command `distclip` (`report`, `suggest`, `diagnose`,
`blame`), which need `distclip[report]`.
"""

from .recorder import Recorder
from .sinks import Sink, mlflow, tensorboard, trackio, wandb
from .update_ratio import UpdateRatio

__all__ = ["Recorder", "Sink", "UpdateRatio", "mlflow", "tensorboard", "trackio", "wandb"]
