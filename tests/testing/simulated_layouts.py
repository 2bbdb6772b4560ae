"""Compare layouts under torch's LocalTensorMode with a float64 oracle. Run as a program, because it sets up the fake
process group: `python -m tests.testing.simulated_layouts 16`."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import distclip
from distclip import reference

R, S = Replicate(), Shard

LAYOUTS: dict[str, list[tuple[tuple[int, ...], str, Sequence[Placement]]]] = {
    "ddp": [((5, 3), "d", [R]), ((4,), "d", [R])],
    "fsdp2": [((128, 3), "d", [S(0)]), ((64,), "d", [S(0)])],
    "ragged": [((67, 3), "d", [S(0)]), ((129,), "d", [S(0)])],
    "empty": [((3, 2), "d", [S(0)]), ((1,), "d", [S(0)])],
    "scalar": [((), "d", [R])],
    "hsdp": [((37, 3), "rs", [R, S(0)]), ((16,), "rs", [R, S(0)])],
    "tp": [((16, 37), "d", [S(1)]), ((70, 2), "d", [S(0)]), ((5,), "d", [R])],
    "fsdp2_tp": [((32, 40), "rs", [S(0), S(1)]), ((9, 33), "rs", [S(1), R]), ((7,), "rs", [R, R])],
    "one_mesh_axis": [((33, 2), "s", [S(0)]), ((3,), "s", [R])],
    "many_meshes": [((33, 2), "d", [S(0)]), ((8, 9), "rs", [R, S(1)]), ((11,), "s", [S(0)]), ((6,), "r", [S(0)])],
    "partial": [((4, 3), "d", [Partial()]), ((9,), "d", [S(0)])],
    "partial_on_two_axes": [((4, 3), "rs", [Partial(), Partial()]), ((9,), "rs", [Partial("avg"), S(0)])],
    "partial_hsdp": [((40, 3), "rs", [Partial(), S(0)]), ((4,), "rs", [R, Partial("avg")])],
}


def cut(whole: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement], ranks: range) -> dict[int, Any]:
    """Return the local tensor of every rank. Ranks outside of the mesh hold what those within it do."""
    members, sizes = mesh.mesh.flatten().tolist(), list(mesh.mesh.shape)
    pieces = {}
    for rank, at in zip(members, product(*map(range, sizes)), strict=True):
        local = whole
        for i, size, placement in zip(at, sizes, placements, strict=True):
            if isinstance(placement, Shard):
                parts = list(local.chunk(size, placement.dim))
                local = parts[i] if i < len(parts) else local.narrow(placement.dim, 0, 0)
            elif isinstance(placement, Partial):
                # Whole numbers times a power of two, so that the summands add up exactly.
                share = local / size if placement.reduce_op == "sum" else local
                local = share + (i - (size - 1) / 2)
        pieces[rank] = local.contiguous()
    # The mesh is a row or a column of the one over all ranks.
    is_row = members == list(range(len(members)))
    others = {rank: members[rank % len(members) if is_row else rank // members[1]] for rank in ranks}
    return {rank: pieces[rank if rank in pieces else others[rank]].clone() for rank in ranks}


def dtensor(whole: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement], size: int) -> DTensor:
    with LocalTensorMode(size).disable():
        local = LocalTensor(cut(whole, mesh, [*placements], range(size)))
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
    )


def params_of(name: str, size: int, meshes: dict[str, DeviceMesh]) -> Iterator[tuple[torch.Tensor, nn.Parameter]]:
    generator = torch.Generator().manual_seed(len(name))
    for shape, axes, placements in LAYOUTS[name]:
        grad = torch.randn(shape, generator=generator)
        whole = [R if p.is_partial() else p for p in placements]
        param = nn.Parameter(dtensor(torch.zeros(shape), meshes[axes], whole, size))
        param.grad = dtensor(grad, meshes[axes], placements, size)
        yield grad, param


def check(
    name: str, size: int, mode: LocalTensorMode, meshes: dict[str, DeviceMesh], norm_types: Sequence[float]
) -> None:
    for norm_type in norm_types:
        with mode.disable():
            wholes, params = zip(*params_of(name, size, meshes), strict=True)
        expected = float(reference.total_norm(wholes, norm_type))
        norm = distclip.clip_grad_norm_(list(params), expected / 2, norm_type)
        assert isinstance(norm, LocalTensor)
        tolerance = 1e-5 if "partial" in name else 2e-6
        assert abs(float(norm) - expected) <= tolerance * expected, (name, size, norm_type, float(norm), expected)
        again = float(distclip.get_total_norm([p.grad for p in params], norm_type))
        assert abs(again - expected / 2) <= 2 * tolerance * expected, (name, size, norm_type, again, expected / 2)
    clipper = distclip.GradClipper([(f"p{i}", p) for i, p in enumerate(params)], distclip.global_norm(expected / 8))
    assert abs(float(clipper.clip().norm) - float(reference.total_norm(wholes)) / 2) < tolerance * expected


def main(size: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    with LocalTensorMode(size) as mode:
        both = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("r", "s"))
        meshes = {"d": init_device_mesh("cpu", (size,)), "rs": both, "r": both["r"], "s": both["s"]}
        for name in LAYOUTS:
            # Torch's own set-up takes seconds for so many ranks.
            if size <= 64 or name == "hsdp":
                check(name, size, mode, meshes, (2.0, 1.0, float("inf")) if size <= 16 else (2.0,))
        # Stages of a pipeline, and a clipper with rows and with an optimizer.
        with mode.disable():
            stages = nn.Parameter(torch.zeros(3))
            grads = {rank: torch.full((3,), 1.0 + rank // (size // 2)) for rank in range(size)}
        stages = nn.Parameter(LocalTensor(dict.fromkeys(range(size), stages.detach()) | {}))
        stages.grad = LocalTensor(grads)
        norm = distclip.clip_grad_norm_([("w", stages)], 1e3, split_over=both["r"])
        assert abs(float(norm) - 15**0.5) < 1e-5
        if size <= 16:
            with mode.disable():
                _, params = zip(*params_of("many_meshes", size, meshes), strict=True)
            optimizer = torch.optim.SGD(params, lr=1.0)
            clipper = distclip.GradClipper([(f"p{i}", p) for i, p in enumerate(params)], distclip.agc(0.1))
            assert bool(clipper.step(optimizer).clipped)
            report = distclip.audit(clipper)
            assert report.ok, report.problems
    with FakeTensorMode():
        model = nn.Linear(3, 3)
        model(torch.ones(1, 3)).sum().backward()
        clipper, optimizer = distclip.GradClipper(model, distclip.zclip()), torch.optim.AdamW(model.parameters())
        distclip.clip_grad_norm_(model, 1.0)
        clipper.clip()
        clipper.step(optimizer)
        assert distclip.audit(model, optimizer=optimizer).as_dict()["parameters"]
    # FakeTensorMode leaves no state behind.
    del model, clipper, optimizer
    gc.collect()
    left = [one for one in gc.get_objects() if isinstance(one, FakeTensor)]
    assert not left, f"{len(left)} fake tensors are left"
    real = nn.Linear(3, 3)
    real(torch.ones(1, 3)).sum().backward()
    assert type(distclip.clip_grad_norm_(real, 1.0)) is torch.Tensor
    print("ok")


if __name__ == "__main__":
    main(int(sys.argv[1]))
