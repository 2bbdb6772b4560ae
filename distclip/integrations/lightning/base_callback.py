"""Import Lightning's Callback from the package that the program uses: `lightning` or `pytorch_lightning`."""

from __future__ import annotations

import sys

# Each package has a class Callback, and its Trainer only accepts callbacks of that class.
if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        try:
            from pytorch_lightning import Callback
        except ModuleNotFoundError:
            raise ImportError(
                "GradientClipping: Lightning is not installed. Use pip install 'distclip[lightning]'."
            ) from None

__all__ = ["Callback"]
