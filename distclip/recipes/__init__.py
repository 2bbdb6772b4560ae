"""Provide the published gradient clipping of well-known models as policies.

Each function returns a policy for `GradClipper`, and its docstring names the source. A recipe contains only what its
source states, so some recipes are a plain bound, and one has no bound. Optimizer, learning rate and batch size matter
as much, but are not part of a recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import ArgumentError
from ..policies import MeanStd, NormPolicy, global_norm, group_norm

__all__ = ["glm5", "kimi_k2", "llama3", "nanogpt", "olmo3"]


def olmo3() -> NormPolicy:
    """Clip to a norm of 1, and skip steps more than 6 standard deviations above the mean of 128 norms.

    The skips begin once 63 norms are known. The optimizer of the source also skips a step whose *loss* is that far
    above the mean of the last 128 losses. A policy does not see losses, so this part is missing here.

    Source: Ai2, OLMo-core, `src/scripts/official/OLMo3/OLMo-3-1025-7B-pretrain-1.py` (max_grad_norm=1.0,
    SkipStepAdamWConfig) and `src/olmo_core/optim/skip_step_optimizer.py` (rolling_interval_length=128, sigma_factor=6).
    Report: "Olmo 3", 2025, arXiv 2512.13961.

    >>> olmo3().skip, olmo3().threshold
    (True, MeanStd(sigma=6.0, window=128, warmup=63, cap=1.0))
    """
    return NormPolicy(MeanStd(cap=1.0), eps=1e-6, skip=True)


def glm5(groups: Mapping[str, Any] | None = None) -> NormPolicy:
    """Clip AdamW's parameters to a norm of 1, and leave Muon's parameters unclipped.

    Muon orthogonalizes its update, so the norm of its gradients has no effect. The norm that is clipped is that of
    AdamW's gradients alone. Pass `groups`, or make a clipper for AdamW's parameters alone: `GradClipper(adamw_params,
    recipes.glm5(), partial=True)`.

    Args:
        groups: {"adamw": its optimizer, "muon": its optimizer}, or patterns or parameters as for `group_norm`. The
            group "adamw" is clipped, and the norms of the others are in the report. None to clip all parameters as one
            group.

    Raises:
        ArgumentError: no group has the name "adamw"; see also `group_norm`.

    Source: InternLM, xtuner, pull request 2001, "Add GLM-5.2 MuonSplit and AdamW-only gradient clipping", 2026, and the
    default max_grad_norm=1.0 of `xtuner/v1/config/optim.py`. In that code, AdamW updates the embeddings, the head, and
    all parameters with fewer than two dims. The report, "GLM-5: from Vibe Coding to Agentic Engineering", 2026, arXiv
    2602.15763, describes Muon Split.

    >>> glm5().threshold
    Fixed(max_norm=1.0)
    >>> glm5(groups={"adamw": "embed|head|norm"}).threshold
    Fixed(max_norm=(1.0, inf))
    """
    if groups is None:
        return global_norm(1.0)
    if not isinstance(groups, Mapping) or "adamw" not in groups:
        raise ArgumentError(
            f'groups={groups!r:.80}: no group "adamw", which the recipe clips. Use groups={{"adamw": adamw, "muon": '
            "muon}, with the two optimizers."
        )
    bounds = {name: (members, 1.0 if name == "adamw" else math.inf) for name, members in groups.items()}
    return group_norm(bounds, max_norm=math.inf)


def kimi_k2() -> NormPolicy:
    """Measure the norm and clip nothing, because the report publishes no bound on gradients.

    The QK-Clip of its optimizer MuonClip is not gradient clipping: after a step it rescales the query and key
    projections of each attention head whose largest logit exceeded τ = 100.

    Source: Kimi Team, "Kimi K2: open agentic intelligence", 2025, arXiv 2507.20534, algorithm 1 and section 2.1.

    >>> kimi_k2().threshold
    Fixed(max_norm=inf)
    """
    return global_norm(math.inf)


def llama3() -> NormPolicy:
    """Clip to a norm of 1.

    The report, "The Llama 3 herd of models", 2024, arXiv 2407.21783, gives no bound.

    Source: PyTorch, torchtitan, `torchtitan/models/llama3/train_configs/llama3_405b.toml` (max_norm = 1.0), a
    configuration for the architecture, not the one of Meta's run.

    >>> llama3().threshold
    Fixed(max_norm=1.0)
    """
    return global_norm(1.0)


def nanogpt() -> NormPolicy:
    """Clip to a norm of 1.

    Source: Karpathy, nanoGPT, `train.py` (grad_clip = 1.0), which reproduces GPT-2.

    >>> nanogpt().threshold
    Fixed(max_norm=1.0)
    """
    return global_norm(1.0)
