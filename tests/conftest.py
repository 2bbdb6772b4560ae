"""One warm world per size for the whole run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.ranks import World, worlds

# Before anything imports Triton: where there is no GPU, its kernels run in an interpreter, on tensors of the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """`world(4)`: four gloo ranks that stay."""
    with worlds() as of:
        yield of
