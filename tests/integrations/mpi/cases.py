"""Cases of tests/integrations/mpi/test_mpi.py: one function a case, one job for all of them.

Nothing here starts torch.distributed, up to the last cases. A rank that fails leaves its traceback and takes the others
down, so that the cases after it have no answer.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from distclip import ArgumentError, GradClipper, LayoutError
from distclip.comm.mpi import MPIComm
from tests.integrations.mpi import trouble
from tests.integrations.mpi.spread import (
    LAYOUTS,
    Spread,
    everywhere,
    grad_of,
    grid,
    pp,
    replicated,
    same_everywhere,
    split,
    tp,
    whole,
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
        for lay in layouts:
            tensor = lay((torch.arange(12.0).view(3, 4) * (comm.rank + 1)).to(dtype))
            expected = torch.arange(12.0).view(3, 4) * sum(range(1, comm.size + 1))
            comm.sum_(tensor)
            torch.testing.assert_close(tensor.detach(), lay(expected.to(dtype)).detach(), rtol=0, atol=0)


def case_the_largest_is_found_and_nan_survives_a_sum() -> None:
    comm = world()
    for dtype in (torch.float64, torch.bfloat16):
        most = torch.tensor([[float(comm.rank), -1.0], [-float(comm.rank), float("inf")]], dtype=dtype).t()
        comm.max_(most)
        expected = torch.tensor([[comm.size - 1.0, -1.0], [0.0, float("inf")]], dtype=dtype).t()
        assert torch.equal(most, expected)
        for bad in range(comm.size):
            total = torch.tensor([NAN if comm.rank == bad else 1.0, 1.0], dtype=dtype)
            comm.sum_(total)
            assert total[0].isnan()
            assert total[1] == comm.size


def case_ranks_are_those_of_the_world() -> None:
    comm, evens = world(), split(world().rank % 2)
    assert (comm.rank, comm.ranks) == (comm.comm.rank, tuple(range(comm.size)))
    assert evens.ranks == tuple(range(comm.rank % 2, comm.size, 2))
    assert evens.ranks[evens.rank] == comm.rank
    assert evens.gather_objects(comm.rank) == list(evens.ranks)
    assert isinstance(comm, distclip.Comm)


def case_what_is_no_communicator_is_refused() -> None:
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


def _as_in_one_process(layout: Callable[[], Spread], dtype: torch.dtype, tolerance: float) -> None:
    spread = layout()
    for name, policy in POLICIES.items():
        mine = spread.made(dtype)
        one = {key: nn.Parameter(whole(key, -1).to(dtype)) for key in spread.keys}
        clipper = GradClipper(list(mine.items()), policy(), comm=world(), split_over=spread.split_over)
        single = GradClipper(list(one.items()), policy())
        for step in range(4):
            for held, param in mine.items():
                key, cut = spread.pieces[held]
                param.grad = cut(whole(key, step)).to(dtype)
            for key, param in one.items():
                param.grad = whole(key, step).to(dtype)
            report, expected = clipper.clip(), single.clip()
            said = f"{name}, step {step}"
            for value, right in ((report.norm, expected.norm), (report.coef, expected.coef)):
                torch.testing.assert_close(value, right, rtol=tolerance, atol=0, msg=said)
                same_everywhere(value)
            same_everywhere(report.norms)
            for held, param in mine.items():
                key, cut = spread.pieces[held]
                torch.testing.assert_close(param.grad, cut(grad_of(one[key])), rtol=tolerance, atol=1e-9, msg=said)
        assert bool(report.clipped), name


def case_replicated() -> None:
    _as_in_one_process(replicated, torch.float64, 1e-12)


def case_tensor_parallel() -> None:
    _as_in_one_process(tp, torch.float64, 1e-12)


def case_pipeline() -> None:
    _as_in_one_process(pp, torch.float64, 1e-12)


def case_tensor_parallel_stages() -> None:
    _as_in_one_process(grid, torch.float64, 1e-12)


def case_half_precision() -> None:
    _as_in_one_process(grid, torch.bfloat16, 0.01)


class Counting(MPIComm):
    """Counts what it is asked for."""

    asked: tuple[str, ...] = ()

    def sum_(self, tensor: Tensor) -> None:
        self.asked += ("sum",)
        super().sum_(tensor)

    def gather_objects(self, value: Any) -> list[Any]:
        self.asked += ("gather",)
        return super().gather_objects(value)


def case_functions_take_one_reduction() -> None:
    comm = Counting()
    for layout in LAYOUTS:
        spread = layout()
        params = spread.made(torch.float32)
        for held, param in params.items():
            key, cut = spread.pieces[held]
            param.grad = cut(whole(key)).float()
        right = torch.cat([whole(key).flatten() for key in spread.keys]).norm()
        comm.asked = ()
        norm = distclip.clip_grad_norm_(params.items(), 1.0, comm=comm, split_over=spread.split_over)
        assert comm.asked == ("sum",), comm.asked
        torch.testing.assert_close(norm.double(), right, rtol=1e-6, atol=0)
        same_everywhere(norm)
        after = distclip.clip_grad_norm_(params.items(), float("inf"), comm=comm, split_over=spread.split_over)
        torch.testing.assert_close(after, torch.tensor(1.0), rtol=1e-5, atol=0)


def case_a_rank_without_gradients_takes_part() -> None:
    axis = split(0)
    weight = nn.Parameter(torch.zeros(2))
    if world().rank:
        weight.grad = torch.tensor([3.0, 4.0])
    norm = distclip.clip_grad_norm_([weight], 1.0, comm=world(), split_over={"pp": axis})
    torch.testing.assert_close(norm, torch.tensor(5.0 * (world().size - 1) ** 0.5))
    same_everywhere(norm)


# --- beside torch.distributed ---


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
    with everywhere(ArgumentError, "has been started already"):
        init_process_group()


def case_dtensors_are_added_up_by_mpi() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world().size,), mesh_dim_names=("dp",))
    full = whole("experts")
    weight = nn.Parameter(distribute_tensor(torch.zeros_like(full), mesh, [Shard(0)]))
    weight.grad = distribute_tensor(full, mesh, [Shard(0)])
    norm = distclip.clip_grad_norm_([weight], 1.0, comm=world())
    torch.testing.assert_close(norm, full.norm(), rtol=1e-12, atol=0)
    with everywhere(LayoutError, "comm= does not contain ranks"):
        distclip.clip_grad_norm_([weight], 1.0, comm=split(world().rank))
    dist.destroy_process_group()


EVERY = {**vars(trouble), **globals()}
CASES = [name.removeprefix("case_") for name in EVERY if name.startswith("case_")]


def main(folder: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    answers: dict[str, str] = {}
    answer = folder / f"rank{world().rank}.json"
    for name in CASES:
        try:
            EVERY[f"case_{name}"]()
            answers[name] = ""
        except BaseException:
            answers[name] = traceback.format_exc()
            raise
        finally:
            answer.write_text(json.dumps(answers), encoding="utf-8")
        world().comm.Barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
