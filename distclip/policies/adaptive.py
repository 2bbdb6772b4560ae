"""The well-known policies by their names: those whose bound follows the norms.

All of them take `cap`, the bound that always holds, in warm-up too: without it a bad batch among the first ones is
learned as usual. And those whose averages are of clipped norms, which can be left behind, take `restart_after`: after
so many steps, more than half of them clipped by the rule, it starts anew from the norms before clipping; 0 is the
published rule without that.
"""

from __future__ import annotations

import math

from .adagc import AdaGC
from .autoclip import Percentile
from .ema import EMA
from .median_mad import MedianMAD
from .norm_policy import NormPolicy
from .policy import Per
from .zclip import ZScore

__all__ = ["adagc", "autoclip", "ema", "median_mad", "zclip"]


def autoclip(
    percentile: float = 10.0,
    window: int = 1000,
    cap: float = math.inf,
    norm_type: float = 2.0,
    per: Per = "model",
) -> NormPolicy:
    r"""AutoClip: the bound is a percentile of the last norms, this one among them.

    .. math:: bound_t = \min(cap, P_p(norm_{t-w+1}, \dots, norm_t))

    A low percentile clips nearly every step, 90 % of them at the default: it normalizes more than it clips.

    Args:
        percentile: p, in [0, 100].
        window: w, how many norms it remembers, ≥ 1; the paper's history is unbounded.
        cap: ≥ 0.
        norm_type: p of the norm.
        per: what has a norm of its own.

    Raises:
        ArgumentError: a number outside of its range.

    Source: Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: adaptive gradient clipping for source separation
    networks", MLSP 2020, arXiv 2007.14469, algorithm 1.

    >>> autoclip(25).threshold
    Percentile(p=25.0, window=1000, cap=inf)
    """
    return NormPolicy(Percentile(percentile, window, cap), norm_type, per)


def zclip(
    z: float = 2.5,
    decay: float = 0.97,
    warmup: int = 25,
    cap: float = math.inf,
    norm_type: float = 2.0,
    per: Per = "model",
    restart_after: int = 128,
) -> NormPolicy:
    r"""ZClip: a norm whose z-score is beyond the threshold is cut the deeper the farther out it is.

    .. math:: bound_t = \min\left(cap, \mu + \frac{z^2}{z_t} \sigma\right) \text{ if }
        z_t = \frac{norm_t - \mu}{\sigma + 10^{-6}} > z \text{ else } cap

    with the running mean μ and deviation σ of the clipped norms. The published rule (`restart_after=0`, and there
    cap=1.0) never follows norms that rise for good by a few times their scatter.

    Args:
        z: the z-score from which on it clips, > 0.
        decay: of mean and variance, in [0, 1).
        warmup: so many norms meet the cap only, ≥ 1.
        cap: ≥ 0.
        norm_type: p of the norm.
        per: what has a norm of its own.
        restart_after: after how many steps, more than half of them clipped by the rule, it starts anew; 0 for never.

    Raises:
        ArgumentError: a number outside of its range.

    Source: Kumar, Owen, Chowdhury, Güra, "ZClip: adaptive spike mitigation for LLM pre-training", 2025,
    arXiv 2504.02507, with reciprocal clipping.

    >>> zclip(3.0).threshold
    ZScore(z=3.0, decay=0.97, warmup=25, eps=1e-06, cap=inf)
    """
    return NormPolicy(ZScore(z, decay, warmup, cap=cap), norm_type, per, window=restart_after)


