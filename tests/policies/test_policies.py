"""Every policy in every layout of the table, over several steps: whole tensors in float64 say what is to come."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip import GradClipper, LayoutError, reference
from distclip.policies import MedianMAD, NormPolicy
from distclip.sharding import named
from tests.ranks import World
from tests.sharding.test_layouts import check_counts, stored
from tests.tables.layouts import LAYOUTS, Case

TRACE = (0.06, 0.11, 0.07, 0.09, 1.0, 0.08, 0.12)
"""What the gradients are multiplied by, step by step: a spike after the warm-ups."""

SHORT = (0.06, 1.0)
"""For rules that remember nothing."""


@dataclass
class Piece:
    """What this rank holds of one parameter.

    Args:
        name: as the clipper has it.
        param: the parameter, with a gradient or without.
        key: the same on all ranks that hold something of the same parameter, and of no other.
        shape: of the whole.
        at: for each local element of the parameter, its place in the whole, flattened.
        grad_at: of the gradient, if it lies elsewhere.
        part: which of several summands the gradient is.
        mean: what summands are multiplied by.
    """

    name: str
    param: Tensor
    key: Any
    shape: tuple[int, ...]
    at: Tensor
    grad_at: Tensor | None = None
    part: tuple[int, ...] = ()
    mean: float = 1.0


def whole(name: str, param: Tensor, key: Any = None, part: tuple[int, ...] = ()) -> Piece:
    """A parameter that this rank holds all of."""
    return Piece(name, param, key or name, tuple(param.shape), torch.arange(param.numel()), part=part)


def part_of(name: str, param: Tensor, key: Any, dim: int, place: int, places: int) -> Piece:
    """One of `places` equal pieces along a dim."""
    shape = list(param.shape)
    shape[dim] *= places
    at = torch.arange(math.prod(shape)).view(shape).chunk(places, dim)[place]
    return Piece(name, param, key, tuple(shape), at.reshape(-1))


def placed(local: Tensor, mesh: DeviceMesh, placements: Sequence[Any], shape: torch.Size) -> Tensor:
    """Where the elements of a local piece come to lie in the whole, as torch puts it together."""
    laid = [Replicate() if p.is_partial() else p for p in placements]
    if all(p.is_replicate() or type(p) is Shard for p in laid):
        # No communication: there are ranks that hold nothing, and stay away.
        ids = torch.arange(shape.numel()).view(shape)
        return distribute_tensor(ids, mesh, laid, src_data_rank=None).to_local().reshape(-1)
    ids = torch.arange(local.numel()).view(local.shape) + (dist.get_rank() << 32)
    stride = torch.empty(shape, device="meta").stride()
    every = DTensor.from_local(ids, mesh, laid, run_check=False, shape=shape, stride=stride).full_tensor().reshape(-1)
    own = (every >> 32 == dist.get_rank()).nonzero().view(-1)
    return own[torch.argsort(every[own])]


def of_dtensor(name: str, param: DTensor, key: Any) -> Piece:
    piece = Piece(
        name,
        param,
        key,
        tuple(param.shape),
        placed(param.to_local(), param.device_mesh, param.placements, param.shape),
    )
    grad = param.grad
    if isinstance(grad, DTensor) and grad.placements != param.placements:
        mesh = grad.device_mesh
        piece.grad_at = placed(grad.to_local(), mesh, grad.placements, grad.shape)
        partial = [i for i, p in enumerate(grad.placements) if p.is_partial()]
        piece.part = tuple(mesh.get_local_rank(i) for i in partial)
        means = [mesh.size(i) for i in partial if grad.placements[i].reduce_op == "avg"]
        piece.mean = 1 / math.prod(means)
    return piece


def of_fsdp1(model: Any, pieces_of: dict[int, tuple[str, Any]]) -> dict[int, Piece]:
    """The slices of FSDP1, by `id`; each begins where those of the ranks before it end."""
    found = {}
    for wrapped in FullyShardedDataParallel.fsdp_modules(model):
        handle = wrapped._handle
        if handle is None or not handle.uses_sharded_strategy:
            continue
        flat, group = handle.flat_param, wrapped.process_group
        for i, param in enumerate(flat._params or (flat,)):
            lengths: list[int] = [0] * dist.get_world_size(group)
            dist.all_gather_object(lengths, param.numel(), group=group)
            shape = (sum(lengths),) if flat._params is None else tuple(flat._shapes[i])
            begin = sum(lengths[: dist.get_rank(group)])
            name, key = pieces_of[id(param)]
            found[id(param)] = Piece(name, param, key, shape, torch.arange(begin, begin + param.numel()))
    return found


def lines(split_over: Any) -> Iterator[list[int]]:
    """The ranks along each axis of `split_over=`, through this one."""
    if isinstance(split_over, DeviceMesh):
        for i in range(split_over.ndim):
            yield dist.get_process_group_ranks(split_over.get_group(i))
    elif isinstance(split_over, dist.ProcessGroup):
        yield dist.get_process_group_ranks(split_over)
    elif split_over is not None:
        for one in split_over.values() if isinstance(split_over, dict) else split_over:
            yield from lines(one)


def pieces_of(parameters: Any, split_over: Any = None) -> list[Piece]:
    """Of parameters that carry no annotation and no tag."""
    pieces, keys = {}, {}
    entries = named(parameters)
    for name, param in entries:
        members = {dist.get_rank()}
        if isinstance(param, DTensor):
            members |= set(param.device_mesh.mesh.flatten().tolist())
        places = (min(line.index(rank) for rank in members if rank in line) for line in lines(split_over))
        keys[id(param)] = (name, (name, *places))
    if isinstance(parameters, torch.nn.Module):
        pieces = of_fsdp1(parameters, keys)
    for name, param in entries:
        if id(param) not in pieces:
            key = keys[id(param)][1]
            pieces[id(param)] = of_dtensor(name, param, key) if isinstance(param, DTensor) else whole(name, param, key)
    return [pieces[id(param)] for _, param in entries]


def local(tensor: Tensor) -> Tensor:
    """All elements here, dense."""
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


@dataclass
class Oracle:
    """The whole parameters and gradients, from the pieces of all ranks; the parameters get random numbers.

    Args:
        pieces: of this rank.
        ranks: the group of those that hold any, None for all.
    """

    pieces: list[Piece]
    ranks: dist.ProcessGroup | None = None
    names: dict[Any, set[str]] = field(default_factory=dict)
    weights: dict[Any, Tensor] = field(default_factory=dict)
    summands: dict[Any, dict[tuple[int, ...], tuple[Tensor, float]]] = field(default_factory=dict)
    scaled: dict[float, dict[Any, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        here = []
        for p in self.pieces:
            grad = None if p.param.grad is None else local(p.param.grad).reshape(-1)
            at = p.at if p.grad_at is None else p.grad_at
            here.append((p.key, p.name, p.shape, p.param.dtype, at, grad, p.part, p.mean))
        every: list[Any] = [None] * dist.get_world_size(self.ranks)
        dist.all_gather_object(every, here, group=self.ranks)
        for key, name, shape, dtype, at, grad, part, mean in (said for rank in every for said in rank):
            self.names.setdefault(key, set()).add(name)
            if key not in self.weights:
                seed = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
                self.weights[key] = torch.randn(shape, generator=seed).to(dtype)
                if len(shape) > 1 and shape[0] > 1:
                    self.weights[key][0] = 0
            if grad is not None:
                empty = (torch.zeros(math.prod(shape), dtype=grad.dtype), mean)
                self.summands.setdefault(key, {}).setdefault(part, empty)[0][at] = grad
        with torch.no_grad():
            for p in self.pieces:
                here = local(p.param)
                here.copy_(self.weights[p.key].reshape(-1)[p.at].view(here.shape))

    def grads(self, scale: float) -> dict[Any, Tensor]:
        """The whole gradients when each rank has multiplied its own; zeros where there is none."""
        if scale not in self.scaled:
            self.scaled[scale] = self._grads(scale)
        return self.scaled[scale]

    def _grads(self, scale: float) -> dict[Any, Tensor]:
        return {
            key: sum(
                (wide(summand * scale) * mean for summand, mean in self.summands.get(key, {}).values()),
                torch.zeros(weight.numel(), dtype=torch.float64),
            ).view(weight.shape)
            for key, weight in self.weights.items()
        }

    def slot(self, key: Any, policy: Any) -> Any:
        """What a parameter is measured with."""
        if policy.per in ("tensor", "row"):
            return key
        hits = [
            g for g, pattern in getattr(policy, "groups", {}).items() for n in self.names[key] if re.search(pattern, n)
        ]
        return hits[0] if hits else "rest"

    def norms(self, tensors: dict[Any, Tensor], policy: Any) -> dict[Any, Tensor]:
        """1-D, by slot."""
        by_slot: dict[Any, list[Tensor]] = {}
        for key, tensor in tensors.items():
            rows = policy.per == "row" and tensor.ndim > 1
            by_slot.setdefault(self.slot(key, policy), []).extend(tensor if rows else [tensor])
        if policy.per == "row":
            return {
                s: torch.stack([reference.total_norm([r], policy.norm_type) for r in rows])
                for s, rows in by_slot.items()
            }
        return {s: reference.total_norm(some, policy.norm_type).view(1) for s, some in by_slot.items()}

    def typical(self, per: str, p: float = 2.0) -> float:
        """A norm of the middle, in few digits."""
        norms = self.norms(
            self.grads(0.09), NormPolicy(norm_type=p, per=per, groups={"": "^$"} if per == "group" else {})
        )
        return middle(torch.cat([*norms.values(), torch.zeros(0)]))


def middle(norms: Tensor) -> float:
    norms = norms[norms > 0]
    return float(f"{float(norms.median()):.2g}") * 1.03 if len(norms) else 1.0


Bound = Callable[..., float]
"""From the norms of a slot so far, those of all, the slot's name and the norm of its weights."""


