"""The model of the cases in cases.py, spread over the ranks of an MPI job, and what all of them must see alike."""

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

WHOLE = {"embedding": (8, 6), "experts": (12, 4), "columns": (5, 8), "norm": (6,), "head": (8, 6)}
"""The one true model: `experts` can be cut along dim 0, `columns` along dim 1."""


@cache
def world() -> MPIComm:
    return MPIComm()


def split(color: int) -> MPIComm:
    """The ranks that bring the same color."""
    return MPIComm(world().comm.Split(color, world().rank))


def whole(key: str, step: int = 0) -> Tensor:
    """The same numbers on every rank: a gradient, one step with a spike; or, at step -1, the parameter."""
    generator = torch.Generator().manual_seed(1000 * (step + 1) + list(WHOLE).index(key.split("@")[0]) + 10 * len(key))
    return torch.randn(WHOLE[key.split("@")[0]], generator=generator, dtype=torch.float64) * (30 if step == 2 else 1)


@dataclass
class Spread:
    """The model as one rank holds it: for each of its parameters, of which whole it is which piece."""

    pieces: dict[str, tuple[str, Callable[[Tensor], Tensor]]]
    split_over: Any
    keys: list[str]

    def made(self, dtype: torch.dtype) -> dict[str, nn.Parameter]:
        params = {name: nn.Parameter(cut(whole(key, -1)).to(dtype)) for name, (key, cut) in self.pieces.items()}
        for name, param in params.items():
            if self.pieces[name][1] is not _all:
                param.tensor_model_parallel, param.partition_dim = True, int("columns" in name)  # type: ignore[attr-defined]
        return params


def _all(tensor: Tensor) -> Tensor:
    return tensor


def replicated() -> Spread:
    return Spread({key: (key, _all) for key in WHOLE}, None, list(WHOLE))


def _tensor_parallel(tp: MPIComm, keys: dict[str, str]) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    dims = {"experts": 0, "columns": 1}

    def cut(dim: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor.chunk(tp.size, dim)[tp.rank].clone()

    return {name: (key, cut(dims[name]) if name in dims else _all) for name, key in keys.items()}


def tp() -> Spread:
    axis = split(0)
    return Spread(_tensor_parallel(axis, {key: key for key in WHOLE}), {"tp": axis}, list(WHOLE))


def pp() -> Spread:
    """Stages with other parameters under the same names; the last of several holds none."""
    axis = split(0)
    stages = max(1, axis.size - 1)
    keys = [f"{key}@{stage}" for stage in range(stages) for key in WHOLE]
    mine = {key: (f"{key}@{axis.rank}", _all) for key in WHOLE} if axis.rank < stages else {}
    return Spread(mine, {"pp": axis}, keys)


def grid() -> Spread:
    """Two stages of tensor-parallel ranks."""
    across = world().size // 2
    stage, place = divmod(world().rank, across)
    axes = {"tp": split(stage), "pp": split(place)}
    keys = [f"{key}@{stage}" for stage in range(2) for key in WHOLE]
    return Spread(_tensor_parallel(axes["tp"], {key: f"{key}@{stage}" for key in WHOLE}), axes, keys)


LAYOUTS = (replicated, tp, pp, grid)


def same_everywhere(value: Tensor | float) -> None:
    """The same bits on all ranks."""
    text = [float(x).hex() for x in torch.as_tensor(value, dtype=torch.float64).reshape(-1)]
    assert world().gather_objects(text) == [text] * world().size, text


@contextmanager
def everywhere(kind: type[Exception], text: str) -> Iterator[None]:
    """All ranks raise the same kind, saying the same."""
    with pytest.raises(kind) as caught:
        yield
    assert text in str(caught.value), caught.value
    world().comm.Barrier()


def grad_of(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad
