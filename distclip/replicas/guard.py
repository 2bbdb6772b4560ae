"""Guard the replicas of one table: what a step compares, and what happens if some replica differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..comm import Comm
from ..comm.ranks import Ranks
from ..norms.per_tensor import PerTensorChecksums
from ..norms.replica_sums import ReplicaSums
from ..sharding.shard import Shards
from ..sharding.table import ShardTable
from .compare import Kind
from .describe import describe_checksums, describe_replicas, gather_differences
from .incidents import ReplicaLog, check_contradiction
from .repair import repair_
from .rules import ReplicaRule
from .scrubber import Scrubber

__all__ = ["ReplicaGuard", "Resolution"]


class Resolution(NamedTuple):
    """Result of resolving a step whose checksums differ.

    Args:
        differ: whether replicas differ by more than rounding errors.
        repaired: whether gradients have been repaired, so that they must be measured again.
    """

    differ: bool
    repaired: bool


class ReplicaGuard:
    """Compares the replicas of a table in every step.

    Args:
        table: of this rank.
        rule: what happens if replicas differ.
        log: records the steps in which they do.
        rounded: replica groups that an earlier call has found to differ by rounding errors; the same on every rank.
        at_once: whether differing replicas must be resolved within the call or not at all. Parameters are not compared
            then.
        reads_now: whether the host must read in this call whether replicas differ; the same on every rank.
    """

    def __init__(
        self,
        table: ShardTable,
        rule: ReplicaRule,
        log: ReplicaLog,
        rounded: frozenset[Ranks] = frozenset(),
        *,
        at_once: bool = False,
        reads_now: bool = False,
    ) -> None:
        self.rule, self.log, self.rounded, self.reads_now = rule, log, rounded, reads_now
        self.at_once = at_once
        self._table = table
        self._scrubber = None if at_once else Scrubber(table)

    def parameter_sums(self, step: int) -> ReplicaSums:
        """Return the checksums of the parameters that a step compares. Collectives: none. Host syncs: none."""
        return {} if self._scrubber is None else self._scrubber.sums(step, self.rounded)

    def resolve(self, step: int, gradients: Shards, comm: Comm) -> Resolution:
        """Find the replicas that differ, and apply the rule.

        Args:
            step: 1-based index of the clipper call.
            gradients: of this rank, as they were measured.
            comm: all ranks concerned, all of which call this function.

        Returns:
            What has been found and done, the same on every rank.

        Raises:
            ReplicaError: see `ReplicaRule`; on every rank.
            LayoutError: placements and `split_over=` contradict each other; on every rank.

        Collectives: one gather over `comm`, and for a repair one all-reduce for every 4 MB of a replica.
        Host syncs: on an accelerator two.
        """
        comparison = gather_differences(describe_replicas(self._table, gradients), comm)
        self.rounded |= comparison.rounded
        check_contradiction(comparison.differences)
        if not comparison.differences or not self.rule.resolve(step, comparison.differences, self.log):
            return Resolution(bool(comparison.differences), False)

        def find(kind: Kind, name: str) -> Tensor:
            if kind == "parameter":
                return self._table.local_weights([self._table.names.index(name)])[0]
            return gradients.grads[gradients.infos.names.index(name)]

        repair_(comparison.differences, find, comm)
        return Resolution(True, any(difference.kind == "gradient" for difference in comparison.differences))

    def resolve_late(self, step: int, checksums: Sequence[PerTensorChecksums], comm: Comm) -> None:
        """Find the replicas that differed in the step before, whose gradients may be gone, and warn.

        Args:
            step: 1-based index of that step.
            checksums: of its gradients.
            comm: all ranks concerned, all of which call this function.

        Collectives: one gather over `comm`. Host syncs: on an accelerator two.
        """
        comparison = gather_differences(describe_checksums(self._table, checksums), comm)
        self.rounded |= comparison.rounded
        if comparison.differences:
            self.log.warn(step, comparison.differences)
