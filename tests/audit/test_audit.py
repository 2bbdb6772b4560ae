"""Audit every layout of the table, and layouts that are described wrongly."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode

import distclip
from distclip.auditing import facts as facts_module
from distclip.auditing import instances
from distclip.auditing import report as report_module
from distclip.auditing.probe import Values, measure_probe, read_values, sum_of_codes
from distclip.comm import threads
from distclip.comm.roll_call import components
from tests.audit.mistakes import MISTAKES, RIGHT, param, sharded, stage_of
from tests.ranks import gather_from_ranks, on_ranks
from tests.rig import to_bytes
from tests.tables.layouts import LAYOUTS
from tests.tables.layouts.data_parallel import backward, mlp
from tests.tables.layouts.meshes import world_mesh
from tests.tables.layouts.tensors import random_grad


@pytest.mark.parametrize(
    ("name", "num_ranks"), [(name, min(n for n in row.worlds if n > 1)) for name, row in LAYOUTS.items()]
)
@on_ranks()
def test_layouts_of_the_table_count_once(name: str) -> None:
    case = LAYOUTS[name].build()
    if case.idle:
        return
    comm = None if case.ranks is None else distclip.ProcessGroupComm(case.ranks)
    report = distclip.audit(case.parameters, split_over=case.split_over, comm=comm)
    assert report.ok, str(report)


@pytest.mark.parametrize(("name", "num_ranks"), [(name, mistake.num_ranks) for name, mistake in MISTAKES.items()])
@on_ranks()
def test_mistakes_are_named(name: str) -> None:
    mistake = MISTAKES[name]
    description = mistake.build()
    report = distclip.audit(description.model, **description.options)
    text = str(report)
    assert {problem.kind for problem in report.problems} == {mistake.kind}, text
    for word in mistake.words:
        assert any(word in str(problem) for problem in report.problems), f"{word!r} is missing:\n{text}"
    if mistake.parameters:
        assert {n for problem in report.problems for n in problem.parameters} == set(mistake.parameters), text
    with pytest.raises(distclip.LayoutError, match=mistake.kind):
        report.raise_if_wrong()
    assert gather_from_ranks(text) == [text] * dist.get_world_size()


@on_ranks(4)
def test_meshes_of_other_parts_of_the_program_change_no_suggestion() -> None:
    """Hold the tied ends alone on an axis of a mesh that has nothing to do with the model."""
    meshes = [DeviceMesh("cpu", torch.tensor([[0, 3], [1, 2]]), mesh_dim_names=("a", "b"))]
    for name, mistake in MISTAKES.items():
        if mistake.num_ranks == 4:
            description = mistake.build()
            text = "\n".join(map(str, distclip.audit(description.model, **description.options).problems))
            assert all(word in text for word in mistake.words), f"{name}:\n{text}"
    assert meshes


@pytest.mark.parametrize(("name", "num_ranks"), [(name, num_ranks) for name, (_, num_ranks) in RIGHT.items()])
@on_ranks()
def test_right_descriptions_have_no_problem(name: str) -> None:
    description = RIGHT[name][0]()
    report = distclip.audit(description.model, **description.options)
    assert report.ok, str(report)


@on_ranks(2)
def test_rank_0_and_its_peers_have_the_same_dict() -> None:
    model = mlp(8, 16, 8)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = distclip.audit(model, optimizer=optimizer).as_dict()
    assert gather_from_ranks(found) == [found] * 2
    assert json.loads(json.dumps(found)) == found
    first = found["parameters"][0]
    assert (
        first
        | {
            "name": "0.weight",
            "shape": [16, 8],
            "layout": "sharded on dim 0 over ranks 0, 1",
            "source": "placements",
            "num_pieces": 2,
            "num_replicas": [1, 1],
            "ranks": [0, 1],
            "local_bytes": 256,
            "trainable": True,
            "problems": [],
        }
        == first
    )
    assert sum(row["share"] for row in found["parameters"]) == pytest.approx(1)
    assert (found["ok"], found["notes"], found["counted_elements"]) == (True, [], found["elements"])


@on_ranks(2)
def test_nothing_is_changed_and_one_gather_is_made() -> None:
    model = nn.Sequential(mlp(8, 16, 8), nn.Linear(8, 4))
    fully_shard(model[0])
    model[1].bias.requires_grad_(False)
    backward(model, 8)
    calls: list[str] = []
    model[1].weight.register_hook(lambda grad: calls.append("hook"))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

    def state() -> Any:
        tensors = list(model.parameters()) + [p.grad for p in model.parameters() if p.grad is not None]
        versions = [t._version for t in tensors]
        kept = [(p.requires_grad, id(p.grad), dict(vars(p))) for p in model.parameters()]
        return to_bytes(tensors), versions, kept, torch.get_rng_state().tolist(), len(optimizer.state)

    before, groups = state(), len(distributed_c10d._world.pg_names)
    gather = dist.all_gather_object
    with pytest.MonkeyPatch.context() as patch, CommDebugMode() as others:
        patch.setattr(dist, "all_gather_object", lambda *a, **k: calls.append("gather") or gather(*a, **k))
        report = distclip.audit(model, optimizer=optimizer)
    assert report.ok, str(report)
    assert calls == ["gather"]
    assert others.get_total_counts() <= 2  # those of the gather itself: lengths, then values
    assert str(state()) == str(before)
    assert len(distributed_c10d._world.pg_names) == groups
    frozen = next(row for row in report.rows if row.name == "1.bias")
    assert (frozen.trainable, frozen.share) == (False, 0.0)
    assert "frozen; " in str(report)


@on_ranks(4)
def test_wrong_counts_are_found_by_numbers() -> None:
    """Count replicas wrongly, as a mistake in the engine would."""
    case = LAYOUTS["hsdp"].build()
    right = instances.num_replicas
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instances, "num_replicas", lambda *args: 2 * right(*args))
        report = distclip.audit(case.parameters)
    assert {problem.kind for problem in report.problems} == {"not counted once"}
    assert "count 1/2 times" in str(report)


@on_ranks(2)
def test_wrong_shards_are_found_by_numbers() -> None:
    """Two ranks that hold the same half of a parameter: the number of elements is right, the elements are not."""
    mesh = world_mesh("fsdp")
    w = nn.Parameter(DTensor.from_local(random_grad(3, 4), mesh, [Shard(0)], run_check=False))
    with pytest.MonkeyPatch.context() as patch:
        box = facts_module.dtensor_box
        patch.setattr(facts_module, "dtensor_box", lambda t: ((0, 3), *box(t)[1:]))
        report = distclip.audit([("w", w)])
    assert [problem.kind for problem in report.problems] == ["not counted once"]


@on_ranks(4)
def test_ranks_that_do_not_call_are_not_waited_for() -> None:
    """Two ranks of four audit twice, then all four do."""
    mesh = world_mesh("model", "fsdp")
    w = sharded(mesh["fsdp"], 8, 3, seed=mesh.get_local_rank("model"))
    if mesh.get_local_rank("model") == 1:
        for _ in range(2):
            report = distclip.audit([("w", w)], patience=0.05)
            assert report.ok, str(report)
            assert (report.ranks, report.rows[0].ranks) == ((2, 3), (2, 3))
            assert any("[0, 1]" in note for note in report.notes)
    dist.barrier()
    report = distclip.audit([("w", w)], patience=60.0)
    assert [problem.kind for problem in report.problems] == ["missing split_over"]


@on_ranks(2)
def test_audits_the_parameters_of_a_clipper() -> None:
    mesh = world_mesh("pp")
    stage = stage_of(dist.get_rank())
    clipper = distclip.GradClipper(stage, distclip.global_norm(1.0), split_over=mesh)
    report = distclip.audit(clipper, optimizer=torch.optim.SGD(stage.parameters(), lr=0.1))
    assert report.ok, str(report)
    assert len(report.rows) == 8


@on_ranks(2)
def test_an_error_on_one_rank_reaches_all() -> None:
    model: Any = stage_of(0) if dist.get_rank() == 0 else 7
    report = distclip.audit(model)
    assert [(problem.kind, problem.ranks) for problem in report.problems] == [("unknown layout", (1,))]


def test_communicator_of_the_caller() -> None:
    def audit(comm: Any) -> Any:
        return distclip.audit([("w", param(3, 4, seed=comm.rank))], comm=comm)

    with ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(audit, threads(3)))
    assert [[problem.kind for problem in report.problems] for report in reports] == [["missing split_over"]] * 3
    assert len(set(map(str, reports))) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_sums_of_a_probe_are_exact(dtype: torch.dtype) -> None:
    local = torch.zeros(3, 40_000, dtype=dtype)
    whole = (5, 100_000)
    index = torch.arange(500_000).view(whole)[1:4, 7:40_007]
    assert measure_probe(local, ((1, 3), (7, 40_000)), whole) == int((index % 251 + 1).sum())
    assert measure_probe(local, None, (3, 40_000)) == sum_of_codes(120_000)


@given(st.integers(1, 3), st.integers(0, 20), st.randoms(use_true_random=False))
def test_any_change_of_bits_changes_the_checksum(ndim: int, length: int, random: Any) -> None:
    values = torch.randn((length + 1,) * ndim)
    before = read_values(values)
    assert read_values(values.clone()) == before
    flat = values.view(-1).view(torch.int32)
    flat[random.randrange(len(flat))] ^= 1 << random.randrange(31)
    assert read_values(values).checksum != before.checksum


def test_values_without_numbers() -> None:
    assert read_values(torch.zeros(3, device="meta")) == Values()
    assert read_values(torch.zeros(0)).is_constant
    assert read_values(torch.tensor([float("nan"), 1.0])) == read_values(torch.tensor([float("nan"), 1.0]))
    assert read_values(torch.arange(4.0).view(2, 2).T) != read_values(torch.arange(4.0).view(2, 2))


def test_tables_with_and_without_rich() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(30))})
    report = distclip.audit(model)
    for plain in (True, False):
        text = report.to_text(100, plain=plain)
        assert "layers.{0-29}.weight" in text
        assert "80.0%" in text
        assert "No problem found." in text
        assert plain or max(map(len, text.splitlines())) <= 100
    assert len(report.as_dict()["parameters"]) == 60


def test_without_rich_the_table_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "find_spec", lambda name: None)
    monkeypatch.setenv("COLUMNS", "100")
    report = distclip.audit(nn.Linear(2, 2))
    assert str(report) == report.to_text(plain=True)


@given(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=6, max_size=6))
def test_components(spans: list[list[int]]) -> None:
    found = components(range(6), {rank: [tuple(span)] for rank, span in enumerate(spans)})
    for rank, span in enumerate(spans):
        assert rank in found[rank]
        assert all(found[other] == found[rank] for other in span)
    assert sum(1 / len(found[rank]) for rank in range(6)) == pytest.approx(len(set(found.values())))
