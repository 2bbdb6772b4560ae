"""torchtitan's Trainer with its debug model on CPUs, clipped without an edited file."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distclip
from distclip import ArgumentError
from distclip.integrations.torchtitan import attach, clipped, detach
from tests.integrations.one_process import bitwise_equal
from tests.ranks import World

MISSING = [name for name in ("torchtitan", "torchdata", "datasets", "typeguard") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore the warnings of torchtitan's imports and of its use of torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(config: Any, before: Callable[[Any], object] = lambda trainer: None) -> Any:
    """Train, and return the Trainer with its parameters as `params`, and `norms` as it logged them."""
    from torchtitan.components.metrics import MetricsProcessor

    from tests.integrations.torchtitan.debug_model import use_cpus

    use_cpus()
    norms, metrics = [], []

    def record(processor: Any, step: int, loss: float, max_loss: float, norm: float, extra_metrics: Any) -> None:
        norms.append(norm)
        metrics.append(extra_metrics)

    with mock.patch.object(MetricsProcessor, "log", record), mock.patch.object(time, "sleep"):
        trainer = config.build()
        before(trainer)
        trainer.train()
        trainer.close()
    trainer.norms, trainer.metrics = norms, metrics
    trainer.params = {n: p.full_tensor().detach() for part in trainer.model_parts for n, p in part.named_parameters()}
    return trainer


@quiet()
def train_all(folder: str) -> None:
    """Make four runs on tensor-parallel ranks."""
    from tests.integrations.torchtitan.debug_model import debug_config

    os.environ["LOCAL_RANK"] = str(dist.get_rank())

    def config(name: str, steps: int) -> Any:
        one = debug_config(os.path.join(folder, name), steps, max_norm=0.5)
        one.parallelism.tensor_parallel_degree = 2
        return one

    # A fixed norm is what torchtitan does. Its norm in fp32 has an error of 3e-5.
    own, same = run(config("own", 2)), run(clipped(config("same", 2), distclip.global_norm(0.5)))
    assert own.norms == pytest.approx(same.norms, rel=1e-3)
    assert min(own.norms) > 0.5
    torch.testing.assert_close(own.params, same.params, rtol=1e-3, atol=1e-4)
    assert [entry["distclip/coef"] for entry in same.metrics] == pytest.approx([0.5 / norm for norm in same.norms])
    # A run that is resumed goes on with the same bits, and with the policy's state.
    policy = distclip.zclip(cap=0.5, warmup=1)
    runs = []
    for load_step in (-1, 1):
        one = clipped(config("resumed", 3), policy)
        one.checkpoint.enable, one.checkpoint.interval, one.checkpoint.load_step = True, 1, load_step
        runs.append(run(one))
    uninterrupted, resumed = runs
    assert resumed.norms == uninterrupted.norms[1:]
    assert bitwise_equal(resumed.params, uninterrupted.params)
    states = [trainer.distclip.state_dict() for trainer in runs]
    assert [int(state["counts"]["steps"]) for state in states] == [3, 3]
    assert bitwise_equal(*states)


@quiet()
def skip_a_step(folder: str) -> None:
    """Put a NaN into the gradient of one rank in the second step. All ranks skip it."""
    from tests.integrations.torchtitan.debug_model import debug_config

    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    seen: dict[int, Any] = {}

    def poison(trainer: Any) -> None:
        step = trainer.forward_backward_step

        def forward_backward_step(**kwargs: Any) -> Tensor:
            loss: Tensor = step(**kwargs)
            params = list(trainer.model_parts[0].parameters())
            seen[trainer.step] = params, [param.grad for param in params], [p.to_local().clone() for p in params]
            if trainer.step == 2 and dist.get_rank() == 1:
                params[0].grad.to_local().view(-1)[0] = float("nan")
            return loss

        trainer.forward_backward_step = forward_backward_step

    config = clipped(debug_config(folder, 3), distclip.global_norm(0.5))
    # gloo cannot reduce FSDP2's gradients as torchtitan divides them.
    config.parallelism.tensor_parallel_degree = 2
    config.training.disable_cuda_graphs = False
    trainer = run(config, poison)
    assert trainer.distclip.clipper.skipped == 1
    assert [entry["distclip/skipped"] for entry in trainer.metrics] == [0, 1, 1]
    # The skipped step has changed nothing, and a CUDA graph would find the same gradient buffers.
    assert all(map(torch.equal, seen[2][2], seen[3][2]))
    assert not all(map(torch.equal, seen[1][2], seen[2][2]))
    assert all(one is other for one, other in zip(seen[2][1], seen[3][1], strict=True))
    detach(trainer)
    assert not hasattr(trainer, "distclip")
    with pytest.raises(ArgumentError, match="nothing is attached"):
        detach(trainer)


def test_debug_model(isolated_ranks: Callable[[int], World], tmp_path: Path) -> None:
    isolated_ranks(2).run(train_all, folder=str(tmp_path))


def test_skipped_step(isolated_ranks: Callable[[int], World], tmp_path: Path) -> None:
    isolated_ranks(2).run(skip_a_step, folder=str(tmp_path))


def test_invalid_input() -> None:
    policy: Any = distclip.global_norm(1.0)
    with pytest.raises(ArgumentError, match="not a Trainer of torchtitan"):
        attach(torch.nn.Linear(1, 1), policy)
    with pytest.raises(ArgumentError, match="not the config of a torchtitan Trainer"):
        clipped(policy, policy)
    with pytest.raises(ArgumentError, match="expected a policy"):
        clipped(policy, 1.0)  # type: ignore[arg-type]
