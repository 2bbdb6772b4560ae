"""The local cases: one process, plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import distclip

from .competitors import BelowNorm, Bound, Contestant, Setup, clipper, drop_ins, limit
from .models import gpt_shapes
from .race import Options, contest
from .results import Outcome

__all__ = ["LOCAL", "LocalCase"]

BUCKET = 25 << 20
"""Bytes in a bucket of DistributedDataParallel."""


@dataclass(frozen=True)
class LocalCase:
    """Gradients of one process.

    Args:
        name: what `--cases` calls it.
        title: what is in it, in one line.
        build: puts it in place.
        devices: where it can run.
    """

    name: str
    title: str
    build: Callable[[Options], Setup]
    devices: Sequence[str] = ("cpu", "cuda")

    def measure(self, options: Options, advance: Callable[[], object]) -> Outcome:
        """Put it in place, count and race; `advance` is called after each round."""
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        setup = self.build(options)
        grads = setup.grads()
        size = sum(grad.nbytes for grad in grads)
        standings = contest(setup, options, advance)
        return Outcome(self.name, self.title, 1, torch.get_num_threads(), len(grads), size, standings)


def parameters(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Parameters of these shapes, each with a gradient of its own."""
    made: list[Tensor] = [torch.nn.Parameter(torch.ones(*shape, dtype=dtype, device=device)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter).mul_(1e-2)
    return made


def into_buckets(made: Sequence[Tensor], bucket: int) -> None:
    """Make gradients views of one storage per bucket, as DDP does with gradient_as_bucket_view: from the last one on.

    Args:
        made: parameters with gradients of one dtype.
        bucket: bytes after which a bucket is full.
    """
    full: list[Tensor] = []
    for i, parameter in enumerate(reversed(made)):
        full.append(parameter)
        if sum(p.nbytes for p in full) >= bucket or i == len(made) - 1:
            flat = torch.cat([p.grad.reshape(-1) for p in full if p.grad is not None])
            for p, piece in zip(full, torch.split(flat, [p.numel() for p in full]), strict=True):
                p.grad = piece.view_as(p)
            full = []


def gpt2(
    options: Options, dtype: torch.dtype = torch.float32, bound: type[Bound] = Bound, views: bool = False
) -> Setup:
    made = parameters(gpt_shapes(options.scale), dtype, options.device)
    if views:
        into_buckets(made, BUCKET)
    return against_limit(made, drop_ins(made, bound(made), options.against))


def one_billion(options: Options) -> Setup:
    made = parameters(gpt_shapes(options.scale, layers=32, width=1536), torch.float32, options.device)
    return against_limit(made, drop_ins(made, Bound(made), options.against))


def small(options: Options, dtype: torch.dtype = torch.float32, views: bool = False) -> Setup:
    made = parameters([(1000,)] * max(4, round(5000 * options.scale)), dtype, options.device)
    if views:
        into_buckets(made, sum(p.nbytes for p in made) // 4)
    return against_limit(made, drop_ins(made, Bound(made), options.against))


def adamw(options: Options, dtype: torch.dtype = torch.float32) -> Setup:
    """The contestants share parameters and optimizer: whoever steps, the next one finds the same work."""
    made = parameters(gpt_shapes(options.scale), dtype, options.device)
    optimizer = torch.optim.AdamW(made, lr=1e-8, fused=True)
    bound = distclip.GradClipper(made, distclip.global_norm(1e9))

    def theirs() -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(made, 1e9)
        optimizer.step()
        return norm

    contestants = [
        Contestant("torch, then step", theirs),
        Contestant("GradClipper.step", lambda: bound.step(optimizer).norm, own=True),
        Contestant("the step alone", optimizer.step),
    ]
    return against_limit(made, contestants)


def new_gradients(options: Options) -> Setup:
    made = parameters(gpt_shapes(options.scale), torch.float32, options.device)

    def renew() -> None:
        for parameter in made:
            parameter.grad = None if parameter.grad is None else parameter.grad.clone()

    contestants = [*drop_ins(made, Bound(made), options.against)]
    for contestant in contestants:
        contestant.prepare = renew
    contestants.append(clipper(made, distclip.global_norm(1e9), prepare=renew))
    return against_limit(made, contestants)


def policies(options: Options) -> Setup:
    made = parameters(gpt_shapes(options.scale, layers=8, width=504)[2:], torch.float32, options.device)
    named = [(f"p{i}", parameter) for i, parameter in enumerate(made)]
    rules = {
        "global_norm": distclip.global_norm(1e9),
        "per_tensor_norm": distclip.per_tensor_norm(1e9),
        "zclip": distclip.zclip(cap=1e9),
        "agc": distclip.agc(1e9),
    }
    theirs = drop_ins(made, Bound(made), options.against)
    contestants = [each for each in theirs if not each.own]
    return against_limit(made, [*contestants, *(clipper(named, rule, name) for name, rule in rules.items())])


def against_limit(made: list[Tensor], contestants: list[Contestant]) -> Setup:
    grads = [p.grad for p in made if p.grad is not None]
    return Setup(made, [*contestants, limit(grads)])


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
"""By name."""