def adagc(
    ratio: float = 1.04,
    decay: float = 0.99,
    warmup: int = 100,
    warmup_norm: float = 1.0,
    cap: float = math.inf,
    norm_type: float = 2.0,
    per: Per = "tensor",
    restart_after: int = 0,
) -> NormPolicy:
    r"""AdaGC: each parameter's gradient may exceed its own running mean by a few percent.

    .. math:: bound_i = \min(cap, \lambda \gamma_i), \quad
        \gamma_i' = \beta \gamma_i + (1 - \beta) \min(norm_i, bound_i)

    In warm-up one bound holds for the norm of the whole gradient, and γ becomes the least clipped norm. The rule clips
    most of the steps where norms scatter by a quarter, and so `restart_after`, which takes that for being lost, is off.

    Args:
        ratio: λ, > 0.
        decay: β, in [0, 1).
        warmup: ≥ 1.
        warmup_norm: > 0.
        cap: ≥ 0.
        norm_type: p of the norm.
        per: what has a norm of its own.
        restart_after: after how many steps, more than half of them clipped by the rule, it starts anew; 0 for never.

    Raises:
        ArgumentError: a number outside of its range.

    Source: Wang et al., "AdaGC: improving training stability for large language model pretraining", 2025,
    arXiv 2502.11034; λ and β are those of its authors' published code.

    >>> adagc(1.05).threshold.ratio
    1.05
    """
    return NormPolicy(AdaGC(ratio, decay, warmup, warmup_norm, cap=cap), norm_type, per, window=restart_after)


def ema(
    ratio: float = 2.0,
    target: float = 1.1,
    slow: float = 0.99,
    fast: float = 0.9,
    warmup: int = 20,
    cap: float = math.inf,
    norm_type: float = 2.0,
    per: Per = "model",
    restart_after: int = 128,
) -> NormPolicy:
    r"""A norm far above a slow running mean is cut to just above a fast one.

    .. math:: bound_t = \min(cap, target \cdot fast) \text{ if } norm_t > ratio \cdot slow \text{ else } cap

    with means of the clipped norms, free of the bias of their start.

    Args:
        ratio: > 0.
        target: > 0.
        slow: the decay of the slow mean, in [0, 1).
        fast: the decay of the fast mean, in [0, 1).
        warmup: so many norms meet the cap only, ≥ 1.
        cap: ≥ 0.
        norm_type: p of the norm.
        per: what has a norm of its own.
        restart_after: after how many steps, more than half of them clipped by the rule, it starts anew; 0 for never.

    Raises:
        ArgumentError: a number outside of its range.

    Source: the EmaGradClip of PDE-Transformer (arXiv 2505.24717), fed with the clipped norm and bias-corrected.

    >>> ema(3.0).threshold
    EMA(ratio=3.0, target=1.1, slow=0.99, fast=0.9, warmup=20, cap=inf)
    """
    return NormPolicy(EMA(ratio, target, slow, fast, warmup, cap), norm_type, per, window=restart_after)


def median_mad(
    k: float = 3.0,
    window: int = 128,
    warmup: int = 16,
    cap: float = math.inf,
    norm_type: float = 2.0,
    per: Per = "model",
    skip: bool = False,
) -> NormPolicy:
    r"""The median of the last norms times k of their usual factors of scatter: a guard against spikes only.

    .. math:: bound_t = \min\left(cap, \exp(m + k \max(1.4826 \, d, 0.1))\right)

    with the median m of the logarithms of the last norms and their median distance d from it. It clips one healthy
    step in several hundred, holds a burst of twenty steps, and follows a level that stays within half of the window.

    Args:
        k: ≥ 0.
        window: how many norms it remembers, ≥ 1.
        warmup: so many norms meet the cap only, ≥ 1.
        cap: ≥ 0.
        norm_type: p of the norm.
        per: what has a norm of its own.
        skip: leave spikes out rather than shorten them, as suits a bad sample that comes again every epoch; up to the
            cap norms are shortened, in warm-up and after it.

    Raises:
        ArgumentError: a number outside of its range.

    Source: the outlier rule of Hampel, "The influence curve and its role in robust estimation", JASA 69, 1974, on
    logarithms.

    >>> median_mad(6.0).threshold
    MedianMAD(k=6.0, window=128, warmup=16, floor=0.1, cap=inf)
    """
    return NormPolicy(MedianMAD(k, window, warmup, cap=cap), norm_type, per, skip=skip)
