"""Run as on an accelerator, where the host reads totals only if it must: the same norms, policies and errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

import distclip
from distclip import ArgumentError, NonFiniteWarning, PeerError, ProcessGroupComm, devices
from distclip.engine import Engine
from distclip.extend import FirstError
from tests.policies.checks import PER_GRANULARITY, check_policies
from tests.ranks import on_ranks
from tests.rig import INF, NAN, assert_same_on_ranks, build_rig, policy_state, to_bytes, training_state
from tests.sharding.checks import check_layout
from tests.tables.layouts import LAYOUTS
from tests.tables.layouts.meshes import mesh_of, world_mesh
from tests.tables.layouts.tensors import dtensor_param, random_grad


@contextmanager
def on_an_accelerator() -> Iterator[None]:
    """Make the engine treat every host read as a synchronization."""
    with mock.patch.object(devices, "host_reads_free", return_value=False):
        yield


# fmt: off
KINDS = [
    "complex_numbers", "ddp", "experts_plain", "fp16_large", "fp64_huge", "fsdp1_full_shard",
    "fsdp2_one_rank_without", "fsdp2_tp", "generator", "hsdp", "many_meshes", "mixed_dtypes", "nothing",
    "partial_missing_on_one", "rank_empty", "sparse", "stages_dtypes", "stages_uneven", "tied_embedding",
    "tp_plain_norm",
]
# fmt: on
"""A layout of each kind. What the host reads of the totals does not depend on the layout."""


@pytest.mark.parametrize(("name", "num_ranks"), [(n, 2 if 2 in LAYOUTS[n].worlds else 4) for n in KINDS])
@on_ranks()
def test_norm_and_gradients(name: str) -> None:
    with on_an_accelerator():
        check_layout(name)


@on_ranks(4)
@pytest.mark.parametrize("name", ["fsdp1_full_shard_orig", "fsdp2_tp", "partial", "stages_fsdp2"])
def test_policies(name: str) -> None:
    with on_an_accelerator():
        check_policies(name, PER_GRANULARITY)


@on_ranks(2)
def test_communicator_of_the_caller_raises_the_error_of_another_rank() -> None:
    """Fail on rank 1, while rank 0 holds nothing and is on no accelerator: both raise the error of rank 1."""
    comm = ProcessGroupComm(dist.group.WORLD)
    last = dist.get_rank() == 1
    # The device on which numbers travel is a CPU on both ranks, and only the gradients of rank 1 are on an accelerator.
    comm.device = torch.device("cpu", 0)
    on_accelerator = mock.patch.object(devices, "host_reads_free", lambda device: device.index == 0)
    mesh = mesh_of(1)
    parameters = [dtensor_param(random_grad(4, 3), mesh, [Shard(0)])] if last else []
    with on_accelerator if last else nullcontext(), pytest.raises(ArgumentError, match="max_norm=-1"):
        distclip.clip_grad_norm_(parameters, -1.0 if last else 1.0, comm=comm)
    dist.barrier()


@on_ranks(2)
@pytest.mark.parametrize("value", [1.0, NAN, INF])
@pytest.mark.parametrize("how", ["clip", "step", "checked", "free"])
def test_failure_of_one_rank_raises_on_the_other_at_its_next_host_read(how: str, value: float) -> None:
    """Fail on rank 1 in the third step, in which rank 0 may have a non-finite element."""
    rig, untouched = build_rig("fsdp2"), build_rig("fsdp2")
    clipper = rig.clipper(distclip.ema(), replicas="warn")
    optimizer = rig.optimizer("fused" if how == "step" else "sgd")
    is_failing = dist.get_rank() == 1

    def call(wrong: bool = False) -> None:
        if how == "clip":
            clipper.clip(errors=FirstError(ArgumentError("of rank 1")) if wrong else None)
            optimizer.step()
        elif how == "step":
            clipper.step(3 if wrong else optimizer)  # type: ignore[arg-type]
        else:
            parameters = [p for _, p in rig.named]
            distclip.clip_grad_norm_(parameters, -1.0 if wrong else 0.5, error_if_nonfinite=how == "checked")

    with on_an_accelerator():
        for number in range(2):
            rig.fill(number)
            call()
        before, state_before = training_state(rig, optimizer), policy_state(clipper)
        for one in (rig, untouched):
            one.fill(2)
            one.poison(0, value)
        if is_failing:
            with pytest.raises(ArgumentError):
                call(wrong=True)
        elif how in ("clip", "checked"):
            with pytest.raises(PeerError, match="another rank failed in this call"):
                call()
        else:
            call()
        assert training_state(rig, optimizer) == before
        assert to_bytes(rig.grads()) == to_bytes(untouched.grads()), "a gradient was written"
        if how == "step" and not is_failing:
            with pytest.raises(PeerError, match="another rank failed in step 3"):
                call()
        assert policy_state(clipper) == state_before
    dist.barrier()


@on_ranks(2)
@pytest.mark.parametrize("is_first", [True, False], ids=["first use", "later"])
@pytest.mark.parametrize(
    ("common", "odd"),
    [
        ({"norm_type": 2.0}, {"norm_type": INF}),
        ({"norm_type": INF}, {"norm_type": 1.0}),
        ({"norm_type": 2.0}, {"norm_type": 1.0}),
        ({"max_norm": 1.0}, {"max_norm": 0.5}),
    ],
    ids=["2 and inf", "inf and 1", "2 and 1", "bounds"],
)
def test_functions_whose_arguments_differ_in_a_later_call(
    common: dict[str, float], odd: dict[str, float], is_first: bool
) -> None:
    """No rank gets a norm, none writes a gradient, and all raise: the ranks that take a maximum at once."""
    param = dtensor_param(random_grad(6, 4), world_mesh("all"), [Shard(0)])
    before = param.grad.to_local().clone()
    own = {"max_norm": 1.0, **(odd if dist.get_rank() else common)}

    def call(**arguments: float) -> torch.Tensor:
        return distclip.clip_grad_norm_([param], **arguments)  # type: ignore[arg-type]

    with on_an_accelerator():
        for arguments in [common] if is_first else [common, odd, common]:
            call(**{**arguments, "max_norm": INF})
        if own.get("norm_type") == INF:
            with pytest.raises(distclip.DisagreementError, match="other ranks passed other arguments"):
                call(**own)
        else:
            assert call(**own).isnan()
            with pytest.raises(distclip.DisagreementError, match="other ranks passed other arguments"):
                call(**own)
        assert torch.equal(param.grad.to_local(), before)
        # All ranks go on together.
        assert call(max_norm=INF).isfinite()
        call(max_norm=INF)
    dist.barrier()


@on_ranks(2)
@pytest.mark.parametrize("name", ["fsdp2", "stages"])
def test_rank_that_offloads_gradients_enters_the_same_collectives(name: str) -> None:
    """Let the host of rank 0 read its numbers at once, while that of rank 1 reads them a step later."""
    rig = build_rig(name)
    optimizer, clipper = rig.optimizer("fused"), rig.clipper(distclip.zclip(warmup=2))
    offloads = dist.get_rank() == 0
    # The device on which numbers travel is an accelerator on both ranks.
    clipper.comm.device = torch.device("cpu", 0)
    with (
        mock.patch.object(Engine, "on_host", False),
        mock.patch.object(devices, "host_reads_free", lambda device: offloads and device.index is None),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", NonFiniteWarning)
        for number in range(6):
            rig.fill(number)
            if number in (2, 3):
                rig.poison(1, NAN)
            report = clipper.step(optimizer)
            assert bool(report.skipped) == (number in (2, 3))
        clipper.state_dict()
    assert_same_on_ranks(clipper)
    assert clipper.skipped == 2
