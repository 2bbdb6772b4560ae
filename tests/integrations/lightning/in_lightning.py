"""Lightning's Trainer and Fabric."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip.integrations import lightning as ours
from distclip.monitor import Recorder
from tests.integrations.plain import (
    ROWS,
    STEPS,
    Samples,
    agree,
    alike,
    among_others,
    equal,
    example,
    mse,
    net,
    poison,
    raised,
    sgd,
    whole,
)
from tests.ranks import everywhere


def module(**options: Any) -> Any:
    """A LightningModule that notes norms and parameters, step by step."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self, poisoned: int | None = None, optimizer: Any = sgd, sharded: bool = False) -> None:
            super().__init__()
            self.net = net()
            self.poisoned, self.optimizer, self.sharded = poisoned, optimizer, sharded
            self.norms: list[float] = []
            self.states: list[dict[str, Tensor]] = []

        def configure_model(self) -> None:
            if self.sharded and not hasattr(self.net, "unshard"):
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def configure_optimizers(self) -> Any:
            return self.optimizer(self.parameters())

        def training_step(self, batch: Any, at: int) -> Tensor:
            return mse(self.net(batch[0]), batch[1])

        def on_after_backward(self) -> None:
            if self.poisoned == self.global_step:
                poison(self, value=getattr(self, "bad", float("nan")))

        def on_train_batch_end(self, outputs: Any, batch: Any, at: int) -> None:
            logged = self.trainer.callback_metrics
            if "grad/norm" in logged and self.global_step > len(self.states):
                self.norms.append(float(logged["grad/norm"]))
            if self.global_step > len(self.states):
                self.states.append(whole(self.trainer.strategy.model))

    return Module(**options)


def strategy(kind: str) -> Any:
    from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

    class OnCPU(FSDPStrategy):
        """Lightning refuses its own class on a CPU, and no other; and it does not name the device, which FSDP wants."""

        def _setup_model(self, model: nn.Module) -> nn.Module:
            return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)

    if kind == "alone":
        return "auto"
    made = {"ddp": DDPStrategy, "fsdp": OnCPU, "fsdp2": ModelParallelStrategy}[kind]
    return made(data_parallel_size=2, tensor_parallel_size=1) if kind == "fsdp2" else made()


def trainer(kind: str, callbacks: Any, ga: int = 1, **options: Any) -> Any:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    plugins = [*([TorchElasticEnvironment()] if kind != "alone" else ()), *options.pop("plugins", ())]
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | options
    return pl.Trainer(
        accelerator="cpu",
        devices=1 if kind == "alone" else 2,
        strategy=strategy(kind),
        callbacks=callbacks,
        accumulate_grad_batches=ga,
        plugins=plugins,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )


def loader(ga: int = 1) -> Any:
    samples = Samples(ga)
    # Without one of its own the Trainer makes one, and that shuffles.
    sampler = torch.utils.data.DistributedSampler(samples, shuffle=False)
    return torch.utils.data.DataLoader(samples, batch_size=ROWS, sampler=sampler)


def names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("net."): tensor for name, tensor in state.items()}


def trains(kind: str, policy: Any, ga: int = 1) -> None:
    """Parameters and norms, step by step as in the plain loop."""
    with among_others():
        clipping, model = ours.GradientClipping(policy), module(sharded=kind == "fsdp2")
        trainer(kind, [clipping], ga).fit(model, loader(ga))
    agree(names(model.states[-1]), model.norms, policy, ga)
    assert set(clipping.clipper.parameters) >= {"net.first.weight", "net.last.bias"}, clipping.clipper.parameters
    alike(model.norms, clipping.report.as_dict())


