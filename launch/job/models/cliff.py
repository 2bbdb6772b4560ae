"""Build the problem of Pascanu, Mikolov, Bengio 2013, figure 6: a one-unit network whose loss has a cliff.

The network computes x <- w * sigmoid(x) + b fifty times from x = 0.5. The loss is (sigmoid(x) - 0.7)^2. Every row of
the one parameter holds the (w, b) of an independent problem, and `clip.per=row` clips each problem separately.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..data import Batch, Data

UNROLLED_STEPS = 50
TARGET = 0.7


def output(starts: Tensor) -> Tensor:
    """Return the network's output for each (w, b) in the last dim of `starts`."""
    w, b = starts.unbind(-1)
    x = torch.full_like(w, 0.5)
    for _ in range(UNROLLED_STEPS):
        x = w * torch.sigmoid(x) + b
    return torch.sigmoid(x)


def sum_of_squared_errors(out: Tensor, target: Tensor) -> Tensor:
    """Return the summed loss of all problems."""
    # A mean would make the gradient of one problem depend on the number of problems.
    return (out - target.mean()).square().sum()


def target_data(batch: int) -> Data:
    """Return the target as data. Its values do not depend on the batch size."""
    target = Batch(torch.zeros(batch, 1), torch.full((batch, 1), TARGET), False, torch.zeros(1, dtype=torch.int64))

    def passes(seed: int) -> Iterator[Batch]:
        while True:
            yield target

    return Data(passes, [target], sum_of_squared_errors, 1, math.nan, "samples", None, 1)


class Cliff(nn.Module):
    """Independent one-unit networks, one per row of `starts`."""

    def __init__(self, starts: Tensor) -> None:
        super().__init__()
        self.starts = nn.Parameter(starts)

    def forward(self, x: Tensor) -> Tensor:
        return output(self.starts)


def cliff(data: Data, starts: int, w: Sequence[float], b: Sequence[float]) -> nn.Sequential:
    """Draw `starts` networks uniformly from the ranges of w and b."""
    if data.criterion is not sum_of_squared_errors:
        raise SystemExit("model=cliff: needs data=cliff, its target. Use model=cliff data=cliff")
    low, high = (torch.tensor(ends, dtype=torch.float64) for ends in zip(w, b, strict=True))
    return nn.Sequential(Cliff(low + (high - low) * torch.rand(starts, 2, dtype=torch.float64)))
