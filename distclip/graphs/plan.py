"""List what a graph needs from a clipper, and the reasons why a step of the clipper cannot be a graph."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..comm import ProcessGroupComm
from ..devices import Fact, accumulation_dtype, is_fake, move
from ..engine import Engine
from ..norms.reduce import Totals
from ..policies import NormPolicy
from ..policies.value import Value
from ..sharding.dtensor import local_of

__all__ = ["GraphPlan"]


class GraphPlan:
    """Facts about a clipper that are the same in every step, for the code that a graph is traced from.

    Args:
        engine: of the clipper.

    Attributes:
        counts: numbers of steps, skipped steps, and steps skipped in a row, that graphs have made and the host has not
            read yet.
        has_run: whether a graph may have made steps since `take_counts`.
    """

    def __init__(self, engine: Engine) -> None:
        table, spec = engine.table, engine.spec
        infos = table.metadata.infos(table.holders)
        self.params, self.names = list(table.tensors), list(table.names)
        self.slots = [info.slot for info in infos]
        self.num_replicas = [float(info.num_replicas) for info in infos]
        self.num_slots = engine.slots.total
        self.norm_type, self.limits, self.magnitudes = spec.norm_type, spec.limits, spec.limits_magnitudes
        self.needs_weights = spec.needs_weights
        self.leaves_step_out = engine.rule.leaves_step_out
        self.size, self.rank, comm = engine.comm.size, engine.comm.rank, engine.comm
        self.group_name = str(comm.group.group_name) if type(comm) is ProcessGroupComm else ""
        self.has_fp64 = any(param.dtype in (torch.float64, torch.complex128) for param in self.params)
        # A fake tensor has a device that this machine may lack.
        local = [local_of(param) for param in self.params[:1]]
        device = local[0].device if local and not is_fake(local[0]) else torch.device("cpu")
        # A graph reads these constants from the device.
        self.slot_index = torch.tensor(self.slots, device=device)
        self.replica_counts = torch.tensor(self.num_replicas, dtype=accumulation_dtype(device), device=device)
        self.excluded: Tensor | None = None
        if any(engine.slots.excluded):
            self.excluded = torch.tensor(engine.slots.excluded_by_slot, dtype=torch.bool, device=device)
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        self.has_run = False
        # These are the facts of an ordinary step.
        self.facts: dict[str, Any] = {one.name: one.default for one in fields(Totals) if type(one.default) is Fact}
        # A graph writes the state in place, so the state must be on the device of the norms.
        if device.type not in ("cpu", "meta"):
            engine.state = {key: move(value, device) for key, value in engine.state.items()}
        self.has_partial_sums = any(info.partial_sums for info in infos)
        self.has_rows = any(info.rows is not None for info in infos)

    def reasons(self, engine: Engine) -> list[str]:
        """Return the reasons why a step of the clipper cannot be a graph. Collectives: none. Host syncs: none."""
        policy: Any = engine.policy
        devices = {param.device for param in self.params}
        found = {
            f'on_nonfinite="{engine.on_nonfinite}" needs the host in the same step: use "skip" or "propagate"': (
                engine.rule.needs_host
            ),
            f'replicas="{engine.replicas}" needs the host in the same step: use "warn" or "off"': (
                self.size > 1 and engine.guard.rule.needs_host
            ),
            "the communicator is not a process group of torch.distributed, whose collectives a graph can contain": (
                self.size > 1 and not self.group_name
            ),
            "the ranks communicate on another device than that of the gradients": (
                self.size > 1 and engine.comm.device is not None and {engine.comm.device.type} != _types(devices)
            ),
            "the parameters are on several devices": len(devices) > 1,
            "this rank has no parameters": not self.params,
            'norms per row (per="row") are not implemented in graphs': self.has_rows,
            "a gradient is annotated as partial, and must be added up first": self.has_partial_sums,
            "the policy is not one of distclip's, and may read numbers on the host": not (
                type(policy) is Value or (type(policy) is NormPolicy and policy.has_own_rule)
            ),
            "gradients are compared with the second moments of optimizers": engine.spec.moment_eps is not None,
            "measure_tensors is on": engine.tensor_norms is not None,
            "observers, such as a Recorder, run on the host": bool(engine.observers),
            "max_skips raises on the host": engine.counter.max_skips is not None,
        }
        return [reason for reason, holds in found.items() if holds]

    def take_counts(self) -> tuple[int, int, int]:
        """Return the steps, the skipped steps and those skipped in a row since the last call.

        Host syncs: one on an accelerator if a graph has run.
        """
        if not self.has_run:
            return 0, 0, 0
        steps, skipped, in_a_row = self.counts.tolist()
        self.counts.zero_()
        self.has_run = False
        return steps, skipped, in_a_row


def _types(devices: set[torch.device]) -> set[str]:
    return {device.type for device in devices}