def skips(kind: str, rule: str) -> None:
    """A NaN on one rank at the third step."""
    with among_others() as caught:
        clipping = ours.GradientClipping(distclip.zclip(cap=1.0, warmup=1), on_nonfinite=rule)  # type: ignore[arg-type]
        model = module(sharded=kind == "fsdp2", poisoned=2)
        said = raised(lambda: trainer(kind, [clipping]).fit(model, loader()))
    warned = [w for w in caught if w.category is distclip.NonFiniteWarning]
    if rule == "raise":
        assert said.startswith("NonFiniteError: step 3"), said
        return
    assert not said, said
    states = model.states
    assert len(warned) == 1 and clipping.clipper.skipped == 1
    assert equal(states[1], states[2]) and not equal(states[2], states[3])
    assert all(bool(value.isfinite().all()) for value in states[-1].values())
    if kind != "ddp":
        alike(model.norms, clipping.clipper.incidents)


def resumes(kind: str, folder: str) -> None:
    """Stopped after an epoch and gone on with: the same bits."""
    policy = distclip.zclip(cap=1.0, warmup=1)

    def run(epochs: int, path: str | None = None) -> tuple[Any, Any, Any]:
        clipping, model = ours.GradientClipping(policy), module(sharded=kind == "fsdp2")
        if path is not None:
            model.states = [{}] * STEPS
        one = trainer(kind, [clipping], max_epochs=epochs)
        one.fit(model, loader(), ckpt_path=path)
        return one, clipping.clipper, model

    with among_others():
        _, through, model = run(2)
        stopped, first, _ = run(1)
        path = os.path.join(everywhere(folder)[0], kind)
        stopped.save_checkpoint(path)
        _, second, rest = run(2, path)
    assert len(rest.states) == len(model.states) == 2 * STEPS, (len(rest.states), len(model.states))
    assert rest.norms == model.norms[STEPS:], (rest.norms, model.norms)
    assert equal(rest.states[-1], model.states[-1])
    assert equal(second.state_dict(), through.state_dict())
    assert not equal(second.state_dict(), first.state_dict())


def scales(fused: bool) -> None:
    """fp16 under a GradScaler: unscaled once, and an overflow is skipped."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    def adamw(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=0.02, fused=fused)

    policy = distclip.global_norm(0.5)
    with among_others():
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        clipping, model = ours.GradientClipping(policy), module(optimizer=adamw)
        trainer("ddp", [clipping], plugins=[plugin]).fit(model, loader())
        agree(names(model.states[-1]), model.norms, policy, fp16=True, optimizer=adamw)
        assert scaler.get_scale() == 1024 and not scaler._per_optimizer_states

        model = module(optimizer=adamw, poisoned=2)
        clipping = ours.GradientClipping(policy)
        trainer("ddp", [clipping], plugins=[plugin]).fit(model, loader())
    alike(scaler.get_scale(), clipping.clipper.skipped)
    assert scaler.get_scale() == 512 and clipping.clipper.skipped == 1


def pair(before_steps: Callable[[Any, int], Any] = lambda net, at: None, after_steps: Any = None) -> Any:
    """Manual optimization of two parts of a net by two optimizers, under DDP.

    Args:
        before_steps: (net, index of the batch), when there are gradients.
        after_steps: (what that returned, the module), when both have stepped.
    """
    import lightning.pytorch as pl

    class Pair(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = net(), False

        def configure_optimizers(self) -> Any:
            return sgd(self.net.first.parameters()), sgd(self.net.last.parameters())

        def training_step(self, batch: Any, at: int) -> None:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
            self.manual_backward(mse(self.net(batch[0]), batch[1]))
            seen = before_steps(self.net, at)
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()
            if after_steps is not None:
                after_steps(seen, self)

    return Pair()


def two_optimizers() -> None:
    """Each has its norm, and is in the checkpoint."""

    def norms(model: Any, at: int = 0) -> list[float]:
        parts = (model.first, model.last)
        return [float(distclip.get_total_norm([p.grad for p in part.parameters()])) for part in parts]

    def check(truth: list[float], model: Any) -> None:
        logged, clipped = model.trainer.callback_metrics, norms(model.net)
        assert [float(logged[f"grad/{i}/norm"]) for i in range(2)] == truth, (logged, truth)
        assert max(clipped) <= 0.1 + 1e-6 and max(truth) > 0.1, (clipped, truth)

    with among_others():
        clipping = ours.GradientClipping(distclip.zclip(cap=0.1))
        trainer("ddp", [clipping]).fit(pair(norms, check), loader())
        assert [clipper.parameters for clipper in clipping.clippers] == [
            ("net.first.weight", "net.first.bias"),
            ("net.last.weight", "net.last.bias"),
        ]
        assert sorted(clipping.state_dict()) == ["0", "1"]


def two_see_a_nan() -> None:
    """Of two optimizers, in one rank's gradients after they were made alike: both ranks leave that step out."""
    with among_others():
        clipping = ours.GradientClipping(distclip.global_norm(0.1))
        model = pair(lambda net, at: poison(net.last) if at == 1 else None)
        trainer("ddp", [clipping]).fit(model, loader())
    assert [clipper.skipped for clipper in clipping.clippers] == [0, 1]
    alike([clipper.incidents for clipper in clipping.clippers], whole(model.net))


