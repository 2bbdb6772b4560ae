"""Accelerate, as a loop of one's own uses it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip.integrations import accelerate as ours
from tests.integrations.plain import (
    ROWS,
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

FP16 = 1024.0
"""The loss scale."""


def forget() -> None:
    """What Accelerate keeps of the last one in this process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_USE_", "PARALLELISM_CONFIG_"))]:
        del os.environ[name]


def as_on_a_device() -> None:
    """On a CPU Accelerate passes over its FSDP plugin without a word and prepares DDP, and refuses tensor parallelism.

    So it is told that its processes have a device of some kind each; that device is the CPU all the same.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def accelerator(kind: str, ga: int = 1, *, fp16: bool = False) -> Any:
    """A new one in a process that has had others."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    forget()
    plugin = None
    if kind == "fsdp2":
        as_on_a_device()
        # To gather tensors in full fails on a CPU: torch hands them out before they are there.
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="no_wrap", state_dict_type="SHARDED_STATE_DICT"
        )
    made = Accelerator(cpu=True, gradient_accumulation_steps=ga, fsdp_plugin=plugin)
    if fp16:
        # On a CPU it makes no scaler of its own.
        made.scaler = torch.amp.GradScaler("cpu", init_scale=FP16)  # type: ignore[attr-defined]
        made.native_amp, made.state._mixed_precision = True, "fp16"
    return made


def attached(made: Any, policy: Any, **options: Any) -> Any:
    """The accelerator, with a policy attached."""
    assert ours.attach(made, policy, **options) is made.distclip
    return made


def is_of(model: Any, kind: str) -> bool:
    """Whether the model is what it was to be."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    kinds = {"ddp": DistributedDataParallel, "fsdp2": FSDPModule}
    return isinstance(model, kinds[kind])


def loader(ga: int = 1) -> Any:
    return torch.utils.data.DataLoader(Samples(ga), batch_size=ROWS)


def prepared(made: Any, ga: int = 1, optimizer: Callable[[Any], Any] = sgd) -> tuple[Any, Any, Any]:
    model = net()
    return made.prepare(model, optimizer(model.parameters()), loader(ga))  # type: ignore[no-any-return]


def loop(made: Any, model: Any, optimizer: Any, data: Any, poisoned: int | None = None) -> list[dict[str, Any]]:
    """The loop of Accelerate's own examples; of each step the norm, whether it was skipped, and what it left."""
    seen: list[dict[str, Any]] = []
    for x, y in data:
        with made.accumulate(model):
            made.backward(mse(model(x), y))
            if made.sync_gradients and poisoned == len(seen):
                poison(model)
            norm = made.clip_grad_norm_(model.parameters(), 1e-9)
            assert (norm is None) == (not made.sync_gradients)
            optimizer.step()
            optimizer.zero_grad()
        if norm is not None:
            skipped = made.optimizer_step_was_skipped
            seen.append({"norm": float(norm), "skipped": skipped, "params": whole(model)})
    return seen


def trains(kind: str, policy: Any, ga: int = 1) -> None:
    """Parameters and norms as in the plain loop."""
    with among_others():
        made = attached(accelerator(kind, ga), policy)
        parts = prepared(made, ga)
        assert is_of(parts[0], kind), type(parts[0])
        seen = loop(made, *parts)
    agree(seen[-1]["params"], [step["norm"] for step in seen], policy, ga)
    assert set(made.distclip.clipper.parameters) >= {"first.weight", "last.bias"}, made.distclip.clipper.parameters
    alike(made.distclip.report.as_dict())


def skips(kind: str, rule: str) -> None:
    """A NaN on one rank at the third step."""
    with among_others() as caught:
        made = attached(accelerator(kind), distclip.zclip(cap=1.0, warmup=1), on_nonfinite=rule)  # type: ignore[arg-type]
        model, optimizer, data = prepared(made)
        assert is_of(model, kind), type(model)
        scheduler = made.prepare(torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1000))
        seen: list[dict[str, Any]] = []
        said = raised(lambda: seen.extend(loop(made, model, optimizer, data, poisoned=2)))
        if rule == "raise":
            assert said.startswith("NonFiniteError: step 3"), said
            return
        assert not said, said
        # Set by a skipped step, see below.
        optimizer._is_overflow = True
        before = scheduler.scheduler._step_count
        scheduler.step()
        assert scheduler.scheduler._step_count == before
    warned = [w for w in caught if w.category is distclip.NonFiniteWarning]
    assert [step["skipped"] for step in seen] == [False, False, True, False, False]
    assert len(warned) == 1 and made.distclip.clipper.skipped == 1
    params = [step["params"] for step in seen]
    assert equal(params[1], params[2]) and not equal(params[2], params[3])
    assert all(bool(value.isfinite().all()) for value in params[-1].values())


