"""Shard a model over the ranks of an MPI job, for the cases in cases.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distclip.comm.mpi import MPIComm

SHAPES = {"embedding": (8, 6), "experts": (12, 4), "columns": (5, 8), "norm": (6,), "head": (8, 6)}
"""Shapes of the full model. `experts` can be cut along dim 0, and `columns` along dim 1."""


@cache
def world() -> MPIComm:
    return MPIComm()


def split(color: int) -> MPIComm:
    """Return the communicator of the ranks that pass the same color."""
    return MPIComm(world().comm.Split(color, world().rank))


def full_tensor(key: str, step: int = 0) -> Tensor:
    """Return a full gradient, the same on every rank, with an outlier at step 2. Step -1 is the parameter."""
    generator = torch.Generator().manual_seed(1000 * (step + 1) + list(SHAPES).index(key.split("@")[0]) + 10 * len(key))
    return torch.randn(SHAPES[key.split("@")[0]], generator=generator, dtype=torch.float64) * (30 if step == 2 else 1)


@dataclass
class LocalModel:
    """The model on one rank: for each parameter, the key of the full tensor and the function that cuts it."""

    pieces: dict[str, tuple[str, Callable[[Tensor], Tensor]]]
    split_over: Any
    keys: list[str]

    def build_params(self, dtype: torch.dtype) -> dict[str, nn.Parameter]:
        params = {name: nn.Parameter(cut(full_tensor(key, -1)).to(dtype)) for name, (key, cut) in self.pieces.items()}
        for name, param in params.items():
            if self.pieces[name][1] is not _all:
                param.tensor_model_parallel, param.partition_dim = True, int("columns" in name)  # type: ignore[attr-defined]
        return params


def _all(tensor: Tensor) -> Tensor:
    return tensor


def replicated() -> LocalModel:
    return LocalModel({key: (key, _all) for key in SHAPES}, None, list(SHAPES))


def _tensor_parallel(tp: MPIComm, keys: dict[str, str]) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    dims = {"experts": 0, "columns": 1}

    def cut(dim: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor.chunk(tp.size, dim)[tp.rank].clone()

    return {name: (key, cut(dims[name]) if name in dims else _all) for name, key in keys.items()}


def tp() -> LocalModel:
    axis = split(0)
    return LocalModel(_tensor_parallel(axis, {key: key for key in SHAPES}), {"tp": axis}, list(SHAPES))


def pp() -> LocalModel:
    """Build stages with other parameters under the same names. The last of several has none."""
    axis = split(0)
    stages = max(1, axis.size - 1)
    keys = [f"{key}@{stage}" for stage in range(stages) for key in SHAPES]
    local = {key: (f"{key}@{axis.rank}", _all) for key in SHAPES} if axis.rank < stages else {}
    return LocalModel(local, {"pp": axis}, keys)


def grid() -> LocalModel:
    """Build two stages of tensor-parallel ranks."""
    tp_size = world().size // 2
    stage, index = divmod(world().rank, tp_size)
    axes = {"tp": split(stage), "pp": split(index)}
    keys = [f"{key}@{stage}" for stage in range(2) for key in SHAPES]
    return LocalModel(_tensor_parallel(axes["tp"], {key: f"{key}@{stage}" for key in SHAPES}), axes, keys)


LAYOUTS = (replicated, tp, pp, grid)


def check_equal_on_ranks(value: Tensor | float) -> None:
    """Check that all ranks have the same bits."""
    text = [float(x).hex() for x in torch.as_tensor(value, dtype=torch.float64).reshape(-1)]
    assert world().gather_objects(text) == [text] * world().size, text


@contextmanager
def raises_on_ranks(kind: type[Exception], text: str) -> Iterator[None]:
    """Check that all ranks raise this kind of error with this text."""
    with pytest.raises(kind) as caught:
        yield
    assert text in str(caught.value), caught.value
    world().comm.Barrier()


def grad_of(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad
