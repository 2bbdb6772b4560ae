"""Check parameters that differ between ranks: DeepSpeed's experts, and Megatron's tensor parallelism."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distclip import ReplicaError
from distclip.integrations.deepspeed import attach
from distclip.reference import total_norm
from tests.integrations.deepspeed.engines import (
    DTYPES,
    Setting,
    backward,
    build_engine,
    import_deepspeed,
    reduced_grads,
    sgd,
)
from tests.ranks import gather_from_ranks


class Experts(nn.Module):
    """A dense layer, then DeepSpeed's experts, two per rank of an expert-parallel group."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.dense = nn.Linear(13, 8)
        self.moe = MoE(8, nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 8)), num_experts=2 * ep_size, ep_size=ep_size)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.moe(torch.tanh(self.dense(x)))[0])


def check_experts(setting: Setting, policy: Any, ep_size: int = 2) -> None:
    """Check that squares are added over experts, and that each expert has a slot, at stage 0 and at `setting`."""
    deepspeed = import_deepspeed()
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    norms_by_stage: list[dict[str, float]] = []
    tolerance = 1e-5 if setting.dtype == "fp32" else setting.tolerance
    grads: dict[str, Tensor] = {}
    for current in (replace(setting, stage=0, config={}), setting):
        torch.manual_seed(0)
        # The layer makes DeepSpeed's process groups, and draws the same experts on every rank.
        deepspeed.init_distributed("gloo", verbose=False)
        model = Experts(ep_size)
        torch.manual_seed(dist.get_rank() % ep_size)
        for name, param in model.named_parameters():
            if "experts" in name:
                nn.init.normal_(param)

        def optimizer_of(groups: Any) -> torch.optim.Optimizer:
            one_group = {"params": [p for group in groups for p in group["params"]], "name": "all"}
            return sgd(split_params_into_different_moe_groups_for_optimizer(one_group))

        engine = build_engine(model, current, optimizer_of)
        start = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
        attachment = attach(engine, policy)
        x = torch.randn(6, 13, generator=torch.Generator().manual_seed(dist.get_rank()))
        backward(engine, x, torch.ones(6, 3), DTYPES[current.dtype])
        is_stage_0 = not norms_by_stage
        if is_stage_0:
            scaled = reduced_grads(engine, dist.get_rank() % ep_size, lambda name, p: "deepspeed_experts" in name)
            grads = {key: grad / (attachment._adapter.loss_scale or 1.0) for key, grad in scaled.items()}
            assert any("deepspeed_experts" in key for key in grads)
        engine.step()
        report = attachment.report
        assert report is not None
        # The gradients are those of stage 0, and other stages round differently.
        rtol = 1e-5 if is_stage_0 else tolerance
        torch.testing.assert_close(report.norm.double(), total_norm(grads.values()), rtol=rtol, atol=0)
        norms = dict(zip(attachment.clipper.slots, report.norms.tolist(), strict=True))
        norms_by_stage.append(norms)
        if policy.per == "tensor":
            assert sorted(norms.values()) == pytest.approx(sorted(float(grad.norm()) for grad in grads.values()), rtol)
        if policy.per == "tensor" and current.dtype == "fp32":
            for name, param in engine.module.named_parameters():
                update = (start[name] - param.detach()) / 0.05
                assert float(update.norm()) <= policy.threshold.max_norm * 1.001, name
    assert norms_by_stage[0].keys() == norms_by_stage[1].keys()
    assert norms_by_stage[0] == pytest.approx(norms_by_stage[1], rel=tolerance)


class MegatronGroups:
    """The groups that Megatron gives DeepSpeed: tensor parallelism over neighbors, data parallelism across them."""

    def __init__(self) -> None:
        size, rank = dist.get_world_size(), dist.get_rank()
        tensor = [dist.new_group([i, i + 1]) for i in range(0, size, 2)]
        data = [dist.new_group(list(range(i, size, 2))) for i in range(2)]
        self.tensor, self.data = tensor[rank // 2], data[rank % 2]

    def get_model_parallel_group(self) -> Any:
        return self.tensor

    def get_data_parallel_group(self) -> Any:
        return self.data

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.tensor)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.tensor)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.data)


class Columns(nn.Module):
    """A replicated layer, and a layer of which each rank has other rows, tagged as Megatron does."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.dense, self.columns = nn.Linear(13, 3), nn.Linear(13, 3, bias=False)
        self.factor = 1.0
        nn.init.normal_(self.columns.weight, mean=index)
        self.columns.weight.tensor_model_parallel = True  # type: ignore[assignment]
        self.columns.weight.model_parallel = True  # type: ignore[assignment]
        self.columns.weight.partition_dim = 0  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x) * self.factor + self.columns(x) - self.columns(x).detach()


def check_replicas(engine: Any, model: Columns, index: int, x: Tensor) -> None:
    """Check that a replica which one of the tensor-parallel ranks computes otherwise is found in the same step."""
    model.factor = 1.0 + index
    backward(engine, x, torch.ones(2, 3), torch.float32)
    with pytest.raises(ReplicaError, match="the gradient of dense") as raised:
        engine.step()
    assert "columns" not in str(raised.value)


def check_tensor_parallel(stage: int, policy: Any) -> None:
    """Check that a parameter that is cut along a tensor axis and by ZeRO has one norm and one coefficient."""
    groups, grads = MegatronGroups(), {}
    index = groups.get_model_parallel_rank()
    updates_by_stage = []
    for current in (0, stage):
        torch.manual_seed(0)
        model = Columns(groups.get_model_parallel_rank())
        engine = build_engine(model, Setting(current, num_groups=1), sgd, groups)
        attachment = attach(engine, policy)
        x = torch.randn(2, 13, generator=torch.Generator().manual_seed(groups.get_data_parallel_rank()))
        backward(engine, x, torch.ones(2, 3), torch.float32)
        if current == 0:
            grads = reduced_grads(engine, index, lambda name, param: hasattr(param, "partition_dim"))
            assert len(grads) == 4
        start = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
        engine.step()
        report, names = attachment.report, attachment.clipper.slots
        assert report is not None
        torch.testing.assert_close(report.norm.double(), total_norm(grads.values()), rtol=1e-6, atol=0)
        columns = torch.cat([grads["columns.weight@0"], grads["columns.weight@1"]])
        if policy.per == "tensor":
            assert float(report.norms[names.index("columns.weight")]) == pytest.approx(float(columns.norm()), 1e-6)
            coefs = torch.clamp(policy.threshold.max_norm / (report.norms + 1e-6), max=1.0)
            torch.testing.assert_close(report.coefs, coefs, rtol=1e-6, atol=0)
        else:
            rows = [i for i, name in enumerate(names) if name.startswith("columns.weight[")]
            torch.testing.assert_close(report.norms[rows], columns.norm(dim=1), rtol=1e-6, atol=0)
        updates = [(start[name] - param.detach()).norm() for name, param in engine.module.named_parameters()]
        updates_by_stage.append(torch.stack(gather_from_ranks(torch.stack(updates).double())))
        check_replicas(engine, model, index, x)
    torch.testing.assert_close(updates_by_stage[0], updates_by_stage[1], rtol=1e-4, atol=0)
