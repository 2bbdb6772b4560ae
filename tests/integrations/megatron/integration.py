"""Run the checks of `tests.tables.integrations` in optimizers of Megatron-core."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distclip import (
    DistclipError,
    GradClipper,
    LocalComm,
    NonFiniteWarning,
    Report,
    agc,
    global_norm,
    median_mad,
    per_tensor_norm,
    reference,
    zclip,
)
from distclip.integrations.megatron import attach, detach
from tests.integrations.megatron.model import (
    DTYPES,
    LR,
    SCALE,
    Coordinates,
    Setting,
    build_model,
    build_optimizer,
    cut,
    fill,
    full_tensors,
    key_of,
    megatron,
)
from tests.ranks import gather_from_ranks, replicas_may_differ
from tests.tables.integrations import Integration

ROUNDING = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
NONFINITE = {"skip": "nan", "raise": "-inf", "zero": "nan", "propagate": "inf"}
"""The bad element under each rule."""


class OneProcess:
    """A training in one process, with every parameter of the model once, in float64.

    Args:
        weights: the weights at the start, by name.
        policy: the policy.
    """

    def __init__(self, weights: Mapping[str, Tensor], policy: Any) -> None:
        self.params = {key: nn.Parameter(weight.double()) for key, weight in weights.items()}
        self.optimizer = torch.optim.SGD(self.params.values(), lr=LR)
        self.clipper = GradClipper(list(self.params.items()), policy, comm=LocalComm())

    def step(self, grads: Mapping[str, Tensor]) -> Report:
        for key, param in self.params.items():
            param.grad = grads[key].double().clone()
        return self.clipper.step(self.optimizer)


def leaves_of(optimizer: Any) -> list[Any]:
    """Return the optimizers of a chain."""
    return list(optimizer.chained_optimizers)


def stepped_params(model: Any, optimizer: Any) -> Iterator[tuple[str, Tensor, Tensor, slice]]:
    """Yield what this rank steps, as Megatron has it.

    Yields:
        (name, parameter of the model, flat tensor that is stepped, range of its elements in the parameter).
    """
    leaf_of = {id(p): leaf for leaf in leaves_of(optimizer) for p in getattr(leaf, "model_param_gbuf_map", ())}
    distributed = any(hasattr(leaf, "model_param_gbuf_map") for leaf in leaves_of(optimizer))
    # A layer-wise optimizer has some of the parameters.
    groups = [group["params"] for leaf in leaves_of(optimizer) for group in leaf.optimizer.param_groups]
    groups += [group for leaf in leaves_of(optimizer) for group in getattr(leaf, "float16_groups", ())]
    owned = {id(param) for group in groups for param in group}
    for name, param in model.module.named_parameters():
        if not param.requires_grad:
            continue
        elements, stepped = slice(0, param.numel()), getattr(param, "main_param", param)
        if distributed:
            if id(param) not in leaf_of:
                continue
            param_range = leaf_of[id(param)]._get_model_param_range_map(param)["param"]
            elements = slice(param_range.start, param_range.end)
            if stepped is None:
                stepped = _master_of(leaf_of[id(param)], param)
            elif stepped is param:
                stepped = stepped.detach().view(-1)[elements]
        elif id(param) not in owned:
            continue
        yield name, param, stepped.detach().view(-1), elements


def _master_of(leaf: Any, param: Tensor) -> Tensor:
    """Return the float32 slice of a parameter that a precision-aware optimizer keeps."""
    group, index = leaf.model_param_group_index_map[param]
    master: Tensor = leaf.optimizer.master_of(leaf.optimizer.param_groups[group]["params"][index])
    return master


def check_equal_on_ranks(value: Any) -> list[Any]:
    """Check that every rank has the same value, and return it by rank."""
    by_rank = gather_from_ranks(value)
    assert by_rank == [by_rank[0]] * len(by_rank)
    return by_rank


def is_last_rank() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def last_piece(model: Any, optimizer: Any) -> tuple[Tensor, Tensor, int]:
    """Return (gradient, stepped tensor, index of its first element in the gradient) of this rank's last piece."""
    *_, (_, param, stepped, elements) = stepped_params(model, optimizer)
    return param.main_grad.view(-1), stepped, elements.start


def poison(model: Any, optimizer: Any, bad: float) -> None:
    """Overwrite one element of one gradient on the last rank."""
    if is_last_rank():
        grad, _, start = last_piece(model, optimizer)
        grad[start] = bad


