"""The sharded cases: FSDP2, alone and with tensor parallelism, on ranks of a world of their own."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distclip

from .competitors import Bound, Setup, clipper, drop_ins
from .errors import BenchError
from .models import GPT, Tiny
from .race import Options, contest
from .results import Outcome, Standing, merged
from .timing import Sample
from .world import default_size, on_ranks

__all__ = ["SHARDED", "FirstCalls", "ShardedCase"]


@dataclass(frozen=True)
class ShardedCase:
    """Gradients that are spread over ranks.

    Args:
        name: what `--cases` calls it.
        title: what is in it, in one line.
        build: the model on this rank, after a backward.
        divisor: of the world size.
        devices: where it can run.
    """

    name: str
    title: str
    build: Callable[[Options], nn.Module]
    divisor: int = 1
    devices: Sequence[str] = ("cpu", "cuda")

    def measure(self, options: Options, advance: Callable[[], object]) -> Outcome:
        """Start a world, count and race in it; `advance` is called after each round.

        Raises:
            BenchError: a world size that does not fit; a rank that failed.
        """
        size = world_size(options)
        if size % self.divisor:
            raise BenchError(f"--world {size}: {self.name} needs a multiple of {self.divisor}.")
        ranks = on_ranks(_race, size, options.device, options.threads, advance, name=self.name, options=options)
        return merged(ranks)


@dataclass(frozen=True)
class FirstCalls:
    """The very first call of a contestant in a world that has clipped nothing yet; a world for each.

    Args:
        name: what `--cases` calls it.
        title: what is in it, in one line.
        build: the model on this rank, after a backward.
        devices: where it can run.
    """

    name: str
    title: str
    build: Callable[[Options], nn.Module]
    devices: Sequence[str] = ("cpu", "cuda")

    def measure(self, options: Options, advance: Callable[[], object]) -> Outcome:
        """Worlds for a third of the rounds (at least one), in each round one for each contestant in random order."""
        order = random.Random(options.seed)
        names = ["torch", "distclip", *options.against]
        calls: dict[str, list[Outcome]] = {name: [] for name in names}
        for _ in range(max(1, options.rounds // 3)):
            for who in order.sample(names, len(names)):
                ranks = on_ranks(
                    _call_once,
                    world_size(options),
                    options.device,
                    options.threads,
                    lambda: None,
                    name=self.name,
                    options=options,
                    who=who,
                )
                calls[who].append(merged(ranks))
            for _ in range(3):
                advance()
        standings = [
            Standing(who, who == "distclip", [each.standings[0].samples[0] for each in calls[who]]) for who in names
        ]
        one = calls[names[0]][0]
        return Outcome(self.name, self.title, one.world, one.threads, one.tensors, one.bytes, standings)


def world_size(options: Options) -> int:
    return options.world or default_size(options.device)


def tiny(options: Options, count: int, tensor_parallel: bool = False) -> nn.Module:
    """`Tiny`, each of its pairs of layers a unit of FSDP2; with tensor parallelism on pairs of ranks."""
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
    """`GPT`, each of its blocks a unit of FSDP2."""
    model = GPT(options.scale).to(options.device)
    for part in (*model.blocks, model):
        fully_shard(part)
    ids = torch.randint(model.token.num_embeddings, (1, 16), device=options.device)
    model(ids).logsumexp(-1).sum().backward()
    return model


def _race(name: str, options: Options, advance: Callable[[], object]) -> Outcome:
    """A sharded case on one rank."""
    case = SHARDED[name]
    torch.manual_seed(options.seed)
    model = case.build(options)
    made = list(model.parameters())
    contestants = [*drop_ins(made, Bound(made), options.against), clipper(model, distclip.global_norm(1e9))]
    setup = Setup(made, contestants)
    standings = contest(setup, options, advance, dist.barrier, _agreed)
    return _outcome(case, setup, standings)


def _call_once(name: str, options: Options, who: str, advance: Callable[[], object]) -> Outcome:
    """The first call of one contestant on one rank."""
    case = SHARDED[name]
    torch.manual_seed(options.seed)
    model = case.build(options)
    made = list(model.parameters())
    setup = Setup(made, [each for each in drop_ins(made, Bound(made), options.against) if each.name == who])
    if options.device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    start = time.perf_counter()
    setup.contestants[0].call()
    if options.device == "cuda":
        torch.cuda.synchronize()
    sample = Sample(time.perf_counter() - start, False)
    return _outcome(case, setup, [Standing(who, who == "distclip", [sample])])


def _outcome(case: ShardedCase | FirstCalls, setup: Setup, standings: Sequence[Standing]) -> Outcome:
    grads = setup.grads()
    size = sum(grad.nbytes for grad in grads)
    return Outcome(case.name, case.title, dist.get_world_size(), torch.get_num_threads(), len(grads), size, standings)


def _agreed(error: str | None) -> str | None:
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return next((each for each in errors if each is not None), None)


_FSDP2 = "tiny parameters under FSDP2"
_TP = "tiny parameters under FSDP2 x tensor parallelism"

_ALL: list[ShardedCase | FirstCalls] = [
    ShardedCase("fsdp2_100", f"100 {_FSDP2}", partial(tiny, count=100)),
    ShardedCase("fsdp2_500", f"500 {_FSDP2}", partial(tiny, count=500)),
    ShardedCase("fsdp2_2000", f"2,000 {_FSDP2}", partial(tiny, count=2000)),
    ShardedCase("fsdp2_gpt2", "GPT-2's 148 parameters, 124 M elements, fp32, under FSDP2", gpt),
    ShardedCase("fsdp2_tp_100", f"100 {_TP}", partial(tiny, count=100, tensor_parallel=True), divisor=2),
    ShardedCase("fsdp2_tp_500", f"500 {_TP}", partial(tiny, count=500, tensor_parallel=True), divisor=2),
    FirstCalls("first_call", f"the first call of all, in a new world; 100 {_FSDP2}", partial(tiny, count=100)),
]

SHARDED = {case.name: case for case in _ALL}
"""By name."""