def resumes(kind: str, folder: str) -> None:
    """`save_state` and `load_state`: what is remembered goes along, loaded before the first step or after it."""
    policy = distclip.zclip(cap=1.0, warmup=1)
    path = os.path.join(everywhere(folder)[0], kind)

    with among_others():
        first = attached(accelerator(kind), policy)
        parts = prepared(first)
        loop(first, *parts)
        first.save_state(path)
        memory = first.distclip.state_dict()
        expected = loop(first, *parts)

        for before in (True, False):
            second = attached(accelerator(kind), policy)
            parts = prepared(second)
            if not before:
                loop(second, *parts)
            second.load_state(path)
            assert equal(second.distclip.state_dict(), memory)
            again = loop(second, *parts)
            assert [step["norm"] for step in again] == [step["norm"] for step in expected]
            assert equal(again[-1]["params"], expected[-1]["params"])
    assert equal(second.distclip.state_dict(), first.distclip.state_dict())


def scales(fused: bool) -> None:
    """fp16 under a GradScaler: unscaled once, and an overflow is skipped on both ranks."""

    def adamw(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=0.02, fused=fused)

    policy = distclip.global_norm(0.5)
    with among_others():
        made = attached(accelerator("ddp", fp16=True), policy)
        parts = prepared(made, optimizer=adamw)
        seen = loop(made, *parts)
        agree(seen[-1]["params"], [step["norm"] for step in seen], policy, fp16=True, optimizer=adamw)
        assert made.scaler.get_scale() == FP16 and not any(step["skipped"] for step in seen)
        seen = loop(made, *parts, poisoned=2)
    assert [step["skipped"] for step in seen] == [False, False, True, False, False]
    assert equal(seen[1]["params"], seen[2]["params"])
    alike(made.scaler.get_scale(), made.distclip.clipper.skipped)
    assert made.scaler.get_scale() == FP16 / 2 and made.distclip.clipper.skipped == 1


def two_optimizers(patched: bool) -> None:
    """Two under one GradScaler: Accelerate alone unscales the second twice."""
    policy = distclip.global_norm(0.5)
    with among_others():
        made = accelerator("ddp", fp16=True)
        if patched:
            ours.attach(made, policy)
        model = net()
        model, one, other, data = made.prepare(
            model, sgd(model.first.parameters()), sgd(model.last.parameters()), loader()
        )
        norms = []
        for x, y in data:
            made.backward(mse(model(x), y))
            norms.append(float(made.clip_grad_norm_(model.parameters(), 0.5)))
            for optimizer in (one, other):
                optimizer.step()
                optimizer.zero_grad()
    said = raised(lambda: agree(whole(model), norms, policy, fp16=True))
    assert (not said) if patched else "AssertionError" in said, said
    assert made.scaler.get_scale() == FP16


def overflows_of_two() -> None:
    """Neither steps, and the scale is halved."""
    with among_others():
        made = attached(accelerator("ddp", fp16=True), distclip.global_norm(0.5))
        model = net()
        model, one, other, data = made.prepare(
            model, sgd(model.first.parameters()), sgd(model.last.parameters()), loader()
        )
        before = whole(model)
        x, y = next(iter(data))
        made.backward(mse(model(x), y))
        poison(model, None)
        made.clip_grad_norm_(model.parameters(), 0.5)
        one.step()
        other.step()
    assert equal(before, whole(model)) and one.step_was_skipped and other.step_was_skipped
    alike(made.scaler.get_scale())
    assert made.scaler.get_scale() < FP16


def refuses(kind: str) -> None:
    """Wrong parameters, on one rank only: both raise, in words, and nothing is touched."""
    policy = distclip.global_norm(0.5)
    with among_others():
        assert "expected a policy" in raised(lambda: ours.attach(accelerator(kind), 1.0))  # type: ignore[arg-type]
        made = attached(accelerator(kind), policy)
        assert "has a policy already" in raised(lambda: ours.attach(made, policy))
        model, _, data = prepared(made)
        x, y = next(iter(data))

        def said(passed: list[Tensor]) -> str:
            model.zero_grad()
            made.backward(mse(model(x), y))
            before = [param.grad.clone() for param in every]
            mine = passed if dist.get_rank() == 1 else model.parameters()
            text = raised(lambda: made.clip_grad_norm_(mine, 1.0))
            assert not text or all(torch.equal(b, param.grad) for b, param in zip(before, every, strict=True))
            return text

        every = list(model.parameters())
        told = everywhere(said(every[1:]))
        assert all("first.weight" in text and "ArgumentError" in text for text in told), told
        told = everywhere(said([*every, torch.zeros(2, requires_grad=True)]))
        assert all("belong to no model" in text for text in told), told
        assert not said(every)

        ours.detach(made)
        model.zero_grad()
        made.backward(mse(model(x), y))
        norm = made.clip_grad_norm_(model.parameters(), 0.01)
        assert float(norm) > 0.01 and float(distclip.get_total_norm([p.grad for p in every])) <= 0.01 + 1e-6
        assert "nothing is attached" in raised(lambda: ours.detach(made))
        assert not hasattr(made, "distclip") and not made._custom_objects
        stands_in = type("Engine", (), {"distributed_type": "DEEPSPEED"})()
        assert "deepspeed.attach" in raised(lambda: ours.attach(stands_in, policy))


