"""Who takes part: torch's call, distclip's, and on request those of other libraries."""

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

__all__ = ["OTHERS", "BelowNorm", "Bound", "Contestant", "Setup", "clipper", "drop_ins", "limit", "local"]

OTHERS = {"torchtitan": "torchtitan.distributed.utils", "deepspeed": "deepspeed.runtime.utils"}
"""Where other libraries keep a `clip_grad_norm_`."""


@dataclass
class Contestant:
    """One way to do the work.

    Args:
        name: as the table has it.
        call: what is timed; returns the norm, None where there is none.
        prepare: called before each call, untimed.
        own: whether this is distclip.
    """

    name: str
    call: Callable[[], Tensor | None]
    prepare: Callable[[], None] = lambda: None
    own: bool = False


@dataclass
class Setup:
    """Gradients in place, and who is to deal with them.

    Args:
        parameters: of this rank; each has a gradient.
        contestants: the first one is what the others are compared with.
    """

    parameters: Sequence[Tensor]
    contestants: list[Contestant]

    def grads(self) -> list[Tensor]:
        """This rank's pieces of the gradients, as they are now."""
        return [local(p.grad) for p in self.parameters if p.grad is not None]


class Bound:
    """A max_norm that nothing reaches."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.value = 1e9

    def prepare(self) -> None:
        """Renew the bound before a call."""


class BelowNorm(Bound):
    """A max_norm just below the norm: every call clips, and the gradient still lasts for many rounds."""

    def prepare(self) -> None:
        # A norm in bf16 is off by more than the bound is to be below it.
        grads = (p.grad for p in self.parameters if p.grad is not None)
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
        self.value = 0.99 * float(torch.stack(norms).norm())


def local(tensor: Tensor) -> Tensor:
    """This rank's piece."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def drop_ins(parameters: Sequence[Tensor], bound: Bound, against: Sequence[str] = ()) -> list[Contestant]:
    """Torch's `clip_grad_norm_`, distclip's, and those of other libraries.

    Args:
        parameters: whose gradients are clipped.
        bound: to what.
        against: keys of `OTHERS`, to be imported.

    Returns:
        Contestants, torch first.
    """
    calls: dict[str, Callable[..., Any]] = {
        "torch": torch.nn.utils.clip_grad_norm_,
        "distclip": distclip.clip_grad_norm_,
    }
    calls |= {name: _imported(name) for name in against}

    def contestant(name: str, clip: Callable[..., Any]) -> Contestant:
        return Contestant(name, lambda: _norm(clip(parameters, bound.value)), bound.prepare, own=name == "distclip")

    return [contestant(name, clip) for name, clip in calls.items()]


def clipper(
    parameters: Any, policy: distclip.Policy, name: str = "GradClipper.clip", prepare: Callable[[], None] | None = None
) -> Contestant:
    """A `GradClipper` that was constructed beforehand.

    Args:
        parameters: what the clipper is bound to.
        policy: its policy.
        name: as the table has it.
        prepare: see `Contestant`.
    """
    bound = distclip.GradClipper(parameters, policy)
    return Contestant(name, lambda: bound.clip().norm, prepare or (lambda: None), own=True)


def limit(grads: Sequence[Tensor]) -> Contestant:
    """What the machine can do: as many bytes read once, by one call that uses all of the device.

    On CPU the sum of a flat buffer; on an accelerator a copy of its first half over the second, which moves as many.
    """
    device = grads[0].device
    flat = torch.ones(sum(grad.nbytes for grad in grads) // 4, device=device)
    half = len(flat) // 2

    def read() -> None:
        if device.type == "cpu":
            flat.sum()
        else:
            flat[half : 2 * half].copy_(flat[:half])

    return Contestant("read limit", read)


def _norm(result: Any) -> Tensor:
    """DeepSpeed returns a float in some releases."""
    return result if isinstance(result, Tensor) else torch.tensor(float(result))


def _imported(name: str) -> Callable[..., Any]:
    try:
        module = importlib.import_module(OTHERS[name])
    except ImportError as error:
        raise BenchError(f"--against {name}: {error}. Install it, or leave it out.") from error
    if name == "deepspeed":
        _start_deepspeed()
    clip: Callable[..., Any] = module.clip_grad_norm_
    return clip


def _start_deepspeed() -> None:
    """Its clip_grad_norm_ averages over a process group even where there is one process: that gets a group of one."""
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    comm = importlib.import_module("deepspeed.comm")
    comm.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
