"""Refuse parameters without names whose order differs between replicas, and nothing that only looks so."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

import distclip
from distclip import GradClipper, LayoutError
from distclip.sharding.order import digest_values, has_other_order, order_of
from tests.ranks import on_ranks
from tests.rig import assert_raises_on_ranks
from tests.tables.layouts.meshes import world_mesh

REFUSED = {"reversed": True, "swapped": True, "equal": False, "zero": False, "not equal yet": False, "named": False}


@pytest.mark.parametrize("case", REFUSED)
@on_ranks(2)
def test_another_order_of_replicas_is_refused(case: str) -> None:
    rank, mesh = dist.get_rank(), world_mesh("dp")
    generator = torch.Generator().manual_seed(rank if case == "not equal yet" else 0)
    values = [torch.randn(4, 3, generator=generator) for _ in range(5)]
    if case == "zero":
        values = [torch.zeros(4, 3) for _ in values]
    params = [nn.Parameter(DTensor.from_local(one, mesh, [Replicate()], run_check=False)) for one in values]
    pairs = [(f"layers.{i}", param) for i, param in enumerate(params)]
    if rank == 1 and case == "swapped":
        pairs[1], pairs[3] = pairs[3], pairs[1]
    elif rank == 1 and case not in ("equal", "not equal yet"):
        pairs.reverse()
    given = pairs if case == "named" else [param for _, param in pairs]
    for policy in (distclip.per_tensor_norm(1.0), distclip.agc()):
        if REFUSED[case]:
            assert_raises_on_ranks(lambda p=policy: GradClipper(given, p), LayoutError, "another order")  # type: ignore[misc]
        else:
            GradClipper(given, policy)
    # One norm of all parameters has no order.
    GradClipper(given, distclip.global_norm(1.0))


def test_every_permutation_of_different_values_has_another_order() -> None:
    digests = digest_values([torch.randn(shape) for shape in ((3,), (3,), (200, 2), (0,))])
    assert digests is not None
    orders = {order_of(some) for some in itertools.permutations(digests)}
    assert len(orders) == 24
    assert len({any_order for _, any_order in orders}) == 1
    assert has_other_order([*orders][:2])
    assert not has_other_order([*orders][:1] * 2)
    assert not has_other_order([order_of(digests), order_of([]), order_of([*digests, 1])])


def test_values_that_cannot_be_read_have_no_order() -> None:
    for tensor in (torch.empty(2, device="meta"), torch.zeros(2, 2).to_sparse()):
        assert digest_values([torch.zeros(2), tensor]) is None
