"""Bound the root mean square of Adam's updates: update clipping, the rule of StableAdamW and Adafactor.

The coefficients divide the step and not the gradients. Adam divides a gradient by moments that follow it within a few
steps, so that a smaller gradient would leave the step as large as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..norms.reduce import Totals
from ..norms.spec import Per
from .norm_policy import NormPolicy
from .policy import Rule, State
from .validation import POSITIVE, convert_fields

__all__ = ["UpdateRule", "update_clip"]


def update_clip(
    max_rms: float = 1.0,
    eps: float = 1e-8,
    per: Per = "tensor",
    groups: Mapping[str, str] | None = None,
    exclude: str | Sequence[str] = (),
) -> NormPolicy:
    r"""Divide the step of each tensor by how much larger its gradient is than Adam's second moments.

    .. math:: RMS_s = \sqrt{\mathrm{mean}_{i \in s} \frac{g_i^2}{\max(\hat v_i, \varepsilon^2)}}, \qquad
        coef_s = \min\left(1, \frac{max\_rms}{RMS_s}\right)

    The moments are those of this step: the optimizer's own, this gradient, and the correction of the bias. RMS is about
    1 in a steady run. It rises where the moments are too old for the gradients, a few steps before the loss. The
    coefficient multiplies what the optimizer's step adds to the tensor, weight decay included, as if its learning rate
    were smaller. Gradients stay as they are, so that the moments follow them.

    It needs the optimizer: call `clipper.step(optimizer)`, `clipper.attach(optimizer)` or `clipper.clip(optimizer)`. A
    tensor without second moments, in its first step for example, is not clipped. During a step there is a copy of the
    parameters whose steps are divided, on an accelerator of all of them.

    Args:
        max_rms: largest RMS, > 0. The paper has 1, which clips a little at every second step. A larger value clips
            spikes only.
        eps: ε, > 0, least square root of a second moment.
        per: "tensor", "group" or "model": the unit that has one RMS and one coefficient.
        groups: for per="group", see `NormPolicy`.
        exclude: a regular expression that is searched in parameter names, or several. Parameters with a match are not
            clipped.

    Raises:
        ArgumentError: a number outside of its range, or per="row".

    Source: Wortsman et al., "Stable and low-precision training for large-scale vision-language models", NeurIPS 2023,
    arXiv 2304.13013, algorithm 2; Shazeer and Stern, "Adafactor", ICML 2018, arXiv 1804.04235, section 6.

    >>> update_clip().threshold
    UpdateRule(max_rms=1.0, eps=1e-08)
    """
    if per == "row":
        raise ArgumentError('per="row": there is no RMS for a row. Use per="tensor".')
    return NormPolicy(UpdateRule(max_rms, eps), per=per, groups=groups or {}, exclude=exclude)


@dataclass(frozen=True, slots=True)
class UpdateRule(Rule):
    r"""Threshold of `update_clip`, per model, group or tensor.

    .. math:: bound_s = \frac{max\_rms}{RMS_s} \lVert g_s \rVert, \text{ if } RMS_s > max\_rms

    Args:
        max_rms, eps: see `update_clip`.

    Raises:
        ArgumentError: a number outside of its range.

    >>> UpdateRule(2.3)
    UpdateRule(max_rms=2.3, eps=1e-08)
    """

    max_rms: float = 1.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        convert_fields(self, max_rms=POSITIVE, eps=POSITIVE)

    @property
    def moment_eps(self) -> float | None:
        """Least square root of a second moment."""
        return self.eps

    def init(self, slots: int, device: torch.device) -> State:
        """Return an empty state."""
        return {}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """Return the norms at the largest RMS, and inf for a slot without second moments."""
        norms, rms = totals.norms, totals.update_rms
        # Squares that overflow would stay in the moments for good, so that such a gradient becomes 0.
        bounds = (norms * (self.max_rms / rms)).where(rms.isfinite(), 0.0)
        fits = (rms <= self.max_rms) | (totals.update_counts == 0)
        return torch.where(fits, torch.inf, bounds), state