def communicates(kind: str) -> None:
    """One all-reduce a step, under DDP too."""
    counts: list[dict[str, int]] = []

    class Counting(ours.GradientClipping):
        def on_before_optimizer_step(self, *args: Any) -> None:
            with CommDebugMode() as counter:
                super().on_before_optimizer_step(*args)
            counts.append({str(op): n for op, n in counter.get_comm_counts().items()})

    with among_others():
        trainer(kind, [Counting(distclip.global_norm(0.5))]).fit(module(sharded=kind == "fsdp2"), loader())
    assert len(counts) == STEPS and all([*step.values()] == [1] and "allreduce" in str(step) for step in counts), counts


def no_loss() -> None:
    """`training_step` returns None at a step: nothing is unscaled or stepped, and the next one goes on as ever."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    for fused in (False, True):
        with among_others():
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            model = module(optimizer=lambda params: torch.optim.AdamW(params, lr=0.02, fused=fused))  # noqa: B023
            step = model.training_step
            model.training_step = lambda batch, batch_idx: None if batch_idx == 1 else step(batch, batch_idx)  # noqa: B023
            clipping = ours.GradientClipping(distclip.global_norm(0.5))
            plugin = MixedPrecision("16-mixed", "cpu", scaler)
            trainer("alone", [clipping], plugins=[plugin]).fit(model, loader())
        assert clipping.clipper.skipped == 0 and len(model.norms) >= STEPS - 1
        assert all(norm < 100 for norm in model.norms), model.norms
        assert scaler.get_scale() == 1024


def refuses() -> None:
    with among_others():
        said = raised(
            lambda: trainer("ddp", [ours.GradientClipping(distclip.global_norm(1.0))], gradient_clip_val=0.7).fit(
                module(), loader()
            )
        )
        assert "clipped twice" in said and "global_norm(0.7)" in said, said
        # On one rank alone.
        bound = 0.7 if dist.get_rank() == 1 else None
        clipping = ours.GradientClipping(distclip.global_norm(1.0))
        told = everywhere(raised(lambda: trainer("ddp", [clipping], gradient_clip_val=bound).fit(module(), loader())))
        assert all("clipped twice" in text for text in told), told
        said = raised(lambda: ours.GradientClipping(1.0))  # type: ignore[arg-type]
        assert said.startswith("ArgumentError: GradientClipping: policy=1.0: expected a policy"), said


def records(folder: str) -> None:
    folder = everywhere(folder)[0]
    with among_others():
        kept: list[Recorder] = []
        clipping = ours.GradientClipping(
            distclip.global_norm(0.5), on_bind=lambda clipper: kept.append(Recorder(clipper, folder, every=2))
        )
        trainer("fsdp2", [clipping]).fit(module(sharded=True), loader())
        kept[0].flush()
        everywhere("written")
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    assert len(lines) >= STEPS + 1, lines


def refused_by_lightning() -> None:
    """Its own mistakes, which are the reason for all this."""
    with among_others():
        said = raised(lambda: trainer("fsdp", [], gradient_clip_val=0.5).fit(module(), loader()))
    assert "is currently not supported" in said, said


def its_own_model() -> None:
    """Lightning's BoringModel under DDP, where its own clipping by norm is right: the same parameters come of both."""
    from lightning.pytorch.demos.boring_classes import BoringModel

    def trained(callbacks: Any, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(dist.get_rank())
        model = BoringModel()
        trainer("ddp", callbacks, max_steps=5, limit_val_batches=1, **options).fit(model)
        return whole(model)

    with among_others():
        clipping = ours.GradientClipping(distclip.global_norm(0.3))
        mine, theirs, unclipped = trained([clipping]), trained([], gradient_clip_val=0.3), trained([])
    assert clipping.report is not None and not equal(theirs, unclipped)
    torch.testing.assert_close(mine, theirs)
    alike(mine)


def fabric_of(kind: str, **options: Any) -> tuple[Any, Any, Any]:
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.fabric.strategies import DDPStrategy, FSDPStrategy

    class OnCPU(FSDPStrategy):
        """As above."""

        def setup_module(self, module: nn.Module) -> nn.Module:
            return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)

    plugins = [TorchElasticEnvironment(), *options.pop("plugins", ())]
    made = Fabric(accelerator="cpu", devices=2, strategy={"ddp": DDPStrategy, "fsdp": OnCPU}[kind](), plugins=plugins)
    made.launch()
    model = net()
    if kind == "fsdp":
        wrapped = made.setup_module(model)
        return made, wrapped, made.setup_optimizers(sgd(wrapped.parameters()))
    return (made, *made.setup(model, sgd(model.parameters())))


