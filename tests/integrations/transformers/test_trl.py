"""Adapters of PEFT in a Trainer of TRL, against the clipping of the Trainer itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import distclip
from distclip.integrations.transformers import attach
from tests.frameworks import skip_without

# TRL is not in the extra `dev` because it needs pandas and datasets: pip install trl.
for _module in ("trl", "peft", "transformers", "accelerate"):
    skip_without(_module)

MAX_NORM = 0.05
WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]


def build_trainer(folder: Path) -> Any:
    """Build a fine-tuning of a tiny Llama by adapters, on sentences of eight words."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    arguments = SFTConfig(
        str(folder),
        max_steps=4,
        logging_steps=1,
        save_steps=2,
        max_grad_norm=MAX_NORM,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        max_length=16,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
    )
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": [" ".join(WORDS[i % 8 :] + WORDS[: i % 8]) for i in range(16)]}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )


def log_of(trainer: Any) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]


# Which warnings TRL and its dependencies emit depends on their versions.
@pytest.mark.filterwarnings("ignore")
def test_adapters_train_as_without_distclip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    plain = build_trainer(tmp_path / "plain")
    plain.train()
    trainer = build_trainer(tmp_path / "ours")
    attachment = attach(trainer, distclip.global_norm(MAX_NORM))
    trainer.train()
    assert attachment.report is not None
    assert bool(attachment.report.clipped)
    torch.testing.assert_close(log_of(trainer), log_of(plain), rtol=1e-5, atol=0)
    # The state of the policy is in a checkpoint.
    again = build_trainer(tmp_path / "ours")
    resumed = attach(again, distclip.global_norm(MAX_NORM))
    again.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    assert resumed.clipper.state_dict()["counts"] == attachment.clipper.state_dict()["counts"]
    torch.testing.assert_close(log_of(again), log_of(plain), rtol=1e-5, atol=0)
