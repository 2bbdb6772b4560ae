"""Compute the whole gradients of a case, and the part of each rank, without distclip and without communication."""

from __future__ import annotations

import itertools
import math
import random

import torch
from torch import Tensor

from .cases import Case, MeshShape, ParamCase

__all__ = ["Unit", "units_of"]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "complex64": torch.complex64,
}


class Unit:
    """One parameter of the model. Stages can hold different parameters under one name.

    Args:
        case: the case.
        param: the parameter.
        stage: coordinates of the ranks that hold it, along the axes of `split_over` that distinguish parameters.
    """

    def __init__(self, case: Case, param: ParamCase, stage: tuple[int, ...]) -> None:
        self.case, self.param, self.stage = case, param, stage
        self.dtype = _DTYPES[param.dtype]
        self.mesh = (
            case.meshes[param.mesh] if param.mesh >= 0 else MeshShape(tuple(range(case.num_ranks)), (case.num_ranks,))
        )
        self._axes = [self.mesh.axes.index(axis) for axis in param.axes]
        self._rng = random.Random(f"{param.seed}/{stage}")
        sizes = [range(self.mesh.shape[axis]) for axis in self._axes]
        # Each coordinate along the axes of sums has a summand, which is a whole tensor.
        self._summands = {at: self._random(at) for at in itertools.product(*itertools.compress(sizes, param.partial))}
        self._missing: set[tuple[int, ...]] = set()
        for coords in itertools.product(*sizes):
            key = self._key(coords)
            if key == coords and self._rng.random() < param.missing:
                self._missing.add(key)
                self._piece(coords).zero_()
        if case.nonfinite == param.name:
            present = [c for c in itertools.product(*sizes) if self._key(c) not in self._missing]
            pieces = [piece for c in present if (piece := self._piece(c)).numel()]
            for piece in pieces[:1]:
                piece[(0,) * piece.ndim] = math.nan

    @property
    def name(self) -> str:
        """Name that no other unit has."""
        return f"{self.param.name}@{self.stage}"

    @property
    def whole(self) -> Tensor:
        """Whole gradient in float64 or complex128."""
        wide = torch.complex128 if self.dtype.is_complex else torch.float64
        total = torch.stack([one.to(wide) for one in self._summands.values()]).sum(0)
        is_mean = self.param.mean and self.param.kind == "dtensor"
        return total / len(self._summands) if is_mean else total

    def coordinates(self, rank: int) -> tuple[int, ...] | None:
        """Return the coordinates of a rank along the axes of the parameter, or None elsewhere."""
        at, stage = self.mesh.coordinates(rank), self.case.meshes[0].coordinates(rank)
        if at is None or stage is None or stage[: len(self.stage)] != self.stage:
            return None
        return tuple(at[axis] for axis in self._axes)

    def local(self, rank: int, factor: Tensor | None = None) -> Tensor | None:
        """Return the gradient of a rank, or None if it has none.

        Args:
            rank: a rank that holds the unit.
            factor: factor of the whole gradient, which may differ between rows. None for 1.
        """
        coords = self.coordinates(rank)
        assert coords is not None
        if self._key(coords) in self._missing:
            return None
        piece = self._piece(coords, factor)
        return piece.to(self.dtype).clone() if factor is None else piece.clone()

    def local_shape(self, rank: int) -> torch.Size:
        """Return the shape of the shard of a rank that holds the unit."""
        coords = self.coordinates(rank)
        assert coords is not None
        return self._piece(coords).shape

    def _random(self, at: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(self._rng.getrandbits(40))
        real = torch.randn(self.param.shape, generator=generator, dtype=torch.float64) * self.param.scale
        if self.dtype.is_complex:
            return torch.complex(real, real.flip(0)).to(self.dtype)
        return real.to(self.dtype)

    def _key(self, coords: tuple[int, ...]) -> tuple[int, ...]:
        """Return the coordinates of the first replica of this shard."""
        splits = zip(coords, self.param.cuts, self.param.partial, strict=True)
        return tuple(at if cut is not None or partial else 0 for at, cut, partial in splits)

    def _piece(self, coords: tuple[int, ...], factor: Tensor | None = None) -> Tensor:
        """Return a view of the shard at these coordinates, or a product with a factor."""
        piece = self._summands[tuple(itertools.compress(coords, self.param.partial))]
        if factor is not None:
            wide = torch.complex128 if self.dtype.is_complex else torch.float64
            piece = piece.to(wide) * factor
        for at, axis, cut in zip(coords, self._axes, self.param.cuts, strict=True):
            if cut is not None:
                # Shards are those of torch.chunk, so the last ones can be shorter or empty.
                length = -(-piece.shape[cut] // self.mesh.shape[axis])
                start = min(at * length, piece.shape[cut])
                piece = piece.narrow(cut, start, min(length, piece.shape[cut] - start))
        return piece


def units_of(case: Case) -> list[Unit]:
    """Return every parameter of the model once."""
    units = []
    for param in case.params:
        if param.stages is None:
            units.append(Unit(case, param, ()))
        else:
            units += [Unit(case, param, (stage,)) for stage in param.stages]
    return units
