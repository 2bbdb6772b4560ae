"""The Trainer of transformers."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import distclip
from distclip.integrations import transformers as ours
from tests.integrations.accelerate.in_accelerate import as_on_a_device, forget, is_of
from tests.integrations.plain import (
    ROWS,
    STEPS,
    Net,
    Samples,
    agree,
    alike,
    among_others,
    equal,
    mse,
    net,
    poison,
    raised,
    sgd,
    whole,
)
from tests.ranks import everywhere


class Rows(Samples):
    def __getitem__(self, i: int) -> Any:
        return {"x": self.x[i], "y": self.y[i]}


class Model(Net):
    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return {"loss": mse(super().forward(x), y)}


def cut_in_two(model: Any) -> None:
    """Tensor parallel in its first layer alone: gradients on a mesh, and beside them plain ones."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    parallelize_module(model, mesh, {"first": ColwiseParallel(output_layouts=Replicate())})


def trainer(
    folder: str, kind: str = "ddp", ga: int = 1, bad: int | None = None, scale: float | None = None, **options: Any
) -> Any:
    """A Trainer with SGD, samples in order, and something bad in the gradients of a step."""
    from accelerate import ParallelismConfig
    from transformers import Trainer, TrainingArguments

    forget()

    class Ours(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(model, *args, **kwargs)
            if bad == self.state.global_step:
                poison(model, value=float("inf"))
            return loss  # type: ignore[no-any-return]

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
    rows = ROWS
    if kind == "tp":
        # Every rank has the same rows, and those of all.
        options |= {"parallelism_config": ParallelismConfig(tp_size=dist.get_world_size())}
        rows *= dist.get_world_size()
    args = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=ga,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        learning_rate=0.05,
        logging_nan_inf_filter=False,
        **options,
    )
    if kind != "ddp":
        assert args.device.type == "cpu"
        as_on_a_device()
    model = Model()
    model.load_state_dict(net().state_dict())
    if kind == "tp":
        cut_in_two(model)
    made = Ours(model=model, args=args, train_dataset=Rows(ga))
    if kind == "tp":
        model.tp_size = dist.get_world_size()  # as a model of transformers says of itself; Accelerate asks
    made.log = lambda logs, *args, **kwargs: type(made).log(made, dict(logs))
    if scale is not None:
        made.accelerator.native_amp, made.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)
        made.accelerator.state._mixed_precision = "fp16"
    return made


def attached(made: Any, policy: Any, **options: Any) -> Any:
    """The trainer, with a policy attached."""
    assert ours.attach(made, policy, **options) is made.distclip is made.accelerator.distclip
    return made


def norms(made: Any) -> list[float]:
    return [float(entry["grad_norm"]) for entry in made.state.log_history if "grad_norm" in entry]


def trains(policy: Any, folder: str, kind: str = "ddp", ga: int = 1, bound: float = 1.0) -> None:
    folder = everywhere(folder)[0]
    with among_others():
        made = attached(trainer(folder, kind, ga, max_grad_norm=bound), policy)
        made.train()
        if kind == "tp":
            assert {isinstance(param, DTensor) for param in made.model.parameters()} == {True, False}
        else:
            assert is_of(made.model_wrapped, kind), type(made.model_wrapped)
        agree(whole(made.model_wrapped), norms(made), policy, ga)
    history = [entry for entry in made.state.log_history if "grad_norm" in entry]
    assert all("grad_coef" in entry and entry["grad_skipped"] == 0 for entry in history), history
    alike(norms(made))


def skips(folder: str, rule: str, kind: str = "ddp", scale: float | None = None) -> None:
    """An Inf in one rank's piece at the third step: that step changes nothing, nor does the scheduler count it."""
    folder = everywhere(folder)[0]
    policy = distclip.zclip(cap=1.0, warmup=1)
    with among_others() as caught:
        made = trainer(folder, kind, bad=2, scale=scale, max_grad_norm=0, lr_scheduler_type="linear")
        ours.attach(made, policy, on_nonfinite=rule)  # type: ignore[arg-type]
        said = raised(made.train)
        if rule == "raise" and scale is None:
            assert said.startswith("NonFiniteError: step 3"), said
            return
        assert not said, said
        params = whole(made.model_wrapped)
    assert all(bool(param.isfinite().all()) for param in params.values())
    skipped = [entry["grad_skipped"] for entry in made.state.log_history if "grad_norm" in entry]
    assert skipped == [0, 0, 1, 1, 1] and made.lr_scheduler.last_epoch == STEPS - 1, skipped
    warned = sum(w.category is distclip.NonFiniteWarning for w in caught)
    assert warned == (0 if scale else 1)
    if scale:
        alike(made.accelerator.scaler.get_scale())
        assert made.accelerator.scaler.get_scale() == scale / 2
    alike(made.accelerator.distclip.clipper.skipped)


