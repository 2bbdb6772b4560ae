"""Lightning's Trainer and Fabric on two ranks, against one process in float64 on the global batch."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip.integrations import lightning as integration
from distclip.integrations.lightning import clip_gradients
from distclip.monitor import Recorder
from tests.frameworks import skip_without
from tests.integrations.lightning.integration import (
    Lightning,
    bare,
    build_loader,
    build_module,
    build_trainer,
)
from tests.integrations.one_process import (
    NUM_STEPS,
    OUTLIER,
    POLICIES,
    bitwise_equal,
    build_net,
    check_equal_on_ranks,
    check_run,
    error_of,
    example_in,
    framework_environment,
    full_params,
    mse,
    poison,
    sgd,
)
from tests.ranks import gather_from_ranks, on_ranks, replicas_may_differ

skip_without("lightning", reason="Lightning is not installed: pip install 'distclip[lightning]'")

KINDS = ["ddp", "fsdp", "fsdp2"]


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_as_one_process(kind: str, policy: str) -> None:
    Lightning().steps_as_one_process(kind, POLICIES[policy])


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", KINDS)
def test_accumulates_as_one_process(kind: str) -> None:
    Lightning().steps_as_one_process(kind, POLICIES["model"], num_micro_batches=2)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize(("kind", "rule"), [*((kind, "skip") for kind in KINDS), ("fsdp2", "raise")])
def test_nonfinite_on_one_rank(kind: str, rule: str) -> None:
    Lightning().nonfinite_on_one_rank(kind, rule)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", KINDS)
def test_step_skipped_by_policy(kind: str) -> None:
    Lightning().skipped_by_policy(kind)


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_checkpoint(kind: str, tmp_path: Path) -> None:
    Lightning().checkpoint(kind, str(tmp_path))


@on_ranks(2, fixture="ranks")
def test_invalid_input() -> None:
    Lightning().invalid_input("ddp")


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", ["ddp"])
def test_detach(kind: str) -> None:
    Lightning().detach(kind)


def build_fp16_plugin() -> tuple[Any, torch.amp.GradScaler]:
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return MixedPrecision("16-mixed", "cpu", scaler), scaler


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("fused", [False, True])
def test_fp16_is_unscaled_once_and_skips_an_overflow(fused: bool) -> None:
    def adamw(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=0.02, fused=fused)

    policy = distclip.global_norm(0.5)
    with framework_environment():
        plugin, scaler = build_fp16_plugin()
        clipping, module = integration.GradientClipping(policy), build_module(optimizer=adamw)
        build_trainer("ddp", [clipping], plugins=[plugin]).fit(module, build_loader())
        check_run(bare(module.params[-1]), module.norms, policy, fp16=True, optimizer=adamw)
        assert scaler.get_scale() == 1024
        assert not scaler._per_optimizer_states

        clipping, module = integration.GradientClipping(policy), build_module(optimizer=adamw, poisoned_step=OUTLIER)
        with replicas_may_differ():
            build_trainer("ddp", [clipping], plugins=[plugin]).fit(module, build_loader())
    check_equal_on_ranks(scaler.get_scale(), clipping.clipper.skipped)
    assert scaler.get_scale() == 512
    assert clipping.clipper.skipped == 1


def build_pair(before_steps: Callable[[Any, int], Any] = lambda net, batch_idx: None, after_steps: Any = None) -> Any:
    """Build a module that optimizes two parts of a net by two optimizers manually.

    Args:
        before_steps: called with (net, index of the batch) once there are gradients.
        after_steps: called with (the result of `before_steps`, the module) once both have stepped.
    """
    import lightning.pytorch as pl

    class Pair(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = build_net(), False

        def configure_optimizers(self) -> Any:
            return sgd(self.net.first.parameters()), sgd(self.net.last.parameters())

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
            self.manual_backward(mse(self.net(batch[0]), batch[1]))
            result = before_steps(self.net, batch_idx)
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()
            if after_steps is not None:
                after_steps(result, self)

    return Pair()


@on_ranks(2, fixture="ranks")
def test_each_of_two_optimizers_has_a_norm() -> None:
    def norms_of(net: Any, batch_idx: int = 0) -> list[float]:
        parts = (net.first, net.last)
        return [float(distclip.get_total_norm([p.grad for p in part.parameters()])) for part in parts]

    def check(before: list[float], module: Any) -> None:
        logged, clipped = module.trainer.callback_metrics, norms_of(module.net)
        assert [float(logged[f"grad/{i}/norm"]) for i in range(2)] == before
        assert max(clipped) <= 0.1 + 1e-6
        assert max(before) > 0.1

    with framework_environment():
        clipping = integration.GradientClipping(distclip.zclip(cap=0.1))
        build_trainer("ddp", [clipping]).fit(build_pair(norms_of, check), build_loader())
        assert [clipper.parameters for clipper in clipping.clippers if clipper is not None] == [
            ("net.first.weight", "net.first.bias"),
            ("net.last.weight", "net.last.bias"),
        ]
        assert sorted(clipping.state_dict()) == ["0", "1"]


@on_ranks(2, fixture="ranks")
def test_two_optimizers_skip_a_nan_that_one_rank_has_after_the_all_reduce() -> None:
    with framework_environment(), replicas_may_differ():
        clipping = integration.GradientClipping(distclip.global_norm(0.1))
        module = build_pair(lambda net, batch_idx: poison(net.last) if batch_idx == 1 else None)
        build_trainer("ddp", [clipping]).fit(module, build_loader())
    clippers: list[Any] = clipping.clippers
    assert [clipper.skipped for clipper in clippers] == [0, 1]
    check_equal_on_ranks([clipper.incidents for clipper in clippers], full_params(module.net))


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_one_all_reduce_per_step(kind: str) -> None:
    counts: list[dict[str, int]] = []

    class Counting(integration.GradientClipping):
        def on_before_optimizer_step(self, *args: Any) -> None:
            with CommDebugMode() as counter:
                super().on_before_optimizer_step(*args)
            counts.append({str(op): n for op, n in counter.get_comm_counts().items()})

    with framework_environment():
        module = build_module(sharded=kind == "fsdp2")
        build_trainer(kind, [Counting(distclip.global_norm(0.5))]).fit(module, build_loader())
    assert len(counts) == NUM_STEPS
    assert all([*step.values()] == [1] and "allreduce" in str(step) for step in counts), counts


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("fused", [False, True])
def test_training_step_without_a_loss(fused: bool) -> None:
    """A `training_step` that returns None unscales nothing and steps nothing."""
    with framework_environment():
        plugin, scaler = build_fp16_plugin()
        module = build_module(optimizer=lambda params: torch.optim.AdamW(params, lr=0.02, fused=fused))
        step = module.training_step
        module.training_step = lambda batch, batch_idx: None if batch_idx == 1 else step(batch, batch_idx)
        clipping = integration.GradientClipping(distclip.global_norm(0.5))
        build_trainer("one process", [clipping], plugins=[plugin]).fit(module, build_loader())
    assert clipping.clipper is not None
    assert clipping.clipper.skipped == 0
    assert len(module.norms) >= NUM_STEPS - 1
    assert all(norm < 100 for norm in module.norms), module.norms
    assert scaler.get_scale() == 1024


@on_ranks(2, fixture="ranks")
def test_recorder_is_attached_by_on_bind(tmp_path: Path) -> None:
    with framework_environment():
        recorders: list[Recorder] = []
        clipping = integration.GradientClipping(
            distclip.global_norm(0.5), on_bind=lambda clipper: recorders.append(Recorder(clipper, tmp_path, every=2))
        )
        build_trainer("fsdp2", [clipping]).fit(build_module(sharded=True), build_loader())
        recorders[0].flush()
        gather_from_ranks("flushed")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) >= NUM_STEPS + 1


@on_ranks(2, fixture="ranks")
def test_lightning_itself_refuses_to_clip_by_norm_under_fsdp() -> None:
    with framework_environment():
        error = error_of(lambda: build_trainer("fsdp", [], gradient_clip_val=0.5).fit(build_module(), build_loader()))
    assert "is currently not supported" in error


@on_ranks(2, fixture="ranks")
def test_clips_as_lightning_itself_under_ddp() -> None:
    """Lightning's own clipping by norm is correct under DDP."""
    import torch.distributed as dist
    from lightning.pytorch.demos.boring_classes import BoringModel

    def train(callbacks: Any, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(dist.get_rank())
        model = BoringModel()
        build_trainer("ddp", callbacks, max_steps=5, limit_val_batches=1, **options).fit(model)
        return full_params(model)

    with framework_environment():
        clipping = integration.GradientClipping(distclip.global_norm(0.3))
        by_distclip, by_lightning, unclipped = train([clipping]), train([], gradient_clip_val=0.3), train([])
    assert clipping.report is not None
    assert not bitwise_equal(by_lightning, unclipped)
    torch.testing.assert_close(by_distclip, by_lightning)
    check_equal_on_ranks(by_distclip)


def launch_fabric(kind: str, **options: Any) -> Any:
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.fabric.strategies import DDPStrategy, FSDPStrategy

    class FSDPOnCPU(FSDPStrategy):
        """FSDP on a CPU, see `build_strategy`."""

        def setup_module(self, module: nn.Module) -> nn.Module:
            return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)

    plugins = [TorchElasticEnvironment(), *options.pop("plugins", ())]
    strategy = {"ddp": DDPStrategy, "fsdp": FSDPOnCPU}[kind]()
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, plugins=plugins)
    fabric.launch()
    return fabric


