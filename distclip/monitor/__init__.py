"""Record the decisions of a clipper at every step, and analyze and show them.

`Recorder` writes one line per step and passes the numbers to sinks: `tensorboard`, `wandb`, `mlflow`, `trackio`, or any
function of a dictionary and a step. `Webhook` posts alerts. `per_sample` measures each sample's part of a gradient,
`UpdateRatio` how far a step moves the parameters, and `UpdateRms` whether Adam's second moments are too old. All of
these need only torch.

`analysis` draws conclusions from the lines of a run. `dashboard` and the command `distclip` (`report`, `suggest`,
`diagnose`, `blame`) show the conclusions. They need `distclip[report]`, and do not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alerts import Webhook
    from .recorder import Recorder
    from .sample_norms import per_sample
    from .sinks import Sink, mlflow, tensorboard, trackio, wandb
    from .update_ratio import UpdateRatio
    from .update_rms import UpdateRms

__all__ = [
    "Recorder",
    "Sink",
    "UpdateRatio",
    "UpdateRms",
    "Webhook",
    "mlflow",
    "per_sample",
    "tensorboard",
    "trackio",
    "wandb",
]

_MODULES = {
    "Recorder": "recorder",
    "UpdateRatio": "update_ratio",
    "UpdateRms": "update_rms",
    "Webhook": "alerts",
    "per_sample": "sample_norms",
}
"""Modules of public names. They are imported on first use, because they need torch.

All other names are in `sinks`.
"""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = vars(import_module(f".{_MODULES.get(name, 'sinks')}", __name__))[name]
    globals()[name] = value
    return value
