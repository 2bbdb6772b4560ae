"""Bound the root mean square of Adam's updates: update clipping, the rule of StableAdamW and Adafactor.

The coefficients scale the step, not the gradients. Adam divides a gradient by moments that follow it within a few
steps, so a smaller gradient would leave the step as large as before.

The published rule clips every step above 1, which many tensors exceed in most steps of a healthy run. Here a step is
clipped only if its RMS exceeds three times what is usual for its tensor.

If gradients stay large, the RMS falls before the moments are accurate again: they are then averages over a few steps,
as at the beginning of training. The learning rate rises slowly there for that reason, and so does the coefficient here.
If gradients return to their usual size, the coefficient returns to 1 within 20 steps.
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

SPIKE = 3.0
"""Multiple of the usual RMS above which a step is scaled down."""

CALM = 1.5
"""Multiple of the usual RMS up to which the moments count as fitting the gradients again."""

RISE = 0.05
"""Rise of a coefficient per step while the moments fit the gradients."""

RATE = 0.01
"""Weight of one step in the moving average that gives the usual RMS."""


def update_clip(
    max_rms: float = 1.0,
    eps: float = 1e-8,
    per: Per = "tensor",
    groups: Mapping[str, str] | None = None,
    exclude: str | Sequence[str] = (),
    recovery: float = 1.0,
) -> NormPolicy:
    r"""Scale down the step of a tensor whose gradient is too large for Adam's second moments.

    .. math:: RMS_s = \sqrt{\mathrm{mean}_{i \in s} \frac{g_i^2}{\max(\hat v_i, \varepsilon^2)}}, \qquad
        coef_s = \min\left(1, c_s + \frac{1 - \beta_2}{recovery}\right), \text{ and at most }
        \frac{max\_rms}{RMS_s} \text{ if } RMS_s > \max(max\_rms, 3 u_s)

    Here c is the coefficient of the step before, and u is the usual RMS: a moving average over 100 steps whose
    coefficient is 1, starting at 1. The moments are those of this step: the optimizer's moments, updated with this
    gradient and bias-corrected. RMS is about 1 in a steady run, and up to 2 for a tensor whose gradients vary or grow.
    It rises further where the moments are too old for the gradients, a few steps before the loss rises. The coefficient
    multiplies what the optimizer's step adds to the tensor, weight decay included, as if its learning rate were
    smaller. Gradients stay as they are, so that the moments follow them.

    The policy needs the optimizer: call `clipper.step(optimizer)`, `clipper.attach(optimizer)` or
    `clipper.clip(optimizer)`. A tensor without second moments, in its first step for example, is not clipped. During a
    step, there is a copy of the parameters whose steps are scaled down, or of all parameters on an accelerator.

    After a step that was scaled down, the coefficient of the tensor rises to 1 in a linear warm-up of recovery / (1 −
    β2) steps. While RMS is at most max(max_rms, 1.5 u), it rises by 0.05 per step, up to max(max_rms, u) / RMS.

    The published rule is `update_clip(recovery=0)`, coef = min(1, max_rms / RMS). It scales down most steps of a tensor
    whose gradients grow. Its coefficient returns to 1 while the moments are still averages over a few steps, so each
    weight still moves by the learning rate in each step. It prevents about half of the spikes (docs/policies.md).

    Args:
        max_rms: RMS to which a step is scaled down, > 0. A step with a smaller RMS is never a spike. The paper uses 1.
        eps: ε, > 0, lower limit of √v for second moments v.
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

    .. math:: bound_s = \frac{max\_rms}{RMS_s} \lVert g_s \rVert, \text{ if } RMS_s > \max(max\_rms, 3 u_s)

    Its state has `max_coefs` (slots,), the coefficients c of the last step, and `usual_rms` (slots,), u.

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
        """Lower limit of √v for second moments v."""
        return self.eps

    def init(self, slots: int, device: torch.device) -> State:
        """Return coefficients and usual RMS of 1, or an empty state without recovery."""
        if not self.recovery:
            return {}
        dtype = accumulation_dtype(device)
        return {key: torch.ones(slots, dtype=dtype, device=device) for key in ("max_coefs", "usual_rms")}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """Return the norms that give the largest RMS, inf for a slot without a spike."""
        norms, rms = totals.norms, totals.update_rms
        # Squares that overflow would stay in the moments for good, so such a gradient becomes 0.
        coefs = (self.max_rms / rms).where(rms.isfinite(), 0.0)
        bounds = (norms * coefs).where(rms.isfinite(), 0.0)
        if not self.recovery:
            fits = (rms <= self.max_rms) | (totals.update_counts == 0)
            return torch.where(fits, torch.inf, bounds), state
        usual = state["usual_rms"]
        limits = (SPIKE * usual).clamp(min=self.max_rms)
        # A slot without second moments has no RMS and no β2, and its state stays as it is.
        is_known = ~totals.update_rate.isnan()
        is_spike = is_known & ~(rms <= limits)
        is_calm = is_known & (rms <= (CALM * usual).clamp(min=self.max_rms))
        before = state["max_coefs"]
        max_coefs = (before + totals.update_rate.where(is_known, 0.0) / self.recovery).clamp(max=1.0)
        fast = torch.minimum((before + RISE).clamp(max=1.0), usual.clamp(min=self.max_rms) / rms)
        max_coefs = torch.where(is_calm, torch.maximum(max_coefs, fast), max_coefs)
        max_coefs = torch.minimum(max_coefs, torch.where(is_spike, coefs, 1.0))
        # During a warm-up, RMS differs from the usual one.
        usual_rms = torch.where(is_known & (max_coefs == 1), usual + RATE * (rms - usual), usual)
        return torch.where(is_spike, bounds, torch.inf), {"max_coefs": max_coefs, "usual_rms": usual_rms}

    def ceilings(self, totals: Totals, state: State) -> Tensor | None:
        """Return the largest coefficients of this step."""
        return state.get("max_coefs")

    def mask_valid(self, state: State) -> dict[str, Tensor]:
        """Return masks of coefficients in [0, 1] and finite RMS, see `Rule.mask_valid`."""
        limits = {"max_coefs": 1.0, "usual_rms": torch.finfo(torch.float32).max}
        return {key: (value >= 0) & (value <= limits[key]) for key, value in state.items()}
