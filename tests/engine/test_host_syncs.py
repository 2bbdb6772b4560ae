"""Count host syncs on meta tensors, which no host can read and which mix with no other tensors."""

from __future__ import annotations

import math
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
from distclip import GradClipper
from distclip.engine.calls import Calls
from distclip.monitor import Recorder
from tests.tables.policies import POLICIES

META = torch.device("meta")

MAKERS = {name: row.make for name, row in POLICIES.items() if not row.needs_optimizer}
MAKERS["inf-norm"] = lambda: distclip.global_norm(1.0, math.inf)


class TwoRanks:
    """A communicator of two ranks that keeps numbers on the device."""

    rank, size, ranks, device, covers_holders = 0, 2, None, META, True

    def sum_(self, tensor: Tensor) -> None:
        assert tensor.device == META
        tensor.mul_(2)

    def max_(self, tensor: Tensor) -> None:
        assert tensor.device == META

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, value]


each_comm = pytest.mark.parametrize("comm", [None, TwoRanks()], ids=["one rank", "two ranks"])
each_policy = pytest.mark.parametrize("policy", MAKERS)


def make_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3, device=META), nn.Linear(3, 2, dtype=torch.bfloat16, device=META))
    for param in model.parameters():
        param.grad = torch.empty_like(param)
    return model


class Fused(torch.optim.Optimizer):
    """An optimizer that takes `grad_scale` and `found_inf`, as torch's fused ones do."""

    _step_supports_amp_scaling = True
    grad_scale: Tensor
    found_inf: Tensor

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"fused": True})

    def step(self, closure: Any = None) -> None:
        assert self.found_inf.device == META


@pytest.fixture(autouse=True)
def agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what reads numbers before the first step: the check before a gather, and the exchange of texts."""
    monkeypatch.setattr(Calls, "agree", lambda self, function, errors: None)
    monkeypatch.setattr("distclip.comm.distinct._reduced", lambda comm, operation, values: values)


def drop_deferred_reads(clipper: GradClipper) -> None:
    """Drop the host reads that are due, as if they had found nothing."""
    clipper._engine.deferred.unread = None


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record each bool that the host reads from the device, which is True. Reading a number raises."""
    bools: list[int] = []
    real = Tensor.__bool__

    def answer(self: Tensor) -> bool:
        if self.device != META:
            return real(self)
        bools.append(1)
        return True

    monkeypatch.setattr(Tensor, "__bool__", answer)
    return bools


@each_comm
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, 0.5, 0.0, math.inf, -math.inf])
def test_functions_have_no_host_sync(reads: list[int], norm_type: float, comm: Any) -> None:
    parameters = list(make_model().parameters())
    norm = distclip.clip_grad_norm_(parameters, 1.0, norm_type, comm=comm)
    total = distclip.get_total_norm([p.grad for p in parameters], norm_type, comm=comm)
    distclip.clip_grads_with_norm_(parameters, 1.0, total)
    distclip.clip_grad_value_(parameters, 0.1)
    assert norm.device == total.device == META
    assert not reads


@each_comm
@each_policy
def test_propagating_clipper_has_no_host_sync(reads: list[int], policy: str, comm: Any) -> None:
    clipper = GradClipper(make_model(), MAKERS[policy](), on_nonfinite="propagate", comm=comm, replicas="warn")
    for _ in range(2):
        drop_deferred_reads(clipper)
        report = clipper.clip()
        values = [getattr(report, field.name) for field in fields(report)]
        assert {value.device for value in values if value is not None} == {META}
    assert not reads


@each_comm
@each_policy
@pytest.mark.parametrize("on_nonfinite", ["skip", "raise", "zero"])
def test_other_clippers_have_one_host_sync(reads: list[int], policy: str, on_nonfinite: Any, comm: Any) -> None:
    clipper = GradClipper(make_model(), MAKERS[policy](), on_nonfinite=on_nonfinite, comm=comm, replicas="warn")
    clipper.clip()
    assert len(reads) == 1


@pytest.mark.parametrize("scaled", [False, True])
@each_comm
@each_policy
@pytest.mark.parametrize("fused", [True, False])
def test_fused_step_has_no_host_sync_and_others_have_one(
    reads: list[int], fused: bool, policy: str, comm: Any, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, scaler = make_model(), None
    clipper = GradClipper(net, MAKERS[policy](), comm=comm, replicas="warn")
    optimizer = Fused(net.parameters()) if fused else torch.optim.SGD(net.parameters(), lr=0.1)
    if scaled:
        # The scale is read once, when the ranks compare their scales.
        monkeypatch.setattr(GradScaler, "get_scale", lambda self: 65536.0)
        scaler = GradScaler("meta")
        scaler.scale(torch.empty((), device=META))
    assert clipper.step(optimizer, scaler).skipped.device == META
    assert len(reads) == (not fused)


class HostToDevice(TorchDispatchMode):
    """Record operators that copy from the host to the device, for which a host may wait too."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs, outputs = ({t.device for t in tree_leaves(x) if isinstance(t, Tensor)} for x in ((args, kwargs), out))
        if torch.device("cpu") in inputs and META in inputs | outputs:
            self.operators.append(str(func))
        return out


@each_comm
@each_policy
@pytest.mark.usefixtures("reads")
def test_constants_and_state_are_copied_once(policy: str, comm: Any) -> None:
    net = make_model()
    clipper, optimizer = GradClipper(net, MAKERS[policy](), comm=comm, replicas="warn"), Fused(net.parameters())
    clipper.measure_tensors()
    clipper.step(optimizer)
    drop_deferred_reads(clipper)
    with HostToDevice() as copies:
        clipper.step(optimizer)
    assert copies.operators == []


def test_recorder_has_no_host_sync_between_writes(reads: list[int], tmp_path: Path) -> None:
    net = make_model()
    clipper, optimizer = GradClipper(net, distclip.zclip(cap=1.0), replicas="warn"), Fused(net.parameters())
    recorder = Recorder(clipper, tmp_path, every=100, per_tensor=True)
    for step in range(3):
        drop_deferred_reads(clipper)
        assert clipper.step(optimizer).tensor_norms is not None
        recorder.note(loss=torch.zeros(()), ids=[step])
    assert not reads
    with pytest.raises(RuntimeError, match="meta"):
        recorder.flush()
