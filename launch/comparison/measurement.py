"""Clip the gradient of each layout with torch and with distclip, on gloo ranks that are started here."""

from __future__ import annotations

import logging
import math
import re
import signal
import textwrap
import warnings
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import distclip
from distclip.bench.world import start_ranks

from .framework import clip_as_frameworks_do
from .layouts import CASES, LayoutCase, LocalParameters

MAX_NORM = 1.0
TOLERANCE = 1e-6
LIBRARIES = ("distclip", "torch", "framework")
HANG_TIMEOUT = 5.0
"""Seconds that the other ranks get after the first one has finished a call. A rank that takes longer counts as hung."""
PRELOAD = ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "rich.table", "distclip"]


@dataclass
class RankResult:
    """Result of one call on one rank.

    Args:
        norm: norm that the call returned.
        error: exception that the call raised.
        factors: smallest and largest factor by which the call multiplied a gradient.
    """

    norm: float | None
    error: str | None
    factors: tuple[float, float] | None


@dataclass
class Result:
    """Result of one call on all ranks.

    Args:
        norms: norms that the ranks returned.
        text: norm or error, for the table.
        right: whether all ranks returned the true norm.
        gradients: description of the gradients after the call.
    """

    norms: list[float]
    text: str
    right: bool
    gradients: str


@dataclass
class Row:
    """Results of one layout."""

    layout: str
    truth: float
    torch: Result
    framework: Result
    distclip: Result


def measure(index: int) -> Row:
    """Measure the layout `CASES[index]`."""
    case = CASES[index]
    elements = torch.cat([grad.double().flatten() for grad in case.gradient().values()])
    truth = float(torch.linalg.vector_norm(elements, case.norm_type))
    results: dict[str, Result] = {}
    while len(results) < len(LIBRARIES):
        remaining = [library for library in LIBRARIES if library not in results]
        with start_ranks(run_rank, case.num_ranks, (index,), PRELOAD) as connections:
            for library in remaining:
                for connection in connections:
                    connection.send(library)
                results[library] = combine(received := receive_all(connections), truth)
                # If ranks hang, they cannot make another call, so a new world starts.
                if None in received:
                    break
    return Row(case.name, truth, **results)


def combine(rank_results: list[RankResult | None], truth: float) -> Result:
    """Combine the results of all ranks. None stands for a rank that hangs."""
    finished = [result for result in rank_results if result is not None]
    norms = [result.norm for result in finished if result.norm is not None]
    errors = [result.error for result in finished if result.error is not None]
    factors = [factor for result in finished if result.factors for factor in result.factors]
    if num_hanging := len(rank_results) - len(finished):
        text = f"hangs ({num_hanging} of {len(rank_results)} ranks)"
    else:
        text = errors[0] if errors else format_range(norms)
    agree = len(norms) == len(rank_results) and len(set(norms)) == 1
    right = agree and abs(norms[0] - truth) <= TOLERANCE * truth
    return Result(norms, text, right, describe_factors(factors, truth) if factors and not num_hanging else "")


def describe_factors(factors: list[float], truth: float) -> str:
    """Describe how the factors that scaled the gradients differ from the right one."""
    right = min(1.0, MAX_NORM / (truth + 1e-6))
    if not all(map(math.isfinite, factors)):
        return "not finite"
    # Half precision rounds by 0.4 %.
    if all(abs(factor / right - 1) < 0.01 for factor in factors):
        return "right"
    for words, value in {"all zero": 0.0, "not clipped": 1.0}.items():
        if all(factor == value for factor in factors):
            return words
    ratios = [factor / right for factor in factors]
    text = f"{format_range(ratios, 2)} x"
    if min(ratios) > 1:
        return f"{text} too large"
    return f"too small ({text})" if max(ratios) < 1 else f"{text} the right size"


def format_range(values: list[float], digits: int = 6) -> str:
    """Format the smallest and the largest value, or one number if they are equal."""
    return " … ".join(dict.fromkeys(f"{value:.{digits}g}" for value in (min(values), max(values))))


# On the ranks


def run_rank(rank: int, folder: str, connection: Connection, index: int) -> None:
    """Clip with each library that the parent names. This is the main function of a rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # DTensor warns if a norm is reduced over two axes of a mesh.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    world_size = CASES[index].num_ranks
    if world_size > 1:
        # The timeout ends ranks whose parent has died.
        rendezvous, timeout = f"file://{folder}/store", timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=timeout)
    # The parent kills the rank. If a rank exited here, a collective of another rank could fail.
    while True:
        connection.send(clip(CASES[index], connection.recv()))


def clip(case: LayoutCase, library: str) -> RankResult:
    """Distribute the gradient and clip it."""
    local = case.distribute(case.gradient())
    before = local_norms(local)
    if dist.is_initialized():
        dist.barrier()
    norm = error = None
    try:
        norm = float(call(library, local, case.norm_type))
    except Exception as exception:
        # Shorten torch's message: it begins with an operator's name, and pages of advice for developers may follow.
        words = re.split(r"[,\n]", re.sub(r"^aten\.\S+ ", "", str(exception)))[0]
        error = f"{type(exception).__name__}: {textwrap.shorten(words, 70, placeholder=' …')}"
    factors = [after / norm for after, norm in zip(local_norms(local), before, strict=True) if norm]
    return RankResult(norm, error, (min(factors), max(factors)) if factors else None)


def call(library: str, local: LocalParameters, norm_type: float) -> Tensor:
    """Call clip_grad_norm_ of a library."""
    if library == "torch":
        return torch.nn.utils.clip_grad_norm_(local.parameters, MAX_NORM, norm_type)
    if library == "framework":
        return clip_as_frameworks_do(local, MAX_NORM, norm_type)
    parameters = local.module or local.parameters
    return distclip.clip_grad_norm_(parameters, MAX_NORM, norm_type, split_over=local.split_over)


def local_norms(local: LocalParameters) -> list[float]:
    """Return the norm of this rank's shard of each gradient."""
    grads = [p.grad for p in local.parameters if p.grad is not None]
    shards = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    return [float(torch.linalg.vector_norm(shard.double())) for shard in shards]


# In the parent


def receive_all(connections: list[Connection]) -> list[RankResult | None]:
    """Receive the result of one call from each rank. None stands for a rank that hangs."""
    results: dict[int, RankResult] = {}
    while len(results) < len(connections):
        pending = {rank: connection for rank, connection in enumerate(connections) if rank not in results}
        ready = wait(list(pending.values()), timeout=HANG_TIMEOUT if results else 60.0)
        if not ready:
            break
        results.update((rank, receive(connection)) for rank, connection in pending.items() if connection in ready)
    return [results.get(rank) for rank in range(len(connections))]


def receive(connection: Connection) -> RankResult:
    """Receive one result. A rank that died has an error."""
    try:
        result: RankResult = connection.recv()
    except EOFError:
        return RankResult(None, "the process died", None)
    return result
