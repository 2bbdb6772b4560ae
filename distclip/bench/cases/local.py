"""Define the local cases: one process, plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import distclip

from ..competitors import BelowNorm, Bound, Competitor, Setup, clipper, drop_ins, read_limit
from ..models import gpt_shapes
from ..race import Options, race
from ..results import Outcome

__all__ = ["LOCAL", "LocalCase"]

BUCKET = 25 << 20
"""Number of bytes in a bucket of DistributedDataParallel."""


@dataclass(frozen=True)
class LocalCase:
    """Case whose gradients are in one process.

    Args:
        name: name for `--cases`.
        title: description in one line.
        build: makes gradients and competitors.
        devices: types of devices that the case runs on.
        divisor: see `ShardedCase`. A local case does not use it.
    """

    name: str
    title: str
    build: Callable[[Options], Setup]
    devices: Sequence[str] = ("cpu", "cuda")
    divisor: int = 1

    def measure(self, options: Options, advance: Callable[[], object]) -> Outcome:
        """Build the gradients, count costs and time the competitors. Call `advance` after each round."""
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        setup = self.build(options)
        grads = setup.grads()
        size = sum(grad.nbytes for grad in grads)
        standings = race(setup, options, advance)
        return Outcome(self.name, self.title, 1, torch.get_num_threads(), len(grads), size, standings)


def make_parameters(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Make parameters of these shapes, each with a separate gradient."""
    parameters: list[Tensor] = [torch.nn.Parameter(torch.ones(*shape, dtype=dtype, device=device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter).mul_(1e-2)
    return parameters


def into_buckets(parameters: Sequence[Tensor], bucket: int) -> None:
    """Make gradients views of buckets, as DDP's gradient_as_bucket_view does, in reverse order.

    Args:
        parameters: parameters with gradients of one dtype.
        bucket: number of bytes that fill a bucket.
    """
    full: list[Tensor] = []
    for i, parameter in enumerate(reversed(parameters)):
        full.append(parameter)
        if sum(p.nbytes for p in full) >= bucket or i == len(parameters) - 1:
            flat = torch.cat([p.grad.reshape(-1) for p in full if p.grad is not None])
            for p, piece in zip(full, torch.split(flat, [p.numel() for p in full]), strict=True):
                p.grad = piece.view_as(p)
            full = []


def gpt2(
    options: Options, dtype: torch.dtype = torch.float32, bound: type[Bound] = Bound, views: bool = False
) -> Setup:
    parameters = make_parameters(gpt_shapes(options.scale), dtype, options.device)
    if views:
        into_buckets(parameters, BUCKET)
    return with_read_limit(parameters, drop_ins(parameters, bound(parameters), options.against))


def one_billion(options: Options) -> Setup:
    parameters = make_parameters(gpt_shapes(options.scale, layers=32, width=1536), torch.float32, options.device)
    return with_read_limit(parameters, drop_ins(parameters, Bound(parameters), options.against))


def small(options: Options, dtype: torch.dtype = torch.float32, views: bool = False) -> Setup:
    parameters = make_parameters([(1000,)] * max(4, round(5000 * options.scale)), dtype, options.device)
    if views:
        into_buckets(parameters, sum(p.nbytes for p in parameters) // 4)
    return with_read_limit(parameters, drop_ins(parameters, Bound(parameters), options.against))


def adamw(options: Options, dtype: torch.dtype = torch.float32) -> Setup:
    """Build the step of a fused optimizer. All competitors share it, so that each does the same work."""
    parameters = make_parameters(gpt_shapes(options.scale), dtype, options.device)
    optimizer = torch.optim.AdamW(parameters, lr=1e-8, fused=True)
    grad_clipper = distclip.GradClipper(parameters, distclip.global_norm(1e9))

    def torch_step() -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1e9)
        optimizer.step()
        return norm

    competitors = [
        Competitor("torch, then step", torch_step),
        Competitor("GradClipper.step", lambda: grad_clipper.step(optimizer).norm, own=True),
        Competitor("the step alone", optimizer.step),
    ]
    return with_read_limit(parameters, competitors)


def new_gradients(options: Options) -> Setup:
    parameters = make_parameters(gpt_shapes(options.scale), torch.float32, options.device)

    def replace_gradients() -> None:
        for parameter in parameters:
            parameter.grad = None if parameter.grad is None else parameter.grad.clone()

    competitors = [*drop_ins(parameters, Bound(parameters), options.against)]
    for competitor in competitors:
        competitor.prepare = replace_gradients
    competitors.append(clipper(parameters, distclip.global_norm(1e9), prepare=replace_gradients))
    return with_read_limit(parameters, competitors)


def policies(options: Options) -> Setup:
    parameters = make_parameters(gpt_shapes(options.scale, layers=8, width=504)[2:], torch.float32, options.device)
    named = [(f"p{i}", parameter) for i, parameter in enumerate(parameters)]
    rules = {
        "global_norm": distclip.global_norm(1e9),
        "per_tensor_norm": distclip.per_tensor_norm(1e9),
        "zclip": distclip.zclip(cap=1e9),
        "agc": distclip.agc(1e9),
    }
    others = drop_ins(parameters, Bound(parameters), options.against)
    competitors = [other for other in others if not other.own]
    return with_read_limit(parameters, [*competitors, *(clipper(named, rule, name) for name, rule in rules.items())])


def with_read_limit(parameters: list[Tensor], competitors: list[Competitor]) -> Setup:
    grads = [p.grad for p in parameters if p.grad is not None]
    return Setup(parameters, [*competitors, read_limit(grads)])


_BF16 = torch.bfloat16
_CLIPPED = "every call clips"
_VIEWS = "as views of a few storages, as DDP's gradient_as_bucket_view"

LOCAL = {
    case.name: case
    for case in [
        LocalCase("gpt2", "GPT-2's 148 gradients, 124 M elements, fp32; nothing is clipped", gpt2),
        LocalCase("gpt2_bf16", "gpt2 in bf16", partial(gpt2, dtype=_BF16)),
        LocalCase("gpt2_clipped", f"gpt2, {_CLIPPED}", partial(gpt2, bound=BelowNorm)),
        LocalCase("gpt2_bf16_clipped", f"gpt2 in bf16, {_CLIPPED}", partial(gpt2, dtype=_BF16, bound=BelowNorm)),
        LocalCase("gpt2_views", f"gpt2 {_VIEWS}", partial(gpt2, views=True)),
        LocalCase("small", "5,000 gradients of 1,000 elements, fp32", small),
        LocalCase("small_bf16", "small in bf16", partial(small, dtype=_BF16)),
        LocalCase("small_views", f"small {_VIEWS}", partial(small, views=True)),
        LocalCase("adamw", "gpt2 and a fused AdamW step, fp32", adamw),
        LocalCase("adamw_bf16", "gpt2 and a fused AdamW step, bf16", partial(adamw, dtype=_BF16)),
        LocalCase("clipper", "gpt2 with new gradient tensors at every call, also by a GradClipper", new_gradients),
        LocalCase("policies", "25 M elements by four policies; torch has one norm for all", policies),
        LocalCase("1b", "388 gradients, 1 B elements, fp32", one_billion, devices=("cuda",)),
    ]
}
"""Local cases by name."""
