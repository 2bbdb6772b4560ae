"""Ranks that wait for each other log who is missing, and raise together where no collective can end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.tensor import Shard, distribute_tensor

import distclip
from distclip import DisagreementError, GradClipper, PeerError
from distclip.comm import ProcessGroupComm, process_group, waiting
from distclip.comm.waiting import Meetings
from tests.ranks import gather_from_ranks, on_ranks
from tests.tables.layouts.meshes import world_mesh


@contextmanager
def impatient(patience: str = "0.05", grace: float = 0.1) -> Iterator[None]:
    with mock.patch.dict("os.environ", DISTCLIP_PATIENCE=patience), mock.patch.object(waiting, "_GRACE", grace):
        yield


@on_ranks(4)
@pytest.mark.parametrize("kind", ["all-reduce", "gather"])
def test_one_rank_logs_who_is_missing(kind: str) -> None:
    assert dist.group.WORLD is not None
    post = Meetings._post

    def post_together(self: Meetings, number: int) -> dist.Store:
        """Write that this rank waits, and wait until all ranks but the late one have, however busy the machine is."""
        waiting_store = post(self, number)
        waiting_store.wait([f"{self._key(number)}/{rank}" for rank in (0, 1, 3)])
        return waiting_store

    with impatient(), mock.patch.object(Meetings, "_post", post_together):
        comm, store = ProcessGroupComm(dist.group.WORLD), distributed_c10d._get_default_store()
        messages: list[str] = []

        def log(message: str, *args: object) -> None:
            messages.append(message % args)
            store.set(f"logged {kind}", "")

        if comm.rank == 2:
            # Late, until another rank has logged so.
            store.wait([f"logged {kind}"])
        with mock.patch.object(waiting._log, "warning", log):
            if kind == "gather":
                assert comm.gather_objects(comm.rank) == [0, 1, 2, 3]
            else:
                comm.sum_(total := torch.ones(1, dtype=torch.float64))
                assert total.item() == 4
    by_rank = gather_from_ranks(messages)
    assert sum(map(len, by_rank)) == 1
    assert f"1 of 4 ranks (rank 2) have not entered the same {kind}" in str(by_rank)


@on_ranks(2, 4)
def test_ranks_whose_calls_fail_read_which_call_each_has_made(num_ranks: int) -> None:
    rank, weight = dist.get_rank(), nn.Parameter(torch.zeros(2))
    options = {"split_over": world_mesh("pp")["pp"]}
    clipper = GradClipper([weight], distclip.global_norm(1.0), **options)

    def fail(*_: object) -> None:
        raise RuntimeError("connection closed")

    store = dist.PrefixStore("failed calls", distributed_c10d._get_default_store())
    with (
        mock.patch.object(waiting, "_store", return_value=store),
        mock.patch.object(process_group, "begin_all_reduce", fail),
    ):
        with pytest.raises(PeerError) as caught:
            clipper.clip() if rank == 0 else GradClipper([weight], distclip.global_norm(1.0), **options)
        # A rank that waits for those that have failed ends as well.
        with pytest.raises(RuntimeError, match="another rank has failed"):
            clipper.comm._meetings.raise_if_failed(1)  # type: ignore[attr-defined]
    message, others = str(caught.value), "rank 1" if num_ranks == 2 else "ranks 1, 2, 3"
    assert "Rank 0 made GradClipper.clip (test_waiting.py, line" in message
    assert f"{others.capitalize()} made GradClipper (test_waiting.py, line" in message
    dist.barrier()


def sharded(mesh: str) -> nn.Parameter:
    """Return a parameter on a mesh of all ranks, or of the half of this one, with a gradient of ones."""
    on = world_mesh("all") if mesh == "all" else world_mesh("outer", "half")["half"]
    param = nn.Parameter(distribute_tensor(torch.zeros(8), on, [Shard(0)], src_data_rank=None))
    param.grad = distribute_tensor(torch.ones(8), on, [Shard(0)], src_data_rank=None)
    return param


@on_ranks(4)
@pytest.mark.parametrize("call", ["function", "clipper"])
@pytest.mark.parametrize("halves_are_known", [False, True])
def test_rank_that_waits_in_a_wider_call_than_its_peers(call: str, halves_are_known: bool) -> None:
    """All ranks of the narrower call raise, and later calls of all ranks work."""
    wide, half, rank = sharded("all"), sharded("half"), dist.get_rank()

    def make(params: list[nn.Parameter]) -> float:
        if call == "function":
            return float(distclip.clip_grad_norm_(params, 10.0))
        return float(GradClipper(params, distclip.global_norm(10.0)).clip().norm)

    with impatient():
        make([wide])
        if halves_are_known:
            make([half])
        error = ""
        try:
            make([half, wide] if rank == 1 else [half])
        except DisagreementError as raised:
            error = str(raised)
        errors = gather_from_ranks(error)
        assert all("a mesh of ranks 0, 1, 2, 3" in text for text in errors[:2]), errors
        assert errors[2:] == ["", ""]
        for params in ([wide], [half], [half, wide]):
            assert len(set(gather_from_ranks(make(params)))) == 1
        assert make([wide]) == pytest.approx(8**0.5)


@on_ranks(2)
def test_audit_on_one_rank_while_the_other_steps_raises_on_both() -> None:
    """Each error names the call of the other rank. The ranks need not wait for the timeout of the process group."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), world_mesh("dp"), [Shard(0)]))
    # Its all-reduce fails, so that no other test can use it.
    group = dist.new_group([0, 1])
    with impatient():
        clipper = GradClipper(model, distclip.global_norm(1.0), comm=ProcessGroupComm(group))
        if dist.get_rank() == 1:
            with pytest.raises(DisagreementError, match=r"Rank 0 waits in GradClipper\.clip"):
                distclip.audit(model, patience=0.05)
        else:
            with pytest.raises(PeerError, match=r"Rank 1 made audit \(test_waiting.py"):
                clipper.clip()
    assert gather_from_ranks(clipper.steps) == [0, 0]
