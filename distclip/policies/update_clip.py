"""Bound the root mean square of Adam's updates: update clipping, the rule of StableAdamW and Adafactor.

The coefficients divide the step and not the gradients. Adam divides a gradient by moments that follow it within a few
steps, so that a smaller gradient would leave the step as large as before.

The published rule clips every step above 1, which many tensors exceed in most steps of a healthy run. Here a step must
exceed three times what is usual for its tensor.

If gradients stay large, their RMS falls faster than the moments become right: the moments are then those of a few
steps, as in the first steps of a training, whose learning rate rises slowly for that reason. So does the coefficient
here. If gradients return to their size, it returns within 20 steps.
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
"""RMS in units of the usual one beyond which a step is divided."""

CALM = 1.5
"""RMS in units of the usual one up to which the moments fit the gradients again."""

RISE = 0.05
"""Rise of a coefficient per step while the moments fit."""

RATE = 0.01
"""Weight of a step in the usual RMS."""


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
        coef_s = \min\left(1, c_s + \frac{1 - \beta_2}{recovery}\right), \text{ and at most }
        \frac{max\_rms}{RMS_s} \text{ if } RMS_s > \max(max\_rms, 3 u_s)

    Here c is the coefficient of the step before, and u a moving average of RMS over 100 steps with a coefficient of 1,
    which starts at 1. The moments are those of this step: the optimizer's own, this gradient, and the correction of the
    bias. RMS is about 1 in a steady run, and up to 2 for a tensor whose gradients vary or grow. It rises beyond that
    where the moments are too old for the gradients, a few steps before the loss. The coefficient multiplies what the
    optimizer's step adds to the tensor, weight decay included, as if its learning rate were smaller. Gradients stay as
    they are, so that the moments follow them.

    It needs the optimizer: call `clipper.step(optimizer)`, `clipper.attach(optimizer)` or `clipper.clip(optimizer)`. A
    tensor without second moments, in its first step for example, is not clipped. During a step there is a copy of the
    parameters whose steps are divided, on an accelerator of all of them.

    After such a step the coefficient of the tensor rises to 1 in 1 / (1 − β2) steps, a linear warm-up. While RMS is at
    most max(max_rms, 1.5 u), it rises by 0.05 a step, up to max(max_rms, u) / RMS.

    The published rule is `update_clip(recovery=0)`, coef = min(1, max_rms / RMS). It divides most steps of a tensor
    whose gradients grow. It returns while the moments are those of a few steps, so that each weight still moves by the
    learning rate in each step, and it prevents about half of the spikes (docs/policies.md).

    Args:
        max_rms: RMS to which a step is divided, > 0, and that no step below it exceeds. The paper has 1.
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
        """Least square root of a second moment."""
        return self.eps

    def init(self, slots: int, device: torch.device) -> State:
        """Return coefficients and usual RMS of 1, or an empty state without recovery."""
        if not self.recovery:
            return {}
        dtype = accumulation_dtype(device)
        return {key: torch.ones(slots, dtype=dtype, device=device) for key in ("max_coefs", "usual_rms")}

    def __call__(self, totals: Totals, state: State) -> tuple[Tensor, State]:
        """Return the norms at the largest RMS, and inf for a slot without second moments."""
        norms, rms = totals.norms, totals.update_rms
        # Squares that overflow would stay in the moments for good, so that such a gradient becomes 0.
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
        # During a warm-up, RMS is not the usual one.
        usual_rms = torch.where(is_known & (max_coefs == 1), usual + RATE * (rms - usual), usual)
        return torch.where(is_spike, bounds, torch.inf), {"max_coefs": max_coefs, "usual_rms": usual_rms}

    def ceilings(self, totals: Totals, state: State) -> Tensor | None:
        """Return the largest coefficients of this step."""
        return state.get("max_coefs")

    def mask_valid(self, state: State) -> dict[str, Tensor]:
        """Return masks of coefficients in [0, 1] and finite RMS, see `Rule.mask_valid`."""
        limits = {"max_coefs": 1.0, "usual_rms": torch.finfo(torch.float32).max}
        return {key: (value >= 0) & (value <= limits[key]) for key, value in state.items()}
