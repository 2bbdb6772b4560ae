"""One case in one process, or on one rank: try, count, race."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .competitors import Contestant, Setup
from .counters import count
from .results import Standing
from .timing import race

__all__ = ["Options", "contest"]


@dataclass(frozen=True)
class Options:
    """How to measure.

    Args:
        device: "cpu" or "cuda".
        rounds: how often each contestant is timed.
        seed: of the order of contestants.
        world: ranks of the sharded cases; None for the default.
        threads: of torch in each process; None for the default.
        against: other libraries that take part, see `contestants.OTHERS`.
        scale: of the models; below 1 for tests.
    """

    device: str = "cpu"
    rounds: int = 15
    seed: int = 0
    world: int | None = None
    threads: int | None = None
    against: tuple[str, ...] = ()
    scale: float = 1.0


def contest(
    setup: Setup,
    options: Options,
    advance: Callable[[], object],
    meet: Callable[[], object] = lambda: None,
    agree: Callable[[str | None], str | None] = lambda error: error,
) -> list[Standing]:
    """Count what each contestant costs, and time those that work.

    Args:
        setup: the case, in place.
        options: how to measure.
        advance: called after each round.
        meet: a barrier, where there are ranks.
        agree: of what went wrong on this rank, what went wrong on any.

    Returns:
        The standings, in the order of contestants.
    """
    errors = {each.name: agree(_failure(each)) for each in setup.contestants}
    fit = [each for each in setup.contestants if errors[each.name] is None]
    counts = {each.name: count(setup, each) for each in fit}
    device = setup.grads()[0].device
    samples = race(fit, options.rounds, options.seed, device, meet, advance)
    return [
        Standing(each.name, each.own, samples.get(each.name, []), counts.get(each.name), errors[each.name])
        for each in setup.contestants
    ]


def _failure(contestant: Contestant) -> str | None:
    """Call it once, untimed; a library that cannot do the case stays out of it."""
    contestant.prepare()
    try:
        contestant.call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None
