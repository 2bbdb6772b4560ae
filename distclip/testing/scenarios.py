"""Declare the actions of the ranks in an explored world: calls of distclip, with one or two deviating ranks.

A scenario is plain data that follows from a seed. `make_calls` makes its calls on one rank.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .. import GradClipper, clip_grad_norm_, global_norm
from ..errors import DistclipError
from .faults import Fault, InjectedFault

__all__ = [
    "CALLS",
    "CONDITIONS",
    "LAYOUTS",
    "Condition",
    "Scenario",
    "Verdict",
    "make_calls",
    "meshes_of",
    "random_scenario",
]

CALLS = ("function", "clipper", "scaler")
"""Calls: `clip_grad_norm_`, `clip` of a new `GradClipper`, and `step` of a new one with a `GradScaler`."""

LAYOUTS = ("stages", "shards", "halves")
"""Layouts: a plain tensor on each rank of a `split_over` axis, shards on one mesh, and shards on two meshes."""

CONDITIONS = (
    "late",
    "raises before measuring",
    "raises while measuring",
    "no gradients",
    "different arguments",
    "different split_over",
    "wider mesh",
    "wider mesh on all ranks",
    "Partial gradients",
    "NaN",
    "dies",
)
"""Conditions of a rank in one call."""


@dataclass(frozen=True, slots=True)
class Condition:
    """Condition of one rank.

    Args:
        name: one of `CONDITIONS`.
        rank: the rank.
        call: index of the call.
        at: seconds by which the rank is late, or number of messages after which it dies.
    """

    name: str
    rank: int
    call: int = 0
    at: float = 1.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """Calls of a world.

    Args:
        num_ranks: size of the world.
        calls: (call, layout) pairs, in order.
        conditions: conditions of the ranks that deviate.
    """

    num_ranks: int
    calls: tuple[tuple[str, str], ...]
    conditions: tuple[Condition, ...] = ()

    def has(self, name: str, rank: int, call: int) -> bool:
        """Return whether a rank has a condition in a call."""
        return any((one.name, one.rank, one.call) == (name, rank, call) for one in self.conditions)

    def faults_of(self, rank: int) -> list[Fault]:
        """Return the faults of a rank within distclip."""
        faults = []
        for one in self.conditions:
            stage = {"raises before measuring": "shards", "raises while measuring": "measure"}.get(one.name)
            if one.rank == rank and stage is not None:
                # Every call reaches the stage once, unless the ranks have different conditions.
                faults.append(Fault(rank, stage, one.call + 1, InjectedFault(one.name)))
        return faults

    def delay_of(self, rank: int) -> float:
        """Return the seconds by which a rank starts late."""
        return max((one.at for one in self.conditions if (one.name, one.rank) == ("late", rank)), default=0.0)

    def death_of(self, rank: int) -> int | None:
        """Return the number of messages after which a rank dies, or None."""
        return next((int(one.at) for one in self.conditions if (one.name, one.rank) == ("dies", rank)), None)

    def is_wide(self, rank: int, call: int) -> bool:
        """Return whether a rank has a parameter on a mesh of all ranks, in addition to its other one."""
        return self.has("wider mesh", rank, call) or self._all_are_wide(call)

    def components(self, call: int) -> list[set[int]]:
        """Return the ranks that must reach the same verdict in a call."""
        everybody, half = set(range(self.num_ranks)), self.num_ranks // 2
        # A wider mesh on a single rank is a mistake that the ranks of the narrower mesh detect.
        is_whole = self.calls[call][1] != "halves" or self._all_are_wide(call)
        return [everybody] if is_whole else [{*range(half)}, {*range(half, self.num_ranks)}]

    def _all_are_wide(self, call: int) -> bool:
        return any((one.name, one.call) == ("wider mesh on all ranks", call) for one in self.conditions)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of one call on one rank.

    Args:
        outcome: "failed", or norm, factor and skip of the step.
        wrote: whether a gradient or a parameter has changed.
        error: the exception, for messages.
        is_expected: whether it is an error of distclip, or a fault of the scenario.
    """

    outcome: str
    wrote: bool
    error: str = ""
    is_expected: bool = True


def random_scenario(seed: int, num_ranks: int) -> Scenario:
    """Generate a scenario: one to three calls, and up to two conditions.

    >>> random_scenario(1, 8) == random_scenario(1, 8)
    True
    """
    rng = random.Random(f"{seed}/{num_ranks}")
    calls = tuple((rng.choice(CALLS), rng.choice(LAYOUTS)) for _ in range(rng.choice((1, 2, 2, 3))))
    conditions: list[Condition] = []
    for _ in range(rng.choice((0, 1, 1, 2))):
        name, call = rng.choice(CONDITIONS), rng.randrange(len(calls))
        if name == "wider mesh":
            # The other ranks of the wider mesh would match their next call with this one.
            call, conditions = len(calls) - 1, [one for one in conditions if one.name != name]
        at = float(rng.randrange(40)) if name == "dies" else rng.choice((0.5, 5.0, 100.0))
        conditions.append(Condition(name, rng.randrange(num_ranks), call, at))
    return Scenario(num_ranks, calls, tuple(conditions))


