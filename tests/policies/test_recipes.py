"""Compare recipes with what their sources state, and statistics of ZClip with the published class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from distclip import ArgumentError, GradClipper, NormPolicy, recipes, reference, zclip
from tests.policies.norms import totals

CPU = torch.device("cpu")


def coefs(policy: NormPolicy, norms: Sequence[float]) -> list[float]:
    state, found = policy.init(1, CPU), []
    for norm in norms:
        verdict, state = policy.decide(totals([norm]), state)
        found.append(0.0 if verdict.skip is not None and bool(verdict.skip) else float(verdict.coefs))
    return found


@pytest.mark.parametrize("name", recipes.__all__)
def test_recipes_name_their_sources(name: str) -> None:
    recipe = getattr(recipes, name)
    assert "Source:" in (recipe.__doc__ or "")
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.tensor([4.0])
    report = GradClipper([weight], recipe()).clip()
    assert float(report.coef) == (1.0 if name == "kimi_k2" else pytest.approx(0.25, rel=1e-6))


def test_olmo3_skips_the_steps_that_its_source_skips() -> None:
    """Loop over plain numbers as the optimizer of the source does, for norms, with one spike and a new level."""
    norms = np.exp(0.1 * np.random.default_rng(0).standard_normal(400)) * 0.5
    norms[[20, 100, 250]] *= 50
    norms[300:] *= 4
    expected: list[float] = []
    seen: list[float] = []
    for norm in norms.tolist():
        seen = [*seen, norm][-129:]
        is_skipped = False
        if len(seen) >= 64:
            is_skipped = norm - np.mean(seen[:-1]) > 6 * np.std(seen[:-1], ddof=1)
        expected.append(0.0 if is_skipped else min(1.0, 1.0 / (norm + 1e-6)))
    assert coefs(recipes.olmo3(), norms.tolist()) == pytest.approx(expected, rel=1e-6)
    # The first spike is in the warm-up, so that it is only clipped.
    assert [t for t in range(300) if expected[t] == 0] == [100, 250]


def published_zclip(norms: Sequence[float], cap: float) -> list[float]:
    """Clip as the published class does, over plain numbers. The cap takes no part in its statistics."""
    alpha, threshold, warmup, eps = 0.97, 2.5, 25, 1e-6
    found = []
    buffer: list[float] = []
    mean = var = math.nan
    for norm in norms:
        if len(buffer) < warmup:
            buffer.append(norm)
            mean, var = float(np.mean(buffer)), float(np.var(buffer))
            found.append(min(1.0, cap / norm))
            continue
        std = math.sqrt(var)
        score = (norm - mean) / (std + eps)
        bound = mean + threshold * std / (score / threshold) if score > threshold else norm
        found.append(min(1.0, min(bound, cap) / norm))
        mean = alpha * mean + (1 - alpha) * bound
        var = alpha * var + (1 - alpha) * (bound - mean) ** 2
    return found


def test_published_statistics_of_zclip_are_those_of_its_code() -> None:
    """Compare under a cap that clips every third step, where the two kinds of statistics differ."""
    norms = np.exp(0.25 * np.random.default_rng(1).standard_normal(1000))
    norms[::97] *= 10
    published = coefs(zclip(cap=1.2, statistics="published", restart_after=0), norms.tolist())
    assert published == pytest.approx(published_zclip(norms.tolist(), 1.2), rel=1e-5)
    bounds = [
        np.array(reference.zclip_bounds(norms.tolist(), cap=math.inf)),
        np.array(reference.zclip_bounds(norms.tolist(), cap=1.2)),
    ]
    assert np.isfinite(bounds[1]).all()
    capped = coefs(zclip(cap=1.2, restart_after=0), norms.tolist())
    assert max(abs(a / b - 1) for a, b in zip(capped, published, strict=True)) > 0.01
    uncapped = [coefs(zclip(statistics=kind, restart_after=0), norms.tolist()) for kind in ("capped", "published")]
    assert uncapped[0] == uncapped[1]


def test_unknown_statistics_raise() -> None:
    with pytest.raises(ValueError, match=r"statistics='raw'.*Use one of capped, published"):
        zclip(statistics="raw")  # type: ignore[arg-type]


def test_glm5_clips_the_group_of_adamw_alone() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "matrix": nn.Linear(2, 2, bias=False)})
    adamw, muon = (torch.optim.SGD(model[name].parameters(), lr=1.0) for name in ("embed", "matrix"))
    clipper = GradClipper(model, recipes.glm5(groups={"adamw": adamw, "muon": muon}))
    for param in model.parameters():
        param.grad = torch.full_like(param, 4.0)
    report = clipper.step([adamw, muon])
    assert dict(zip(clipper.slots, report.norms.tolist(), strict=True)) == pytest.approx({"adamw": 128**0.5, "muon": 8})
    assert report.coefs.tolist() == pytest.approx([128**-0.5, 1.0], rel=1e-5)
    with pytest.raises(ArgumentError, match="adamw"):
        recipes.glm5(groups={"muon": muon})