def refuses_unequal_models() -> None:
    """None was prepared, or one rank alone has prepared one more."""
    with among_others():
        made = attached(accelerator("ddp"), distclip.global_norm(0.5))
        told = everywhere(raised(lambda: made.clip_grad_norm_([], 1.0)))
        assert all("has prepared no model" in text for text in told), told
        model, _, _ = prepared(made)
        if dist.get_rank() == 0:
            made.prepare_model(net(), evaluation_mode=True)
        told = everywhere(raised(lambda: made.clip_grad_norm_(model.parameters(), 1.0)))
        assert all("have prepared [2, 1] models" in text for text in told), told


def communicates(kind: str) -> None:
    """One all-reduce a step, under DDP too."""
    with among_others():
        made = attached(accelerator(kind), distclip.global_norm(0.5))
        model, optimizer, data = prepared(made)
        counts = []
        for x, y in data:
            made.backward(mse(model(x), y))
            with CommDebugMode() as counter:
                made.clip_grad_norm_(model.parameters(), 1.0)
            counts.append({str(op): n for op, n in counter.get_comm_counts().items()})
            optimizer.step()
            optimizer.zero_grad()
    assert all("allreduce" in op and n == 1 for step in counts[1:] for op, n in step.items()), counts
    assert all(len(step) == 1 for step in counts[1:]), counts


def local_sgd() -> None:
    """Between two averages each process is on its own, and clips by its own norm."""
    from accelerate.local_sgd import LocalSGD

    with among_others():
        made = attached(accelerator("ddp"), distclip.global_norm(0.01), comm=distclip.LocalComm())
        model, optimizer, data = prepared(made)
        with LocalSGD(accelerator=made, model=model, local_sgd_steps=3) as local:
            for x, y in data:
                made.backward(mse(model(x), y))
                truth = float(distclip.get_total_norm([p.grad for p in model.parameters()]))
                norm = made.clip_grad_norm_(model.parameters(), 1.0)
                clipped = float(distclip.get_total_norm([p.grad for p in model.parameters()]))
                assert float(norm) == truth and clipped <= 0.01 + 1e-6 < truth
                assert len(set(everywhere(truth))) == 2
                optimizer.step()
                optimizer.zero_grad()
                local.step()
        assert len(set(everywhere(repr(whole(model))))) == 1


def infinite() -> None:
    """One infinity, to be clipped to infinity: all NaN by Accelerate; left as it is, or out, here."""
    with among_others():
        made = accelerator("ddp")
        model, _, data = prepared(made)
        x, y = next(iter(data))

        def grads() -> Tensor:
            model.zero_grad()
            made.backward(mse(model(x), y))
            poison(model, None, float("inf"))
            made.clip_grad_norm_(model.parameters(), float("inf"))
            return torch.cat([p.grad.view(-1) for p in model.parameters()])

        assert int(grads().isnan().sum()) > 0
        ours.attach(made, distclip.global_norm(float("inf")), on_nonfinite="zero")
        assert bool(grads().isfinite().all())


def its_own_script() -> None:
    """`training_check` of Accelerate's `test_script`: one process beside all, here with its `step` clipped in both."""
    import inspect

    from accelerate.test_utils.scripts import test_script as script

    made: list[Any] = []

    def patched(**options: Any) -> Any:
        made.append(attached(script.Accelerator(**options), distclip.global_norm(0.5)))
        return made[-1]

    text = inspect.getsource(script.mock_training) + inspect.getsource(script.training_check)
    for backward, clip in {
        "accelerator.backward(loss)": "accelerator.clip_grad_norm_(model.parameters(), 0.5)",
        "loss.backward()": "torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)",
    }.items():
        assert backward in text
        text = re.sub(rf"^( *){re.escape(backward)}$", rf"\1{backward}\n\1{clip}", text, flags=re.MULTILINE)
    with among_others():
        accelerator("ddp")
        known = {**vars(script), "Accelerator": patched, "print": lambda *_: None}
        exec(text, known)
        known["training_check"]()
    assert len(made) >= 2 and all(one.num_processes == 2 for one in made)
    alike([one.distclip.report.as_dict() for one in made])
