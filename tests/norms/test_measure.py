"""Compare the power sums of one call with float64, for shards of any mixture of kinds."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distclip.norms.measure import measure
from distclip.norms.spec import NormSpec
from distclip.sharding.shard import Rows, Shard, Shards

CPU = torch.device("cpu")

KINDS = st.sampled_from(["whole", "shared", "rows", "slice", "strided rows", "sparse rows", "replica"])

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


def shards_of(kinds: list[str], dtypes: list[torch.dtype], seed: int) -> tuple[list[Shard], int]:
    """Return one shard of each kind, and the number of slots."""
    generator = torch.Generator().manual_seed(seed)
    # Shards of the kind "shared" add up in slot 0. Without them, each slot has one summand.
    shards, num_slots = [], int("shared" in kinds)
    for i, (kind, dtype) in enumerate(zip(kinds, dtypes, strict=True)):
        num_rows = 1 + i % 4
        tensor = torch.randn((num_rows, 5), generator=generator).to(dtype)
        slot, rows, num_replicas = num_slots, None, 1.0
        if kind in ("whole", "replica"):
            num_slots += 1
            num_replicas = 2.0 if kind == "replica" else 1.0
        elif kind == "shared":
            slot = 0
        else:
            num_slots += num_rows
            rows = Rows(0, num_rows)
            if kind == "slice":
                tensor, rows = tensor.reshape(-1)[2:], Rows(0, num_rows, 2, 5)
            elif kind == "strided rows":
                tensor = tensor.t().contiguous().t()
            elif kind == "sparse rows":
                tensor = tensor.to_sparse()
        shards.append(Shard(f"p{i}", tensor, num_replicas, slot=slot, rows=rows))
    return shards, num_slots


def powers_of(shard: Shard, norm_type: float) -> Tensor:
    """Return the power of each element in float64."""
    dense = shard.grad.to_dense() if shard.grad.is_sparse else shard.grad
    return dense.double().abs().pow(norm_type)


def sums_by_tensor(shards: list[Shard], norm_type: float) -> dict[str, float]:
    """Return the power sum of each shard, computed by torch in float64."""
    return {shard.name: float(powers_of(shard, norm_type).sum()) for shard in shards}


def sums_by_slot(shards: list[Shard], norm_type: float, num_slots: int) -> Tensor:
    """Return the power sums of the slots, computed row by row in float64."""
    total = torch.zeros(num_slots, dtype=torch.float64)
    for shard in shards:
        powers = powers_of(shard, norm_type)
        if shard.rows is None:
            total[shard.slot] += powers.sum() / shard.num_replicas
            continue
        flat = torch.cat([torch.zeros(shard.rows.lead), powers.reshape(-1)])
        total[shard.slot : shard.slot + shard.rows.count] += flat.view(shard.rows.count, -1).sum(1)
    return total


@given(st.lists(st.tuples(KINDS, DTYPES, st.booleans()), max_size=8), st.sampled_from([1.0, 2.0, 3.0]))
def test_gradients_and_parameters_are_measured_together(
    cases: list[tuple[str, torch.dtype, bool]], norm_type: float
) -> None:
    """Measure both in one call, whichever parameters have a gradient."""
    kinds, dtypes = [kind for kind, _, _ in cases], [dtype for _, dtype, _ in cases]
    all_gradients, num_slots = shards_of(kinds, dtypes, seed=0)
    weights, _ = shards_of(kinds, dtypes, seed=1)
    gradients = [shard for shard, (_, _, has_gradient) in zip(all_gradients, cases, strict=True) if has_gradient]
    spec = NormSpec(norm_type, per="row", needs_weights=True)
    found = measure(Shards.of(gradients), spec, CPU, num_slots, Shards.of(weights))
    assert found.weight_powers is not None
    exact = {"rtol": 1e-6, "atol": 1e-12}
    torch.testing.assert_close(found.powers, sums_by_slot(gradients, norm_type, num_slots), **exact)
    torch.testing.assert_close(found.weight_powers, sums_by_slot(weights, norm_type, num_slots), **exact)
    assert found.has_fp64 == any(shard.grad.dtype == torch.float64 for shard in gradients)
    alone = measure(Shards.of(gradients), NormSpec(norm_type, per="row"), CPU, num_slots)
    torch.testing.assert_close(found.powers, alone.powers, rtol=0, atol=0)
    by_tensor = {
        name: float(power) for one in found.per_tensor_powers for name, power in zip(one.names, one.sums(), strict=True)
    }
    expected = sums_by_tensor(gradients, norm_type)
    assert by_tensor.keys() == expected.keys()
    assert all(math.isclose(by_tensor[name], expected[name], rel_tol=1e-6) for name in expected)


def test_a_parameter_that_is_not_finite_is_no_gradient_that_is_not() -> None:
    """Find no NaN among the gradients if it is in a parameter, and find it in the row of a gradient."""
    kinds, dtypes = ["rows", "whole"], [torch.float32] * 2
    gradients, num_slots = shards_of(kinds, dtypes, seed=0)
    weights, _ = shards_of(kinds, dtypes, seed=1)
    spec = NormSpec(per="row", needs_weights=True)
    for tensor in (weights[0].grad, weights[1].grad):
        tensor[0, 0] = math.nan
    found = measure(Shards.of(gradients), spec, CPU, num_slots, Shards.of(weights))
    assert not any(one.any(one.powers.isnan()).any() for one in found.per_tensor_powers)
    gradients[0].grad[0, 0] = math.nan
    (found_in,) = measure(Shards.of(gradients), spec, CPU, num_slots, Shards.of(weights)).per_tensor_powers
    marked = found_in.any(found_in.powers.isnan()).tolist()
    assert [name for name, is_marked in zip(found_in.names, marked, strict=True) if is_marked] == ["p0"]
