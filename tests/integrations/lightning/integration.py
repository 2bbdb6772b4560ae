"""Run the checks of `tests.tables.integrations` in Lightning's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import distclip
from distclip.integrations import lightning as integration
from tests.integrations.one_process import (
    NUM_ROWS,
    NUM_STEPS,
    Samples,
    bitwise_equal,
    build_net,
    error_of,
    framework_environment,
    full_params,
    mse,
    poison,
    sgd,
)
from tests.integrations.training_loop import Run, TrainingLoop
from tests.ranks import gather_from_ranks


def build_module(**options: Any) -> Any:
    """Build a LightningModule that records the norm and the parameters of every step."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self, poisoned_step: int | None = None, optimizer: Any = sgd, sharded: bool = False) -> None:
            super().__init__()
            self.net = build_net()
            self.poisoned_step, self.optimizer, self.sharded = poisoned_step, optimizer, sharded
            self.norms: list[float] = []
            self.params: list[dict[str, Tensor]] = []

        def configure_model(self) -> None:
            if self.sharded and not hasattr(self.net, "unshard"):
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def configure_optimizers(self) -> Any:
            return self.optimizer(self.parameters())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return mse(self.net(batch[0]), batch[1])

        def on_after_backward(self) -> None:
            if self.poisoned_step == self.global_step:
                poison(self)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            logged = self.trainer.callback_metrics
            if self.global_step > len(self.params):
                if "grad/norm" in logged:
                    self.norms.append(float(logged["grad/norm"]))
                self.params.append(full_params(self.trainer.strategy.model))

    return Module(**options)


def build_strategy(kind: str) -> Any:
    from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

    class FSDPOnCPU(FSDPStrategy):
        """FSDP on a CPU, which Lightning refuses only for its own class. FSDP needs the device, which it omits."""

        def _setup_model(self, model: nn.Module) -> nn.Module:
            return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)

    if kind == "one process":
        return "auto"
    strategy = {"ddp": DDPStrategy, "fsdp": FSDPOnCPU, "fsdp2": ModelParallelStrategy}[kind]
    return strategy(data_parallel_size=2, tensor_parallel_size=1) if kind == "fsdp2" else strategy()


def build_trainer(kind: str, callbacks: Any, num_micro_batches: int = 1, **options: Any) -> Any:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    in_world = kind != "one process"
    plugins = [*([TorchElasticEnvironment()] if in_world else ()), *options.pop("plugins", ())]
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | options
    return pl.Trainer(
        accelerator="cpu",
        devices=2 if in_world else 1,
        strategy=build_strategy(kind),
        callbacks=callbacks,
        accumulate_grad_batches=num_micro_batches,
        plugins=plugins,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )


def build_loader(num_micro_batches: int = 1) -> Any:
    samples = Samples(num_micro_batches)
    # Without a sampler the Trainer adds one that shuffles.
    sampler = torch.utils.data.DistributedSampler(samples, shuffle=False)
    return torch.utils.data.DataLoader(samples, batch_size=NUM_ROWS, sampler=sampler)


def bare(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("net."): tensor for name, tensor in params.items()}


class Lightning(TrainingLoop):
    """Lightning's Trainer with the callback `GradientClipping`."""

    def train(
        self,
        setting: str,
        policy: Any,
        *,
        num_micro_batches: int = 1,
        poisoned_step: int | None = None,
        on_nonfinite: Any = "skip",
    ) -> Run:
        clipping = integration.GradientClipping(policy, on_nonfinite=on_nonfinite)
        module = build_module(sharded=setting == "fsdp2", poisoned_step=poisoned_step)
        build_trainer(setting, [clipping], num_micro_batches).fit(module, build_loader(num_micro_batches))
        return Run(module.norms, [bare(params) for params in module.params], clipping)

    def checkpoint(self, setting: str, folder: str) -> None:
        """Stop after an epoch and resume with the same bits."""

        def run(num_epochs: int, path: str | None = None) -> tuple[Any, Any, Any]:
            clipping = integration.GradientClipping(distclip.zclip(cap=1.0, warmup=1))
            module = build_module(sharded=setting == "fsdp2")
            if path is not None:
                module.params = [{}] * NUM_STEPS
            trainer = build_trainer(setting, [clipping], max_epochs=num_epochs)
            trainer.fit(module, build_loader(), ckpt_path=path)
            return trainer, clipping.clipper, module

        path = str(Path(folder) / setting)
        with framework_environment():
            _, uninterrupted, full_run = run(2)
            trainer, interrupted, _ = run(1)
            trainer.save_checkpoint(path)
            _, resumed, second_epoch = run(2, path)
        assert len(second_epoch.params) == len(full_run.params) == 2 * NUM_STEPS
        assert second_epoch.norms == full_run.norms[NUM_STEPS:]
        assert bitwise_equal(second_epoch.params[-1], full_run.params[-1])
        assert bitwise_equal(resumed.state_dict(), uninterrupted.state_dict())
        assert not bitwise_equal(resumed.state_dict(), interrupted.state_dict())

    def invalid_input(self, setting: str) -> None:
        def fit(bound: float | None) -> None:
            clipping = integration.GradientClipping(distclip.global_norm(1.0))
            build_trainer(setting, [clipping], gradient_clip_val=bound).fit(build_module(), build_loader())

        with framework_environment():
            error = error_of(lambda: fit(0.7))
            assert "clipped twice" in error
            assert "global_norm(0.7)" in error
            on_one_rank = 0.7 if dist.get_rank() == 1 else None
            errors = gather_from_ranks(error_of(lambda: fit(on_one_rank)))
            assert all("clipped twice" in error for error in errors)
            error = error_of(lambda: integration.GradientClipping(1.0))  # type: ignore[arg-type]
            assert error.startswith("ArgumentError: GradientClipping: policy=1.0: expected a policy")

    def detach(self, setting: str) -> None:
        """Remove the callback from a Trainer. The module trains like one that never had it."""
        with framework_environment():
            modules = []
            for clipping in ([integration.GradientClipping(distclip.global_norm(1e-6))], []):
                trainer = build_trainer(setting, clipping)
                trainer.callbacks = [callback for callback in trainer.callbacks if callback not in clipping]
                modules.append(build_module(sharded=setting == "fsdp2"))
                trainer.fit(modules[-1], build_loader())
        assert bitwise_equal(modules[0].params[-1], modules[1].params[-1])
        assert all(clipper is None for callback in clipping for clipper in callback.clippers)
