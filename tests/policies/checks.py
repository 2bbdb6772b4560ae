"""Check a policy in one layout, step by step, against whole tensors in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip import GradClipper, LayoutError, reference
from tests.policies.oracle import Oracle, local_dense, pieces_of, widened
from tests.sharding.checks import check_counts, stored
from tests.tables.layouts import LAYOUTS, Case
from tests.tables.policies import ADAPTIVE, POLICIES, Bound

TRACE = (0.06, 0.11, 0.07, 0.09, 1.0, 0.08, 0.12)
"""Factors of the gradients, step by step, with a spike after the warm-ups."""

SHORT_TRACE = (0.06, 1.0)
"""Factors for policies that remember nothing."""

PER_GRANULARITY = [name for name, row in POLICIES.items() if row.on_all_layouts]
FITTED = [name for name, row in POLICIES.items() if row.fit is not None or row.twin is not None]


def check_clipper(oracle: Oracle, clipper: GradClipper, bound: Bound, where: str, case: Case, trace: Any) -> int:
    """Clip the gradients times each factor of the trace, and compare with the oracle.

    Returns:
        Number of steps in which some coefficient was below 1.
    """
    policy = clipper.policy
    weights = oracle.norms(oracle.weights, policy)
    history: dict[tuple[Any, int], list[tuple[float, float]]] = {}
    pieces = [p for p in oracle.pieces if p.param.grad is not None]
    before = [stored(p.param.grad).clone() for p in pieces]
    storages = [stored(p.param.grad).untyped_storage().data_ptr() for p in pieces]
    num_clipped, reported = 0, []
    for t, scale in enumerate(trace):
        here = f"{where}, step {t}"
        for p, old in zip(pieces, before, strict=True):
            stored(p.param.grad).copy_(old * scale)
        grads = oracle.grads(scale)
        total = float(reference.total_norm(grads.values(), policy.norm_type))
        norms = oracle.norms(grads, policy)
        coefs = {slot: torch.ones_like(some) for slot, some in norms.items()}
        for slot, some in norms.items():
            for i, norm in enumerate(some.tolist()):
                if norm > 0:
                    past = history.setdefault((slot, i), [])
                    past.append((norm, total))
                    limit = bound([n for n, _ in past], [n for _, n in past], slot, float(weights[slot][i]))
                    coefs[slot][i] = 1.0 if norm + policy.eps <= limit else limit / (norm + policy.eps)
        num_clipped += any((c < 1).any() for c in coefs.values())
        scaled = [local_dense(p.param.grad).clone() for p in pieces]
        writes = [stored(p.param.grad)._version for p in pieces]
        if t % 3:
            report = clipper.clip()
        else:
            with CommDebugMode() as counter:
                report = clipper.clip()
            own = case.all_reduces if case.all_reduces_of_clipper is None else case.all_reduces_of_clipper
            check_counts(
                counter, replace(case, all_reduces=own), policy.norm_type, here, gathers=case.gathers_once and t == 0
            )
        check_report(report, clipper, total, norms, coefs, oracle.names, case, here)
        for p, old, write, storage in zip(pieces, scaled, writes, storages, strict=True):
            slot = oracle.slot(p.key, policy)
            coef = coefs[slot]
            if len(coef) == 1:
                coef = coef.view(())
            else:
                coef = coef.view(-1, *(1,) * (len(p.shape) - 1)).expand(p.shape).reshape(-1)
                coef = coef[p.at if p.grad_at is None else p.grad_at].view(old.shape)
            check_local(local_dense(p.param.grad), old, coef, f"{here}, {p.name}")
            # Views of one bucket share a version, and a slot of zeros may have any coefficient.
            must_not_write = old.numel() and (coef == 1).all() and norms[slot].all() and storages.count(storage) == 1
            if must_not_write:
                assert stored(p.param.grad)._version == write, f"{here}, {p.name}: written without need"
        reported.append([x.numpy().tobytes() for x in (report.norm.double(), report.norms, report.coefs, report.coef)])
    by_rank: list[Any] = [None] * dist.get_world_size(case.ranks)
    dist.all_gather_object(by_rank, (reported, clipper.slots), group=case.ranks)
    assert all(other == by_rank[0] for other in by_rank), f"{where}: ranks differ"
    for p, old in zip(pieces, before, strict=True):
        stored(p.param.grad).copy_(old)
    return num_clipped


def check_local(grad: Tensor, old: Tensor, coef: Tensor, where: str) -> None:
    """Check the local part of a gradient, as exactly as its dtype stores it."""
    rtol = {torch.float64: 1e-9, torch.bfloat16: 4e-3, torch.float16: 1e-3}.get(grad.dtype, 2e-6)
    tiny = torch.finfo(grad.dtype).tiny
    torch.testing.assert_close(widened(grad), widened(old) * coef, rtol=rtol, atol=tiny, msg=lambda m: f"{where}: {m}")


def check_report(
    report: Any, clipper: GradClipper, total: float, norms: Any, coefs: Any, names: Any, case: Case, where: str
) -> None:
    """Check the total norm, and the norm and coefficient of each slot."""
    assert abs(float(report.norm) - total) <= case.tolerance * total, f"{where}: {float(report.norm)} for {total}"
    assert len(clipper.slots) == len(report.norms) == len(report.coefs), f"{where}: {clipper.slots}"
    by_parameter = clipper.policy.spec.per in ("tensor", "row")
    if by_parameter:
        # Without any parameter there is one slot, whose norm is 0.
        num_slots = sum(len(n) for n in norms.values()) or 1
        assert len(set(clipper.slots)) == len(clipper.slots) == num_slots, clipper.slots
    expected_norms = torch.cat([torch.zeros(0, dtype=torch.float64), *norms.values()])
    expected_coefs = torch.cat([torch.zeros(0, dtype=torch.float64), *coefs.values()])[expected_norms > 0]
    reported = dict(zip(clipper.slots, report.norms.tolist(), strict=True))
    for key, some in norms.items() if by_parameter else ():
        for i, norm in enumerate(some.tolist()):
            for name in names[key]:
                other = reported.get(f"{name}[{i}]" if len(some) > 1 else name, norm)
                assert abs(other - norm) <= case.tolerance * norm, f"{where}: {other} for {norm} of {name}[{i}]"
    is_positive = report.norms > 0
    torch.testing.assert_close(
        report.norms[is_positive].sort().values,
        expected_norms[expected_norms > 0].sort().values,
        rtol=case.tolerance,
        atol=0,
        msg=lambda m: f"{where}: {m}",
    )
    torch.testing.assert_close(
        report.coefs[is_positive].sort().values,
        expected_coefs.sort().values,
        rtol=3 * case.tolerance,
        atol=0,
        msg=lambda m: f"{where}: {m}",
    )


def check_value(oracle: Oracle, parameters: Any, case: Case, where: str) -> None:
    """Check the policy that clamps elements."""
    limit = oracle.typical("tensor", math.inf)
    clipper = GradClipper(parameters, distclip.value(limit), split_over=case.split_over)
    params = [p.param for p in oracle.pieces if p.param.grad is not None]
    before = [stored(p.grad).clone() for p in params]
    sparse = {id(p): p.grad.clone() for p in params if p.grad.is_sparse}
    total = float(reference.total_norm(oracle.grads(1.0).values()))
    report = clipper.clip()
    assert abs(float(report.norm) - total) <= case.tolerance * total, where
    for param, old in zip(params, before, strict=True):
        if id(param) in sparse:
            # An element is the sum of what is stored for it.
            whole = sparse[id(param)]
            assert torch.equal(param.grad.to_dense(), whole.to_dense().clamp(-limit, limit)), where
            param.grad = whole
            continue
        assert torch.equal(stored(param.grad), old.double().clamp(-limit, limit).to(old.dtype)), where
        stored(param.grad).copy_(old)


def check_fitted(oracle: Oracle, parameters: Any, case: Case, name: str, where: str) -> bool:
    """Check a policy of the table, with a bound that suits the gradients. Return whether it clipped."""
    policy, bound = POLICIES[name].fitted(oracle)
    clipper = GradClipper(parameters, policy, split_over=case.split_over)
    trace = TRACE if name in ADAPTIVE else SHORT_TRACE
    return bool(check_clipper(oracle, clipper, bound, f"{where}, {policy}", case, trace))


def check_policies(name: str, policies: Iterable[str]) -> None:
    """Check policies in a layout of the table."""
    case = LAYOUTS[name].build()
    if case.idle:
        return
    parameters = list(case.parameters) if isinstance(case.parameters, Iterator) else case.parameters
    oracle = Oracle(pieces_of(parameters, case.split_over), case.ranks)
    is_one_flat_parameter = name.startswith("fsdp1") and not name.endswith("_orig")
    must_clip = bool(oracle.partial_grads)
    for policy in policies:
        if is_one_flat_parameter and POLICIES[policy].per in ("tensor", "row"):
            with pytest.raises(LayoutError, match="use_orig_params"):
                GradClipper(parameters, POLICIES[policy].fitted(oracle)[0], split_over=case.split_over)
        elif oracle.names or POLICIES[policy].per != "group":
            clipped = check_fitted(oracle, parameters, case, policy, name)
            assert clipped or not must_clip, f"{name}, {policy}: no step was clipped, so this tests nothing"
    if not oracle.has_partial_grads and not any(w.is_complex() for w in oracle.weights.values()):
        check_value(oracle, parameters, case, name)
