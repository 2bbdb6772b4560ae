"""Audit a model on all ranks: `audit`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ..apply.grad_scaler import parameters_of
from ..apply.optimizers import as_list
from ..clipper import GradClipper
from ..comm import Comm, global_ranks
from ..comm.consensus import FirstError
from ..comm.discovery import check_covered, global_rank, is_dry_run
from ..comm.ranks import Axis, Ranks
from ..comm.roll_call import call_roll, components
from ..devices import outside_fake_mode
from ..sharding.parameters import Parameters
from ..sharding.split_over import SplitOver, split_axes
from ..sharding.table import ShardTable, parameter_table
from .checks import check_arguments, check_counts, check_memory, check_names, check_optimizers
from .comparison import compare_values
from .facts import Facts, read_facts
from .instances import find_instances
from .problem import Findings
from .report import Audit, make_report

__all__ = ["audit"]


@outside_fake_mode
@torch.no_grad()
def audit(
    model: Parameters | GradClipper,
    *,
    split_over: SplitOver = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    comm: Comm | None = None,
    patience: float = 20.0,
) -> Audit:
    """Check how a model is spread over ranks: which parts count, how often, and what steps them.

    Call it for every new layout, before training, on every rank, and with the arguments of the clipper. It measures a
    probe gradient of integers with the kernels of the norm, so that all sums are exact, and compares checksums of the
    values. The model, its gradients and the random number generators are not changed.

    Args:
        model: see `clip_grad_norm_`, or a `GradClipper`, whose parameters and arguments are used.
        split_over: see `clip_grad_norm_`.
        optimizer: the optimizer of the model, or several. None to skip the check of optimizers.
        comm: see `clip_grad_norm_`. Without it, all ranks of torch.distributed are compared.
        patience: seconds to wait for ranks that share no mesh and no axis with this one.

    Returns:
        A table that prints, the same on every rank, with `problems`, `notes`, `ok`, `as_dict()` and
        `raise_if_wrong()`.

    Raises:
        DisagreementError: a rank that shares a mesh or an axis with this one did not call within the timeout of the
            process group, or is waiting for this rank in another call. That other call then raises PeerError.

    Collectives: one gather. Without `comm`, ranks find each other through the store of torch.distributed first.
    Host syncs: a few per parameter.

    >>> model = torch.nn.Linear(3, 2)
    >>> report = audit(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    >>> report.ok, report.problems
    (True, ())
    >>> report.as_dict()["parameters"][0]["name"], report.as_dict()["parameters"][0]["shape"]
    ('weight', [2, 3])
    """
    errors, all_train = FirstError(), False
    axes: tuple[Axis, ...] = ()
    table, module, stepped = ShardTable.empty(), None, None
    if isinstance(model, GradClipper):
        table, axes = model.table, model.table.axes
        # An integration can have passed the partitions of an optimizer, which require no gradient.
        all_train = not any(tensor.requires_grad for tensor in table.tensors)
        if comm is None and not (model.comm.covers_holders or is_dry_run()) and model.comm.size > 1:
            comm = model.comm
    else:
        module = model if isinstance(model, nn.Module) else None
        with errors:
            axes = split_axes(split_over, comm)
        with errors:
            table = parameter_table(model, axes)
    if comm is not None:
        with errors:
            check_covered(comm, table.groups, axes)
    with errors:
        stepped = None if optimizer is None else parameters_of(as_list(optimizer))
    rank, facts = (0 if comm is None else global_rank(comm)), Facts()
    if comm is None and dist.is_available() and dist.is_initialized():
        rank = dist.get_rank()
    with errors:
        facts = read_facts(table, module, stepped, rank, errors.error, all_train=all_train)
    if facts.error is None and errors.error is not None:
        facts = Facts(axes=axes, error=(type(errors.error).__name__, str(errors.error)))
    by_rank, absent = _gather(facts, comm, patience)
    if errors.error is not None and not isinstance(errors.error, Exception):
        raise errors.error  # An interrupt of this rank, which has kept no other rank waiting.
    return _conclude(by_rank, absent, comm)


def _gather(facts: Facts, comm: Comm | None, patience: float) -> tuple[dict[int, Facts], Ranks]:
    """Return the facts of every rank, and the ranks of the job that did not call."""
    if comm is not None:
        return dict(zip(global_ranks(comm), comm.gather_objects(facts), strict=True)), ()
    if not (dist.is_available() and dist.is_initialized()):
        return {0: facts}, ()
    if is_dry_run():
        rank = dist.get_rank()
        return {rank: facts}, tuple(other for other in range(dist.get_world_size()) if other != rank)
    roster = call_roll(facts.spans, patience)
    return dict(zip(roster.ranks, roster.gather(facts), strict=True)), roster.absent


def _conclude(by_rank: Mapping[int, Facts], absent: Ranks, comm: Comm | None) -> Audit:
    """Find mistakes in the facts of all ranks. No rank communicates."""
    if comm is None:
        component_of = components(by_rank, {rank: facts.spans for rank, facts in by_rank.items()})
    else:
        component_of = dict.fromkeys(by_rank, tuple(by_rank))
    findings = Findings()
    check_arguments(by_rank, component_of, findings)
    check_names(by_rank, findings)
    instances = find_instances(by_rank, component_of)
    if comm is None and is_dry_run():
        # No other rank exists, so no sum over ranks shows which elements count how often.
        findings.note(f"In a dry run only the facts of rank {min(by_rank)} exist, and nothing is compared.")
    elif not findings.problems:
        # Further checks would only repeat that a layout is unknown.
        compare_values(instances, by_rank, component_of, findings)
        check_counts(instances, by_rank, findings)
    check_memory(by_rank, findings)
    check_optimizers(by_rank, findings)
    if absent and not is_dry_run():
        findings.note(f"Ranks {list(absent)} of the job did not call audit, and are not compared.")
    return make_report(instances, by_rank, findings)