def scales(folder: str, kind: str = "ddp") -> None:
    """fp16: unscaled once, and the norm in the log is free of the scale."""
    policy = distclip.global_norm(0.5)
    with among_others():
        made = attached(trainer(everywhere(folder)[0], kind, scale=1024.0), policy)
        made.train()
        agree(whole(made.model_wrapped), norms(made), policy, fp16=True)


def resumes(folder: str, kind: str = "ddp") -> None:
    """From a checkpoint in the middle: the same bits."""
    folder = everywhere(folder)[0]
    policy = distclip.zclip(cap=1.0, warmup=1)
    with among_others():
        through = attached(trainer(folder, kind, save_strategy="steps", save_steps=3), policy)
        through.train()
        dist.barrier()
        rest = attached(trainer(folder, kind), policy)
        rest.train(resume_from_checkpoint=os.path.join(folder, "checkpoint-3"))
        assert norms(rest) == norms(through), (norms(rest), norms(through))
        assert equal(whole(rest.model_wrapped), whole(through.model_wrapped))
        memories = [made.accelerator.distclip.state_dict() for made in (rest, through)]
        assert equal(*memories) and int(memories[0]["counts"]["steps"]) == STEPS


def trains_again(folder: str) -> None:
    """A second `train` wraps the model anew: the memory stays."""
    with among_others():
        made = attached(trainer(everywhere(folder)[0]), distclip.zclip(cap=1.0, warmup=1))
        made.train()
        made.train()
        assert int(made.accelerator.distclip.state_dict()["counts"]["steps"]) == 2 * STEPS


def poisoned_by_transformers(folder: str) -> None:
    """Its own mistake: clipping is off, one element is infinite, and the way to the log makes everything NaN."""
    folder = everywhere(folder)[0]
    with among_others():
        theirs = trainer(folder, bad=2, max_grad_norm=0)
        theirs.train()
        broken = whole(theirs.model_wrapped)
        made = attached(trainer(folder, bad=2, max_grad_norm=0), distclip.global_norm(float("inf")))
        made.train()
        sound = whole(made.model_wrapped)
        assert sum(int(param.isnan().sum()) for param in broken.values()) > 1
        assert all(bool(param.isfinite().all()) for param in sound.values())


def refuses(folder: str) -> None:
    with among_others():
        made = trainer(everywhere(folder)[0])
        assert "expected a policy" in raised(lambda: ours.attach(made, 1.0))  # type: ignore[arg-type]
        assert "expected a Trainer of transformers" in raised(lambda: ours.attach(net(), distclip.global_norm(1.0)))
        its_own = getattr(made, "_has_mixed_mesh_grads", None)
        ours.attach(made, distclip.global_norm(1.0))
        assert "has a policy already" in raised(lambda: ours.attach(made, distclip.global_norm(1.0)))
        ours.detach(made)
        assert getattr(made, "_has_mixed_mesh_grads", None) == its_own and not hasattr(made.accelerator, "distclip")
        assert "nothing is attached" in raised(lambda: ours.detach(made))


def refuses_together(folder: str, kind: str) -> None:
    """A Trainer that on one rank passes what is not its model's."""
    with among_others():
        made = attached(trainer(everywhere(folder)[0], kind), distclip.global_norm(1.0))
        if dist.get_rank() == 1:
            stranger = torch.zeros(2, requires_grad=True)
            made._clip_grad_norm = lambda model: made.accelerator.clip_grad_norm_([*model.parameters(), stranger], 1.0)
        told = everywhere(raised(made.train))
        assert all("belong to no model" in text for text in told), told


def a_model_of_its_own(folder: str) -> None:
    """A small GPT-2 with AdamW and a schedule under DDP, where the Trainer's clipping is right: both come to one."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    tokens = torch.randint(64, (40, 8), generator=torch.Generator().manual_seed(2))
    rows = [{"input_ids": row, "labels": row} for row in tokens]

    def trained(bound: float, policy: Any = None) -> tuple[dict[str, Tensor], list[float]]:
        forget()
        args = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=5,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_grad_norm=bound,
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
        made = Trainer(model=GPT2LMHeadModel(config), args=args, train_dataset=rows)
        if policy is not None:
            ours.attach(made, policy)
        made.train()
        return whole(made.model_wrapped), norms(made)

    folder = everywhere(folder)[0]
    with among_others():
        (mine, seen), (theirs, expected) = trained(1.0, distclip.global_norm(0.1)), trained(0.1)
    assert len(seen) == 5 and min(seen) > 0.1
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected))
    torch.testing.assert_close(mine, theirs)
    alike(seen)