def copy_state(model: Any, optimizer: Any, attachment: Any = None) -> list[Tensor]:
    """Copy all that a step changes on this rank: parameters, their stepped tensors, optimizer and policy."""
    tensors = [param for _, param in model.module.named_parameters()]
    tensors += [stepped for _, _, stepped, _ in stepped_params(model, optimizer)]
    for leaf in leaves_of(optimizer):
        tensors += [x for state in leaf.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    if attachment is not None:
        tensors += [x for slot in attachment.state_dict()["state"].values() for x in slot.values()]
    return [tensor.detach().clone() for tensor in tensors]


def same_state(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def loss_scales_of(optimizer: Any) -> list[float]:
    """Return the loss scales of a chain, which every rank must have."""
    scales: list[float] = check_equal_on_ranks([float(leaf.get_loss_scale()) for leaf in leaves_of(optimizer)])[0]
    return scales


def step(optimizer: Any) -> tuple[Any, list[str], str]:
    """Step and return (result, warnings, error), which every rank must have."""
    result, error_text = None, ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = optimizer.step()
        except Exception as error:
            error_text = f"{type(error).__name__}: {error}"
    messages = [str(warning.message) for warning in caught if warning.category is NonFiniteWarning]
    check_equal_on_ranks((str(result), messages, error_text))
    return result, messages, error_text


def error_on_ranks(call: Callable[[], Any]) -> str:
    """Return the message that a call raises, which every rank must have."""
    try:
        call()
    except DistclipError as error:
        message: str = check_equal_on_ranks(re.sub(r"rank \d+: ", "", str(error)))[0]
        return message
    raise AssertionError("nothing was raised")


class Megatron(Integration):
    """An optimizer of Megatron-core with a policy attached."""

    def steps_as_one_process(self, setting: Setting, policy: Any, num_steps: int = 3) -> None:
        with megatron(setting):
            self._steps_as_one_process(setting, policy, num_steps)

    def steps_under_policies(self, setting: Setting, policies: list[Any]) -> None:
        """Check several policies one after another with the same groups, which take most of the time to make."""
        with megatron(setting):
            for policy in policies:
                self._steps_as_one_process(setting, policy, 3)

    def _steps_as_one_process(self, setting: Setting, policy: Any, num_steps: int) -> None:
        def named(text: str) -> str:
            return f"{policy}: {text}"

        model, dtype = build_model(setting), DTYPES[setting.dtype]
        weights = {key: (weight * 0.1).to(dtype) for key, weight in full_tensors(model, setting, "weights").items()}
        one_process = OneProcess(weights, policy)
        optimizer = build_optimizer(model, setting)
        attachment = attach(optimizer, policy, model=[model])
        assert len(attachment.clipper.slots) == len(one_process.clipper.slots), named(str(attachment.clipper.slots))
        for i in range(num_steps):
            # The last step is an outlier.
            kind, factor = f"gradients {i}", 8.0 if i == num_steps - 1 else 1.0
            fill(model, setting, lambda name, grad, factor=factor: grad * factor, kind)
            success, norm, _ = optimizer.step()
            grads = {key: grad.double() * factor for key, grad in full_tensors(model, setting, kind).items()}
            expected, report = one_process.step(grads), attachment.report
            assert success
            assert report is not None
            exact = float(reference.total_norm(grads.values(), policy.spec.norm_type))
            seen = [float(norm), float(report.norm), float(report.coef)]
            torch.testing.assert_close(seen, [exact, exact, float(expected.coef)], rtol=1e-5, atol=0, msg=named)
            assert bool(report.clipped) == bool(expected.clipped), policy
            check_equal_on_ranks((report.norm.numpy().tobytes(), report.coefs.numpy().tobytes()))
        # Stepped tensors are exact, and parameters of the model are rounded to its dtype.
        coordinates, local_params = Coordinates(), {}
        for name, param in model.module.named_parameters():
            full = one_process.params[key_of(name, coordinates.pp, coordinates.ep)].detach()
            local = cut(full, name, param, setting).float()
            local_params[name] = local.reshape(-1)
            rounding = ROUNDING[setting.dtype]
            torch.testing.assert_close(param.detach().float(), local, rtol=rounding, atol=rounding, msg=named)
        for name, _, stepped, elements in stepped_params(model, optimizer):
            torch.testing.assert_close(
                stepped, local_params[name][elements], rtol=1e-5, atol=2e-5, msg=lambda text, n=name: named(n + text)
            )

    def nonfinite_on_one_rank(self, setting: Setting, rule: str = "") -> None:
        """Check one rule, or all of them with the same groups."""
        with megatron(setting):
            for one_rule in [rule] if rule else NONFINITE:
                self._nonfinite_on_one_rank(setting, one_rule)

    def _nonfinite_on_one_rank(self, setting: Setting, rule: Any) -> None:
        model, scaled = build_model(setting), setting.dtype == "fp16"
        optimizer = build_optimizer(model, setting, sgd_momentum=0.0 if rule == "zero" else 0.9)
        with replicas_may_differ():
            attachment = attach(optimizer, zclip(cap=1.0, warmup=1), model=[model], on_nonfinite=rule)
        fill(model, setting)
        assert step(optimizer)[0][0]
        fill(model, setting)
        poison(model, optimizer, float(NONFINITE[rule]))
        before = copy_state(model, optimizer, attachment)
        *_, stepped, _ = last_piece(model, optimizer)
        element = stepped[0].clone()
        result, messages, error = step(optimizer)
        after, report = copy_state(model, optimizer, attachment), attachment.report
        if scaled or rule in ("skip", "raise"):
            assert same_state(before, after), rule
        if rule == "raise" and not scaled:
            assert re.match(r"NonFiniteError: step 2: elements are not finite in .+ \(1 (NaN|Inf) on rank \d\)", error)
            return
        assert error == ""
        assert report is not None
        if scaled or rule == "skip":
            assert result == (False, None, None)
            assert bool(report.skipped)
            assert not bool(report.finite)
            # The loss scaler finds its scale by such steps.
            assert len(messages) == (0 if scaled else 1)
            assert attachment.clipper.skipped == 1
            scale = SCALE / 2 if scaled else 1.0
            assert set(loss_scales_of(optimizer)) == {scale}
            fill(model, setting, scale=scale)
            assert step(optimizer)[0][0]
            next_state = copy_state(model, optimizer, attachment)
            assert not same_state(after, next_state)
            assert all(bool(tensor.isfinite().all()) for tensor in next_state)
        elif rule == "zero":
            assert result[0]
            assert len(messages) == 1
            assert "were set to zero" in messages[0]
            assert not same_state(before, after)
            assert all(bool(tensor.isfinite().all()) for tensor in after)
            assert not is_last_rank() or torch.equal(stepped[0], element)
        else:
            assert result[0]
            assert not messages
            assert not torch.tensor(result[1]).isfinite()
            assert not is_last_rank() or not bool(stepped[0].isfinite())

    def skipped_by_policy(self, setting: Setting) -> None:
        with megatron(setting):
            model = build_model(setting)
            optimizer = build_optimizer(model, setting)
            attachment = attach(optimizer, median_mad(k=3, window=8, warmup=3, skip=True), model=[model])
            for _ in range(5):
                fill(model, setting)
                assert step(optimizer)[0][0]
            before, scales = copy_state(model, optimizer), loss_scales_of(optimizer)
            fill(model, setting, lambda name, grad: grad * 200)
            assert step(optimizer)[0] == (False, None, None)
            assert same_state(before, copy_state(model, optimizer))
            assert attachment.report is not None
            assert bool(attachment.report.finite)
            assert bool(attachment.report.skipped)
            assert loss_scales_of(optimizer) == scales

    def checkpoint(self, setting: Setting, folder: str) -> None:
        """Save and load the attachment's state. Weights that a reload has moved are those that the policy reads."""
        with megatron(setting):
            model = build_model(setting)
            optimizer = build_optimizer(model, setting)
            attachment = attach(optimizer, agc(1e-3), model=[model])
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            coefs = []
            for _ in range(2):
                fill(model, setting)
                assert step(optimizer)[0][0]
                assert attachment.report is not None
                coefs.append(attachment.report.coefs)
                for _, param, *_ in stepped_params(model, optimizer):
                    stepped: Any = param.main_param if hasattr(param, "main_param") else param
                    stepped.data = 4 * stepped.data
            torch.testing.assert_close(coefs[1], 4 * coefs[0])
            detach(optimizer)
            # A policy with a history goes on with the same bits.
            attachment = attach(optimizer, zclip(cap=1.0, warmup=1), model=[model])
            norms, state = [], attachment.state_dict()
            for i in range(4):
                if i == 2:
                    state = copy.deepcopy(attachment.state_dict())
                fill(model, setting, kind=f"gradients {i}")
                assert step(optimizer)[0][0]
                assert attachment.report is not None
                norms.append((attachment.report.norms, attachment.report.coefs))
            end = attachment.state_dict()
            detach(optimizer)
            attachment = attach(optimizer, zclip(cap=1.0, warmup=1), model=[model])
            attachment.load_state_dict(state)
            for i in (2, 3):
                fill(model, setting, kind=f"gradients {i}")
                assert step(optimizer)[0][0]
                assert attachment.report is not None
                assert torch.equal(attachment.report.norms, norms[i][0])
                assert torch.equal(attachment.report.coefs, norms[i][1])
            assert str(attachment.state_dict()) == str(end)

    def invalid_input(self, setting: Setting) -> None:
        """Compare errors on all ranks. `setting` is that of an optimizer without a loss scale."""
        sharded = Setting(dtype="fp16", distributed=True)
        with megatron(setting):
            from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
            from megatron.core.process_groups_config import ProcessGroupCollection

            model, scaled_model = build_model(setting), build_model(sharded)
            optimizer, scaled = build_optimizer(model, setting), build_optimizer(scaled_model, sharded)
            first, before = dist.get_rank() == 0, (dict(vars(optimizer)), dict(vars(scaled)))
            (leaf,) = leaves_of(scaled)
            of_torch: Any = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)
            collection = ProcessGroupCollection.use_mpu_process_groups(["dp_cp", "expt_dp"])
            by_layer = LayerWiseDistributedOptimizer(
                [build_optimizer(build_model(setting), setting)], leaf.config, collection
            )
            # As in a later version of Megatron-FSDP, with other parameters.
            fsdp = replace(leaf.ddp_config, use_megatron_fsdp=True)
            policy, per_tensor = global_norm(1.0), per_tensor_norm(1.0)
            wrong: Any = 1.0
            for call, text in (
                (lambda: attach(of_torch if first else optimizer, policy), "optimizer=SGD: expected what megatron"),
                (lambda: attach(optimizer, per_tensor), 'per="tensor" or exclude= uses parameter names'),
                (lambda: attach(optimizer, per_tensor, model=None if first else [model]), "uses parameter names"),
                (
                    lambda: attach(optimizer, per_tensor, model=scaled_model if first else model),
                    "that model= does not have",
                ),
                (lambda: attach(optimizer, agc(exclude=["nowhere"]), model=model), "nowhere"),
                (lambda: attach(optimizer, global_norm(1.0 if first else 2.0)), "different policies"),
                (lambda: attach(optimizer, wrong if first else policy), "policy=1.0: expected a policy"),
                (lambda: attach(optimizer, policy, on_nonfinite=wrong), "on_nonfinite=1.0"),
                (
                    lambda: attach(scaled if first else optimizer, policy),
                    "have no loss scale and those of other ranks do",
                ),
                (lambda: attach(by_layer if first else optimizer, policy), "split_over"),
                (lambda: detach(optimizer), "nothing is attached"),
            ):
                assert text in error_on_ranks(call)
            with (
                mock.patch.object(leaf, "ddp_config", fsdp if first else leaf.ddp_config),
                mock.patch.object(leaf.model_chunks[0], "param_and_grad_buffer", None, create=True),
            ):
                assert "this version of Megatron-FSDP keeps" in error_on_ranks(lambda: attach(scaled, policy))
            assert (vars(optimizer), vars(scaled)) == before
            attach(optimizer, policy)
            assert "has a policy already" in error_on_ranks(lambda: attach(optimizer, policy))
            if first:
                detach(optimizer)
            assert "has a policy already" in error_on_ranks(lambda: attach(optimizer, policy))

    def detach(self, setting: Setting) -> None:
        with megatron(setting):
            model = build_model(setting)
            optimizer = build_optimizer(model, setting, log_num_zeros_in_grad=True)
            attributes = dict(vars(optimizer))

            def update() -> tuple[float, float, float]:
                """Step and return (norm of this rank's update, norm of the gradient, number of zeros)."""
                start = [stepped.clone() for *_, stepped, _ in stepped_params(model, optimizer)]
                fill(model, setting, lambda name, grad: torch.where(grad < 0, 0.0, grad) if "norm" in name else grad)
                success, norm, zeros = optimizer.step()
                assert success
                assert zeros > 0
                end = [stepped for *_, stepped, _ in stepped_params(model, optimizer)]
                return float(torch.cat([old - new for old, new in zip(start, end, strict=True)]).norm()), norm, zeros

            attachment = attach(optimizer, global_norm(1e-2), model=[model])
            assert optimizer.distclip is attachment
            by_distclip = update()
            detach(optimizer)
            assert vars(optimizer) == attributes
            # Megatron's bound is a hundred times larger.
            expected = (100 * by_distclip[0], *by_distclip[1:])
            torch.testing.assert_close(update(), expected, rtol=1e-3, atol=0)
            again = attach(optimizer, global_norm(1e-2), model=[model])
            torch.testing.assert_close(update(), by_distclip, rtol=1e-3, atol=0)
            assert attachment.report is not None
            assert again.report is not None
            assert attachment.report is not again.report
            assert torch.equal(attachment.report.norm, again.report.norm)
