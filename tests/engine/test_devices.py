"""Facts that the host may not have read, and constants on devices."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import distclip
from distclip import devices
from distclip.devices import Fact, device_constant

KINDS = ["host", "device"]


def fact(value: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> Fact:
    """Return a fact that the host has read, or one that it has not."""
    with monkeypatch.context() as accelerator:
        accelerator.setattr(devices, "host_reads_free", lambda _: kind == "host")
        made = Fact(torch.tensor(value))
    assert made.host is (value if kind == "host" else None)
    return made


@pytest.mark.parametrize(("one_kind", "other_kind"), list(itertools.product(KINDS, KINDS)))
def test_facts_combine_like_bools(one_kind: str, other_kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for one, other in itertools.product([True, False], [True, False]):
        left, right = fact(one, one_kind, monkeypatch), fact(other, other_kind, monkeypatch)
        assert (left & right).read() is (one and other)
        assert (left | right).read() is (one or other)
        assert (~left).read() is (not one)
        assert bool((left & right).on(torch.device("cpu"))) is (one and other)
        selected = left.select(torch.tensor(1.0), torch.tensor(2.0))
        assert float(selected) == (1.0 if one else 2.0)


def test_unread_fact_stays_unread_until_read(monkeypatch: pytest.MonkeyPatch) -> None:
    unread = fact(True, "device", monkeypatch)
    assert (unread & Fact(True)).host is None
    assert (unread & Fact(False)).host is False
    assert unread.read() is True
    assert unread.host is True


def test_fact_refuses_implicit_bool() -> None:
    with pytest.raises(TypeError, match=r"read\(\)"):
        bool(Fact(True))


def test_constant_made_under_fake_tensor_mode_is_not_kept() -> None:
    numbers = (0.25, 0.5, 17.0)
    with FakeTensorMode():
        assert type(device_constant(numbers, torch.device("cpu"))) is not torch.Tensor
    again = device_constant(numbers, torch.device("cpu"))
    assert type(again) is torch.Tensor
    assert again.tolist() == list(numbers)
    assert device_constant(numbers, torch.device("cpu")) is again, "a real constant is made once"


POLICIES: dict[str, Any] = {
    "group_norm": lambda: distclip.group_norm({"head": ("head", 0.5)}, 1.0),
    "per_tensor_norm": lambda: distclip.per_tensor_norm(1.0),
    "agc": lambda: distclip.agc(0.01),
    "adagc": lambda: distclip.adagc(),
}


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_fake_run_leaves_later_real_runs_alone(policy: str) -> None:
    """Run a step on fake tensors, as memory estimation does, which no cache may keep."""

    def clip() -> float:
        model = torch.nn.ModuleDict({"head": torch.nn.Linear(3, 2), "body": torch.nn.Linear(2, 3)})
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        return float(distclip.GradClipper(model, POLICIES[policy]()).clip().norm)

    with FakeTensorMode():
        try:
            clip()
        except Exception as error:
            # Reading a fake number on the host fails, as it should: the point is what comes afterwards.
            assert "fake" in str(error).lower() or "DataDependent" in type(error).__name__  # noqa: PT017
    assert clip() == pytest.approx(17**0.5)
