"""Compute norms and bounds from whole gradients in float64, exactly as the papers write the formulas.

This module does not use ranks. It is the oracle of the tests, and public, so that anyone can check a new layout.

The `*_bounds` functions loop over plain floats. Each takes the norms of one slot, step by step, and returns the bound
at every step, `inf` for none. All norms must be finite and above zero, because a policy never passes other norms to its
rule.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = [
    "adagc_bounds",
    "agc_bound",
    "aggc_bands",
    "autoclip_bounds",
    "budget_coefficients",
    "budget_shares",
    "clip_coefficient",
    "ema_bounds",
    "mean_std_bounds",
    "median_mad_bounds",
    "total_norm",
    "update_coefficients",
    "update_rms",
    "zclip_bounds",
]


def total_norm(grads: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    r"""Compute the p-norm of all elements together, :math:`(\sum_i |g_i|^p)^{1/p}`.

    Args:
        grads: every whole gradient of the model, once. Dense, of any floating or complex dtype.
        norm_type: p > 0, or `inf`.

    Returns:
        0-d float64.

    Collectives: none. Host syncs: none.

    >>> total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    tensor(5., dtype=torch.float64)
    """
    wide = [(g.to(torch.complex128) if g.is_complex() else g.double()).abs().reshape(-1) for g in grads]
    elements = torch.cat([torch.zeros(1, dtype=torch.float64), *wide])
    if math.isinf(norm_type):
        return elements.amax()
    # Divide by the largest element first: its power may overflow although the norm does not.
    largest = elements.amax().clamp(min=torch.finfo(torch.float64).tiny)
    return largest * (elements / largest).pow(norm_type).sum().pow(1.0 / norm_type)


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    r"""Compute the factor that scales the gradient, :math:`\min(1, max\_norm / (norm + 10^{-6}))`.

    Source: Pascanu, Mikolov, Bengio 2013, algorithm 1, with the 1e-6 of torch.nn.utils.clip_grad_norm_.

    >>> clip_coefficient(torch.tensor(4.0, dtype=torch.float64), 1.0)
    tensor(0.2500, dtype=torch.float64)
    """
    return torch.minimum(torch.ones_like(norm), max_norm / (norm + 1e-6))


def agc_bound(weight_norm: float, ratio: float = 0.01, eps: float = 1e-3) -> float:
    r"""Compute the bound of one row, :math:`ratio \cdot \max(\lVert w \rVert, eps)`.

    Source: Brock, De, Smith, Simonyan 2021, arXiv 2102.06171, equation 3.

    >>> agc_bound(2.0)
    0.02
    """
    return ratio * max(weight_norm, eps)


def update_rms(grad: Tensor, moment: Tensor, beta: float, step: int, eps: float = 1e-8) -> float:
    r"""Compute the root mean square of a gradient divided by the square roots of Adam's second moments.

    .. math:: \sqrt{\mathrm{mean} \frac{g^2}{\max(\hat v, eps^2)}}, \quad
        \hat v = \frac{\beta_2 v + (1 - \beta_2) g^2}{1 - \beta_2^t}

    Args:
        grad: the whole gradient of a tensor.
        moment: v before this step, `exp_avg_sq` of torch.
        beta: β2.
        step: t, 1-based index of this step.
        eps: least square root of a moment.

    Source: Wortsman et al. 2023, arXiv 2304.13013, algorithm 2.

    >>> update_rms(torch.tensor([2.0]), torch.tensor([0.0]), 0.9, 1)
    1.0
    """
    squares = grad.double().square()
    current = (beta * moment.double() + (1 - beta) * squares) / (1 - beta**step)
    return float((squares / current.clamp(min=eps**2)).mean().sqrt())


def update_coefficients(rms: Sequence[float], beta: float, max_rms: float = 1.0, recovery: float = 1.0) -> list[float]:
    """Compute the factors of one tensor's steps, from the RMS of every step with second moments.

    Args:
        rms: > 0, step by step.
        beta: β2.
        max_rms, recovery: see `distclip.update_clip`.

    Source: Wortsman et al. 2023, arXiv 2304.13013, algorithm 2, for recovery=0. The usual RMS and the warm-up are not
    from the paper.

    >>> [round(coef, 2) for coef in update_coefficients([2.0, 5.0, 2.5, 0.5], 0.99)]
    [1.0, 0.2, 0.21, 0.26]
    >>> update_coefficients([2.0, 5.0, 2.5, 0.5], 0.99, recovery=0)
    [0.5, 0.2, 0.4, 1.0]
    """
    if not recovery:
        return [min(1.0, max_rms / value) for value in rms]
    coefs, coef, usual = [], 1.0, 1.0
    for value in rms:
        before, coef = coef, min(1.0, coef + (1 - beta) / recovery)
        if value <= max(max_rms, 1.5 * usual):
            coef = max(coef, min(1.0, before + 0.05, max(max_rms, usual) / value))
        if value > max(max_rms, 3 * usual):
            coef = min(coef, max_rms / value)
        coefs.append(coef)
        if coef == 1:
            usual += 0.01 * (value - usual)
    return coefs


def autoclip_bounds(
    norms: Sequence[float], percentile: float = 10.0, window: int = 1000, cap: float = math.inf
) -> list[float]:
    """Compute the percentile of the last `window` norms, including the current one.

    Source: Seetharaman, Wichern, Pardo, Le Roux 2020, arXiv 2007.14469, algorithm 1.

    >>> autoclip_bounds([1.0, 3.0, 2.0], percentile=50)
    [1.0, 2.0, 2.0]
    """
    bounds = []
    for t in range(len(norms)):
        history = norms[max(0, t + 1 - window) : t + 1]
        bounds.append(min(_percentile(history, percentile), cap))
    return bounds


def zclip_bounds(
    norms: Sequence[float],
    z: float = 2.5,
    decay: float = 0.97,
    warmup: int = 25,
    eps: float = 1e-6,
    cap: float = math.inf,
    *,
    published: bool = False,
) -> list[float]:
    """Compute the bounds of z-score clipping with the reciprocal rule.

    Args:
        norms: the norm at each step.
        z, decay, warmup, eps, cap: see `distclip.zclip`.
        published: leave the cap out of mean and variance, as the published code does.

    Source: Kumar, Owen, Chowdhury, Güra 2025, arXiv 2504.02507.

    >>> zclip_bounds([1.0, 3.0, 100.0], warmup=2)[-1] < 3.0
    True
    """
    bounds: list[float] = []
    collected: list[float] = []
    mean = var = 0.0
    for norm in norms:
        if len(collected) < warmup:
            bounds.append(cap)
            collected.append(norm if published else min(norm, cap))
            mean = math.fsum(collected) / len(collected)
            var = math.fsum((x - mean) ** 2 for x in collected) / len(collected)
            continue
        std = math.sqrt(var)
        score = (norm - mean) / (std + eps * mean)
        bound = mean + z * std / (score / z) if score > z else math.inf
        bounds.append(min(bound, cap))
        x = min(norm, bound if published else bounds[-1])
        mean = decay * mean + (1 - decay) * x
        var = decay * var + (1 - decay) * (x - mean) ** 2
    return bounds


def ema_bounds(
    norms: Sequence[float],
    ratio: float = 2.0,
    target: float = 1.1,
    slow: float = 0.99,
    fast: float = 0.9,
    warmup: int = 20,
    cap: float = math.inf,
) -> list[float]:
    """Compute the bounds of clipping against two moving averages of the clipped norms.

    A norm above `ratio` times the slow average is clipped to `target` times the fast average.

    Source: the EmaGradClip of PDE-Transformer (arXiv 2505.24717), with the bias correction of Adam (arXiv 1412.6980).

    >>> ema_bounds([1.0, 1.0, 5.0], warmup=1, target=1.5)
    [inf, inf, 1.5]
    """
    bounds: list[float] = []
    ema_slow = ema_fast = 0.0
    for t, norm in enumerate(norms):
        bound = math.inf
        if t >= warmup and norm > ratio * ema_slow / (1 - slow**t):
            bound = target * ema_fast / (1 - fast**t)
        bounds.append(min(bound, cap))
        x = min(norm, bounds[-1])
        ema_slow = slow * ema_slow + (1 - slow) * x
        ema_fast = fast * ema_fast + (1 - fast) * x
    return bounds


def aggc_bands(
    norms: Sequence[float],
    low: float = 0.5,
    high: float = 2.0,
    decay: float = 0.98,
    warmup: int = 20,
    late_low: float | None = None,
    late_high: float | None = None,
    switch: int = 0,
    transition: int = 0,
    min_norm: float = 0.0,
    max_coef: float = 10.0,
    cap: float = math.inf,
) -> list[tuple[float, float]]:
    """Compute (floor, bound) of a band around the running mean of the norms that result from it.

    A norm above the bound is scaled down to it. A norm below the floor is scaled up to it, at most by `max_coef`.

    Source: Li et al. 2026, arXiv 2601.11864, with the bias correction of Adam (arXiv 1412.6980).

    >>> [(round(floor, 6), round(bound, 6)) for floor, bound in aggc_bands([1.0, 1.0, 0.25], warmup=2)]
    [(0.0, inf), (0.0, inf), (0.5, 2.0)]
    """
    bands: list[tuple[float, float]] = []
    total = 0.0
    for t, norm in enumerate(norms):
        floor, bound = 0.0, math.inf
        if t >= warmup:
            done = t >= switch + transition
            part = 1.0 if done else max(0.0, (t - switch) / transition)
            mean = total / (1 - decay**t)
            floor = max(min_norm, (low + part * ((low if late_low is None else late_low) - low)) * mean)
            bound = (high + part * ((high if late_high is None else late_high) - high)) * mean
        bound = min(bound, cap)
        bands.append((min(floor, bound), bound))
        x = min(max(norm, min(floor, max_coef * norm)), bound)
        total = decay * total + (1 - decay) * x
    return bands


def mean_std_bounds(
    norms: Sequence[float], sigma: float = 6.0, window: int = 128, warmup: int = 63, cap: float = math.inf
) -> list[float]:
    """Compute the mean of the last `window` norms plus `sigma` sample standard deviations.

    Source: the SkipStepOptimizer of OLMo-core.

    >>> mean_std_bounds([1.0, 3.0, 9.0], sigma=1, warmup=2)[-1] == 2 + 2**0.5
    True
    """
    bounds = []
    for t in range(len(norms)):
        bound = math.inf
        if t >= warmup:
            last = norms[max(0, t - window) : t]
            bound = statistics.mean(last) + sigma * statistics.stdev(last)
        bounds.append(min(bound, cap))
    return bounds


def adagc_bounds(
    norms: Sequence[float],
    totals: Sequence[float] | None = None,
    ratio: float = 1.04,
    decay: float = 0.99,
    warmup: int = 100,
    warmup_norm: float = 1.0,
    cap: float = math.inf,
) -> list[float]:
    """Compute the bounds of one tensor, which follow the moving average of its norm after a warm-up.

    During the warm-up the tensor is clipped by the norm of the whole gradient.

    Args:
        norms: the tensor's norm at each step.
        totals: the norm of the whole gradient at each step. None if the tensor is the whole gradient.

    Source: Wang et al. 2025, arXiv 2502.11034.

    >>> adagc_bounds([0.5, 0.25, 1.0], warmup=2, ratio=2)[-1]
    0.5
    """
    bounds: list[float] = []
    gamma = math.inf
    for t, (norm, total) in enumerate(zip(norms, norms if totals is None else totals, strict=True)):
        if t < warmup:
            h = min(1.0, warmup_norm / total, cap / norm)
            gamma = min(gamma, h * norm)
            bounds.append(min(cap, norm * min(1.0, warmup_norm / total)))
        else:
            bounds.append(min(cap, ratio * gamma))
            h = min(1.0, ratio * gamma / norm, cap / norm)
            gamma = decay * gamma + (1 - decay) * h * norm
    return bounds


def median_mad_bounds(
    norms: Sequence[float],
    k: float = 3.0,
    window: int = 128,
    warmup: int = 16,
    floor: float = 0.1,
    cap: float = math.inf,
) -> list[float]:
    """Compute bounds at k robust standard deviations above the median of recent norms, in log space.

    Source: Hampel 1974 (JASA 69), applied to logarithms. The constant 1.4826 is 1 / Φ⁻¹(3/4).

    >>> median_mad_bounds([1.0, 1.0, 50.0], warmup=2, floor=0.5, k=2)[-1] == math.e
    True
    """
    bounds = []
    for t in range(len(norms)):
        logs = [math.log(norm) for norm in norms[max(0, t - window) : t]]
        bound = math.inf
        if t >= warmup:
            median = _percentile(logs, 50)
            mad = _percentile([abs(x - median) for x in logs], 50)
            bound = math.exp(median + k * max(1.4826 * mad, floor))
        bounds.append(min(bound, cap))
    return bounds


def _percentile(numbers: Sequence[float], percent: float) -> float:
    """Compute a percentile as numpy does, by linear interpolation between the two neighbours."""
    ordered = sorted(numbers)
    rank = percent / 100 * (len(ordered) - 1)
    below = math.floor(rank)
    above = math.ceil(rank)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])


def budget_coefficients(
    norms: Sequence[float], shares: Sequence[float], max_norm: float, cap: float = math.inf
) -> list[float]:
    r"""Compute the coefficients of tensors that are clipped one after another under one bound.

    .. math:: allowed_i^2 = c^2 - \sum_{j<i} used_j^2 - c^2 \sum_{j>i} s_j^2

    Args:
        norms: norms of the tensors, in the order in which they are clipped.
        shares: s_i² of each, which add up to 1.
        max_norm: c.
        cap: bound of each tensor.

    >>> budget_coefficients([4.0, 3.0], [0.25, 0.75], 4.0)
    [0.5, 1.0]
    """
    coefs, used = [], 0.0
    for i, norm in enumerate(norms):
        allowed = max(0.0, max_norm**2 - used - max_norm**2 * math.fsum(shares[i + 1 :]))
        coefs.append(min(1.0, math.sqrt(allowed) / norm, cap / norm))
        used += (coefs[-1] * norm) ** 2
    return coefs


def budget_shares(norms: Sequence[Sequence[float]], decay: float = 0.99) -> list[float]:
    """Compute the running mean of each tensor's share of the squared norm.

    Args:
        norms: norms of all tensors, step by step, before clipping.
        decay: decay of the mean. The first steps have equal weight.

    >>> budget_shares([[3.0, 4.0], [4.0, 3.0]])
    [0.5, 0.5]
    """
    shares = [0.0] * len(norms[0])
    for step, row in enumerate(norms, 1):
        weight, total = max(1 / step, 1 - decay), math.fsum(norm**2 for norm in row)
        shares = [share + weight * (norm**2 / total - share) for share, norm in zip(shares, row, strict=True)]
    return shares
