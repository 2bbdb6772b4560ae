"""Add up what all ranks have measured: Partials -> Totals, by one all-reduce over all ranks concerned.

In addition to the power sums, the all-reduce shows whether all ranks make the same call in the same situation. If they
do not, all ranks read this from the result, and gather the reasons (`gather_facts`): a rank has failed, has other
arguments, or has partial gradients. So no rank decides alone whether another collective follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import devices
from ..comm import Comm, global_ranks
from ..comm.agreement import disagreement
from ..comm.consensus import raise_gathered, wire_of
from ..devices import ALWAYS, NEVER, Fact, as_fact
from ..errors import LayoutError, PeerError
from .kernels.torch_ops import combine
from .lazy import lazy
from .measure import Partials
from .message import FIELDS, facts_anywhere, maximum, own_counts, own_facts, own_vectors, start_all_reduce
from .replica_sums import any_differ, to_host
from .spec import NormSpec
from .watch import NO_WATCHED_TOTALS, WatchedTotals

__all__ = ["Totals", "gather_facts", "reduce", "root", "start_reduce"]


_MAX_FLOAT32 = torch.finfo(torch.float32).max


# Not frozen, because one is created in every step, which takes three times as long for a frozen dataclass.
@dataclass(eq=False)
class Totals:
    """The sums over all ranks, the same bits on each.

    Args:
        powers: (slots,) float64, Σ|g|^p of the whole gradient of each slot, or its max|g| (−min|g| for p = −inf).
        norm_type: p.
        weight_powers: (slots,) float64, the same for the parameters. None unless the policy needs it.
        update_powers: (slots,), Σ g² / max(v, ε²) with Adam's second moments v, for `update_rms`. None unless the
            policy needs it.
        update_counts: (slots,), number of elements with second moments.
        update_rates: (slots,), Σ (1 − β2) over these elements.
        same_call: whether all ranks make the same call in the same situation. On an accelerator the host may not have
            read it yet. If it does not hold, the other facts are those of this rank until `gather_facts`.
        failed: whether some rank has failed, or made another call.
        uncovered: whether some rank has parameters on ranks that the communicator does not reach.
        widens_anew: whether the meshes of some rank outside of the communicator have changed since it was widened last.
        new_layouts: whether some rank has layouts that the ranks have not exchanged, so that a replica may count twice.
        has_partial_grads: whether some rank has partial gradients, which are missing from `powers`.
        has_fp64: whether some gradient is float64.
        out_of_limits: whether some element of the whole gradient is outside of the policy's limits.
        replicas_differ: whether the replicas of a gradient, or of a parameter of this step's part, differ.
        loss_scale: 0-d, factor by which a GradScaler has scaled the gradients. Norms are divided by it. None for 1.
        watch: scalars of the user.
    """

    powers: Tensor
    norm_type: float = 2.0
    weight_powers: Tensor | None = None
    update_powers: Tensor | None = None
    update_counts: Tensor | None = None
    update_rates: Tensor | None = None
    same_call: Fact = ALWAYS
    failed: Fact = NEVER
    uncovered: Fact = NEVER
    widens_anew: Fact = NEVER
    new_layouts: Fact = NEVER
    has_partial_grads: Fact = NEVER
    has_fp64: Fact = NEVER
    out_of_limits: Fact = NEVER
    replicas_differ: Fact = NEVER
    loss_scale: Tensor | None = None
    watch: WatchedTotals = NO_WATCHED_TOTALS

    @lazy
    def norms(self) -> Tensor:
        r"""Norm of each slot, (slots,) float64.

        It is :math:`(\sum |g|^p)^{1/p}`, and for p = 0 the number of non-zero elements.

        >>> Totals(torch.tensor([25.0, 1.0])).norms
        tensor([5., 1.])
        """
        return self._unscaled(root(self.powers, self.norm_type))

    @lazy
    def norm(self) -> Tensor:
        """Norm of the whole gradient, all slots together, 0-d float64."""
        if self.powers.numel() == 1:
            return self.norms[0]
        return self._unscaled(root(self._power, self.norm_type))

    @lazy
    def host_norm(self) -> float | None:
        """Norm of the whole gradient as a number of Python.

        None if there are several slots, or if the host cannot read the number without a sync.
        """
        is_free = self.powers.numel() == 1 and devices.host_reads_free(self.powers.device)
        if not is_free or self.loss_scale is not None or self.failed.host is None:
            return None
        # A Python number takes a fraction of the time of the operators.
        if self.norm_type == 2:
            power = self.powers.item()
            return math.sqrt(power) if power >= 0 else math.nan
        return self.norms.item()

    @lazy
    def _power(self) -> Tensor:
        """Power sum of the whole gradient, all slots together, 0-d."""
        return combine(self.powers, self.norm_type)

    @lazy
    def weight_norms(self) -> Tensor:
        """Norm of each slot's parameters, (slots,) float64, for a policy whose spec has `needs_weights`."""
        if self.weight_powers is None:
            raise AttributeError(
                "weight_norms: the norms of the parameters were not measured. Set needs_weights=True in the policy's "
                "NormSpec, or in the threshold."
            )
        return root(self.weight_powers, self.norm_type)

    @lazy
    def update_rms(self) -> Tensor:
        """Root mean square of g / √v of each slot, (slots,) float64, for a policy whose spec has `moment_eps`.

        NaN for a slot without second moments.
        """
        if self.update_powers is None or self.update_counts is None:
            raise AttributeError(
                "update_rms: the gradients were not compared with second moments. Set moment_eps=1e-8 in the policy's "
                "NormSpec, or call clipper.measure_updates()."
            )
        return (self.update_powers / self.update_counts).sqrt()

    @lazy
    def update_rate(self) -> Tensor:
        """Mean 1 − β2 of each slot, (slots,) float64, for a policy whose spec has `moment_eps`.

        NaN for a slot without second moments.
        """
        if self.update_rates is None or self.update_counts is None:
            raise AttributeError(
                "update_rate: no second moments were read. Set moment_eps=1e-8 in the policy's NormSpec."
            )
        return self.update_rates / self.update_counts

    @lazy
    def finite(self) -> Fact:
        """Fact that every element and every watched scalar is finite, unless a rank has failed.

        This implies that no power sum exceeds float64.
        """
        return self.powers_finite & self.watch.finite

    @lazy
    def powers_finite(self) -> Fact:
        """Fact that every element is finite and no power sum exceeds float64, unless a rank has failed."""
        if self.powers.numel() == 1:
            # Reading one number on the host is faster than comparing it in a tensor.
            is_free = devices.host_reads_free(self.powers.device)
            return as_fact(math.isfinite(self.powers.item())) if is_free else Fact(self.powers.isfinite()[0])
        with devices.on_one_thread(self.powers.numel(), self.powers.device):
            # Checking the sum takes an eighth of the time. A sum that is not finite may only have overflowed.
            if devices.host_reads_free(self.powers.device):
                total = self.powers.sum() if math.isinf(self.norm_type) else self._power
                if math.isfinite(total.item()):
                    return ALWAYS
            return Fact(self.powers.isfinite().all())

    @property
    def needs_attention(self) -> bool:
        """True if the host knows that the ranks are not in one ordinary situation."""
        is_ordinary = self.same_call.host is not False and not (self.failed.host or self.uncovered.host)
        return not is_ordinary or bool(self.new_layouts.host or self.has_partial_grads.host)

    def read(self, fact: Fact) -> bool:
        """Return a fact on the host.

        Args:
            fact: about these totals.

        Raises:
            LayoutError: the totals are on the meta device.
            PeerError: the totals are incomplete because another rank has failed. That rank has raised already.

        Host syncs: on an accelerator one, and another if the answer is no.
        """
        if self._read_first(fact & ~self.failed):
            # The host knows both facts now.
            fact.host = True
            if self.failed.host is None:
                self.failed.host = False
            return True
        if self.failed.read():
            raise PeerError("another rank failed in this call; its own traceback has the reason. No gradient changed.")
        fact.host = False
        return False

    def _read_first(self, fact: Fact) -> bool:
        try:
            return fact.read()
        except RuntimeError:
            if not self.powers.is_meta:
                raise
            raise LayoutError(
                "the gradients are on the meta device, so that no number can be read. Materialize the parameters: "
                'model.to_empty(device=device). For a dry run, use on_nonfinite="propagate", or clip_grad_norm_.'
            ) from None

    def mask_if_failed(self, coefs: Tensor) -> Tensor:
        """Return `coefs`, or ones where a rank has failed, so that no gradient changes. Host syncs: none."""
        return coefs if self.failed.host is False else self.failed.select(torch.ones_like(coefs), coefs)

    def as_user_dtype(self) -> Tensor:
        """Return the total norm in the dtype that the user gets.

        It is float32, or float64 if any gradient is float64 or the norm overflows float32. On an accelerator an
        overflow goes unnoticed, because the host does not read the norm.
        """
        if (number := self.host_norm) is not None:
            is_wide = self.has_fp64.host or _MAX_FLOAT32 < number < math.inf
            return torch.full((), number, dtype=torch.float64 if is_wide else torch.float32, device=self.powers.device)
        norm = self.norm
        if self.failed.host is None:
            # A sum over different calls is not a norm.
            norm = norm.masked_fill(self.failed.on(norm.device), math.nan)
        overflows = devices.host_reads_free(norm.device) and _MAX_FLOAT32 < float(norm) < math.inf
        return norm if self.has_fp64.host or overflows else norm.to(torch.float32)

    def _unscaled(self, norm: Tensor) -> Tensor:
        return norm if self.loss_scale is None else norm / self.loss_scale.to(norm)


