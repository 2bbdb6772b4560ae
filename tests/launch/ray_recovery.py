"""Train on two ranks of Ray Train, fail once, and go on from Ray's checkpoint: `python ray_recovery.py FOLDER`.

The first step of the second attempt and the coefficients of all steps are in FOLDER/result.json afterwards.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distclip

NUM_STEPS = 8
FAILING_STEP = 5


def build() -> tuple[nn.Module, distclip.NormPolicy]:
    """Build the model and its policy."""
    torch.manual_seed(0)
    return nn.Linear(4, 1), distclip.zclip(cap=50.0, warmup=2)


def loss_of(model: nn.Module, step: int, ranks: list[int]) -> Tensor:
    """Return the loss on the samples of some ranks. The gradient of step 6 is an outlier."""
    inputs = [torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * step + rank)) for rank in ranks]
    loss: Tensor = (model(torch.cat(inputs)) * (20.0 if step == 6 else 1.0)).square().mean()
    return loss


def train(config: dict[str, Any]) -> None:
    """Train on one rank. Rank 0 reports a checkpoint with the policy's state before the failure."""
    from ray.train import Checkpoint, get_checkpoint, get_context, report

    model, policy = build()
    model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clipper = distclip.GradClipper(model, policy)
    rank, first, coefs = get_context().get_world_rank(), 0, []
    if checkpoint := get_checkpoint():
        with checkpoint.as_directory() as saved:
            state = torch.load(Path(saved) / "state.pt", weights_only=True)
        first, coefs = state["step"], state["coefs"]
        model.load_state_dict(state["model"])
        clipper.load_state_dict(state["clipper"])
    for step in range(first, NUM_STEPS):
        if step == FAILING_STEP and first == 0:
            with tempfile.TemporaryDirectory() as new:
                state = {"step": step, "coefs": coefs, "model": model.state_dict(), "clipper": clipper.state_dict()}
                torch.save(state, Path(new) / "state.pt")
                report({"step": step}, checkpoint=Checkpoint.from_directory(new) if rank == 0 else None)
            raise RuntimeError("preempted")
        loss_of(model, step, [rank]).backward()
        coefs.append(float(clipper.step(optimizer).coef))
        optimizer.zero_grad()
    if rank == 0:
        (Path(config["folder"]) / "result.json").write_text(json.dumps([first, coefs]))


def main(folder: str) -> None:
    """Train on the ranks of Ray."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(num_cpus=2, include_dashboard=False)
    TorchTrainer(
        train,
        train_loop_config={"folder": folder},
        scaling_config=ScalingConfig(num_workers=2),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(name="run", storage_path=folder, failure_config=FailureConfig(max_failures=1)),
    ).fit()


if __name__ == "__main__":
    main(sys.argv[1])
