"""The Trainer of transformers under DeepSpeed takes one line. Logs have the coefficient, checkpoints the state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import distclip
from tests.frameworks import skip_without
from tests.integrations.one_process import framework_environment
from tests.ranks import on_ranks

skip_without("deepspeed", reason="DeepSpeed is not installed: pip install 'distclip[deepspeed]'")
skip_without("transformers", reason="transformers is not installed: pip install 'distclip[hf]'")


def build_trainer(folder: Path, stage: int, **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    tokens = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (64, 16))]
    deepspeed = {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    options |= {"max_steps": 4, "logging_steps": 1, "save_steps": 2, "optim": "adamw_torch", "deepspeed": deepspeed}
    options |= {"use_cpu": True, "disable_tqdm": True, "report_to": [], "per_device_train_batch_size": 8}
    return Trainer(LlamaForCausalLM(config), TrainingArguments(str(folder), **options), train_dataset=tokens)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("stage", [2, 3])
def test_trainer_under_deepspeed(stage: int, tmp_path: Path) -> None:
    import deepspeed.ops

    from distclip.integrations.transformers import attach, detach

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with framework_environment():
        trainer = build_trainer(tmp_path, stage)
        with pytest.raises(distclip.ArgumentError, match="split_over is not for DeepSpeed"):
            attach(trainer, distclip.zclip(cap=0.01), split_over=torch.distributed.group.WORLD)
        attachment = attach(trainer, distclip.zclip(cap=0.01))
        assert attachment.clipper is None
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        assert [entry["grad_coef"] for entry in logs] == pytest.approx([0.01 / entry["grad_norm"] for entry in logs])
        assert (attachment.clipper.steps, logs[-1]["grad_skipped"]) == (4, 0)
        # The state of the policy continues from a checkpoint.
        other = build_trainer(tmp_path, stage)
        continued = attach(other, distclip.zclip(cap=0.01))
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert continued.clipper.steps == 4
        engine = other.accelerator.deepspeed_engine_wrapped.engine
        assert hasattr(engine, "distclip")
        detach(other)
        assert not any(hasattr(owner, "distclip") for owner in (engine, other, other.accelerator))
