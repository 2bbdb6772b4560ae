r"""Compare gradients with Adam's second moments, which gives early warning of spikes of the loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..clipper import GradClipper
from ..comm.consensus import FirstError, gather_or_raise
from ..errors import ArgumentError, short_repr
from ..norms.measure import measure
from ..norms.moments import debias, find_moments
from ..norms.reduce import reduce
from ..norms.spec import NormSpec
from ..sharding.shard import Shards

__all__ = ["UpdateRms"]


class UpdateRms:
    r"""Measures how much larger the squared gradients are than Adam's second moments, in any layout.

    .. math:: RMS = \sqrt{\mathrm{mean}\left(\frac{g^2}{\hat v}\right)}

    It is about 1 in a steady run. If it is much larger, Adam's second moments are too old for the gradients, and the
    updates are too large. Wortsman et al. found RMS above 2.3 a few steps before spikes of the loss. A remedy is a
    lower beta2, or a bound on the norm.

    Args:
        clipper: clipper of the parameters. If it measures tensors (`GradClipper.measure_tensors`), there is an RMS per
            tensor. Otherwise there is one for each slot of its policy.
        optimizer: Adam, AdamW, or another optimizer whose state has `exp_avg_sq`, such as Adafactor without factors.

    Raises:
        ArgumentError: an argument is invalid.

    Source: Wortsman et al., "Stable and low-precision training for large-scale vision-language models", NeurIPS 2023,
    arXiv 2304.13013, which divides the learning rate by max(1, RMS).

    >>> import distclip
    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> clipper = distclip.GradClipper([("weight", weight)], distclip.global_norm(1e3))
    >>> optimizer = torch.optim.AdamW([weight], betas=(0.9, 0.99))
    >>> update = UpdateRms(clipper, optimizer)
    >>> for size in (1.0, 1.0, 10.0):
    ...     weight.grad = size * torch.ones(2)
    ...     update.measure()  # after backward, before the step
    ...     report = clipper.step(optimizer)
    >>> round(float(update.rms), 3)  # without a host sync: recorder.note(update_rms=update.rms)
    10.0
    """

    def __init__(self, clipper: GradClipper, optimizer: Optimizer) -> None:
        if not isinstance(clipper, GradClipper):
            raise ArgumentError(f"clipper={short_repr(clipper)}: not a GradClipper. Pass that of the parameters.")
        if not isinstance(optimizer, Optimizer):
            raise ArgumentError(f"optimizer={short_repr(optimizer)}: not a torch.optim.Optimizer. Pass the optimizer.")
        self.rms: Tensor = torch.tensor(torch.nan, dtype=torch.float64)
        """0-d float64 RMS over all elements with a second moment. NaN before there are second moments."""
        self.by_name: dict[str, Tensor] = {}
        """0-d float64 RMS by tensor, or by slot of the policy. NaN for one without second moments."""
        self._clipper, self._optimizer = clipper, optimizer

    @torch.no_grad()
    def measure(self, grad_scale: float | Tensor = 1.0) -> None:
        """Measure the gradients that exist now, before the optimizer's step.

        Args:
            grad_scale: factor that the gradients carry, such as that of a GradScaler.

        Raises:
            ArgumentError: the optimizer has no second moments, and will have none after its first step. Every rank
                raises it.

        Collectives: call it on every rank. It has one gather, and one all-reduce of 2 · slots + 1 float64 numbers.
        Host syncs: none.
        """
        errors, table = FirstError(), self._clipper.table
        ratios = ones = Shards.of(())
        with errors:
            shards, tensors = table.gradients(), table.tensors_with_gradient()
            moments = find_moments([self._optimizer], is_alone=self._clipper.comm.size == 1)
            pairs = []
            for info, grad, tensor in zip(shards.infos, shards.grads, tensors, strict=True):
                second, beta, step = moments.get(id(tensor), (None, 0.0, None))
                if second is not None and second.shape == grad.shape:
                    moment = second if step is None else second / debias(beta, step, second.device)
                    # If both are zero, the parameter does not move, so the ratio is zero.
                    scaled = (grad.float() / grad_scale) / moment.float().sqrt().clamp(min=1e-30)
                    pairs.append((info, torch.where(grad == 0, 0.0, scaled)))
            infos = type(shards.infos)(info for info, _ in pairs)
            ratios = Shards(infos, [ratio for _, ratio in pairs])
            ones = Shards(infos, [torch.ones_like(ratio) for _, ratio in pairs])
        gather_or_raise(self._clipper.comm, errors.error, None)
        spec, device = NormSpec(needs_weights=True), ratios.grads[0].device if ratios.grads else torch.device("cpu")
        # The numbers of elements are measured like weights, so that shards and replicas count once.
        partials = measure(ratios, spec, device, self._clipper.measured_slots, ones)
        totals = reduce(partials, spec, self._clipper.comm, read_facts=False)
        squares, counts = totals.norms.square(), totals.weight_norms.square()
        self.rms = (squares.sum() / counts.sum()).sqrt()
        by_slot = (squares / counts).sqrt()
        names = self._clipper.tensors or self._clipper.slots
        self.by_name = dict(zip(names, by_slot, strict=True)) if len(names) == len(by_slot) else {}