def rules(oracle: Oracle) -> Iterator[tuple[Any, Bound]]:
    """Every preset with numbers that make it act, and the bound that it is to give."""
    total, tensor = oracle.typical("model"), oracle.typical("tensor", math.inf)
    absolute = oracle.typical("model", 1.0)
    yield distclip.global_norm(total), lambda norms, *_: total
    yield distclip.per_tensor_norm(tensor, math.inf), lambda norms, *_: tensor
    first = "^" + re.escape(min((n for names in oracle.names.values() for n in names), default="none"))
    if oracle.names:
        groups = {"first": (first, absolute / 2)}
        yield (
            distclip.group_norm(groups, absolute / 3, 1.0),
            lambda norms, totals, slot, w: absolute / (2 if slot == "first" else 3),
        )
    exclude = [first] if len(set().union(*oracle.names.values())) > 1 else []
    rows = NormPolicy(per="row")
    grads, weights = oracle.norms(oracle.grads(0.09), rows), oracle.norms(oracle.weights, rows)
    ratio = middle(torch.cat([*(grads[k] / weights[k].clamp(min=0.01) for k in grads), torch.zeros(0)]))
    yield (
        distclip.agc(ratio, eps=0.01, exclude=exclude),
        lambda norms, totals, slot, weight: (
            math.inf
            if exclude and any(re.search(first, n) for n in oracle.names[slot])
            else reference.agc_bound(weight, ratio, 0.01)
        ),
    )
    yield distclip.autoclip(40, window=4, per="tensor"), lambda norms, *_: reference.autoclip_bounds(norms, 40, 4)[-1]
    yield distclip.zclip(1.5, 0.8, warmup=3), lambda norms, *_: reference.zclip_bounds(norms, 1.5, 0.8, 3)[-1]
    yield (
        distclip.adagc(1.2, 0.8, warmup=2, warmup_norm=total),
        lambda norms, totals, *_: reference.adagc_bounds(norms, totals, 1.2, 0.8, 2, total)[-1],
    )
    yield (
        distclip.ema(1.7, 1.1, 0.9, 0.6, warmup=2, per="row"),
        lambda norms, *_: reference.ema_bounds(norms, 1.7, 1.1, 0.9, 0.6, 2)[-1],
    )
    yield (
        NormPolicy(MedianMAD(1.5, window=4, warmup=2), per="tensor"),
        lambda norms, *_: reference.median_mad_bounds(norms, 1.5, 4, 2)[-1],
    )