def meshes_of(num_ranks: int) -> dict[str, Any]:
    """Make the meshes of the layouts, on every rank."""
    rank, half = dist.get_rank(), num_ranks // 2
    mine = range(half) if rank < half else range(half, num_ranks)
    return {
        "all": DeviceMesh("cpu", list(range(num_ranks)), mesh_dim_names=("dp",)),
        "half": DeviceMesh("cpu", list(mine), mesh_dim_names=("half",)),
    }


def make_calls(scenario: Scenario, meshes: dict[str, Any]) -> list[Verdict]:
    """Make the calls of a scenario on this rank, until one of them fails."""
    verdicts: list[Verdict] = []
    for i in range(len(scenario.calls)):
        verdicts.append(_make_call(scenario, i, meshes))
        if verdicts[-1].outcome == "failed":
            break
    return verdicts


def _make_call(scenario: Scenario, i: int, meshes: dict[str, Any]) -> Verdict:
    rank, (call, layout) = dist.get_rank(), scenario.calls[i]

    def has(name: str) -> bool:
        return scenario.has(name, rank, i)

    split_over = meshes["all"] if layout == "stages" else None
    if has("different split_over"):
        # None would not do: a rank that passes neither a mesh nor an axis is alone, and no other rank can detect it.
        split_over = {"other": meshes["all"]}
    params = [
        ("w", _param(rank, i, None if layout == "stages" else meshes["all" if layout == "shards" else "half"], has))
    ]
    if scenario.is_wide(rank, i):
        params.append(("x", _param(rank, i, meshes["all"], lambda name: False)))
    before = [_bits(param) for _, param in params]
    bound = 0.25 if has("different arguments") else 0.5
    run: Callable[..., str] = {"function": _function, "clipper": _clipper, "scaler": _scaler}[call]
    outcome, text, is_expected = "failed", "", True
    try:
        outcome = run(params, bound, split_over)
    except (DistclipError, InjectedFault) as error:
        text = f"{type(error).__name__}: {error}"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        # Torch raises if a peer has died while a process group is made, or during a gather.
        is_expected = any(one.name == "dies" for one in scenario.conditions)
    return Verdict(outcome, [_bits(param) for _, param in params] != before, text, is_expected)


def _function(params: Any, bound: float, split_over: Any) -> str:
    norm = clip_grad_norm_(params, bound, split_over=split_over)
    return f"{float(norm).hex()} {bound}"


def _clipper(params: Any, bound: float, split_over: Any) -> str:
    report = GradClipper(params, global_norm(bound), split_over=split_over).clip()
    return f"{float(report.norm).hex()} {float(report.coef).hex()} {bool(report.skipped)}"


def _scaler(params: Any, bound: float, split_over: Any) -> str:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    optimizer = torch.optim.SGD([param for _, param in params], lr=1.0, foreach=False)
    report = GradClipper(params, global_norm(bound), split_over=split_over).step(optimizer, scaler)
    scaler.update()
    return f"{float(report.norm).hex()} {float(report.coef).hex()} {bool(report.skipped)} {scaler.get_scale()}"


def _param(rank: int, i: int, mesh: DeviceMesh | None, has: Callable[[str], bool]) -> nn.Parameter:
    """Make a parameter with a gradient of two elements on each rank."""
    grad = torch.tensor([1.0 + rank + i, float("nan") if has("NaN") else 2.0])
    if mesh is None:
        param = nn.Parameter(torch.zeros(2))
        param.grad = grad
    else:
        size, is_partial = mesh.size(), has("Partial gradients")
        shape = torch.Size([2 * size])

        def on_mesh(local: torch.Tensor, placement: Any, shape: torch.Size) -> DTensor:
            return DTensor.from_local(local, mesh, [placement], run_check=False, shape=shape, stride=(1,))

        whole = torch.Size([2]) if is_partial else shape
        param = nn.Parameter(on_mesh(torch.zeros(2), Replicate() if is_partial else Shard(0), whole))
        param.grad = on_mesh(grad, Partial() if is_partial else Shard(0), whole)
    if has("no gradients"):
        param.grad = None
    return param


def _bits(param: nn.Parameter) -> bytes:
    parts = [part for part in (param, param.grad) if part is not None]
    return b"".join((p._local_tensor if isinstance(p, DTensor) else p).detach().numpy().tobytes() for p in parts)
