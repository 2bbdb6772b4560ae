"""Bound the root mean square of Adam's updates: update clipping, the rule of StableAdamW and Adafactor.

The coefficients divide the step and not the gradients. Adam divides a gradient by moments that follow it within a few
steps, so that a smaller gradient would leave the step as large as before.

After a large gradient, its RMS falls faster than the moments become right: the moments are then those of a few steps,
as in the first steps of a training, whose learning rate rises slowly for that reason. So does the coefficient here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..devices import accumulation_dtype
from ..errors import ArgumentError
from ..norms.reduce import Totals
from ..norms.spec import Per
from .norm_policy import NormPolicy
from .policy import Rule, State
from .validation import POSITIVE, Range, convert_fields

__all__ = ["UpdateRule", "update_clip"]

_FINITE = Range(0, exclude=(math.inf,))

HEADROOM = 1.25
"""RMS in units of `max_rms` from which on the coefficient rises slowly afterwards. Ordinary steps stay below it."""


def update_clip(
    max_rms: float = 1.0,
    eps: float = 1e-8,
    per: Per = "tensor",
    groups: Mapping[str, str] | None = None,
    exclude: str | Sequence[str] = (),
    recovery: float = 1.0,
) -> NormPolicy:
    r"""Divide the step of each tensor by how much larger its gradient is than Adam's second moments.

    .. math:: RMS_s = \sqrt{\mathrm{mean}_{i \in s} \frac{g_i^2}{\max(\hat v_i, \varepsilon^2)}}, \qquad
        coef_s = \min\left(1, \frac{max\_rms}{RMS_s}, c_s\right)

    .. math:: c_s \leftarrow \min\left(1, c_s + \frac{1 - \beta_2}{recovery}, 1.25 \frac{max\_rms}{RMS_s}\right)

    The moments are those of this step: the optimizer's own, this gradient, and the correction of the bias. RMS is about
    1 in a steady run. It rises where the moments are too old for the gradients, a few steps before the loss. The
    coefficient multiplies what the optimizer's step adds to the tensor, weight decay included, as if its learning rate
    were smaller. Gradients stay as they are, so that the moments follow them.

    It needs the optimizer: call `clipper.step(optimizer)`, `clipper.attach(optimizer)` or `clipper.clip(optimizer)`. A
    tensor without second moments, in its first step for example, is not clipped. During a step there is a copy of the
    parameters whose steps are divided, on an accelerator of all of them.

    c is 1 as long as no RMS exceeds 1.25 max_rms. After one that does, the coefficient of the tensor rises to 1 in
    1 / (1 − β2) steps at most, a linear warm-up. The published rule has no c: `update_clip(recovery=0)`. Its
    coefficient returns while the moments are those of a few steps, so that each weight still moves by the learning rate
    in each step, and it prevents about half of the spikes (docs/policies.md).

    Args:
        max_rms: largest RMS, > 0. The paper has 1, which clips a little at every second step. A larger value clips
            spikes only.
        eps: ε, > 0, least square root of a second moment.
        per: "tensor", "group" or "model": the unit that has one RMS and one coefficient.
        groups: for per="group", see `NormPolicy`.
        exclude: a regular expression that is searched in parameter names, or several. Parameters with a match are not
            clipped.
        recovery: length of the warm-up after a spike, ≥ 0, in units of 1 / (1 − β2) steps. 0 for none, as published.

    Raises:
        ArgumentError: a number outside of its range, or per="row".

    Source: Wortsman et al., "Stable and low-precision training for large-scale vision-language models", NeurIPS 2023,
    arXiv 2304.13013, algorithm 2; Shazeer and Stern, "Adafactor", ICML 2018, arXiv 1804.04235, section 6.

    >>> update_clip(recovery=0).threshold
    UpdateRule(max_rms=1.0, eps=1e-08, recovery=0.0)
    """
    if per == "row":
        raise ArgumentError('per="row": there is no RMS for a row. Use per="tensor".')
    return NormPolicy(UpdateRule(max_rms, eps, recovery), per=per, groups=groups or {}, exclude=exclude)


@dataclass(frozen=True, slots=True)
class UpdateRule(Rule):
    r"""Threshold of `update_clip`, per model, group or tensor.

    .. math:: bound_s = \frac{max\_rms}{RMS_s} \lVert g_s \rVert, \text{ if } RMS_s > max\_rms

    Its state has `max_coefs` (slots,), the largest coefficients c of the last step.

    Args:
        max_rms, eps, recovery: see `update_clip`.

    Raises:
        ArgumentError: a number outside of its range.

    >>> UpdateRule(2.3)
    UpdateRule(max_rms=2.3, eps=1e-08, recovery=1.0)
    """

    max_rms: float = 1.0
    eps: float = 1e-8
    recovery: float = 1.0

    def __post_init__(self) -> None:
        convert_fields(self, max_rms=POSITIVE, eps=POSITIVE, recovery=_FINITE)

    @property
    def moment_eps(self) -> float | None:
        """Least square root of a second moment."""
        return self.eps

    def init(self, slots: int, device: torch.device) -> State:
        """Return largest coefficients of 1, or an empty state without recovery."""
        if not self.recovery:
            return {}
        return {"max_coefs": torch.ones(slots, dtype=accumulation_dtype(device), device=device)}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """Return the norms at the largest RMS, and inf for a slot without second moments."""
        norms, rms = totals.norms, totals.update_rms
        # Squares that overflow would stay in the moments for good, so that such a gradient becomes 0.
        bounds = (norms * (self.max_rms / rms)).where(rms.isfinite(), 0.0)
        fits = (rms <= self.max_rms) | (totals.update_counts == 0)
        bounds = torch.where(fits, torch.inf, bounds)
        if not self.recovery:
            return bounds, state
        # A slot without second moments has no RMS and no β2, and its coefficient stays as it is.
        is_known = ~totals.update_rate.isnan()
        rise = totals.update_rate.where(is_known, 0.0) / self.recovery
        limits = (HEADROOM * self.max_rms / rms).where(rms.isfinite(), 0.0).where(is_known, 1.0)
        return bounds, {"max_coefs": torch.minimum((state["max_coefs"] + rise).clamp(max=1.0), limits)}

    def ceilings(self, totals: Totals, state: State) -> Tensor | None:
        """Return the largest coefficients of this step."""
        return state.get("max_coefs")

    def mask_valid(self, state: State) -> dict[str, Tensor]:
        """Return masks of the coefficients in [0, 1], see `Rule.mask_valid`."""
        return {key: (value >= 0) & (value <= 1) for key, value in state.items()}