def check_clipper(
    oracle: Oracle, clipper: GradClipper, bound: Bound, where: str, case: Case, trace: Iterable[float] | None = None
) -> int:
    """Several steps against the oracle.

    Returns:
        In how many of them some coefficient was below 1.
    """
    policy = clipper.policy
    if trace is None:
        remembers = bool(policy.init(1, torch.device("cpu")))
        trace = TRACE if remembers else SHORT
    weights = oracle.norms(oracle.weights, policy)
    series: dict[tuple[Any, int], list[tuple[float, float]]] = {}
    mine = [p for p in oracle.pieces if p.param.grad is not None]
    before = [stored(p.param.grad).clone() for p in mine]
    memory = [stored(p.param.grad).untyped_storage().data_ptr() for p in mine]
    clipped, said = 0, []
    for t, scale in enumerate(trace):
        here = f"{where}, step {t}"
        for p, old in zip(mine, before, strict=True):
            stored(p.param.grad).copy_(old * scale)
        grads = oracle.grads(scale)
        total = float(reference.total_norm(grads.values(), policy.norm_type))
        norms = oracle.norms(grads, policy)
        coefs = {slot: torch.ones_like(some) for slot, some in norms.items()}
        for slot, some in norms.items():
            for i, norm in enumerate(some.tolist()):
                if norm > 0:
                    past = series.setdefault((slot, i), [])
                    past.append((norm, total))
                    most = bound([n for n, _ in past], [a for _, a in past], slot, float(weights[slot][i]))
                    coefs[slot][i] = 1.0 if norm + policy.eps <= most else most / (norm + policy.eps)
        clipped += any((c < 1).any() for c in coefs.values())
        locals_ = [local(p.param.grad).clone() for p in mine]
        writes = [stored(p.param.grad)._version for p in mine]
        if t % 3:
            report = clipper.clip()
        else:
            with CommDebugMode() as counter:
                report = clipper.clip()
            check_counts(counter, case, here)
        check_report(report, clipper, total, norms, coefs, oracle.names, case, here)
        for p, old, write, place in zip(mine, locals_, writes, memory, strict=True):
            coef = coefs[oracle.slot(p.key, policy)]
            if len(coef) == 1:
                coef = coef.view(())
            else:
                coef = coef.view(-1, *(1,) * (len(p.shape) - 1)).expand(p.shape).reshape(-1)
                coef = coef[p.at if p.grad_at is None else p.grad_at].view(old.shape)
            check_local(local(p.param.grad), old, coef, f"{here}, {p.name}")
            # Views of one bucket are counted together; a slot of zeros may have any coefficient.
            if (
                old.numel()
                and (coef == 1).all()
                and norms[oracle.slot(p.key, policy)].all()
                and memory.count(place) == 1
            ):
                assert stored(p.param.grad)._version == write, f"{here}, {p.name}: written without need"
        said.append([x.numpy().tobytes() for x in (report.norm.double(), report.norms, report.coefs, report.coef)])
    bits: list[Any] = [None] * dist.get_world_size(case.ranks)
    dist.all_gather_object(bits, (said, clipper.slots), group=case.ranks)
    assert all(b == bits[0] for b in bits), f"{where}: ranks differ"
    for p, old in zip(mine, before, strict=True):
        stored(p.param.grad).copy_(old)
    return clipped


