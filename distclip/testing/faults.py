"""Declare the stages of a call at which a simulated rank can fail, and the faults of a world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .. import functional
from ..apply.optimizers import OptimizerSteps
from ..engine import calls, execution, measuring, setup
from ..errors import ArgumentError
from ..policies import NormPolicy, Value, checked

__all__ = ["STAGES", "Fault", "InjectedFault", "check_stage", "stage_functions"]

_FUNCTIONS: dict[str, tuple[tuple[ModuleType | type, str], ...]] = {
    "table": (
        (setup, "parameter_table"),
        (functional, "cached_table"),
        (functional, "gradient_table"),
    ),
    "rendezvous": ((setup, "resolve_comm"), (functional, "resolve_comm")),
    "gather": ((setup, "exchange_setup"),),
    "shards": ((measuring, "read_gradients"),),
    "measure": ((measuring, "measure"),),
    "all_reduce": ((calls, "reduce"), (measuring, "start_reduce")),
    "decide": (
        (NormPolicy, "decide"),
        (Value, "decide"),
        (checked._CheckedPolicy, "decide"),
        (functional, "coefficient"),
    ),
    "write": ((execution, "scale_"), (functional, "scale_")),
    "step": ((OptimizerSteps, "advance"),),
}

STAGES = tuple(_FUNCTIONS)
"""Names of the stages of `distclip.engine`, in the order of a step.

"table" lists the tensors and their layouts, "rendezvous" finds the ranks, "gather" compares arguments when a clipper is
made, "shards" reads the gradients, "measure" sums their powers, "all_reduce" adds them up over ranks, "decide" asks the
policy, "write" scales the gradients, and "step" runs the optimizer.
"""


class InjectedFault(RuntimeError):
    """The exception that `World.fail` raises on a rank."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of one rank.

    Args:
        rank: the rank.
        stage: stage at whose beginning the fault happens.
        call: 1-based index among the times that the rank reaches the stage.
        error: exception to raise. None kills the rank.
    """

    rank: int
    stage: str
    call: int
    error: BaseException | None


def check_stage(at: str) -> str:
    """Return the name of a stage.

    Raises:
        ArgumentError: there is no such stage.
    """
    if at not in STAGES:
        raise ArgumentError(f"at={at!r}: no stage of a step. Use one of {', '.join(STAGES)}.")
    return at


def stage_functions() -> list[tuple[str, ModuleType | type, str, Callable[..., Any]]]:
    """Return the functions at which the stages begin: (stage, owner, attribute, function)."""
    return [(stage, owner, name, vars(owner)[name]) for stage, at in _FUNCTIONS.items() for owner, name in at]
