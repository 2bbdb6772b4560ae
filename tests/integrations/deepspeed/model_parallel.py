"""Parameters that differ between ranks: DeepSpeed's experts, Megatron's tensor parallelism."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distclip.integrations.deepspeed import attach
from distclip.reference import total_norm
from tests.integrations.deepspeed.engines import DTYPES, Setting, backward, engine_of, quiet_deepspeed, reduced, sgd
from tests.ranks import everywhere


class Experts(nn.Module):
    """A dense layer, then DeepSpeed's experts: as many as ranks, each two times on four of them."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.dense = nn.Linear(13, 8)
        self.moe = MoE(8, nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 8)), num_experts=2 * ep_size, ep_size=ep_size)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.moe(torch.tanh(self.dense(x)))[0])


def experts(setting: Setting, policy: Any, ep_size: int = 2) -> None:
    """DeepSpeed's mixture of experts: squares are added over experts, and each has a norm of its own."""
    quiet_deepspeed()
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    norms: list[Any] = []
    rough = 1e-5 if setting.dtype == "fp32" else setting.tolerance
    for own in (replace(setting, stage=0, top={}), setting):
        torch.manual_seed(0)
        # Makes DeepSpeed's process groups, and draws the experts alike.
        deepspeed = quiet_deepspeed()
        deepspeed.init_distributed("gloo", verbose=False)
        model = Experts(ep_size)
        torch.manual_seed(dist.get_rank() % ep_size)
        for name, param in model.named_parameters():
            if "experts" in name:
                nn.init.normal_(param)

        def grouped(groups: Any) -> torch.optim.Optimizer:
            one = {"params": [p for group in groups for p in group["params"]], "name": "all"}
            return sgd(split_params_into_different_moe_groups_for_optimizer(one))

        engine = engine_of(model, own, grouped)
        start = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
        attached = attach(engine, policy)
        x = torch.randn(6, 13, generator=torch.Generator().manual_seed(dist.get_rank()))
        backward(engine, x, torch.ones(6, 3), DTYPES[own.dtype])
        if not norms:
            found = reduced(engine, dist.get_rank() % ep_size, lambda name, p: "deepspeed_experts" in name)
            truth = {key: grad / (attached._adapter.loss_scale or 1.0) for key, grad in found.items()}
            assert any("deepspeed_experts" in key for key in truth)
        engine.step()
        right, exact = total_norm(truth.values()), 1e-5 if not norms else rough
        torch.testing.assert_close(attached.report.norm.double(), right, rtol=exact, atol=0)
        norms.append(dict(zip(attached.clipper.slots, attached.report.norms.tolist(), strict=True)))
        if policy.per == "tensor":
            assert sorted(norms[-1].values()) == pytest.approx(sorted(float(g.norm()) for g in truth.values()), exact)
        if policy.per == "tensor" and own.dtype == "fp32":
            mine = {n: (start[n] - p.detach()) / 0.05 for n, p in engine.module.named_parameters()}
            for name, moved in mine.items():
                assert float(moved.norm()) <= policy.threshold.max_norm * 1.001, (name, moved.norm())
    assert norms[0].keys() == norms[1].keys()
    assert norms[0] == pytest.approx(norms[1], rel=rough)


class Mpu:
    """What Megatron gives DeepSpeed: tensor parallelism over neighbours, data parallelism over the others."""

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
    """A layer of which each rank has other rows, marked as Megatron does, beside one that all have alike."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.dense, self.columns = nn.Linear(13, 3), nn.Linear(13, 3, bias=False)
        nn.init.normal_(self.columns.weight, mean=place)
        self.columns.weight.tensor_model_parallel = True  # type: ignore[assignment]
        self.columns.weight.model_parallel = True  # type: ignore[assignment]
        self.columns.weight.partition_dim = 0  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x) + self.columns(x) - self.columns(x).detach()


def tensor_parallel(stage: int, policy: Any) -> None:
    """Pieces of one parameter along a tensor axis, cut again by ZeRO: it counts once and has one coefficient."""
    mpu, truth, reports = Mpu(), {}, []
    for own in (0, stage):
        torch.manual_seed(0)
        engine = engine_of(Columns(mpu.get_model_parallel_rank()), Setting(own, groups=1), sgd, mpu)
        attached = attach(engine, policy)
        x = torch.randn(2, 13, generator=torch.Generator().manual_seed(mpu.get_data_parallel_rank()))
        backward(engine, x, torch.ones(2, 3), torch.float32)
        if own == 0:
            truth = reduced(engine, mpu.get_model_parallel_rank(), lambda name, p: hasattr(p, "partition_dim"))
            assert len(truth) == 4
        start = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
        engine.step()
        report = attached.report
        torch.testing.assert_close(report.norm.double(), total_norm(truth.values()), rtol=1e-6, atol=0)
        half = torch.cat([truth["columns.weight@0"], truth["columns.weight@1"]])
        names = attached.clipper.slots
        if policy.per == "tensor":
            assert float(report.norms[names.index("columns.weight")]) == pytest.approx(float(half.norm()), 1e-6)
        else:
            rows = [i for i, name in enumerate(names) if name.startswith("columns.weight[")]
            torch.testing.assert_close(report.norms[rows], half.norm(dim=1), rtol=1e-6, atol=0)
        moved = [(start[n] - p.detach()).norm() for n, p in engine.module.named_parameters()]
        told = everywhere(torch.stack(moved).double())
        reports.append(torch.stack(told))
        torch.testing.assert_close(report.coefs, policy_coefs(policy, report, attached), rtol=1e-6, atol=0)
    torch.testing.assert_close(reports[0], reports[1], rtol=1e-4, atol=0)


def policy_coefs(policy: Any, report: Any, attached: Any) -> Tensor:
    """What each slot is to be multiplied by, where the bound is fixed; otherwise what was said."""
    if policy.per != "tensor":
        return report.coefs
    return torch.clamp(policy.threshold.max_norm / (report.norms + 1e-6), max=1.0)
