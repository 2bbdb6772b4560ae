"""What becomes of a step that is left out, and of an engine that is attached to, given back, or cannot be."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distclip import GradClipper, global_norm, median_mad, value, zclip
from distclip.integrations.deepspeed import attach, config, detach
from tests.integrations.deepspeed.engines import NAN, Setting, Uneven, caught, engine_of, masters, sgd, step


def nonfinite(setting: Setting, rule: str) -> None:
    """A NaN on the last rank: what `on_nonfinite` says, on all ranks alike."""
    torch.manual_seed(0)
    engine = engine_of(Uneven(), setting, sgd)
    attached = attach(engine, zclip(cap=1.0, warmup=1), on_nonfinite=rule)  # type: ignore[arg-type]
    step(engine, setting, 0)
    before, memory = masters(engine), attached.clipper.state_dict()
    scale = attached._adapter.loss_scale
    last = dist.get_world_size() - 1
    said, raised = caught(lambda: step(engine, setting, 1, NAN, last))
    after, scaled = masters(engine), scale is not None
    unchanged = all(torch.equal(after[n], before[n]) for n in before)
    if rule == "raise" and not scaled:
        assert raised.startswith("NonFiniteError: step 2: elements are not finite in"), raised
        assert unchanged
        return
    assert not raised, raised
    if rule == "skip" or scaled:
        assert unchanged and engine.skipped_steps == 1 and not engine.was_step_applied()
        assert bool(attached.report.skipped) and not bool(attached.report.finite)
        assert len(said) == (0 if scaled else 1), said
        assert attached.clipper.skipped == 1
        assert all(map(torch.equal, flat_state(memory), flat_state(attached.clipper.state_dict())))
        if scaled:
            assert attached._adapter.loss_scale == scale / 2
    elif rule == "zero":
        assert len(said) == 1 and "were set to zero" in said[0], said
        assert all(bool(value.isfinite().all()) for value in after.values())
        # All elements are bad, so nothing is left but momentum.
        assert engine.skipped_steps == 0 and not unchanged
    else:
        assert engine.skipped_steps == 0 and not said
        assert any(bool(value.isnan().any()) for value in after.values())
        assert torch.as_tensor(engine.get_global_grad_norm()).isnan()
        return
    step(engine, setting, 2)
    after_all = masters(engine)
    assert all(bool(value.isfinite().all()) for value in after_all.values())
    assert any(not torch.equal(after_all[n], after[n]) for n in after)
    assert engine.skipped_steps == (0 if rule == "zero" and not scaled else 1)


def flat_state(state: dict[str, Any]) -> list[Tensor]:
    """What a policy remembers."""
    return [value for slot in state["state"].values() for value in slot.values()]


def leaves_out(setting: Setting) -> None:
    """A spike that the policy leaves out: nothing moves, and the loss scale has nothing to do with it."""
    torch.manual_seed(0)
    engine = engine_of(Uneven(), setting, lambda groups: torch.optim.SGD(groups, lr=0.001))
    attached = attach(engine, median_mad(k=3, window=8, warmup=3, skip=True))
    for _ in range(5):
        step(engine, setting, 0)
    before, scale = masters(engine), attached._adapter.loss_scale
    step(engine, setting, 0, 200.0)
    after = masters(engine)
    assert all(torch.equal(after[n], before[n]) for n in before), attached.report.as_dict()
    assert attached._adapter.loss_scale == scale
    assert engine.skipped_steps == 1 and bool(attached.report.finite) and bool(attached.report.skipped)
    torch.testing.assert_close(torch.as_tensor(engine.get_global_grad_norm()), attached.report.norm)


def gives_back(setting: Setting) -> None:
    """After `detach` an engine clips by its own config, and may be attached to anew, to a clipper with its memory."""
    torch.manual_seed(0)
    setting.top.update({"gradient_clipping": 1e-3})
    engine, twin = (engine_of(copy.deepcopy(module), setting, sgd) for module in [Uneven()] * 2)
    optimizer = getattr(engine, "basic_optimizer", engine.optimizer)
    early = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    before = {key for key, value in vars(engine.optimizer).items() if callable(value)}
    attached = attach(engine, global_norm(1e-6))
    step(engine, setting, 0)
    with warnings.catch_warnings():
        # It would warn of a step that was put in place of the one it knows.
        warnings.simplefilter("error")
        early.step()
    detach(engine)
    assert before == {key for key, value in vars(engine.optimizer).items() if callable(value)}
    for seed in range(1, 4):
        moved = []
        for each in (engine, twin):
            start = masters(each)
            step(each, setting, seed)
            end = masters(each)
            moved.append(torch.cat([(end[n] - start[n]).flatten() for n in start]).norm())
        assert 0.5 < float(moved[0] / moved[1]) < 2, moved
    clipper = GradClipper(Uneven(), zclip(cap=1.0, warmup=1), max_skips=3)
    clipper._counter.skipped = 7
    again = attach(engine, clipper)
    # A scheduler made while a policy is attached finds an optimizer whose step is a method.
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    step(engine, setting, 4)
    assert again.clipper is clipper and clipper.skipped == 7 and again.report is not None
    assert attached.report is not again.report


def reloads(setting: Setting, policy: Any, folder: str) -> None:
    """After a checkpoint of DeepSpeed is loaded, the weights that a policy looks at are those of the checkpoint."""
    torch.manual_seed(0)
    setting.top.update({"gradient_clipping": 1e-3})
    engine = engine_of(Uneven(), setting, sgd)
    attached = attach(engine, policy)
    step(engine, setting, 0)
    engine.save_checkpoint(folder, tag="one")
    seen = []
    for _ in range(2):
        step(engine, setting, 1)
        seen.append((attached.report.norms, attached.report.coefs, masters(engine)))
        step(engine, setting, 2)
        engine.load_checkpoint(folder, tag="one")
    for once, again in zip(seen[0][:2], seen[1][:2], strict=True):
        torch.testing.assert_close(again, once, rtol=0, atol=0)
    assert all(torch.equal(seen[0][2][name], seen[1][2][name]) for name in seen[0][2])
    assert float(seen[0][1].min()) < 1


def refuses() -> None:
    """Bad input, on one rank or all: an error on each of them, and the engine is as before."""
    engine = engine_of(Uneven(), Setting(1), sgd)
    first = dist.get_rank() == 0
    for call, text in (
        (lambda: attach(engine, 1.0), "policy=1.0: expected a policy"),  # type: ignore[arg-type]
        (lambda: attach(engine, 1.0 if first else global_norm(1.0)), "policy=1.0"),  # type: ignore[arg-type]
        (lambda: attach(engine if first else object(), global_norm(1.0)), "expected what deepspeed.initialize"),
        (lambda: attach(engine, global_norm(1.0 if first else 2.0)), "were given different policies"),
        (lambda: attach(engine, GradClipper(Uneven(), value(1.0)), on_nonfinite="skip"), "has its own on_nonfinite"),
        (lambda: detach(engine), "nothing is attached"),
        (lambda: config(value(1.0)), "DeepSpeed itself clips the 2-norm"),
        (lambda: config(global_norm(1.0, 3.0)), "DeepSpeed itself clips the 2-norm"),
    ):
        _, raised = caught(call)
        assert text in raised, (text, raised)
    attach(engine, global_norm(1.0))
    _, raised = caught(lambda: attach(engine, global_norm(1.0)))
    assert "has a policy already" in raised
    step(engine, Setting(1), 0)
