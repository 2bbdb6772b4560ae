"""Skip the tests of a framework that is not installed, without importing one that is.

Every process collects all tests, and importing all frameworks takes it much longer than that.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

__all__ = ["skip_without"]


def skip_without(module: str, reason: str = "") -> None:
    """Skip the module that calls this if another module is not installed."""
    package = module.partition(".")[0]
    if find_spec(package) is None or find_spec(module) is None:
        pytest.skip(reason or f"{module} is not installed", allow_module_level=True)