def fabric_loop(made: Any, model: Any, optimizer: Any, clipper: distclip.GradClipper) -> list[float]:
    """Train by it; the norm of each step."""
    norms = []
    for x, y in made.setup_dataloaders(loader()):
        optimizer.zero_grad()
        made.backward(mse(model(x), y))
        norms.append(float(ours.clip_gradients(made, clipper, optimizer).norm))
        optimizer.step()
    return norms


def fabric(kind: str, policy: Any) -> None:
    with among_others():
        made, model, optimizer = fabric_of(kind)
        clipper = distclip.GradClipper(model, policy)
        norms = fabric_loop(made, model, optimizer, clipper)
    assert set(clipper.parameters) == {"first.weight", "first.bias", "last.weight", "last.bias"}, clipper.parameters
    agree(whole(model._forward_module), norms, policy)


def fabric_scales() -> None:
    from lightning.fabric.plugins.precision import MixedPrecision

    policy = distclip.global_norm(0.5)
    with among_others():
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        made, model, optimizer = fabric_of("ddp", plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        clipper = distclip.GradClipper(model, policy)
        norms = fabric_loop(made, model, optimizer, clipper)
        agree(whole(model._forward_module), norms, policy, fp16=True)
        x, y = next(iter(loader()))
        made.backward(mse(model(x), y))
        poison(model, rank=0)
        before = whole(model._forward_module)
        report = ours.clip_gradients(made, clipper, optimizer)
        optimizer.step()
    assert bool(report.skipped) and equal(before, whole(model._forward_module))


def fabric_forgets() -> None:
    """Under FSDP its `error_if_nonfinite` raises nothing; distclip's rule does, on both ranks."""
    with among_others():
        made, model, optimizer = fabric_of("fsdp")
        x, y = next(iter(loader()))

        def backward() -> None:
            optimizer.zero_grad()
            made.backward(mse(model(x), y))
            poison(model)

        backward()
        norm = made.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=True)
        assert not bool(norm.isfinite()), norm
        clipper = distclip.GradClipper(model, distclip.global_norm(1.0), on_nonfinite="raise")
        backward()
        said = raised(lambda: ours.clip_gradients(made, clipper, optimizer))
        assert said.startswith("NonFiniteError"), said


def examples() -> None:
    """The code blocks of what a loop calls, as they stand."""
    from lightning.pytorch import Trainer as Plain

    def run(model: nn.Module, of: Any, **known: Any) -> None:
        exec(example(of), {"distclip": distclip, "model": model, **known})

    with among_others():

        def made(*, strategy: str = "ddp", callbacks: Any) -> Plain:
            return trainer(strategy, callbacks)  # type: ignore[no-any-return]
