"""Run the checks of `tests.tables.integrations` in a Trainer of transformers."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import distclip
from distclip.integrations.transformers import attach, detach
from tests.integrations.accelerate.integration import claim_devices, is_prepared_as, reset_state
from tests.integrations.one_process import (
    NUM_ROWS,
    NUM_STEPS,
    OUTLIER,
    Net,
    Samples,
    bitwise_equal,
    build_net,
    check_equal_on_ranks,
    error_of,
    framework_environment,
    full_params,
    mse,
    poison,
    sgd,
)
from tests.integrations.training_loop import Run, TrainingLoop
from tests.ranks import gather_from_ranks


class NamedSamples(Samples):
    """Samples as keyword arguments of the model."""

    def __getitem__(self, i: int) -> Any:
        return {"x": self.x[i], "y": self.y[i]}


class Model(Net):
    """A net that returns its loss."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return {"loss": mse(super().forward(x), y)}


def build_model() -> Model:
    """Build the net of `build_net` as a model."""
    model = Model()
    model.load_state_dict(build_net().state_dict())
    return model


def parallelize_first_layer(model: Any) -> None:
    """Shard the first layer only, so that some gradients are DTensors and others are plain tensors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    parallelize_module(model, mesh, {"first": ColwiseParallel(output_layouts=Replicate())})


def build_trainer(
    folder: str,
    kind: str = "ddp",
    num_micro_batches: int = 1,
    poisoned_step: int | None = None,
    loss_scale: float | None = None,
    **options: Any,
) -> Any:
    """Build a Trainer with SGD that reads the samples in order and records parameters as `steps`.

    Args:
        folder: where checkpoints go.
        kind: "ddp", "fsdp2" or "tp".
        num_micro_batches: micro-batches of a step.
        poisoned_step: step at which a gradient on one rank gets an Inf.
        loss_scale: initial scale of a GradScaler, or None without one.
        options: of TrainingArguments.
    """
    from accelerate import ParallelismConfig
    from transformers import Trainer, TrainerCallback, TrainingArguments

    reset_state()

    class RecordParams(TrainerCallback):
        """Record full parameters after each step."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.params.append(full_params(trainer.model_wrapped))

    class PoisonedTrainer(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().training_step(model, *args, **kwargs)
            if poisoned_step == self.state.global_step:
                poison(model, value=float("inf"))
            return loss

        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = self.optimizer or sgd((model or self.model).parameters())
            return self.optimizer

    options = {
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        "num_train_epochs": 1,
        "lr_scheduler_type": "constant",
    } | options
    if kind == "fsdp2":
        options |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
    num_rows = NUM_ROWS
    if kind == "tp":
        # Every rank has the rows of all.
        options |= {"parallelism_config": ParallelismConfig(tp_size=dist.get_world_size())}
        num_rows *= dist.get_world_size()
    args = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=num_rows,
        gradient_accumulation_steps=num_micro_batches,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        learning_rate=0.05,
        logging_nan_inf_filter=False,
        **options,
    )
    if kind != "ddp":
        assert args.device.type == "cpu"
        claim_devices()
    model = build_model()
    if kind == "tp":
        parallelize_first_layer(model)
    trainer: Any = PoisonedTrainer(
        model=model, args=args, train_dataset=NamedSamples(num_micro_batches), callbacks=[RecordParams()]
    )
    trainer.params = []
    if kind == "tp":
        model.tp_size = dist.get_world_size()  # Accelerate reads it, and models of transformers have it
    # Logs go to the history only.
    trainer.log = lambda logs, *args, **kwargs: type(trainer).log(trainer, dict(logs))
    if loss_scale is not None:
        accelerator = trainer.accelerator
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=loss_scale)
        accelerator.state._mixed_precision = "fp16"
    return trainer


def norms_in(trainer: Any) -> list[float]:
    """Return the logged norms."""
    return [float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]


def check_kind(trainer: Any, kind: str) -> None:
    """Check that the Trainer has wrapped its model as the kind means."""
    if kind == "tp":
        assert {isinstance(param, DTensor) for param in trainer.model.parameters()} == {True, False}
    else:
        assert is_prepared_as(trainer.model_wrapped, kind)


