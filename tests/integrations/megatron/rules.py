"""What becomes of a step that is left out, and of an optimizer that is attached to, given back, or cannot be."""

from __future__ import annotations

import copy
import re
import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distclip import (
    DistclipError,
    NonFiniteWarning,
    PeerError,
    TooManySkippedSteps,
    agc,
    global_norm,
    median_mad,
    per_tensor_norm,
    reference,
    zclip,
)
from distclip.integrations.megatron import attach, detach
from tests.integrations.megatron.model import (
    LR,
    SCALE,
    Places,
    Setting,
    fill,
    made,
    megatron,
    optimizer_of,
    piece,
    wholes,
)
from tests.integrations.megatron.training import alike, leaves_of, owned
from tests.ranks import everywhere

RULES = {"skip": "nan", "raise": "-inf", "zero": "nan", "propagate": "inf"}


def is_last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def last_value(model: Any, optimizer: Any) -> tuple[Tensor, Tensor, int]:
    """(gradient, what is stepped, its first element in the gradient) of a parameter that this rank steps."""
    *_, (_, param, own, here) = owned(model, optimizer)
    return param.main_grad.view(-1), own, here.start


def poison(model: Any, optimizer: Any, bad: float) -> None:
    """One element of one gradient on the last rank."""
    if is_last():
        grad, _, at = last_value(model, optimizer)
        grad[at] = bad