def root(power_sum: Tensor, norm_type: float) -> Tensor:
    """Return the p-th root of power sums."""
    if norm_type == -math.inf:
        return -power_sum
    if norm_type in (math.inf, 1.0, 0.0):
        return power_sum
    return power_sum.sqrt() if norm_type == 2 else power_sum.pow(1.0 / norm_type)


def reduce(partials: Partials, spec: NormSpec, comm: Comm, *, read_facts: bool = True) -> Totals:
    """Add up what every rank of the communicator has measured, or take the maximum for p = ±inf.

    Args:
        partials: of this rank.
        spec: the norm that was measured, the same on every rank.
        comm: all ranks concerned.
        read_facts: whether the host reads now whether the ranks make the same call; the same on every rank.

    Returns:
        `Totals`. Where `same_call` does not hold, call `gather_facts` on every rank.

    Collectives: one all-reduce over `comm`, of slots + 1 float64 numbers (slots + 2 on an accelerator), `slots` more
    with the norms of the parameters, one more with limits, and two for each watched scalar (ranks + 1 for a maximum).
    For p = ±inf a second one of 2 · slots. None for a single rank.
    Host syncs: on an accelerator one with `read_facts`, otherwise none.
    """
    return start_reduce(partials, spec, comm, read_facts=read_facts, overlap=False)()


