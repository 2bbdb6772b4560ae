"""Run as on a device without float64, such as Apple's GPUs: no operator may use it, and norms are as precise."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distclip
from distclip import devices, reference
from distclip.norms.kernels import native, torch_ops
from tests.tables.policies import POLICIES

FORBIDDEN = (torch.float64, torch.complex128)


class NoFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raise if an operator reads or writes float64 tensors with elements."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not isinstance(leaf, Tensor) or leaf.dtype not in FORBIDDEN, f"{func} uses float64"
        return result


@pytest.fixture(autouse=True)
def _no_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(devices, "has_float64", lambda device: False)
    real = devices.host_reads_free
    for module in [module for name, module in sys.modules.items() if name.startswith("distclip")]:
        if vars(module).get("host_reads_free") is real:
            monkeypatch.setattr(module, "host_reads_free", lambda device: False)
    monkeypatch.setattr(native, "load_library", lambda: None)
    with NoFloat64():
        yield


GRADIENTS: dict[str, Tensor] = {
    "positive": torch.rand(1 << 22, generator=torch.Generator().manual_seed(0)),
    "equal": torch.full((1 << 20,), 0.1),
    "one": torch.tensor([3.0]),
    "empty": torch.zeros(0),
    "fp16 of 3000": torch.full((70_000,), 3000.0, dtype=torch.float16),
    "bf16": torch.rand(70_001, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "large": torch.full((70_000,), 1e16),
    "small": torch.full((70_000,), 1e-17),
    "strided": torch.rand(300, 70, generator=torch.Generator().manual_seed(0))[:, ::3],
}


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_norm_is_as_precise(name: str, norm_type: float) -> None:
    grad = GRADIENTS[name]
    param = nn.Parameter(torch.zeros_like(grad))
    param.grad = grad.clone()
    norm = distclip.clip_grad_norm_([param], 1e-3, norm_type)
    # torch's ε, 1e-6, is added to the norm.
    assert norm.dtype == torch.float32
    with torch.utils._python_dispatch._disable_current_modes():
        expected = float(reference.total_norm([grad], norm_type))
        assert float(norm) == pytest.approx(expected, rel=1e-6, abs=0)
        clipped = float(reference.total_norm([param.grad], norm_type))
    # Half-precision elements are rounded, and the small ones to subnormal numbers.
    assert grad.dtype != torch.float32 or clipped == pytest.approx(min(1e-3, expected), rel=2e-5, abs=0)


def test_rows_are_as_precise() -> None:
    grad = torch.rand(5, 30_000)
    found = torch_ops.row_powers(grad, distclip.sharding.shard.Rows(0, 5), 2.0)
    with torch.utils._python_dispatch._disable_current_modes():
        torch.testing.assert_close(found.double(), grad.double().square().sum(1), rtol=5e-7, atol=0)


def test_infinity_and_nan_stay() -> None:
    for bad in (math.inf, math.nan):
        found = torch_ops.power_sum(torch.ones(5000).index_fill_(0, torch.tensor([77]), bad), 2.0)
        assert repr(float(found)) == repr(bad)


@pytest.mark.filterwarnings("ignore::distclip.NonFiniteWarning")
@pytest.mark.parametrize("name", POLICIES)
def test_policies_need_no_float64(name: str) -> None:
    """Take steps with every policy, one of which is skipped, and pass the state through a checkpoint."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    clipper = distclip.GradClipper(model, POLICIES[name].make(), on_nonfinite="skip")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for step in range(5):
        model(torch.ones(1, 4) * (math.nan if step == 3 else 1.0)).sum().backward()
        clipper.step(optimizer)
        optimizer.zero_grad()
    assert clipper.skipped == 1
