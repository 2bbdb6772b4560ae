"""Define the competitors: calls of torch, of distclip, and of other libraries on request."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import distclip

from .errors import BenchError

__all__ = ["OTHERS", "BelowNorm", "Bound", "Competitor", "Setup", "clipper", "drop_ins", "local", "read_limit"]

OTHERS = {"torchtitan": "torchtitan.distributed.utils", "deepspeed": "deepspeed.runtime.utils"}
"""Modules of other libraries that define `clip_grad_norm_`."""


@dataclass
class Competitor:
    """One way to clip the gradients of a case.

    Args:
        name: name in the table.
        call: the timed function. It returns the norm, or None if it computes none.
        prepare: called before each call, untimed.
        own: whether this is distclip.
    """

    name: str
    call: Callable[[], Tensor | None]
    prepare: Callable[[], None] = lambda: None
    own: bool = False


@dataclass
class Setup:
    """Parameters with gradients, and the competitors that clip them.

    Args:
        parameters: parameters of this rank. Each has a gradient.
        competitors: the first one is the baseline.
    """

    parameters: Sequence[Tensor]
    competitors: list[Competitor]

    def grads(self) -> list[Tensor]:
        """Return the current gradients, as this rank's shards."""
        return [local(p.grad) for p in self.parameters if p.grad is not None]


class Bound:
    """A max_norm that no norm reaches."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.value = 1e9

    def prepare(self) -> None:
        """Update the bound before a call."""


class BelowNorm(Bound):
    """A max_norm 1 % below the norm, so that every call clips and gradients shrink slowly."""

    def prepare(self) -> None:
        # A bf16 norm would have an error larger than the 1 % between norm and bound.
        grads = (p.grad for p in self.parameters if p.grad is not None)
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
        self.value = 0.99 * float(torch.stack(norms).norm())


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def drop_ins(parameters: Sequence[Tensor], bound: Bound, against: Sequence[str] = ()) -> list[Competitor]:
    """Return the `clip_grad_norm_` of torch, distclip and other libraries as competitors.

    Args:
        parameters: parameters with gradients.
        bound: the max_norm.
        against: keys of `OTHERS`. Each is imported.

    Returns:
        The competitors, torch first.
    """
    calls: dict[str, Callable[..., Any]] = {
        "torch": torch.nn.utils.clip_grad_norm_,
        "distclip": distclip.clip_grad_norm_,
    }
    calls |= {name: _import_clip(name) for name in against}

    def make(name: str, clip: Callable[..., Any]) -> Competitor:
        def call() -> Tensor:
            return _as_tensor(clip(parameters, bound.value))

        return Competitor(name, call, bound.prepare, own=name == "distclip")

    return [make(name, clip) for name, clip in calls.items()]


def clipper(
    parameters: Any, policy: distclip.Policy, name: str = "GradClipper.clip", prepare: Callable[[], None] | None = None
) -> Competitor:
    """Return a `GradClipper` as a competitor. It is constructed here, untimed.

    Args:
        parameters: parameters of the clipper.
        policy: policy of the clipper.
        name: name in the table.
        prepare: see `Competitor`.
    """
    grad_clipper = distclip.GradClipper(parameters, policy)
    return Competitor(name, lambda: grad_clipper.clip().norm, prepare or (lambda: None), own=True)


def read_limit(grads: Sequence[Tensor]) -> Competitor:
    """Return a competitor that reads as many bytes as the gradients have, at full memory bandwidth.

    On a CPU it sums a flat buffer. On an accelerator it copies the first half of the buffer over the second half, which
    moves the same number of bytes.
    """
    device = grads[0].device
    flat = torch.ones(sum(grad.nbytes for grad in grads) // 4, device=device)
    half = len(flat) // 2

    def read() -> None:
        if device.type == "cpu":
            flat.sum()
        else:
            flat[half : 2 * half].copy_(flat[:half])

    return Competitor("read limit", read)


def _as_tensor(result: Any) -> Tensor:
    """Convert a norm to a tensor, because DeepSpeed returns a float in some releases."""
    return result if isinstance(result, Tensor) else torch.tensor(float(result))


def _import_clip(name: str) -> Callable[..., Any]:
    try:
        module = importlib.import_module(OTHERS[name])
    except ImportError as error:
        raise BenchError(f"--against {name}: {error}. Install it, or omit the option.") from error
    if name == "deepspeed":
        _start_deepspeed()
    clip: Callable[..., Any] = module.clip_grad_norm_
    return clip


def _start_deepspeed() -> None:
    """Initialize DeepSpeed's communication, which its clip_grad_norm_ uses even in one process."""
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    comm = importlib.import_module("deepspeed.comm")
    comm.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
