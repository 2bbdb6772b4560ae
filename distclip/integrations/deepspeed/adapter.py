"""`Hold`: where one kind of DeepSpeed optimizer keeps its gradients, and where its step can be taken hold of.

Measuring and writing are two moments: DeepSpeed wants the norm before it has made the copies in float32 that its step
takes, and lets go of the originals in between. So a hold lays the gradients of the moment beside stand-ins for this
rank's pieces of the parameters (`look`), and writes the decision into the copies when they are there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...extend import LayoutError, Outcome, named, set_layout
from ..monkeypatch import Patches
from .topology import Ranks

__all__ = ["Decide", "Hold", "Piece", "Write", "go_on", "skipped"]

Decide: TypeAlias = Callable[[], Outcome]
"""Looks, measures and decides; on every rank together."""

Write: TypeAlias = Callable[[Sequence["Piece"], Sequence[Tensor]], None]
"""Writes the last decision into the gradients of some pieces."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """This rank's piece of one parameter.

    Args:
        name: of the parameter in the engine's module.
        tensor: stands for the piece; its gradient of the moment is laid beside it as `main_grad`.
        index: the how-manieth of all pieces of the rank it is.
        offset: where it begins in the flat partition of its group, counted in elements.
    """

    name: str
    tensor: Tensor
    index: int
    offset: int = 0

    def of(self, flat: Tensor) -> Tensor:
        """Its elements in a partition of its group."""
        return flat.narrow(0, self.offset, self.tensor.numel()).view(self.tensor.shape)


class Hold(ABC):
    """An optimizer of DeepSpeed, by the places where its step is taken hold of.

    Args:
        engine: what `deepspeed.initialize` returned.
        weights: whether the policy looks at the parameters too: stand-ins then share the memory of the float32 copies.
    """

    def __init__(self, engine: Any, weights: bool) -> None:
        self.engine, self.optimizer, self.weights = engine, engine.optimizer, weights
        self._names = {id(param): name for name, param in named(engine.module)}
        self.ranks = Ranks(engine)
        self.groups: list[list[Piece]] = []
        self._count = 0
        self.find()

    @property
    def pieces(self) -> list[Piece]:
        """Of all groups, in order."""
        return [piece for group in self.groups for piece in group]

    @property
    def loss_scale(self) -> float | None:
        """What gradients are multiplied by at the moment; None where no loss is scaled."""
        own = self.optimizer
        dtype = getattr(own, "low_precision_dtype", getattr(own, "dtype", None))
        return float(own.loss_scale) if dtype == torch.float16 else None

    @abstractmethod
    def find(self) -> None:
        """Fill `groups` with the pieces of this rank."""

    @abstractmethod
    def look(self) -> None:
        """Lay the gradients of the moment beside the stand-ins.

        Raises:
            LayoutError: they are not where they were expected; on this rank, for the others to hear of.
        """

    @abstractmethod
    def take(self, patches: Patches, decide: Decide, write: Write) -> None:
        """Put `decide` and `write` where DeepSpeed measures and clips."""

    def piece(
        self, param: Any, weights: Tensor, process_group: Any, *, start: int | None = None, offset: int = 0
    ) -> Piece:
        """A stand-in for this rank's piece of a parameter.

        Args:
            param: the parameter of the module.
            weights: the piece in float32: what the step will change.
            process_group: the ranks that hold the other pieces, or copies of the whole parameter.
            start: of a slice, which element of the parameter is its first; None for the whole.
            offset: see `Piece`.
        """
        # Memory of its own would be wasted on who only counts elements.
        stand_in = weights.detach() if self.weights else weights.new_empty(()).expand(weights.shape)
        shape = tuple(getattr(param, "ds_shape", param.shape))
        layout = self.ranks.layout(param, process_group, cut=start is not None)
        set_layout(stand_in, layout, None if start is None else (shape, start))
        if hasattr(param, "partition_dim"):
            stand_in.partition_dim = param.partition_dim  # type: ignore[attr-defined]
        self._count += 1
        name = self._names.get(id(param)) or f"optimizer.parameters[{self._count - 1}]"
        return Piece(name, stand_in, self._count - 1, offset)

    @staticmethod
    def lay(piece: Piece, grad: Tensor | None) -> None:
        """Lay a gradient beside its stand-in, or say that there is none."""
        if grad is not None and grad.numel() != piece.tensor.numel():
            raise LayoutError(
                f"the gradient of {piece.name} has {grad.numel()} elements where DeepSpeed holds "
                f"{piece.tensor.numel()} of its weights: this version keeps them otherwise than 0.19 does. "
                "Write detach(engine), and gradient_clipping into its config."
            )
        piece.tensor.main_grad = None if grad is None else grad.view(piece.tensor.shape)  # type: ignore[attr-defined]

    def renew(self, group: int, weights: Tensor) -> None:
        """Let stand-ins share the memory of the weights, which DeepSpeed moves when it loads a checkpoint."""
        if self.weights:
            for piece in self.groups[group]:
                piece.tensor.data = piece.of(weights.detach())

    def let_go(self) -> None:
        """Keep no gradient alive."""
        for piece in self.pieces:
            piece.tensor.main_grad = None  # type: ignore[attr-defined]


def skipped(decision: Outcome) -> bool:
    """Whether the step is left out; known to the host, as DeepSpeed's own steps need it."""
    return bool(decision.skip.host)


def go_on(decision: Outcome, device: Any) -> Tensor:
    """What DeepSpeed is told in place of the norm, which it only looks at to see whether it is finite."""
    return torch.tensor(torch.inf if skipped(decision) else 0.0, device=device)
