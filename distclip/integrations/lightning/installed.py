"""Lightning's Callback, out of the package that the program uses: `lightning`, or `pytorch_lightning` alone."""

from __future__ import annotations

import sys

if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        from pytorch_lightning import Callback

__all__ = ["Callback"]
