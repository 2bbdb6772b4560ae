"""Write a policy into DeepSpeed's own config, if DeepSpeed can express it."""

from __future__ import annotations

import math
from typing import Any

from ...extend import ArgumentError, Fixed, NormPolicy, Policy, describe

__all__ = ["config"]


def config(policy: Policy) -> dict[str, Any]:
    """Return the entry of DeepSpeed's JSON config that clips by a policy without `attach`.

    DeepSpeed then computes the norm and handles non-finite gradients itself.

    Args:
        policy: a fixed bound on the 2-norm of the whole gradient. `inf` sets no bound.

    Returns:
        {"gradient_clipping": bound}, for the engine's config. DeepSpeed reads 0 as no bound.

    Raises:
        ArgumentError: DeepSpeed cannot express this policy.

    >>> from distclip import global_norm
    >>> config(global_norm(1.0))
    {'gradient_clipping': 1.0}
    """
    rule = policy.threshold if isinstance(policy, NormPolicy) else None
    if (
        not isinstance(policy, NormPolicy)
        or not isinstance(rule, Fixed)
        or policy.per != "model"
        or policy.norm_type != 2
        or policy.exclude
        or policy.skip
        or policy.eps != 1e-6
        or not isinstance(rule.max_norm, float)
        or rule.max_norm == 0
    ):
        raise ArgumentError(
            f"policy={describe(policy)}: DeepSpeed itself clips only the 2-norm of the whole gradient, at a fixed "
            "bound above 0. Call attach(engine, policy) for any other policy."
        )
    return {"gradient_clipping": 0.0 if math.isinf(rule.max_norm) else rule.max_norm}
