"""As on an accelerator, where the host reads totals only if it has to: the same norms, policies and refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from unittest import mock

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

import distclip
from distclip import ArgumentError, PeerError, ProcessGroupComm
from tests.policies.test_policies import check_policies
from tests.ranks import World
from tests.rig import INF, NAN, bits, build, frozen, memory
from tests.sharding.test_layouts import check_layout
from tests.tables.layouts import LAYOUTS
from tests.tables.layouts.model_parallel import known, made


@contextmanager
def on_an_accelerator() -> Iterator[None]:
    with ExitStack() as stack:
        for stage in ("norms.reduce", "call", "judge"):
            module = import_module(f"distclip.{stage}")
            stack.enter_context(mock.patch.object(module, "host_reads_free", return_value=False))
        yield


def check_as_before(check: Callable[..., None], name: str) -> None:
    with on_an_accelerator():
        check(name)


# A norm beyond float32 is written in float64 where the host knows it to be one.
@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - {"fp32_norm_beyond_fp32"}))
def test_layout(world: Callable[[int], World], name: str) -> None:
    world(max(LAYOUTS[name].worlds)).run(check_as_before, check=check_layout, name=name)


@pytest.mark.parametrize(
    "name", ["ddp", "fsdp1_full_shard_orig", "fsdp2_tp", "many_meshes", "partial", "stages_fsdp2", "tp_sequence"]
)
def test_policies(world: Callable[[int], World], name: str) -> None:
    world(4).run(check_as_before, check=check_policies, name=name)


def check_a_communicator_of_the_caller() -> None:
    """Rank 0 holds nothing and is on no accelerator; both read that rank 1 has failed, and raise in its words."""
    comm = ProcessGroupComm(dist.group.WORLD)
    last = dist.get_rank() == 1
    mesh = DeviceMesh("cpu", [1])
    parameters = [made(known(4, 3), mesh, [Shard(0)])] if last else []
    with on_an_accelerator() if last else nullcontext(), pytest.raises(ArgumentError, match="max_norm=-1"):
        distclip.clip_grad_norm_(parameters, -1.0 if last else 1.0, comm=comm)
    dist.barrier()


def test_a_communicator_of_the_caller(world: Callable[[int], World]) -> None:
    world(2).run(check_a_communicator_of_the_caller)


def check_a_failure(how: str, value: float) -> None:
    """Of rank 1, in the third step, beside a bad element of rank 0 or not: nobody waits to be told."""
    rig, untouched = build("fsdp2"), build("fsdp2")
    clipper = rig.clipper(distclip.ema())
    optimizer = rig.optimizer("fused" if how == "step" else "sgd")
    fails = dist.get_rank() == 1

    def call(wrong: bool = False) -> None:
        if how == "clip":
            clipper.clip(failure=ArgumentError("of rank 1") if wrong else None)
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
        before, remembered = frozen(rig, optimizer), memory(clipper)
        for one in (rig, untouched):
            one.fill(2)
            one.poison(0, value)
        if fails:
            with pytest.raises(ArgumentError):
                call(wrong=True)
        elif how in ("clip", "checked"):
            with pytest.raises(PeerError, match="another rank failed in this call"):
                call()
        else:
            call()
        assert frozen(rig, optimizer) == before
        assert bits(rig.grads()) == bits(untouched.grads()), "a gradient was touched"
        if how == "step" and not fails:
            with pytest.raises(PeerError, match="another rank failed in step 3"):
                call()
        assert memory(clipper) == remembered
    dist.barrier()


@pytest.mark.parametrize("value", [1.0, NAN, INF])
@pytest.mark.parametrize("how", ["clip", "step", "checked", "free"])
def test_a_failure(world: Callable[[int], World], how: str, value: float) -> None:
    world(2).run(check_a_failure, how=how, value=value)
