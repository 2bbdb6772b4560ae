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
from tests.integrations.recorded import check_log
from tests.ranks import on_ranks


@on_ranks(2, fixture="ranks")
def test_recorder_gets_loss_and_learning_rate(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from distclip.integrations.transformers import attach
    from tests.integrations.transformers.integration import build_trainer

    with framework_environment():
        trainer = build_trainer(str(tmp_path / "trained"), "ddp", 2, remove_unused_columns=False)
        trainer.create_optimizer()
        trainer.optimizer.param_groups[0]["lr"] = 0.1
        factors = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 0.5**step)
        trainer.lr_scheduler = factors
        losses: list[float] = []
        compute_loss, dataset = trainer.compute_loss, trainer.train_dataset
        trainer.train_dataset = [{**dataset[i], "ids": i} for i in range(len(dataset))]

        def compute_and_keep(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            inputs.pop("ids")
            loss = compute_loss(model, inputs, *args, **kwargs)
            losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
            return loss

        trainer.compute_loss = compute_and_keep
        attach(trainer, distclip.global_norm(0.5), on_bind=partial(Recorder, directory=tmp_path, every=1, top=5))
        trainer.train()
        check_log(tmp_path, losses, num_micro_batches=2)