def build_fabric(kind: str, **options: Any) -> tuple[Any, Any, Any]:
    """Return (fabric, model, optimizer)."""
    fabric, model = launch_fabric(kind, **options), build_net()
    if kind == "fsdp":
        wrapped = fabric.setup_module(model)
        return fabric, wrapped, fabric.setup_optimizers(sgd(wrapped.parameters()))
    return (fabric, *fabric.setup(model, sgd(model.parameters())))


def train_by_fabric(fabric: Any, model: Any, optimizer: Any, clipper: distclip.GradClipper) -> list[float]:
    """Train and return the norm of each step."""
    norms = []
    for x, y in fabric.setup_dataloaders(build_loader()):
        optimizer.zero_grad()
        fabric.backward(mse(model(x), y))
        norms.append(float(clip_gradients(fabric, clipper, optimizer).norm))
        optimizer.step()
    return norms


@on_ranks(2, fixture="ranks")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_fabric_steps_as_one_process(kind: str, policy: str) -> None:
    with framework_environment():
        fabric, model, optimizer = build_fabric(kind)
        clipper = distclip.GradClipper(model, POLICIES[policy])
        norms = train_by_fabric(fabric, model, optimizer, clipper)
    assert set(clipper.parameters) == {"first.weight", "first.bias", "last.weight", "last.bias"}
    check_run(full_params(model._forward_module), norms, POLICIES[policy])


