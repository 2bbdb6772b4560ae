"""The end of a gloo process waits for threads that still hold a tensor of distclip (pytorch #190489)."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from distclip.comm import ProcessGroupComm, process_group
from distclip.comm.process_group import await_gloo
from tests.ranks import on_ranks


class Sent:
    """A tensor that a thread of gloo holds for a while."""

    def __init__(self, num_looks: float) -> None:
        self.num_looks = num_looks

    def _use_count(self) -> int:
        self.num_looks -= 1
        return 1 if self.num_looks < 0 else 4


class Clock:
    """A clock that only sleeping advances, so that the load of the machine is no matter."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@on_ranks(2)
@pytest.mark.parametrize("num_looks", [0, 5, float("inf")])
def test_waits_for_the_last_tensor(num_looks: float) -> None:
    assert dist.group.WORLD is not None
    comm = ProcessGroupComm(dist.group.WORLD)
    comm.sum_(tensor := torch.ones(3))
    assert comm.sent is tensor
    sent: Any = Sent(num_looks)
    comm.sent = sent
    with patch.object(process_group, "time", Clock()), patch.object(process_group, "_used", [comm]):
        await_gloo()
    assert (sent.num_looks < 0) == (num_looks < float("inf"))
    comm.gather_objects(1)
    assert comm.sent is None
