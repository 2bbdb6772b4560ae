"""Run cases on the ranks of one MPI job. Each `case_` function is a test of test_mpi.py.

The cases start no process group of torch.distributed, except the last ones. A rank that fails writes its traceback and
ends the job, so that later cases have no result.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from distclip import ArgumentError, GradClipper, LayoutError
from distclip.comm import mpi, waiting
from distclip.comm.mpi import MPIComm
from tests.integrations.mpi import failure_cases
from tests.integrations.mpi.model import (
    LAYOUTS,
    LocalModel,
    check_equal_on_ranks,
    full_tensor,
    grad_of,
    grid,
    pp,
    raises_on_ranks,
    replicated,
    split,
    tp,
    world,
)

NAN = float("nan")

POLICIES = {
    "global": lambda: distclip.global_norm(0.5),
    "global, p = 3": lambda: distclip.global_norm(0.5, 3.0),
    "global, p = inf": lambda: distclip.global_norm(0.5, float("inf")),
    "per tensor": lambda: distclip.per_tensor_norm(0.3),
    "per group": lambda: distclip.group_norm({"head": ("head", 0.2)}, 1.0),
    "per row": lambda: distclip.agc(0.01, exclude=["norm"]),
    "zclip": lambda: distclip.zclip(1.0, warmup=2, cap=5.0),
    "value": lambda: distclip.value(0.1),
}


# --- the communicator ---


def case_one_rank_logs_who_is_missing() -> None:
    """The last rank comes after another one has logged that it is missing."""
    last = world().size - 1
    for kind in ("all-reduce", "gather"):
        messages = []

        def log(message: str, *args: object, messages: list[str] = messages) -> None:
            messages.append(message % args)
            world().comm.send(None, last, tag=1)

        with mock.patch.dict(os.environ, DISTCLIP_PATIENCE="0.05"), mock.patch.object(mpi, "_GRACE", 0.5):
            comm = MPIComm()
            if comm.rank == last:
                comm.comm.recv(tag=1)
            with mock.patch.object(waiting._log, "warning", log):
                _ = comm.sum_(torch.ones(1)) if kind == "all-reduce" else comm.gather_objects(1)
        by_rank = comm.comm.allgather(messages)
        assert sum(map(len, by_rank)) == 1, by_rank
        # On a busy machine other ranks can be missing as well.
        assert re.search(
            rf"of {last + 1} ranks \(ranks? [0-9, ]*{last}\) have not entered the same {kind}", str(by_rank)
        )


def case_any_tensor_is_summed() -> None:
    comm = world()
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: t.t(),
        lambda t: t[:, ::2],
        lambda t: t[1:1],
        lambda t: t[0, 1],
        lambda t: t.requires_grad_(t.is_floating_point() or t.is_complex()),
    ]
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.int32):
        for view in layouts:
            tensor = view((torch.arange(12.0).view(3, 4) * (comm.rank + 1)).to(dtype))
            expected = torch.arange(12.0).view(3, 4) * sum(range(1, comm.size + 1))
            comm.sum_(tensor)
            torch.testing.assert_close(tensor.detach(), view(expected.to(dtype)).detach(), rtol=0, atol=0)


def case_max_and_sums_with_nan() -> None:
    comm = world()
    for dtype in (torch.float64, torch.bfloat16):
        values = torch.tensor([[float(comm.rank), -1.0], [-float(comm.rank), float("inf")]], dtype=dtype).t()
        comm.max_(values)
        expected = torch.tensor([[comm.size - 1.0, -1.0], [0.0, float("inf")]], dtype=dtype).t()
        assert torch.equal(values, expected)
        for bad in range(comm.size):
            total = torch.tensor([NAN if comm.rank == bad else 1.0, 1.0], dtype=dtype)
            comm.sum_(total)
            assert total[0].isnan()
            assert total[1] == comm.size


def case_ranks_are_numbered_in_the_world() -> None:
    comm, evens = world(), split(world().rank % 2)
    assert (comm.rank, comm.ranks) == (comm.comm.rank, tuple(range(comm.size)))
    assert evens.ranks == tuple(range(comm.rank % 2, comm.size, 2))
    assert evens.ranks[evens.rank] == comm.rank
    assert evens.gather_objects(comm.rank) == list(evens.ranks)
    assert isinstance(comm, distclip.Comm)


def case_other_objects_are_refused() -> None:
    from mpi4py import MPI

    null = MPI.COMM_WORLD.Split(0 if world().rank == 0 else MPI.UNDEFINED)
    if null == MPI.COMM_NULL:
        with pytest.raises(ArgumentError, match="that this rank belongs to"):
            MPIComm(null)
    with pytest.raises(ArgumentError, match=r"Use MPIComm\(\)"):
        MPIComm("tp")  # type: ignore[arg-type]
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ArgumentError, match=r"comm=MPIComm\(comm\)"):
        distclip.clip_grad_norm_(weight, 1.0, comm=MPI.COMM_WORLD)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="an MPIComm"):
        distclip.clip_grad_norm_(weight, 1.0, comm=world(), split_over=MPI.COMM_WORLD)  # type: ignore[arg-type]


# --- layouts and policies ---


def _check_against_one_process(layout: Callable[[], LocalModel], dtype: torch.dtype, tolerance: float) -> None:
    model = layout()
    for name, policy in POLICIES.items():
        params = model.build_params(dtype)
        full_params = {key: nn.Parameter(full_tensor(key, -1).to(dtype)) for key in model.keys}
        clipper = GradClipper(list(params.items()), policy(), comm=world(), split_over=model.split_over)
        one_process = GradClipper(list(full_params.items()), policy())
        for step in range(4):
            for name_here, param in params.items():
                key, cut = model.pieces[name_here]
                param.grad = cut(full_tensor(key, step)).to(dtype)
            for key, param in full_params.items():
                param.grad = full_tensor(key, step).to(dtype)
            report, expected = clipper.clip(), one_process.clip()
            where = f"{name}, step {step}"
            for value, exact in ((report.norm, expected.norm), (report.coef, expected.coef)):
                torch.testing.assert_close(value, exact, rtol=tolerance, atol=0, msg=where)
                check_equal_on_ranks(value)
            check_equal_on_ranks(report.norms)
            for name_here, param in params.items():
                key, cut = model.pieces[name_here]
                torch.testing.assert_close(
                    param.grad, cut(grad_of(full_params[key])), rtol=tolerance, atol=1e-9, msg=where
                )
        assert bool(report.clipped), name


def case_replicated() -> None:
    _check_against_one_process(replicated, torch.float64, 1e-12)


def case_tensor_parallel() -> None:
    _check_against_one_process(tp, torch.float64, 1e-12)


def case_pipeline() -> None:
    _check_against_one_process(pp, torch.float64, 1e-12)


def case_tensor_parallel_stages() -> None:
    _check_against_one_process(grid, torch.float64, 1e-12)


def case_half_precision() -> None:
    _check_against_one_process(grid, torch.bfloat16, 0.01)


class Counting(MPIComm):
    """A communicator that records its collectives."""

    calls: tuple[str, ...] = ()

    def sum_(self, tensor: Tensor) -> None:
        self.calls += ("sum",)
        super().sum_(tensor)

    def gather_objects(self, value: Any) -> list[Any]:
        self.calls += ("gather",)
        return super().gather_objects(value)


def case_functions_take_one_reduction() -> None:
    comm = Counting()
    for layout in LAYOUTS:
        model = layout()
        params = model.build_params(torch.float32)
        for name_here, param in params.items():
            key, cut = model.pieces[name_here]
            param.grad = cut(full_tensor(key)).float()
        exact = torch.cat([full_tensor(key).flatten() for key in model.keys]).norm()
        comm.calls = ()
        norm = distclip.clip_grad_norm_(params.items(), 1.0, comm=comm, split_over=model.split_over)
        assert comm.calls == ("sum",), comm.calls
        torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
        check_equal_on_ranks(norm)
        after = distclip.clip_grad_norm_(params.items(), float("inf"), comm=comm, split_over=model.split_over)
        torch.testing.assert_close(after, torch.tensor(1.0), rtol=1e-5, atol=0)


def case_rank_without_gradients_takes_part() -> None:
    axis = split(0)
    weight = nn.Parameter(torch.zeros(2))
    if world().rank:
        weight.grad = torch.tensor([3.0, 4.0])
    norm = distclip.clip_grad_norm_([weight], 1.0, comm=world(), split_over={"pp": axis})
    torch.testing.assert_close(norm, torch.tensor(5.0 * (world().size - 1) ** 0.5))
    check_equal_on_ranks(norm)


# --- with torch.distributed ---


def case_torch_distributed_starts_from_mpi() -> None:
    from distclip.integrations.mpi import init_process_group

    assert not dist.is_initialized()
    init_process_group()
    comm = world()
    assert (dist.get_rank(), dist.get_world_size()) == (comm.rank, comm.size)
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"]) == (str(comm.rank),) * 2
    assert (os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]) == (str(comm.size),) * 2
    total = torch.tensor([float(comm.rank)])
    dist.all_reduce(total)
    assert total == sum(range(comm.size))
    with raises_on_ranks(ArgumentError, "has been started already"):
        init_process_group()


def case_dtensors_are_reduced_by_mpi() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world().size,), mesh_dim_names=("dp",))
    full = full_tensor("experts")
    weight = nn.Parameter(distribute_tensor(torch.zeros_like(full), mesh, [Shard(0)]))
    weight.grad = distribute_tensor(full, mesh, [Shard(0)])
    norm = distclip.clip_grad_norm_([weight], 1.0, comm=world())
    torch.testing.assert_close(norm, full.norm(), rtol=1e-12, atol=0)
    with raises_on_ranks(LayoutError, "comm= does not contain ranks"):
        distclip.clip_grad_norm_([weight], 1.0, comm=split(world().rank))
    dist.destroy_process_group()


FUNCTIONS = {**vars(failure_cases), **globals()}
CASES = [name.removeprefix("case_") for name in FUNCTIONS if name.startswith("case_")]


def main(folder: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    results: dict[str, str] = {}
    file = folder / f"rank{world().rank}.json"
    for name in CASES:
        try:
            FUNCTIONS[f"case_{name}"]()
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
            raise
        finally:
            file.write_text(json.dumps(results), encoding="utf-8")
        world().comm.Barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
