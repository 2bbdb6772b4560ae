"""Define the interface of the adapters: one for each kind of DeepSpeed optimizer.

DeepSpeed asks for the norm before it has made the float32 copies that its step consumes, and frees the original
gradients in between. Measuring and writing therefore happen at different points of the step. An adapter attaches the
current gradients to stand-ins for this rank's pieces of the parameters, and applies the decision to the copies once
they exist.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ...extend import Layout, LayoutError, name_tensors, set_layout
from ..monkeypatch import MethodPatches
from .topology import Topology

if TYPE_CHECKING:
    from .foreign import Engine

__all__ = ["Adapter", "Decide", "Piece", "Write", "norm_signal"]

Slice: TypeAlias = tuple[tuple[int, ...], int]
"""Shape of the whole parameter, and index of the first element of a slice in it."""

Decide: TypeAlias = Callable[[], bool]
"""Function that measures and decides, on all ranks together. It returns True if the step must be skipped."""

Write: TypeAlias = Callable[[Sequence["Piece"], Sequence[Tensor]], None]
"""Function that applies the last decision to the gradients of some pieces, in place."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Piece of one parameter, on this rank.

    Args:
        name: the name of the parameter in the engine's module.
        stand_in: a tensor with the layout of the piece. Its `main_grad` is the current gradient.
        index: position of this piece among all pieces on this rank.
        offset: index of its first element in the flat partition of its group.
    """

    name: str
    stand_in: Tensor
    index: int
    offset: int = 0

    def view_in(self, partition: Tensor) -> Tensor:
        """Return the view of this piece in a flat partition of its group."""
        return partition.narrow(0, self.offset, self.stand_in.numel()).view(self.stand_in.shape)


class Adapter(ABC):
    """One kind of DeepSpeed optimizer: where its gradients are, and which of its methods clip.

    Args:
        engine: the engine that `deepspeed.initialize` returned.
        weights: True if the policy reads parameters. Stand-ins then share the memory of the float32 copies.
    """

    optimizer: Any
    slices_alone = True
    """True if each parameter is sliced by itself, so that its replicas on tensor-parallel ranks have equal slices."""

    def __init__(self, engine: Engine, weights: bool) -> None:
        self.engine, self.optimizer, self.weights = engine, engine.optimizer, weights
        self._names = {id(param): name for name, param in name_tensors(engine.module)}
        self.topology = Topology(engine)
        self.groups: list[list[Piece]] = []
        """Pieces of this rank, by parameter group of the optimizer."""
        self._num_pieces = 0
        # Pieces that tensor-parallel ranks may slice at different elements, and their layouts if they do not.
        self._sliced_together: list[tuple[Piece, Layout, Slice]] = []
        self.find_pieces()

    @property
    def pieces(self) -> list[Piece]:
        """Pieces of all groups, in order."""
        return [piece for group in self.groups for piece in group]

    @property
    def loss_scale(self) -> float | None:
        """Factor that the gradients carry now, or None without loss scaling."""
        dtype = getattr(self.optimizer, "low_precision_dtype", getattr(self.optimizer, "dtype", None))
        return float(self.optimizer.loss_scale) if dtype == torch.float16 else None

    @property
    def slices(self) -> list[str]:
        """Digest of the slices of each group that tensor-parallel replicas must cut at the same elements."""
        by_id = {id(piece): slice for piece, _, slice in self._sliced_together}
        texts = (
            [(piece.name, piece.stand_in.numel(), by_id[id(piece)]) for piece in group if id(piece) in by_id]
            for group in self.groups
        )
        return [hashlib.sha256(repr(text).encode()).hexdigest() for text in texts]

    def declare_replicas(self, slices_by_rank: Sequence[list[str]]) -> None:
        """Declare slices as replicas.

        Only groups that all tensor-parallel ranks of this rank cut at the same elements have such slices.

        Args:
            slices_by_rank: `slices` of every rank of the job.
        """
        ranks, own = self.topology.tensor_parallel_ranks, self.slices
        are_equal = [all(slices_by_rank[rank][i : i + 1] == [slices] for rank in ranks) for i, slices in enumerate(own)]
        found = {id(piece) for group, same in zip(self.groups, are_equal, strict=True) if same for piece in group}
        for piece, layout, slice in self._sliced_together:
            if id(piece) in found:
                set_layout(piece.stand_in, layout, slice)

    @abstractmethod
    def find_pieces(self) -> None:
        """Fill `groups` with the pieces of this rank."""

    @abstractmethod
    def attach_grads(self) -> None:
        """Attach the current gradients to the stand-ins.

        Raises:
            LayoutError: DeepSpeed keeps them elsewhere. The error is local, and the caller raises it on all ranks.
        """

    @abstractmethod
    def install(self, patches: MethodPatches, decide: Decide, write: Write) -> None:
        """Replace the methods that DeepSpeed uses to measure and clip."""

    def piece(
        self,
        param: Any,
        weights: Tensor,
        process_group: dist.ProcessGroup,
        *,
        start: int | None = None,
        offset: int = 0,
    ) -> Piece:
        """Make a stand-in for this rank's piece of a parameter.

        Args:
            param: the parameter of the module, see `foreign.Parameter`.
            weights: the piece in float32, which the step will change.
            process_group: the ranks that have the other pieces, or replicas of the whole parameter.
            start: for a slice, the index of its first element in the parameter. None for the whole parameter.
            offset: see `Piece`.
        """
        # Without weights only the shape is used, so one element is expanded instead of allocating memory.
        stand_in = weights.detach() if self.weights else weights.new_empty(()).expand(weights.shape)
        shape = tuple(getattr(param, "ds_shape", param.shape))
        slice = None if start is None else (shape, start)

        def layout_of(*, has_equal_slices: bool) -> Layout:
            is_sliced = start is not None
            return self.topology.layout(param, process_group, sliced=is_sliced, has_equal_slices=has_equal_slices)

        set_layout(stand_in, layout_of(has_equal_slices=self.slices_alone), slice)
        if hasattr(param, "partition_dim"):
            stand_in.partition_dim = param.partition_dim  # type: ignore[attr-defined]
        index = self._num_pieces
        self._num_pieces += 1
        piece = Piece(self._names.get(id(param)) or f"optimizer.parameters[{index}]", stand_in, index, offset)
        if slice is not None and not self.slices_alone and self.topology.is_replicated(param):
            self._sliced_together.append((piece, layout_of(has_equal_slices=True), slice))
        return piece

    @staticmethod
    def set_grad(piece: Piece, grad: Tensor | None) -> None:
        """Attach a gradient to its stand-in, or None if there is no gradient.

        Raises:
            LayoutError: the gradient does not have the size of the piece.
        """
        if grad is not None and grad.numel() != piece.stand_in.numel():
            raise LayoutError(
                f"the gradient of {piece.name} has {grad.numel()} elements and the optimizer's piece has "
                f"{piece.stand_in.numel()}: this version of DeepSpeed keeps gradients differently from 0.19. "
                "Call detach(engine), and set gradient_clipping in the engine's config."
            )
        piece.stand_in.main_grad = None if grad is None else grad.view(piece.stand_in.shape)  # type: ignore[attr-defined]

    def share_weights(self, group: int, weights: Tensor) -> None:
        """Share the memory of a group's flat weights with its stand-ins.

        Call it before each use, because loading a checkpoint moves that memory.
        """
        if self.weights:
            for piece in self.groups[group]:
                piece.stand_in.data = piece.view_in(weights.detach())

    def drop_grads(self) -> None:
        """Remove the gradients from the stand-ins, so that DeepSpeed can free them."""
        for piece in self.pieces:
            piece.stand_in.main_grad = None  # type: ignore[attr-defined]


def norm_signal(skip: bool, device: torch.device) -> Tensor:
    """Return the number that replaces the norm within DeepSpeed's step.

    DeepSpeed uses the number only to see whether it is finite, and skips the step if it is not.
    """
    return torch.tensor(torch.inf if skip else 0.0, device=device)