def start_reduce(
    partials: Partials,
    spec: NormSpec,
    comm: Comm,
    *,
    read_facts: bool = True,
    overlap: bool = True,
    is_same_norm: bool = True,
) -> Callable[[], Totals]:
    """Begin `reduce`, and return a function that waits and returns its result.

    Args:
        partials, spec, comm, read_facts: see `reduce`.
        overlap: return before the all-reduce is complete, if the backend can do so.
        is_same_norm: whether all ranks are known to measure the same norm. Otherwise there is a host sync for p = ±inf.
    """
    if comm.size == 1:
        totals = _local_totals(partials, spec, comm)
        return lambda: totals
    if not read_facts:
        # A host may only skip the read if all ranks have the same layouts and dtypes, so this rank's dtypes stand for
        # those of all ranks.
        partials = replace(partials, fp64_anywhere=partials.has_fp64)
    read_message = start_all_reduce(
        partials, spec, comm, on_host=read_facts, overlap=overlap, is_same_norm=is_same_norm
    )

    def finish() -> Totals:
        message = read_message()
        facts, same_call = facts_anywhere(partials), message.checks["call"]
        if not read_facts:
            facts["failed"] = ~same_call
        # A maximum is only taken once the ranks agree.
        fields: dict[str, Any] = {**(message.fields or {"powers": partials.powers}), **message.counts, **facts}
        differ = ~message.checks["replicas"]
        return Totals(
            norm_type=spec.norm_type, same_call=same_call, replicas_differ=differ, watch=message.watch, **fields
        )

    return finish


def _local_totals(partials: Partials, spec: NormSpec, comm: Comm) -> Totals:
    """Return the totals of a single rank."""
    fields: dict[str, Any] = dict(zip(FIELDS, own_vectors(partials), strict=True))
    fields |= {name: as_fact(value) for name, value in own_counts(partials, spec).items()}
    watch = partials.watch.read(partials.watch.write(partials.powers, comm), comm)
    return Totals(norm_type=spec.norm_type, watch=watch, **fields | facts_anywhere(partials))


def gather_facts(totals: Totals, partials: Partials, spec: NormSpec, error: BaseException | None, comm: Comm) -> Totals:
    """Find out why the ranks of a call are not in one ordinary situation.

    Args:
        totals: totals whose `same_call` does not hold. Every rank has read this.
        partials: of this rank.
        spec: the norm that was measured.
        error: error of this rank, or None.
        comm: all ranks concerned, all of which call this function.

    Returns:
        The totals with the facts of all ranks.

    Raises:
        DistclipError: an error of this rank, or of the lowest other rank with one; on every rank.
        DisagreementError: the ranks make different calls; on every rank.

    Collectives: one gather over `comm`, and for p = ±inf the postponed all-reduce of the maximum. Host syncs: none.
    """
    own = own_facts(partials)
    call = partials.call
    sums = to_host(partials.replica_sums)
    gathered = comm.gather_objects((wire_of(error), own, call.counter.count, call.as_dict(), sums))
    wires, facts_by_rank, counts, calls, sums_by_rank = zip(*gathered, strict=True)
    # An interrupted call may have left this rank behind. From here on all ranks count together again.
    call.counter.count = max(counts)
    if any(wire is not None for wire in wires):
        raise_gathered(error, wires, comm)
    if (different := disagreement(calls, comm)) is not None:
        raise different
    found: dict[str, Any] = {name: as_fact(any(facts[name] for facts in facts_by_rank)) for name in own}
    found["replicas_differ"] = as_fact(any_differ(dict(zip(global_ranks(comm), sums_by_rank, strict=True))))
    if math.isinf(spec.norm_type):
        found |= maximum(partials, spec, comm)
    return replace(totals, **found)
