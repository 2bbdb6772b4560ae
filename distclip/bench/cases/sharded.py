"""Define the sharded cases: FSDP2 alone and with tensor parallelism, on a new world of ranks."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distclip

from ..competitors import Bound, Competitor, Setup, clipper, drop_ins
from ..errors import BenchError
from ..models import GPT, Adapters, Tiny, gpt_shapes
from ..race import Options, race
from ..results import Outcome, Standing, merge
from ..timing import Sample
from ..world import default_size, on_ranks
from .local import make_parameters

__all__ = ["SHARDED", "FirstCalls", "ShardedCase"]


@dataclass(frozen=True)
class ShardedCase:
    """Case whose gradients are sharded over ranks.

    Args:
        name: name for `--cases`.
        title: description in one line.
        build: makes the model on this rank and runs backward.
        divisor: number that the world size must be a multiple of.
        devices: types of devices that the case runs on.
    """

    name: str
    title: str
    build: Callable[[Options], nn.Module]
    divisor: int = 1
    devices: Sequence[str] = ("cpu", "cuda")

    def measure(self, options: Options, advance: Callable[[], object]) -> Outcome:
        """Start a world, count costs and time the competitors in it. Call `advance` after each round.

        Raises:
            BenchError: the world size does not fit, or a rank failed.
        """
        size = world_size(options)
        if size % self.divisor:
            raise BenchError(f"--world {size}: {self.name} needs a multiple of {self.divisor}. Pass one.")
        ranks = on_ranks(_race_on_rank, size, options.device, options.threads, advance, name=self.name, options=options)
        return merge(ranks)


@dataclass(frozen=True)
class FirstCalls:
    """Case that times the first call of each competitor in a new world.

    Args:
        name: name for `--cases`.
        title: description in one line.
        build: makes the model on this rank and runs backward.
        devices: types of devices that the case runs on.
        divisor: number that the world size must be a multiple of.
    """

    name: str
    title: str
    build: Callable[[Options], nn.Module]
    devices: Sequence[str] = ("cpu", "cuda")
    divisor: int = 1

    def measure(self, options: Options, advance: Callable[[], object]) -> Outcome:
        """Start one world per competitor and round, in random order. There are a third of `--rounds` rounds."""
        order = random.Random(options.seed)
        names = ["torch", "distclip", *options.against]
        calls: dict[str, list[Outcome]] = {name: [] for name in names}
        for _ in range(max(1, options.rounds // 3)):
            for competitor in order.sample(names, len(names)):
                ranks = on_ranks(
                    _call_once,
                    world_size(options),
                    options.device,
                    options.threads,
                    lambda: None,
                    name=self.name,
                    options=options,
                    competitor=competitor,
                )
                calls[competitor].append(merge(ranks))
            for _ in range(3):
                advance()
        standings = [
            Standing(name, name == "distclip", [outcome.standings[0].samples[0] for outcome in calls[name]])
            for name in names
        ]
        first = calls[names[0]][0]
        return Outcome(self.name, self.title, first.world, first.threads, first.tensors, first.bytes, standings)


def world_size(options: Options) -> int:
    return options.world or default_size(options.device)


def tiny(options: Options, count: int, tensor_parallel: bool = False) -> nn.Module:
    """Shard `Tiny` with FSDP2, one unit per pair of layers, and with tensor parallelism on pairs of ranks."""
    model = Tiny(4 * max(1, round(count * options.scale / 4))).to(options.device)
    size = dist.get_world_size()
    mesh = init_device_mesh(options.device, (size,), mesh_dim_names=("dp",))
    if tensor_parallel:
        mesh = init_device_mesh(options.device, (size // 2, 2), mesh_dim_names=("dp", "tp"))
        for pair in model.pairs:
            parallelize_module(pair, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    for part in (*model.pairs, model):
        fully_shard(part, mesh=mesh["dp"])
    model(torch.randn(8, model.width, device=options.device)).square().sum().backward()
    return model


def gpt(options: Options) -> nn.Module:
    """Shard `GPT` with FSDP2, one unit per block."""
    model = GPT(options.scale).to(options.device)
    for part in (*model.blocks, model):
        fully_shard(part)
    ids = torch.randint(model.token.num_embeddings, (1, 16), device=options.device)
    model(ids).logsumexp(-1).sum().backward()
    return model


def adapters(options: Options) -> nn.Module:
    """Shard a frozen layer and 256 adapters, each a unit of FSDP2, and give the adapters gradients."""
    model = Adapters(max(2, round(256 * options.scale))).to(options.device)
    for part in (model.base, *model.adapters.values()):
        fully_shard(part)
    for parameter in model.adapters.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def tenants(model: Adapters) -> list[Competitor]:
    """Return a clipper with all adapters as one group, and one with an isolated group per adapter."""
    isolated = isolated_adapters(model)
    return [
        clipper(model.adapters, distclip.global_norm(1e9), "one group"),
        Competitor("isolated groups", lambda: isolated.clip().norm, own=True),
    ]


def tenants_step(model: Adapters) -> list[Competitor]:
    """Return the steps of AdamW with the clippers of `tenants`."""
    optimizer = torch.optim.AdamW(model.adapters.parameters(), lr=1e-8)
    one_group, isolated = distclip.GradClipper(model.adapters, distclip.global_norm(1e9)), isolated_adapters(model)
    return [
        Competitor("one group", lambda: one_group.step(optimizer).norm, own=True),
        Competitor("isolated groups", lambda: isolated.step(optimizer).norm, own=True),
    ]


def isolated_adapters(model: Adapters) -> distclip.GradClipper:
    """Return a clipper with an isolated group for each adapter."""
    isolated = distclip.GradClipper(model, distclip.global_norm(1e9), isolate=True)
    isolated.add_groups(dict(model.adapters.items()))
    return isolated


def replicated(options: Options) -> nn.Module:
    """Make parameters of GPT-2 that all ranks hold, with equal gradients."""
    parameters = make_parameters(gpt_shapes(options.scale), torch.float32, options.device)
    mesh = init_device_mesh(options.device, (dist.get_world_size(),), mesh_dim_names=("dp",))
    for parameter in parameters:
        distclip.annotate_(parameter, mesh, [Replicate()])
    return nn.ParameterList(parameters)


def replica_checks(model: nn.Module) -> list[Competitor]:
    """Return a clipper that compares no replicas, and one that compares all of them."""

    def make(name: str, replicas: Literal["off", "warn"]) -> Competitor:
        grad_clipper = distclip.GradClipper(model, distclip.global_norm(1e9), replicas=replicas)
        return Competitor(name, lambda: grad_clipper.clip().norm, own=True)

    return [make('replicas="off"', "off"), make('replicas="warn"', "warn")]


def _race_on_rank(name: str, options: Options, advance: Callable[[], object]) -> Outcome:
    """Run a sharded case on one rank."""
    case = SHARDED[name]
    torch.manual_seed(options.seed)
    model = case.build(options)
    parameters = list(model.parameters())
    if name in _CONTESTS:
        competitors = _CONTESTS[name](model)
    else:
        competitors = [
            *drop_ins(parameters, Bound(parameters), options.against),
            clipper(model, distclip.global_norm(1e9)),
        ]
    setup = Setup(parameters, competitors)
    standings = race(setup, options, advance, dist.barrier, _first_error)
    return _outcome(case, setup, standings)


def _call_once(name: str, options: Options, competitor: str, advance: Callable[[], object]) -> Outcome:
    """Time the first call of one competitor on one rank."""
    case = SHARDED[name]
    torch.manual_seed(options.seed)
    model = case.build(options)
    parameters = list(model.parameters())
    competitors = drop_ins(parameters, Bound(parameters), options.against)
    setup = Setup(parameters, [one for one in competitors if one.name == competitor])
    if options.device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    start = time.perf_counter()
    setup.competitors[0].call()
    if options.device == "cuda":
        torch.cuda.synchronize()
    sample = Sample(time.perf_counter() - start, False)
    return _outcome(case, setup, [Standing(competitor, competitor == "distclip", [sample])])


def _outcome(case: ShardedCase | FirstCalls, setup: Setup, standings: Sequence[Standing]) -> Outcome:
    grads = setup.grads()
    size = sum(grad.nbytes for grad in grads)
    return Outcome(case.name, case.title, dist.get_world_size(), torch.get_num_threads(), len(grads), size, standings)


def _first_error(error: str | None) -> str | None:
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return next((message for message in errors if message is not None), None)


_FSDP2 = "tiny parameters under FSDP2"
_ADAPTERS = "256 adapters of a frozen layer under FSDP2"
_TP = "tiny parameters under FSDP2 x tensor parallelism"

_ALL: list[ShardedCase | FirstCalls] = [
    ShardedCase("fsdp2_100", f"100 {_FSDP2}", partial(tiny, count=100)),
    ShardedCase("fsdp2_500", f"500 {_FSDP2}", partial(tiny, count=500)),
    ShardedCase("fsdp2_2000", f"2,000 {_FSDP2}", partial(tiny, count=2000)),
    ShardedCase("fsdp2_gpt2", "GPT-2's 148 parameters, 124 M elements, fp32, under FSDP2", gpt),
    ShardedCase("fsdp2_tp_100", f"100 {_TP}", partial(tiny, count=100, tensor_parallel=True), divisor=2),
    ShardedCase("fsdp2_tp_500", f"500 {_TP}", partial(tiny, count=500, tensor_parallel=True), divisor=2),
    ShardedCase("replicas", "GPT-2's 148 parameters, fp32, on all ranks, which compare them or not", replicated),
    ShardedCase("tenants", f"the gradients of {_ADAPTERS}", adapters),
    ShardedCase("tenants_step", f"a step of AdamW on {_ADAPTERS}", adapters),
    FirstCalls("first_call", f"the first call in a new world; 100 {_FSDP2}", partial(tiny, count=100)),
]

_CONTESTS: dict[str, Callable[[Any], list[Competitor]]] = {
    "replicas": replica_checks,
    "tenants": tenants,
    "tenants_step": tenants_step,
}
"""Competitors of a case, other than functions with the signature of torch and a `GradClipper`."""

SHARDED = {case.name: case for case in _ALL}
"""Sharded cases by name."""