def check_local(grad: Tensor, old: Tensor, coef: Tensor, where: str) -> None:
    rtol = {torch.float64: 1e-9, torch.bfloat16: 4e-3, torch.float16: 1e-3}.get(grad.dtype, 2e-6)
    tiny = torch.finfo(grad.dtype).tiny
    torch.testing.assert_close(wide(grad), wide(old) * coef, rtol=rtol, atol=tiny, msg=lambda m: f"{where}: {m}")


def check_report(
    report: Any, clipper: GradClipper, total: float, norms: Any, coefs: Any, names: Any, case: Case, where: str
) -> None:
    assert abs(float(report.norm) - total) <= case.tolerance * total, f"{where}: {float(report.norm)} for {total}"
    assert len(clipper.slots) == len(report.norms) == len(report.coefs), f"{where}: {clipper.slots}"
    if clipper.policy.per in ("tensor", "row"):
        # Where no rank has a parameter the one norm is that of nothing.
        many = sum(len(n) for n in norms.values()) or 1
        assert len(set(clipper.slots)) == len(clipper.slots) == many, clipper.slots
    flat = torch.cat([torch.zeros(0, dtype=torch.float64), *norms.values()])
    expected = torch.cat([torch.zeros(0, dtype=torch.float64), *coefs.values()])[flat > 0]
    found = dict(zip(clipper.slots, report.norms.tolist(), strict=True))
    for key, some in norms.items() if clipper.policy.per in ("tensor", "row") else ():
        for i, norm in enumerate(some.tolist()):
            for name in names[key]:
                seen = found.get(f"{name}[{i}]" if len(some) > 1 else name, norm)
                assert abs(seen - norm) <= case.tolerance * norm, f"{where}: {seen} for {norm} of {name}[{i}]"
    there, their = report.norms[report.norms > 0], report.coefs[report.norms > 0]
    torch.testing.assert_close(
        there.sort().values, flat[flat > 0].sort().values, rtol=case.tolerance, atol=0, msg=where
    )
    torch.testing.assert_close(their.sort().values, expected.sort().values, rtol=3 * case.tolerance, atol=0, msg=where)


