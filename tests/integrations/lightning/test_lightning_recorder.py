"""One argument, `on_bind=partial(Recorder, ...)`, gives a log with the loss and the learning rate."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import distclip
from distclip.monitor import Recorder
from tests.integrations.one_process import framework_environment
from tests.integrations.recorded import check_log, lr_of
from tests.ranks import on_ranks


@on_ranks(2, fixture="ranks")
def test_recorder_gets_loss_and_learning_rate(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from distclip.integrations.lightning import GradientClipping
    from tests.integrations.lightning.integration import build_loader, build_module, build_trainer

    with framework_environment():
        module = build_module(optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        losses: list[float] = []
        step = module.training_step

        def step_and_keep(batch: Any, batch_idx: int) -> Any:
            loss = step(batch, batch_idx)
            losses.append(float(loss))
            return loss

        module.training_step = step_and_keep
        module.on_train_batch_end = lambda *args: module.optimizers().param_groups[0].update(lr=lr_of(len(losses)))
        clipping = GradientClipping(distclip.global_norm(0.5), on_bind=partial(Recorder, directory=tmp_path, every=1))
        build_trainer("ddp", [clipping]).fit(module, build_loader())
        check_log(tmp_path, losses)