@on_ranks(2, fixture="ranks")
def test_fabric_fp16_skips_an_overflow() -> None:
    from lightning.fabric.plugins.precision import MixedPrecision

    policy = distclip.global_norm(0.5)
    with framework_environment():
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        fabric, model, optimizer = build_fabric("ddp", plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        clipper = distclip.GradClipper(model, policy, replicas="warn")
        norms = train_by_fabric(fabric, model, optimizer, clipper)
        check_run(full_params(model._forward_module), norms, policy, fp16=True)
        x, y = next(iter(build_loader()))
        fabric.backward(mse(model(x), y))
        poison(model, rank=0)
        before = full_params(model._forward_module)
        report = clip_gradients(fabric, clipper, optimizer)
        optimizer.step()
    assert bool(report.skipped)
    assert bitwise_equal(before, full_params(model._forward_module))


@on_ranks(2, fixture="ranks")
def test_fabric_itself_ignores_error_if_nonfinite_under_fsdp() -> None:
    with framework_environment():
        fabric, model, optimizer = build_fabric("fsdp")
        x, y = next(iter(build_loader()))

        def backward() -> None:
            optimizer.zero_grad()
            fabric.backward(mse(model(x), y))
            poison(model)

        backward()
        norm = fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=True)
        assert not bool(norm.isfinite())
        clipper = distclip.GradClipper(model, distclip.global_norm(1.0), on_nonfinite="raise")
        backward()
        error = error_of(lambda: clip_gradients(fabric, clipper, optimizer))
        assert error.startswith("NonFiniteError")


@on_ranks(2, fixture="ranks")
def test_docstring_example_of_the_callback() -> None:
    with framework_environment():
        names: dict[str, Any] = {"distclip": distclip, "FSDPStrategy": lambda: "fsdp"}
        names["Trainer"] = lambda *, strategy, callbacks: build_trainer(strategy, callbacks)
        exec(example_in(integration.GradientClipping), names)
        names["trainer"].fit(build_module(), build_loader())
    (clipping,) = (
        callback for callback in names["trainer"].callbacks if isinstance(callback, integration.GradientClipping)
    )
    assert clipping.report is not None


@on_ranks(2, fixture="ranks")
def test_docstring_example_of_fabric() -> None:
    with framework_environment():
        fabric, model = launch_fabric("ddp"), build_net()
        names: dict[str, Any] = {"distclip": distclip, "clip_gradients": clip_gradients, "loss": mse}
        names |= {"fabric": fabric, "model": model, "optimizer": sgd(model.parameters())}
        names["loader"] = fabric.setup_dataloaders(build_loader())
        with mock.patch.object(fabric, "save") as save:
            exec(example_in(clip_gradients), names)
    assert set(save.call_args.args[1]) == {"model", "optimizer", "clipper"}
    assert not bool(names["report"].skipped)


def test_callback_can_be_pickled() -> None:
    """Strategies that start processes pickle the Trainer with its callbacks, before it has a model."""
    callback = integration.GradientClipping(distclip.zclip(cap=5.0), on_nonfinite="raise", max_skips=3)
    callback.load_state_dict({"0": {}, "1": {}})
    other = pickle.loads(pickle.dumps(callback))
    assert other.state_dict() == callback.state_dict()
    assert other.clippers == [None, None]


@pytest.mark.filterwarnings("ignore")
def test_trainer_can_be_pickled_after_training(tmp_path: Path) -> None:
    """The copy has the policy's state, and continues. Lightning cannot find the size of batches of such a module."""
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 1)

        def training_step(self, dataloader_iter: Any) -> Tensor:
            next(dataloader_iter)
            return self.net(torch.ones(4, 2)).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callback = integration.GradientClipping(distclip.zclip(cap=5.0))
    trainer = Trainer(max_steps=2, callbacks=[callback], default_root_dir=tmp_path, **options)
    trainer.fit(Module(), [["no tensor"]] * 2)
    assert "grad/norm" in trainer.callback_metrics
    copy = pickle.loads(pickle.dumps(callback))
    assert copy.clippers == [None]
    Trainer(max_steps=1, callbacks=[copy], default_root_dir=tmp_path, **options).fit(Module(), [["no tensor"]])
    assert copy.clipper.steps == 3
