"""What every rank of an MPI job does in tests/integrations/test_mpi.py: one function a case, one job for all of them.

Nothing here starts torch.distributed, up to the last cases. A rank that fails leaves its traceback and takes the others
down, so that the cases after it have no answer.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from distclip import ArgumentError, DisagreementError, GradClipper, LayoutError, NonFiniteError, NonFiniteWarning
from distclip.comm.mpi import MPIComm

NAN = float("nan")

WHOLE = {"embedding": (8, 6), "experts": (12, 4), "columns": (5, 8), "norm": (6,), "head": (8, 6)}
"""The one true model: `experts` can be cut along dim 0, `columns` along dim 1."""

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
    with pytest.raises(ArgumentError, match=r"Write MPIComm\(\)"):
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
                torch.testing.assert_close(param.grad, cut(_grad(one[key])), rtol=tolerance, atol=1e-9, msg=said)
        assert bool(report.clipped), name


def _grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


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


# --- gradients that are not finite ---


def _bad_step(on_nonfinite: Any, **kwargs: Any) -> tuple[GradClipper, nn.Parameter, torch.optim.Optimizer]:
    """Stages of one parameter each; the last rank's gradient has a NaN."""
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), 2.0)
    if world().rank == world().size - 1:
        weight.grad[1] = NAN
    optimizer = torch.optim.SGD([weight], lr=1.0)
    comm, axis = world(), {"pp": split(0)}
    policy = distclip.zclip(warmup=2, cap=1.0)
    clipper = GradClipper([("w", weight)], policy, comm=comm, split_over=axis, on_nonfinite=on_nonfinite, **kwargs)
    return clipper, weight, optimizer


def case_nan_on_one_rank_skips_on_all() -> None:
    clipper, weight, optimizer = _bad_step("skip")
    before = clipper.state_dict()
    with pytest.warns(NonFiniteWarning, match=f"w \\(1 NaN on rank {world().size - 1}\\)"):
        report = clipper.step(optimizer)
    assert bool(report.skipped)
    assert not bool(report.finite)
    assert torch.equal(weight, torch.ones(3))
    assert clipper.skipped == 1
    assert str(clipper.state_dict()["state"]) == str(before["state"])


def case_nan_on_one_rank_raises_on_all() -> None:
    clipper, weight, optimizer = _bad_step("raise")
    with everywhere(NonFiniteError, f"1 NaN on rank {world().size - 1}"):
        clipper.step(optimizer)
    assert torch.equal(weight, torch.ones(3))
    with everywhere(NonFiniteError, "cannot be clipped"):
        distclip.clip_grad_norm_([weight], 1.0, error_if_nonfinite=True, comm=world(), split_over={"pp": split(0)})


def case_nan_on_one_rank_is_zeroed() -> None:
    clipper, weight, optimizer = _bad_step("zero")
    with pytest.warns(NonFiniteWarning, match="set to zero"):
        report = clipper.step(optimizer)
    right = (4.0 * (3 * world().size - 1)) ** 0.5
    torch.testing.assert_close(report.norm.double(), torch.tensor(right).double(), rtol=1e-6, atol=0)
    same_everywhere(report.coef)
    assert bool(weight.isfinite().all())


def case_nan_on_one_rank_propagates_to_all() -> None:
    clipper, weight, optimizer = _bad_step("propagate")
    report = clipper.step(optimizer)
    assert bool(report.norm.isnan())
    assert bool(weight.isnan().all())


def case_giving_up_comes_on_all() -> None:
    clipper, _, optimizer = _bad_step("skip", max_skips=1)
    with everywhere(distclip.TooManySkippedSteps, "1 steps in a row"):
        clipper.step(optimizer)


def case_a_loss_scale_stays_the_same() -> None:
    _, weight, _ = _bad_step("raise")
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper = GradClipper([("w", weight)], distclip.global_norm(1.0), comm=world(), split_over={"pp": split(0)})
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # makes the scale
    assert bool(clipper.step(optimizer, scaler).skipped)
    scaler.update()
    assert scaler.get_scale() == 512.0


def case_an_attached_clipper_decides_for_all() -> None:
    clipper, weight, optimizer = _bad_step("skip")
    handle = clipper.attach(optimizer)
    with pytest.warns(NonFiniteWarning):
        optimizer.step()
    assert torch.equal(weight, torch.ones(3))
    handle.remove()


# --- what is wrong on one rank ---


def case_a_bad_argument_on_one_rank_is_refused_by_all() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    last = world().rank == world().size - 1
    with everywhere(ArgumentError, "max_norm=-1"):
        distclip.clip_grad_norm_([weight], -1.0 if last else 1.0, comm=world())
    with everywhere(ArgumentError, "on_nonfinite='never'"):
        given: Any = "never" if last else "skip"
        GradClipper([weight], distclip.global_norm(1.0), comm=world(), on_nonfinite=given)
    with everywhere(DisagreementError, "different policies"):
        GradClipper([weight], distclip.global_norm(1.0 + last), comm=world())
    assert torch.equal(_grad(weight), torch.ones(2))


def case_another_rank_is_named_as_the_world_names_it() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    half = split(world().rank % 2)
    bad = half.rank == half.size - 1
    with pytest.raises(ArgumentError) as caught:
        distclip.clip_grad_norm_([weight], -1.0 if bad else 1.0, comm=half)
    assert bad or f"rank {half.ranks[-1]}: max_norm=-1" in str(caught.value)


def case_axes_without_a_communicator_are_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    with everywhere(ArgumentError, "Write comm=MPIComm()"):
        distclip.clip_grad_norm_([weight], 1.0, split_over={"pp": split(0)})
    with everywhere(ArgumentError, "Write comm=MPIComm()"):
        GradClipper([weight], distclip.global_norm(1.0), split_over=[split(0)])


def case_axes_that_reach_further_are_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    alone = split(world().rank)
    with everywhere(LayoutError, "comm= does not contain ranks"):
        distclip.clip_grad_norm_([weight], 1.0, comm=alone, split_over={"pp": split(0)})
    with everywhere(LayoutError, "comm= does not contain ranks"):
        GradClipper([weight], distclip.global_norm(1.0), comm=alone, split_over={"pp": split(0)})


def case_axes_that_differ_are_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    axis = split(0)
    with everywhere(DisagreementError, "split_over= differs"):
        over = {"pp": axis} if world().rank else None
        GradClipper([weight], distclip.global_norm(1.0), comm=world(), split_over=over)


def case_a_tag_without_its_axis_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.tensor_model_parallel = True  # type: ignore[attr-defined]
    with everywhere(LayoutError, 'Write split_over={"tp": tp_group}'):
        distclip.clip_grad_norm_([("w", weight)], 1.0, comm=world())


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


CASES = [name.removeprefix("case_") for name in globals() if name.startswith("case_")]


def main(folder: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    answers: dict[str, str] = {}
    answer = folder / f"rank{world().rank}.json"
    for name in CASES:
        try:
            globals()[f"case_{name}"]()
            answers[name] = ""
        except BaseException:
            answers[name] = traceback.format_exc()
            raise
        finally:
            answer.write_text(json.dumps(answers), encoding="utf-8")
        world().comm.Barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
