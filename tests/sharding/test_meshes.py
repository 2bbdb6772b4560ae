"""Count shards on meshes in any order, over some ranks only, several at a time, and meshes that join later."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import distclip
from tests.ranks import on_ranks
from tests.rig import local_tensor
from tests.tables.layouts.tensors import plain_param, random_grad, tagged_param

ROWS = distclip.NormPolicy(distclip.Fixed(1.0), per="row", eps=0.0)


@on_ranks(4)
@pytest.mark.parametrize("kind", ["dtensor", "annotation", "tags"])
def test_rows_on_a_mesh_whose_ranks_do_not_ascend(kind: str) -> None:
    # torch's own full_tensor() joins the shards of such a mesh in another order, so it is no reference here.
    mesh = DeviceMesh("cpu", torch.tensor([[1, 0], [2, 3]]), mesh_dim_names=("a", "b"))
    whole, split_over = random_grad(6, 4), None
    column, row = mesh.get_coordinate()
    local = whole.chunk(2, 1)[column].chunk(2, 0)[row].clone()
    if kind == "dtensor":
        param = nn.Parameter(DTensor.from_local(torch.zeros(3, 2), mesh, [Shard(1), Shard(0)], run_check=False))
        param.grad = DTensor.from_local(local.clone(), mesh, [Shard(1), Shard(0)], run_check=False)
    elif kind == "annotation":
        param = distclip.annotate_(plain_param(local), mesh, [Shard(1), Shard(0)])
    else:
        param, split_over = tagged_param(local, tensor_model_parallel=True, partition_dim=0), {"tp": mesh["b"]}
        whole = whole.chunk(2, 1)[column]  # Each line of the mesh holds a separate model.
    expected = whole.double().norm(dim=1)
    norms = distclip.GradClipper([("w", param)], ROWS, split_over=split_over).clip().norms
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)
    clipped = local / expected.float().chunk(2)[row][:, None].clamp(min=1)
    torch.testing.assert_close(local_tensor(param.grad), clipped, rtol=1e-5, atol=0)