class Transformers(TrainingLoop):
    """A Trainer with a policy attached."""

    def train(
        self,
        setting: str,
        policy: Any,
        *,
        num_micro_batches: int = 1,
        poisoned_step: int | None = None,
        on_nonfinite: Any = "skip",
        **options: Any,
    ) -> Run:
        options = {"lr_scheduler_type": "constant"} | options
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(folder, setting, num_micro_batches, poisoned_step, **options)
            attachment = attach(trainer, policy, on_nonfinite=on_nonfinite)
            assert trainer.distclip is trainer.accelerator.distclip is attachment
            trainer.train()
        check_kind(trainer, setting)
        history = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        num_skipped = attachment.clipper.skipped
        # The scheduler does not count a skipped step.
        assert trainer.lr_scheduler.last_epoch == NUM_STEPS - num_skipped
        assert [entry["grad_skipped"] for entry in history] == [num_skipped * (i >= OUTLIER) for i in range(NUM_STEPS)]
        assert all("grad_coef" in entry for entry in history)
        return Run(norms_in(trainer), trainer.params, attachment)

    def checkpoint(self, setting: str, folder: str) -> None:
        """Resume from a checkpoint in the middle with the same bits."""
        policy = distclip.zclip(cap=1.0, warmup=1)
        with framework_environment():
            uninterrupted = build_trainer(folder, setting, save_strategy="steps", save_steps=3)
            attach(uninterrupted, policy)
            uninterrupted.train()
            dist.barrier()
            resumed = build_trainer(folder, setting)
            attach(resumed, policy)
            resumed.train(resume_from_checkpoint=os.path.join(folder, "checkpoint-3"))
            assert norms_in(resumed) == norms_in(uninterrupted)
            assert bitwise_equal(full_params(resumed.model_wrapped), full_params(uninterrupted.model_wrapped))
            states = [trainer.distclip.state_dict() for trainer in (resumed, uninterrupted)]
            assert bitwise_equal(*states)
            assert int(states[0]["counts"]["steps"]) == NUM_STEPS

    def invalid_input(self, setting: str) -> None:
        """Pass a parameter of no model on one rank. Both ranks raise."""
        policy = distclip.global_norm(1.0)
        with framework_environment(), tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(folder, setting)
            assert "expected a policy" in error_of(lambda: attach(trainer, 1.0))  # type: ignore[arg-type]
            assert "expected a Trainer of transformers" in error_of(lambda: attach(build_net(), policy))
            attach(trainer, policy)
            assert "has a policy already" in error_of(lambda: attach(trainer, policy))
            if dist.get_rank() == 1:
                foreign = torch.zeros(2, requires_grad=True)
                accelerator = trainer.accelerator
                trainer._clip_grad_norm = lambda model: accelerator.clip_grad_norm_([*model.parameters(), foreign], 1.0)
            errors = gather_from_ranks(error_of(trainer.train))
            assert all("belong to no model" in error for error in errors)

    def detach(self, setting: str) -> None:
        """Detach before training. The Trainer has its methods back, and trains as one that was never attached."""
        patched = ["_has_mixed_mesh_grads", "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler", "log"]
        with framework_environment(), tempfile.TemporaryDirectory() as folder:
            trainers = [build_trainer(folder, setting) for _ in range(2)]
            trainer = trainers[0]
            methods = [getattr(trainer, name, None) for name in patched]
            attach(trainer, distclip.global_norm(1e-6))
            detach(trainer)
            assert [getattr(trainer, name, None) for name in patched] == methods
            assert not hasattr(trainer, "distclip")
            assert not hasattr(trainer.accelerator, "distclip")
            assert "nothing is attached" in error_of(lambda: detach(trainer))
            for trainer in trainers:
                trainer.train()
        assert norms_in(trainers[0]) == norms_in(trainers[1])
        assert bitwise_equal(trainers[0].params[-1], trainers[1].params[-1])
        check_equal_on_ranks(trainers[0].params[-1])
