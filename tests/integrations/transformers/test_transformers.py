"""The Trainer of transformers on two ranks, against one process in float64 on the global batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import distclip
from distclip.integrations.transformers import attach, detach
from tests.frameworks import skip_without
from tests.integrations.accelerate.integration import reset_state
from tests.integrations.one_process import (
    NUM_STEPS,
    OUTLIER,
    POLICIES,
    bitwise_equal,
    check_equal_on_ranks,
    check_run,
    framework_environment,
    full_params,
)
from tests.integrations.transformers.integration import Transformers, build_model, build_trainer, check_kind, norms_in
from tests.ranks import on_ranks, replicas_may_differ

skip_without("transformers", reason="transformers is not installed: pip install 'distclip[hf]'")
skip_without("accelerate", reason="Accelerate is not installed: pip install 'distclip[hf]'")

KINDS = ["ddp", "fsdp2", "tp"]
"""With "tp" only the first layer is sharded, and the Trainer treats DTensors and plain gradients separately."""

LOSS_SCALE = 1024.0


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize(
    ("kind", "policy"), [*((kind, "model") for kind in KINDS), ("fsdp2", "tensor"), ("tp", "tensor")]
)
def test_steps_as_one_process(kind: str, policy: str) -> None:
    Transformers().steps_as_one_process(kind, POLICIES[policy])


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", KINDS)
def test_accumulates_as_one_process(kind: str) -> None:
    Transformers().steps_as_one_process(kind, POLICIES["model"], num_micro_batches=2)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("rule", ["skip", "raise"])
@pytest.mark.parametrize("kind", KINDS)
def test_nonfinite_on_one_rank(kind: str, rule: str) -> None:
    Transformers().nonfinite_on_one_rank(kind, rule)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", KINDS)
def test_step_skipped_by_policy(kind: str) -> None:
    Transformers().skipped_by_policy(kind)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_checkpoint(kind: str, tmp_path: Path) -> None:
    Transformers().checkpoint(kind, str(tmp_path))


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", KINDS)
def test_invalid_input(kind: str) -> None:
    Transformers().invalid_input(kind)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", ["ddp"])
def test_detach(kind: str) -> None:
    Transformers().detach(kind)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", KINDS)
def test_max_grad_norm_is_ignored(tmp_path: Path, kind: str) -> None:
    with framework_environment():
        trainer = build_trainer(str(tmp_path), kind, max_grad_norm=0.0)
        attach(trainer, POLICIES["adaptive"])
        trainer.train()
        check_kind(trainer, kind)
    check_run(trainer.params[-1], norms_in(trainer), POLICIES["adaptive"])


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_fp16_is_unscaled_once_and_logs_unscaled_norms(tmp_path: Path, kind: str) -> None:
    policy = distclip.global_norm(0.5)
    with framework_environment():
        trainer = build_trainer(str(tmp_path), kind, loss_scale=LOSS_SCALE)
        attach(trainer, policy)
        trainer.train()
    check_run(trainer.params[-1], norms_in(trainer), policy, fp16=True)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_fp16_skips_an_overflow_on_every_rank(kind: str) -> None:
    with framework_environment() as caught, replicas_may_differ():
        policy = distclip.zclip(cap=1.0, warmup=1)
        run = Transformers().train(
            kind,
            policy,
            poisoned_step=OUTLIER,
            on_nonfinite="raise",
            loss_scale=LOSS_SCALE,
            max_grad_norm=0,
            lr_scheduler_type="linear",
        )
    assert not [warning for warning in caught if warning.category is distclip.NonFiniteWarning]
    assert all(bool(param.isfinite().all()) for param in run.params[-1].values())
    scale = run.attached._accelerator.scaler.get_scale()
    check_equal_on_ranks(scale, run.attached.clipper.skipped)
    assert scale == LOSS_SCALE / 2
    assert run.attached.clipper.skipped == 1


@on_ranks(2, fixture="ranks")
def test_second_train_keeps_the_state(tmp_path: Path) -> None:
    """A second `train` wraps the model again."""
    with framework_environment():
        trainer = build_trainer(str(tmp_path))
        attachment = attach(trainer, distclip.zclip(cap=1.0, warmup=1))
        trainer.train()
        trainer.train()
        assert int(attachment.state_dict()["counts"]["steps"]) == 2 * NUM_STEPS


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("made_by", ["trial", "call", "assignment"])
def test_policy_goes_with_another_accelerator(tmp_path: Path, made_by: str) -> None:
    """Each trial of `hyperparameter_search` makes an Accelerator and a model, as do calls and classes that derive."""
    from accelerate import Accelerator
    from transformers.trainer_utils import HPSearchBackend

    policy, clippers = distclip.zclip(cap=0.01, warmup=1), list[Any]()
    with framework_environment():
        trainer = build_trainer(str(tmp_path))
        attachment = attach(trainer, policy, on_bind=clippers.append)
        first = trainer.accelerator
        trainer.train()
        params, norms = trainer.params[-1], norms_in(trainer)
        if made_by == "trial":
            trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
            trainer.model_init = lambda trial=None: build_model()
            with pytest.MonkeyPatch.context() as monkeypatch:
                # It knows a trial only if optuna is installed.
                monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
                trainer.train(trial=SimpleNamespace(params={"weight_decay": 0.0}, number=0))
        elif made_by == "call":
            trainer.create_accelerator_and_postprocess()
            trainer.train()
        else:
            trainer.accelerator = Accelerator(cpu=True)
            trainer.train()
        second = trainer.accelerator
        assert second is not first
        assert second.distclip is trainer.distclip is attachment
        assert not hasattr(first, "distclip")
        assert not first._custom_objects
        logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        assert [entry["grad_coef"] for entry in logs] == pytest.approx([0.01 / entry["grad_norm"] for entry in logs])
        if made_by == "trial":
            # A trial repeats the first training, without its history.
            assert norms_in(trainer) == norms
            assert bitwise_equal(trainer.params[-1], params)
            assert [clipper.steps for clipper in clippers] == [NUM_STEPS] * 2
        else:
            assert [clipper.steps for clipper in clippers] == [2 * NUM_STEPS]
        detach(trainer)
        assert not any(hasattr(owner, "distclip") for owner in (second, trainer))
        assert second.clip_grad_norm_.__func__ is Accelerator.clip_grad_norm_


@on_ranks(2, fixture="ranks")
def test_transformers_itself_turns_an_infinite_gradient_into_nan(tmp_path: Path) -> None:
    """With clipping turned off, the call that logs the norm spreads one infinite element."""
    with framework_environment(), replicas_may_differ():
        trainer = build_trainer(str(tmp_path), poisoned_step=OUTLIER, max_grad_norm=0)
        trainer.train()
        assert sum(int(param.isnan().sum()) for param in full_params(trainer.model_wrapped).values()) > 1
        trainer = build_trainer(str(tmp_path), poisoned_step=OUTLIER, max_grad_norm=0)
        attach(trainer, distclip.global_norm(float("inf")))
        trainer.train()
        assert all(bool(param.isfinite().all()) for param in full_params(trainer.model_wrapped).values())


@on_ranks(2, fixture="ranks")
def test_gpt2_trains_as_under_the_trainers_own_clipping(tmp_path: Path) -> None:
    """With AdamW and a schedule under DDP, the Trainer's own clipping is correct."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    tokens = torch.randint(64, (40, 8), generator=torch.Generator().manual_seed(2))
    rows = [{"input_ids": row, "labels": row} for row in tokens]

    def train(max_grad_norm: float, policy: Any = None) -> tuple[dict[str, Tensor], list[float]]:
        reset_state()
        args = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=5,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_grad_norm=max_grad_norm,
            learning_rate=0.01,
            warmup_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        torch.manual_seed(0)
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8, "vocab_size": 64}
        config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
        trainer = Trainer(model=GPT2LMHeadModel(config), args=args, train_dataset=rows)
        if policy is not None:
            attach(trainer, policy)
        trainer.train()
        return full_params(trainer.model_wrapped), norms_in(trainer)

    with framework_environment():
        params, norms = train(1.0, distclip.global_norm(0.1))
        expected_params, expected_norms = train(0.1)
    assert len(norms) == 5
    assert min(norms) > 0.1
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected_norms))
    torch.testing.assert_close(params, expected_params)
    check_equal_on_ranks(norms)
