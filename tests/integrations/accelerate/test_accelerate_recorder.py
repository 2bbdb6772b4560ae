"""One argument, `on_bind=partial(Recorder, ...)`, gives a log with the loss and the learning rate."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

import distclip
from distclip.monitor import Recorder
from tests.integrations.one_process import framework_environment, mse
from tests.integrations.recorded import check_log
from tests.ranks import on_ranks


@on_ranks(2, fixture="ranks")
def test_recorder_gets_loss_and_learning_rate(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from distclip.integrations.accelerate import attach
    from tests.integrations.accelerate.integration import build_accelerator, prepare

    with framework_environment():
        accelerator = build_accelerator("ddp", num_micro_batches=2)
        attach(accelerator, distclip.global_norm(0.5), on_bind=partial(Recorder, directory=tmp_path, every=1))
        model, optimizer, loader = prepare(accelerator, 2, lambda params: torch.optim.SGD(params, lr=0.1))
        losses = []
        for x, y in loader:
            with accelerator.accumulate(model):
                losses.append(loss := mse(model(x), y))
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    optimizer.param_groups[0]["lr"] *= 0.5
        check_log(tmp_path, [float(loss) for loss in losses], num_micro_batches=2)
