"""The end of a gloo process waits for threads that still hold a tensor of distclip (pytorch #190489)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from distclip.comm import ProcessGroupComm
from distclip.comm.process_group import await_gloo
from tests.ranks import on_ranks


class Sent:
    """A tensor that a thread of gloo holds for a while."""

    def __init__(self, num_looks: float) -> None:
        self.num_looks = num_looks

    def _use_count(self) -> int:
        self.num_looks -= 1
        return 1 if self.num_looks < 0 else 4


@on_ranks(2)
@pytest.mark.parametrize("num_looks", [0, 5, float("inf")])
def test_waits_for_the_last_tensor(num_looks: float) -> None:
    assert dist.group.WORLD is not None
    comm = ProcessGroupComm(dist.group.WORLD)
    comm.sum_(tensor := torch.ones(3))
    assert comm.sent is tensor
    sent: Any = Sent(num_looks)
    comm.sent = sent
    await_gloo()
    assert (sent.num_looks < 0) == (num_looks < float("inf"))
    comm.gather_objects(1)
    assert comm.sent is None