def everything(model: Any, optimizer: Any, attached: Any = None) -> list[Tensor]:
    """All that a step changes on this rank: parameters, what is stepped in their place, optimizer, and the policy's."""
    tensors = [param for _, param in model.module.named_parameters()]
    tensors += [own for _, _, own, _ in owned(model, optimizer)]
    for leaf in leaves_of(optimizer):
        tensors += [x for state in leaf.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    if attached is not None:
        tensors += [x for slot in attached.clipper.state_dict()["state"].values() for x in slot.values()]
    return [tensor.detach().clone() for tensor in tensors]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(map(torch.equal, one, two))


def scales_of(optimizer: Any) -> list[float]:
    """The loss scales of all optimizers of a chain, on all ranks the same."""
    return alike([float(leaf.get_loss_scale()) for leaf in leaves_of(optimizer)])[0]


def stepped(optimizer: Any) -> tuple[Any, list[str], str]:
    """What a step returned, warned of and raised, on all ranks the same."""
    out, raised = None, ""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            out = optimizer.step()
        except Exception as error:
            raised = f"{type(error).__name__}: {error}"
    said = [str(w.message) for w in seen if w.category is NonFiniteWarning]
    alike((str(out), said, raised))
    return out, said, raised


def nonfinite(setting: Setting) -> None:
    """NaN and Inf in one place on one rank: what `on_nonfinite` says, on all ranks alike."""
    with megatron(setting):
        for rule, bad in RULES.items():
            _nonfinite(setting, rule, float(bad))


def _nonfinite(setting: Setting, rule: str, bad: float) -> None:
    model, scaled = made(setting), setting.dtype == "fp16"
    optimizer = optimizer_of(model, setting, sgd_momentum=0.0 if rule == "zero" else 0.9)
    attached = attach(optimizer, zclip(cap=1.0, warmup=1), model=[model], on_nonfinite=rule)  # type: ignore[arg-type]
    fill(model, setting)
    assert stepped(optimizer)[0][0]
    fill(model, setting)
    poison(model, optimizer, bad)
    before = everything(model, optimizer, attached)
    *_, own, _ = last_value(model, optimizer)
    element = own[0].clone()
    out, said, raised = stepped(optimizer)
    after = everything(model, optimizer, attached)
    if scaled or rule in ("skip", "raise"):
        assert same(before, after), rule
    if rule == "raise" and not scaled:
        assert re.match(r"NonFiniteError: step 2: elements are not finite in .+ \(1 (NaN|Inf) on rank \d\)", raised)
        return
    assert not raised, raised
    if scaled or rule == "skip":
        assert out == (False, None, None)
        assert bool(attached.report.skipped) and not bool(attached.report.finite)
        assert len(said) == (0 if scaled else 1) and attached.clipper.skipped == 1
        assert set(scales_of(optimizer)) == {SCALE / 2 if scaled else 1.0}
        fill(model, setting, scale=SCALE / 2 if scaled else 1.0)
        assert stepped(optimizer)[0][0]
        moved = everything(model, optimizer, attached)
        assert not same(after, moved) and all(bool(x.isfinite().all()) for x in moved)
    elif rule == "zero":
        assert out[0] and len(said) == 1 and "were set to zero" in said[0]
        assert not same(before, after) and all(bool(x.isfinite().all()) for x in after)
        assert not is_last() or torch.equal(own[0], element)
    else:
        assert out[0] and not said and not torch.tensor(out[1]).isfinite()
        assert not is_last() or not bool(own[0].isfinite())


def gives_up(setting: Setting) -> None:
    """The last of too many skipped steps in a row raises on all ranks; one that goes well begins anew."""
    with megatron(setting):
        model = made(setting)
        optimizer = optimizer_of(model, setting)
        attached = attach(optimizer, global_norm(1.0), model=[model], max_skips=2)
        for bad in (True, False, True):
            fill(model, setting, scale=scales_of(optimizer)[0])
            if bad:
                poison(model, optimizer, float("nan"))
            assert stepped(optimizer)[0][0] is not bad
        fill(model, setting, scale=scales_of(optimizer)[0])
        poison(model, optimizer, float("nan"))
        before = everything(model, optimizer, attached)
        raised = stepped(optimizer)[2]
        assert raised.startswith(f"{TooManySkippedSteps.__name__}: step 4: 2 steps in a row were skipped"), raised
        assert same(before, everything(model, optimizer, attached))


def leaves_out(setting: Setting) -> None:
    """A spike that the policy leaves out: nothing moves, and the loss scale has nothing to do with it."""
    with megatron(setting):
        model = made(setting)
        optimizer = optimizer_of(model, setting)
        attached = attach(optimizer, median_mad(k=3, window=8, warmup=3, skip=True), model=[model])
        for _ in range(5):
            fill(model, setting)
            assert stepped(optimizer)[0][0]
        before, scales = everything(model, optimizer), scales_of(optimizer)
        fill(model, setting, lambda name, grad: grad * 200)
        assert stepped(optimizer)[0] == (False, None, None)
        assert same(before, everything(model, optimizer))
        assert bool(attached.report.finite) and bool(attached.report.skipped) and scales_of(optimizer) == scales


def grows(setting: Setting) -> None:
    """A step at which the loss scale grows is a step like any other, and all of a chain grow together."""
    with megatron(setting):
        model = made(setting)
        optimizer = optimizer_of(model, setting, loss_scale_window=2)
        attach(optimizer, global_norm(1.0), model=[model])
        true = float(reference.total_norm(wholes(model, setting).values()))
        seen = []
        for _ in range(6):
            seen += scales_of(optimizer)
            start = [own.clone() for *_, own, _ in owned(model, optimizer)]
            fill(model, setting, scale=seen[-1])
            success, norm, _ = optimizer.step()
            assert success and abs(norm / true - 1) < 1e-6
            for (name, param, own, here), old in zip(owned(model, optimizer), start, strict=True):
                grad = piece(name, param, setting, "gradients").reshape(-1)[here]
                torch.testing.assert_close(old - own, LR / true * grad, rtol=1e-4, atol=1e-5)
            # Nobody else keeps the slices of gradients alive; what is no slice is Megatron's own buffer.
            slices = [weakref.ref(p.main_param.grad) for _, p, *_ in owned(model, optimizer) if setting.distributed]
            optimizer.zero_grad()
            assert not any(grad() is not None for grad in slices)
        assert sorted(set(seen)) == [SCALE, 2 * SCALE, 4 * SCALE]


def backs_off(setting: Setting, how: str) -> tuple[bool, list[float]]:
    """Whether a step was made, and the loss scales, after an expert's gradient on the last rank was not finite."""
    with megatron(setting):
        model = made(setting)
        optimizer = optimizer_of(model, setting)
        if how == "attach":
            attach(optimizer, global_norm(1.0), model=[model])
        fill(model, setting, lambda name, grad: grad * float("inf") if is_last() and "expert" in name else grad)
        return optimizer.step()[0], [float(leaf.get_loss_scale()) for leaf in leaves_of(optimizer)]


def looks_again(setting: Setting) -> None:
    """Weights that were moved to other memory since, as by a reload, are those that the policy looks at."""
    with megatron(setting):
        model = made(setting)
        optimizer = optimizer_of(model, setting)
        attached = attach(optimizer, agc(1e-3), model=[model])
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        seen = []
        for _ in range(2):
            fill(model, setting)
            assert stepped(optimizer)[0][0]
            seen.append(attached.report.coefs)
            for _, param, *_ in owned(model, optimizer):
                param.main_param.data = 4 * param.main_param.data
        torch.testing.assert_close(seen[1], 4 * seen[0])


def fails(setting: Setting) -> None:
    """An exception in what one rank does alone: all raise in that step, and the next one is made."""
    with megatron(setting):
        model = made(setting)
        optimizer = optimizer_of(model, setting)
        attached = attach(optimizer, per_tensor_norm(0.1), model=[model])
        fill(model, setting)
        before = everything(model, optimizer, attached)
        leaf = leaves_of(optimizer)[-1]
        place = "_copy_model_grads_to_main_grads" if hasattr(leaf, "grad_scaler") else "prepare_grads"
        raised: Any = None
        with ExitStack() as stack:
            if is_last():
                stack.enter_context(mock.patch.object(leaf, place, side_effect=RuntimeError("no memory")))
            try:
                optimizer.step()
            except RuntimeError as error:
                raised = error
        peer = f"rank {dist.get_world_size() - 1} failed with RuntimeError: "
        assert str(raised) == ("" if is_last() else peer) + "no memory"
        assert is_last() or isinstance(raised, PeerError)
        assert same(before, everything(model, optimizer, attached))
        fill(model, setting)
        assert stepped(optimizer)[0][0]
        assert not same(before, everything(model, optimizer, attached))


def gives_back(setting: Setting) -> None:
    """After `detach` an optimizer clips by its own config, and may be attached to anew."""
    with megatron(setting):
        model = made(setting)
        optimizer = optimizer_of(model, setting, log_num_zeros_in_grad=True)
        kept = dict(vars(optimizer))

        def step() -> tuple[float, float, float]:
            """How far this rank's parameters went, and what the step says of norm and zeros."""
            start = [own.clone() for *_, own, _ in owned(model, optimizer)]
            fill(model, setting, lambda name, grad: torch.where(grad < 0, 0.0, grad) if "norm" in name else grad)
            success, norm, zeros = optimizer.step()
            assert success and zeros > 0
            moved = [old - own for (*_, own, _), old in zip(owned(model, optimizer), start, strict=True)]
            return float(torch.cat(moved).norm()), norm, zeros

        first = attach(optimizer, global_norm(1e-2), model=[model])
        ours = step()
        detach(optimizer)
        assert vars(optimizer) == kept
        theirs = step()
        # Their bound is a hundred times ours.
        torch.testing.assert_close(theirs, (100 * ours[0], *ours[1:]), rtol=1e-3, atol=0)
        again = attach(optimizer, global_norm(1e-2), model=[model])
        torch.testing.assert_close(step(), ours, rtol=1e-3, atol=0)
        assert first.report is not again.report and torch.equal(first.report.norm, again.report.norm)


def frozen(setting: Setting) -> None:
    """A stage without parameters to train takes part in every decision."""
    with megatron(setting):
        place = Places()
        model = made(setting, trained=place.pp == 0)
        optimizer = optimizer_of(model, setting)
        assert (not optimizer.chained_optimizers[0].get_parameters()) is (place.pp > 0)
        attach(optimizer, per_tensor_norm(0.1), model=[model])
        fill(model, setting)
        told = everywhere([piece(n, p, setting, "gradients") for n, p in model.module.named_parameters()])
        success, norm, _ = stepped(optimizer)[0]
        true = float(reference.total_norm(told[0]))
        assert success and abs(norm / true - 1) < 1e-6
        fill(model, setting)
        if not place.pp:
            grad, _, at = last_value(model, optimizer)
            grad[at] = float("inf")
        out, said, _ = stepped(optimizer)
        assert out == (False, None, None) and len(said) == (setting.dtype != "fp16")
        scales_of(optimizer)


def refused(call: Callable[[], Any]) -> str:
    """What a call raises, on all ranks the same."""
    try:
        call()
    except DistclipError as error:
        return alike(re.sub(r"rank \d+: ", "", str(error)))[0]
    raise AssertionError("nothing was raised")


def refuses() -> None:
    """Bad input, on one rank or all: an error on each of them, and the optimizers are as before."""
    plain, cut = Setting(), Setting(dtype="fp16", distributed=True)
    with megatron(plain):
        from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
        from megatron.core.process_groups_config import ProcessGroupCollection

        model, half = made(plain), made(cut)
        optimizer, scaled = optimizer_of(model, plain), optimizer_of(half, cut)
        first, kept = dist.get_rank() == 0, (dict(vars(optimizer)), dict(vars(scaled)))
        (leaf,) = leaves_of(scaled)
        flat: Any = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)
        collection = ProcessGroupCollection.use_mpu_process_groups(["dp_cp", "expt_dp"])
        by_layer = LayerWiseDistributedOptimizer([optimizer_of(made(plain), plain)], leaf.config, collection)
        fsdp, aware = replace(leaf.ddp_config, use_megatron_fsdp=True), copy.copy(leaf.config)
        aware.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        every, tensor = global_norm(1.0), per_tensor_norm(1.0)
        wrong: Any = 1.0
        for call, text in (
            (lambda: attach(flat if first else optimizer, every), "optimizer=SGD: expected what megatron.core"),
            (lambda: attach(optimizer, tensor), 'a policy with per="tensor" or exclude= uses the names'),
            (lambda: attach(optimizer, tensor, model=None if first else [model]), "uses the names of parameters"),
            (lambda: attach(optimizer, tensor, model=half if first else model), "that model= does not have"),
            (lambda: attach(optimizer, agc(exclude=["nowhere"]), model=model), "'nowhere' matches none of"),
            (lambda: attach(optimizer, global_norm(1.0 if first else 2.0)), "were given different policies"),
            (lambda: attach(optimizer, wrong if first else every), "policy=1.0: expected a policy"),
            (lambda: attach(optimizer, every, on_nonfinite=wrong), "on_nonfinite=1.0"),
            (lambda: attach(scaled if first else optimizer, every), "have no loss scale and those of other ranks do"),
            (lambda: attach(by_layer if first else optimizer, every), "LayerWiseDistributedOptimizer keeps its"),
            (lambda: detach(optimizer), "nothing is attached"),
        ):
            said = refused(call)
            assert text in said, (text, said)
        for name, value, text in (
            ("ddp_config", fsdp, "attach: Megatron-FSDP keeps its gradients"),
            ("config", aware, "attach: a precision-aware optimizer keeps its gradients"),
        ):
            with mock.patch.object(leaf, name, value if first else getattr(leaf, name)):
                said = refused(lambda: attach(scaled, every))
            assert text in said, (text, said)
        assert (vars(optimizer), vars(scaled)) == kept
        attach(optimizer, every)
        assert "has a policy already" in refused(lambda: attach(optimizer, every))
        if first:
            detach(optimizer)
        assert "has a policy already" in refused(lambda: attach(optimizer, every))
