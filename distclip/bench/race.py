"""Run one case in one process or on one rank: try each competitor, count its costs, time it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UnclippedStepWarning
from .competitors import Competitor, Setup
from .counters import count
from .results import Standing
from .timing import time_interleaved

__all__ = ["Options", "race"]


@dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Args:
        device: "cpu" or "cuda".
        rounds: number of timed calls of each competitor.
        seed: seed of the gradients and of the order of competitors.
        world: number of ranks of the sharded cases. None for the default.
        threads: torch threads in each process. None for the default.
        against: other libraries to include, see `competitors.OTHERS`.
        scale: scale of the models, below 1 for tests.
    """

    device: str = "cpu"
    rounds: int = 15
    seed: int = 0
    world: int | None = None
    threads: int | None = None
    against: tuple[str, ...] = ()
    scale: float = 1.0


def race(
    setup: Setup,
    options: Options,
    advance: Callable[[], object],
    barrier: Callable[[], object] = lambda: None,
    share_error: Callable[[str | None], str | None] = lambda error: error,
) -> list[Standing]:
    """Count the costs of each competitor, and time those that do not fail.

    Args:
        setup: the gradients and the competitors.
        options: options of the benchmark.
        advance: called after each round.
        barrier: called before each timed call.
        share_error: function that takes the error of this rank, and returns the first error of all ranks.

    Returns:
        The standings, in the order of competitors.
    """
    errors = {competitor.name: share_error(_try(competitor)) for competitor in setup.competitors}
    working = [competitor for competitor in setup.competitors if errors[competitor.name] is None]
    counts = {competitor.name: count(setup, competitor) for competitor in working}
    device = setup.grads()[0].device
    samples = time_interleaved(working, options.rounds, options.seed, device, barrier, advance)
    return [
        Standing(one.name, one.own, samples.get(one.name, []), counts.get(one.name), errors[one.name])
        for one in setup.competitors
    ]


def _try(competitor: Competitor) -> str | None:
    """Call a competitor once, untimed. Return its error, which excludes it from the case."""
    competitor.prepare()
    try:
        with warnings.catch_warnings():
            # Competitors step the same gradients in turn, which causes this warning once.
            warnings.simplefilter("ignore", UnclippedStepWarning)
            competitor.call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None
