"""Clip in the steps that torchft commits: with a manager that agrees, declines and heals, and with real faults."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import ArgumentError, GradClipper, NonFiniteError, Policy
from distclip.integrations.torchft import attach, detach
from tests.commands import output
from tests.integrations.one_process import SKIPPING
from tests.interpreter import forked_python
from tests.tables import policies

torchft = pytest.importorskip("torchft", reason="torchft is not installed: pip install torchft")

ROOT = Path(__file__).parents[3]


class Manager:
    """Manager of a replica that votes as a test wants, and heals in the vote, as torchft's does."""

    def __init__(self) -> None:
        self._user_state_dicts: dict[str, Callable[[], Any]] = {}
        self._load_state_dict_fns: dict[str, Callable[[Any], None]] = {}
        self._min_replica_size, self.num_replicas = 2, 3
        self.agrees, self.pending = True, None

    def register_state_dict_fn(self, key: str, load: Callable[[Any], None], state: Callable[[], Any]) -> None:
        self._load_state_dict_fns[key], self._user_state_dicts[key] = load, state

    def start_quorum(self) -> None:
        pass

    def num_participants(self) -> int:
        return self.num_replicas

    def should_commit(self) -> bool:
        if self.pending is not None:
            for key, load in self._load_state_dict_fns.items():
                load(self.pending[key])
            self.pending = None
        return self.agrees

    def state_dict(self) -> Any:
        return {key: state() for key, state in self._user_state_dicts.items()}


class Replica:
    """A replica with a model, a torchft optimizer and a policy."""

    def __init__(self, policy: Policy | GradClipper, seed: int = 0, **options: Any) -> None:
        torch.manual_seed(seed)
        self.model = nn.Linear(3, 2)
        self.manager = Manager()
        self.manager.register_state_dict_fn("default", self.load_state_dict, self.state_dict)
        self.inner = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.optimizer = torchft.Optimizer(self.manager, self.inner)
        self.attachment = attach(self.optimizer, policy, self.model, **options)

    def load_state_dict(self, state: Any) -> None:
        self.model.load_state_dict(state["model"])
        self.inner.load_state_dict(state["optimizer"])

    def state_dict(self) -> Any:
        state = {"model": self.model.state_dict(), "optimizer": self.inner.state_dict()}
        return torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state)

    def step(self, scale: float, agrees: bool = True) -> None:
        self.manager.agrees = agrees
        self.optimizer.zero_grad()
        for param, seed in zip(self.model.parameters(), (1, 2), strict=True):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)) * scale
        self.optimizer.step()

    def bits(self) -> str:
        return f"{torch.utils._pytree.tree_map(_exact, self.manager.state_dict())}"


def _exact(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


SCALES = [1.0, 4.0, 0.5, 2.0, 1.0, 3.0]


@pytest.mark.parametrize("row", policies.ADAPTIVE.values(), ids=policies.ADAPTIVE)
@pytest.mark.filterwarnings("ignore::distclip.FrequentClippingWarning", "ignore::UserWarning")
def test_steps_as_one_process(row: policies.PolicyRow) -> None:
    """Replicas whose steps were declined, or that healed, have the bits of one that always stepped."""
    assert row.small is not None
    whole, unlucky = Replica(row.small()), Replica(row.small())
    late = Replica(row.small(), seed=5)
    for i, scale in enumerate(SCALES):
        unlucky.step(100 * scale, agrees=False)
        if i == 3:
            # It heals in the vote of the step that it then takes part in.
            late.manager.pending = whole.manager.state_dict()
        for replica in (whole, unlucky, *([late] if i >= 3 else [])):
            replica.step(scale)
        assert unlucky.bits() == whole.bits()
        assert i < 3 or late.bits() == whole.bits()
    assert whole.attachment.clipper is not None
    assert whole.attachment.clipper.steps == len(SCALES)


@pytest.mark.parametrize("rule", ["skip", "raise"])
@pytest.mark.filterwarnings("ignore::distclip.NonFiniteWarning")
def test_nonfinite_on_one_rank(rule: Any) -> None:
    replica = Replica(distclip.ema(), on_nonfinite=rule)
    replica.step(1.0)
    before = replica.model.weight.tolist()
    if rule == "raise":
        with pytest.raises(NonFiniteError):
            replica.step(float("nan"))
    else:
        replica.step(float("nan"))
        assert replica.optimizer.distclip.report.as_dict()["skipped"]
    assert replica.model.weight.tolist() == before


def test_step_skipped_by_policy() -> None:
    replica = Replica(SKIPPING)
    for scale in (1.0, 1.1, 0.9, 1.0):
        replica.step(scale)
    before = replica.model.weight.tolist()
    replica.step(1000.0)
    assert replica.model.weight.tolist() == before


def test_checkpoint() -> None:
    whole, resumed = Replica(distclip.ema()), Replica(distclip.ema(), seed=3)
    for scale in SCALES:
        whole.step(scale)
    resumed.manager.pending = whole.manager.state_dict()
    for replica in (whole, resumed):
        replica.step(7.0)
    assert resumed.bits() == whole.bits()


def test_invalid_input() -> None:
    replica = Replica(distclip.ema())
    with pytest.raises(ArgumentError, match="has a policy already"):
        attach(replica.optimizer, distclip.ema(), replica.model)
    other = torchft.Optimizer(replica.manager, replica.inner)
    with pytest.raises(ArgumentError, match=r"key='distclip': the manager has a state .* Pass another key"):
        attach(other, distclip.ema(), replica.model)
    attach(other, distclip.ema(), replica.model, key="other")
    with pytest.raises(ArgumentError, match=r"not an optimizer of torchft. Pass torchft.Optimizer"):
        attach(replica.inner, distclip.ema())
    with pytest.raises(ArgumentError, match=r"policy=1\.0: expected a policy"):
        attach(torchft.Optimizer(Manager(), replica.inner), 1.0)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="take no closure"):
        replica.optimizer.step(lambda: None)


def test_detach() -> None:
    replica = Replica(distclip.global_norm(1e-6))
    detach(replica.optimizer)
    assert "step" not in vars(replica.optimizer)
    assert list(replica.manager.state_dict()) == ["default"]
    replica.step(1.0)


def test_warns_of_a_quorum_that_is_too_small() -> None:
    replica = Replica(distclip.ema())
    replica.manager.num_replicas = 1
    with pytest.warns(RuntimeWarning, match="quorum has 1 replica, and min_replica_size=2, so that no step is made"):
        replica.step(1.0, agrees=False)
    replica.step(1.0, agrees=False)


def test_finds_the_model_in_ddp() -> None:
    """torchft's DistributedDataParallel has a process group of one rank that torch.distributed does not have."""
    replica = Replica(distclip.ema())
    wrapped = torchft.DistributedDataParallel(replica.manager, nn.Linear(3, 2))
    assert isinstance(wrapped, DistributedDataParallel)
    optimizer = torchft.Optimizer(Manager(), torch.optim.SGD(wrapped.parameters()))
    assert attach(optimizer, distclip.per_tensor_norm(1.0), wrapped).clipper.parameters == ("weight", "bias")  # type: ignore[union-attr]


def test_random_faults() -> None:
    """Kill real replicas. The process ends itself, because torchft's threads outlive replicas that were killed."""
    command = [str(forked_python()), str(Path(__file__).with_name("kills.py")), "--faults", "4", "--seed", "2"]
    out = output(*command, cwd=ROOT, timeout=200, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert "4 faults" in out
    assert "0 steps after which replicas differed" in out
