"""Types of `spmd_types` on plain tensors, as torchtitan sets them: rows, replicas, and types that have no norm."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate

import distclip
from distclip import GradClipper, LayoutError
from tests.frameworks import skip_without
from tests.ranks import on_ranks
from tests.rig import assert_raises_on_ranks
from tests.tables.layouts.meshes import world_mesh
from tests.tables.layouts.tensors import plain_param, random_grad

skip_without("spmd_types", reason="spmd_types is not installed: pip install --no-deps spmd_types==0.2.3")


@on_ranks(4)
def test_rows_of_shards() -> None:
    """A policy per row finds the rows of a shard by the order of the axes, as one process has them."""
    import spmd_types as spmd

    mesh = world_mesh("dp", "tp")
    dp, tp = mesh["dp"].get_group(), mesh["tp"].get_group()
    whole = random_grad(8, 2)
    entry = spmd.MeshAxis.of(tp), spmd.MeshAxis.of(dp)
    piece = whole.chunk(2)[mesh.get_local_rank("tp")].chunk(2)[mesh.get_local_rank("dp")]
    param = spmd.assert_type(plain_param(piece), {dp: spmd.V, tp: spmd.V}, spmd.PartitionSpec(entry, None))
    report = GradClipper([("w", param)], distclip.agc(0.1)).clip()
    single = plain_param(whole)
    expected = GradClipper([("w", single)], distclip.agc(0.1), comm=distclip.LocalComm()).clip()
    torch.testing.assert_close(report.coefs, expected.coefs)
    assert float(report.coefs.min()) < 1


@on_ranks(4)
def test_types_without_a_norm() -> None:
    import spmd_types as spmd

    mesh = world_mesh("dp", "tp")
    tp = mesh["tp"].get_group()
    varying = spmd.assert_type(plain_param(random_grad(4, 2, seed=dist.get_rank())), {tp: spmd.V})
    assert_raises_on_ranks(lambda: GradClipper([("w", varying)], distclip.agc(0.1)), LayoutError, "Use S(dim)")
    partial = spmd.assert_type(plain_param(random_grad(4, 2)), {tp: spmd.P})
    assert_raises_on_ranks(lambda: distclip.clip_grad_norm_([partial], 1.0), LayoutError, "has type P")


@on_ranks(4)
def test_own_annotation_and_later_types() -> None:
    """`annotate_` wins over types. A type that is set between two calls counts in the second."""
    import spmd_types as spmd

    mesh = world_mesh("dp", "tp")
    tp = mesh["tp"].get_group()
    model = nn.Linear(3, 2, bias=False)
    model.weight.grad = torch.full((2, 3), 1.0)
    whole = float(model.weight.grad.norm())
    assert float(distclip.clip_grad_norm_(model, float("inf"))) == pytest.approx(whole)
    spmd.assert_type(model.weight, {tp: spmd.S(0)})
    assert float(distclip.clip_grad_norm_(model, float("inf"))) == pytest.approx(whole * 2**0.5)
    distclip.annotate_(model.weight, mesh, [Replicate(), Replicate()])
    assert float(distclip.clip_grad_norm_(model, float("inf"))) == pytest.approx(whole)