def check_value(oracle: Oracle, parameters: Any, case: Case, where: str) -> None:
    bound = oracle.typical("tensor", math.inf)
    clipper = GradClipper(parameters, distclip.value(bound), split_over=case.split_over)
    mine = [p.param.grad for p in oracle.pieces if p.param.grad is not None]
    before = [stored(g).clone() for g in mine]
    total = float(reference.total_norm(oracle.grads(1.0).values()))
    report = clipper.clip()
    assert abs(float(report.norm) - total) <= case.tolerance * total, where
    for grad, old in zip(mine, before, strict=True):
        assert torch.equal(stored(grad), old.double().clamp(-bound, bound).to(old.dtype)), where
        stored(grad).copy_(old)


_MARKED = ("tied_", "annotated_", "megatron_")
"""Rows whose plain tensors are pieces by what is written on them: see test_slots."""

_WIDE = {"ddp_unused", "fsdp2_ragged", "fsdp2_empty", "fsdp1_full_shard_orig", "partial_missing_on_one", "stages"}
"""Rows that are not the same with two ranks as with four; elsewhere two are enough."""

_TABLE = [
    (name, 2 if 2 in row.worlds and name not in _WIDE else 4)
    for name, row in LAYOUTS.items()
    if not name.startswith(_MARKED) and 8 not in row.worlds
]


def check_policies(name: str) -> None:
    case = LAYOUTS[name].build()
    if case.idle:
        return
    parameters = list(case.parameters) if isinstance(case.parameters, Iterator) else case.parameters
    oracle = Oracle(pieces_of(parameters, case.split_over), case.ranks)
    one_flat = name.startswith("fsdp1") and not name.endswith("_orig")
    # What is far below every ε is not clipped by rules that have one.
    some = oracle.typical("model") > 1e-3 and bool(oracle.summands)
    for policy, bound in rules(oracle):
        where = f"{name}, {policy}"
        if one_flat and policy.per in ("tensor", "row"):
            try:
                GradClipper(parameters, policy, split_over=case.split_over)
            except LayoutError as error:
                assert "use_orig_params" in str(error)
            else:
                raise AssertionError(f"{where}: accepted")
            continue
        clipper = GradClipper(parameters, policy, split_over=case.split_over)
        clipped = check_clipper(oracle, clipper, bound, where, case)
        assert clipped or not some, f"{where}: the test tests nothing"
    parts = [part for summands in oracle.summands.values() for part in summands]
    if not any(parts) and not any(w.is_complex() for w in oracle.weights.values()):
        check_value(oracle, parameters, case, name)


@pytest.mark.parametrize(("name", "size"), _TABLE)
def test_policies(world: Callable[[int], World], name: str, size: int) -> None:
    world(size).run(check_policies, name=name)
