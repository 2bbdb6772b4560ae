"""Run the simulators of torch in separate processes, because they replace the default process group."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.interpreter import forked_python
from tests.testing import simulated_layouts


@pytest.mark.parametrize("num_ranks", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_local_tensor_mode(num_ranks: int) -> None:
    command = [str(forked_python()), "-W", "ignore", "-m", simulated_layouts.__name__, str(num_ranks)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.stdout.endswith("ok\n"), done.stderr
