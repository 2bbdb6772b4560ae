"""Who waits for a device, and who does not: on meta tensors, which no host can read and which mix with no others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distclip
from distclip import GradClipper, Policy
from distclip.monitor import Recorder

META = torch.device("meta")

POLICIES: dict[str, Callable[[], Policy]] = {
    "global_norm": lambda: distclip.global_norm(1.0),
    "inf-norm": lambda: distclip.global_norm(1.0, math.inf),
    "group_norm": lambda: distclip.group_norm({"first": ("^0", 2.0)}),
    "per_tensor_norm": lambda: distclip.per_tensor_norm(1.0),
    "value": lambda: distclip.value(0.1),
    "agc": lambda: distclip.agc(0.01),
    "autoclip": lambda: distclip.autoclip(10),
    "zclip": lambda: distclip.zclip(cap=1.0),
    "adagc": lambda: distclip.adagc(),
    "ema": lambda: distclip.ema(),
    "median_mad": lambda: distclip.median_mad(3.0, cap=2.0),
}


class TwoRanks:
    """Of which this is one: numbers stay on the device."""

    rank, size, ranks, device, covers_holders = 0, 2, None, META, True

    def sum_(self, tensor: Tensor) -> None:
        assert tensor.device == META
        tensor.mul_(2)

    def max_(self, tensor: Tensor) -> None:
        assert tensor.device == META

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, value]


alone_and_of_two = pytest.mark.parametrize("comm", [None, TwoRanks()], ids=["alone", "of two"])
each_policy = pytest.mark.parametrize("policy", POLICIES)


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(4, 3, device=META), nn.Linear(3, 2, dtype=torch.bfloat16, device=META))
    for param in made.parameters():
        param.grad = torch.empty_like(param)
    return made


class Fused(torch.optim.Optimizer):
    """Takes a factor, and whether to step at all, as torch's fused optimizers do."""

    _step_supports_amp_scaling = True
    grad_scale: Tensor
    found_inf: Tensor

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"fused": True})

    def step(self, closure: Any = None) -> None:
        assert self.found_inf.device == META


def go_on(clipper: GradClipper) -> None:
    """As if what the host has not read yet had come: nothing of interest."""
    clipper._judge._later = None


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Each time that a fact was asked of the device; the answer is yes. Asking for a number raises."""
    asked: list[int] = []
    real = Tensor.__bool__

    def answer(self: Tensor) -> bool:
        if self.device != META:
            return real(self)
        asked.append(1)
        return True

    monkeypatch.setattr(Tensor, "__bool__", answer)
    return asked


@alone_and_of_two
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, 0.5, 0.0, math.inf, -math.inf])
def test_functions_wait_for_nothing(reads: list[int], norm_type: float, comm: Any) -> None:
    parameters = list(model().parameters())
    norm = distclip.clip_grad_norm_(parameters, 1.0, norm_type, comm=comm)
    total = distclip.get_total_norm([p.grad for p in parameters], norm_type, comm=comm)
    distclip.clip_grads_with_norm_(parameters, 1.0, total)
    distclip.clip_grad_value_(parameters, 0.1)
    assert norm.device == total.device == META
    assert not reads


@alone_and_of_two
@each_policy
def test_a_clipper_that_propagates_waits_for_nothing(reads: list[int], policy: str, comm: Any) -> None:
    clipper = GradClipper(model(), POLICIES[policy](), on_nonfinite="propagate", comm=comm)
    for _ in range(2):
        go_on(clipper)
        report = clipper.clip()
        values = [getattr(report, field.name) for field in fields(report)]
        assert {value.device for value in values if value is not None} == {META}
    assert not reads


@alone_and_of_two
@each_policy
@pytest.mark.parametrize("on_nonfinite", ["skip", "raise", "zero"])
def test_a_clipper_asks_once_whether_all_is_finite(reads: list[int], policy: str, on_nonfinite: Any, comm: Any) -> None:
    clipper = GradClipper(model(), POLICIES[policy](), on_nonfinite=on_nonfinite, comm=comm)
    clipper.clip()
    assert len(reads) == 1


@pytest.mark.parametrize("scaled", [False, True])
@alone_and_of_two
@each_policy
@pytest.mark.parametrize("fused", [True, False])
def test_a_fused_step_waits_for_nothing_and_others_ask_once(
    reads: list[int], fused: bool, policy: str, comm: Any, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, scaler = model(), None
    clipper = GradClipper(net, POLICIES[policy](), comm=comm)
    optimizer = Fused(net.parameters()) if fused else torch.optim.SGD(net.parameters(), lr=0.1)
    if scaled:
        # The scale itself is read once, when the ranks compare theirs.
        monkeypatch.setattr(GradScaler, "get_scale", lambda self: 65536.0)
        scaler = GradScaler("meta")
        scaler.scale(torch.empty((), device=META))
    assert clipper.step(optimizer, scaler).skipped.device == META
    assert len(reads) == (not fused)


class Travels(TorchDispatchMode):
    """Operators that take something from the host to the device, for which a host may have to wait too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = ({t.device for t in tree_leaves(x) if isinstance(t, Tensor)} for x in ((args, kwargs), out))
        if torch.device("cpu") in given and META in given | made:
            self.seen.append(str(func))
        return out


@alone_and_of_two
@each_policy
@pytest.mark.usefixtures("reads")
def test_constants_and_memory_travel_once(policy: str, comm: Any) -> None:
    net = model()
    clipper, optimizer = GradClipper(net, POLICIES[policy](), comm=comm), Fused(net.parameters())
    clipper.measure_tensors()
    clipper.step(optimizer)
    go_on(clipper)
    with Travels() as travels:
        clipper.step(optimizer)
    assert travels.seen == []


def test_a_recorder_waits_for_nothing_between_its_writes(reads: list[int], tmp_path: Path) -> None:
    net = model()
    clipper, optimizer = GradClipper(net, distclip.zclip(cap=1.0)), Fused(net.parameters())
    recorder = Recorder(clipper, tmp_path, every=100, per_tensor=True)
    for step in range(3):
        go_on(clipper)
        assert clipper.step(optimizer).tensor_norms is not None
        recorder.note(loss=torch.empty((), device=META), ids=[step])
    assert not reads
    with pytest.raises(RuntimeError, match="meta"):
        recorder.flush()
