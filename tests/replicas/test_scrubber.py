"""Parts of the parameters that steps compare in turn: together they are all elements, each of them once."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from distclip.extend import Layout, set_layout
from distclip.replicas.scrubber import NUM_PARTS, Scrubber
from distclip.sharding.replicas import replica_group
from distclip.sharding.table import parameter_table


@pytest.mark.parametrize("seed", range(30))
def test_every_element_is_in_one_part(seed: int) -> None:
    generator = random.Random(seed)
    lengths = [generator.choice([0, 1, 2, 5, 63, 64, 65, 1000, 12345]) for _ in range(generator.randrange(1, 40))]
    params = [nn.Parameter(torch.zeros(length)) for length in lengths]
    for param in params:
        set_layout(param, Layout(((0, 1),), replicas=replica_group((0, 1))))
    table = parameter_table(params, ())
    table.world_size = 2
    parts = Scrubber(table)._parts
    read = [0] * len(params)
    for part in parts:
        for i, (start, stop) in part:
            assert start == read[i] < stop
            read[i] = stop
    assert read == lengths
    sizes = [sum(stop - start for _, (start, stop) in part) for part in parts]
    assert len(sizes) == NUM_PARTS
    assert max(sizes) - min(sizes) <= 1
