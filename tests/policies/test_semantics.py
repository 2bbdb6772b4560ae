"""Compare policies with the rules of other frameworks, by their formulas in NumPy's float64."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import distclip
from distclip import Fixed, GradClipper, NormPolicy, Policy, agc, global_norm, per_tensor_norm, value
from distclip.policies import RelativeToWeight

DOCS = Path(__file__).parents[2] / "docs"
Arrays = list[NDArray[np.float64]]
SHAPES = [(6, 5), (6,), (4, 3, 2, 2), (3, 1, 2, 2, 2), (1, 7), ()]
SCALES = [0.01, 1.0, 100.0]
"""Scales of gradients below all bounds, among the bounds and far above."""


def optax_clip_by_global_norm(grads: Arrays, weights: Arrays, max_norm: float) -> Arrays:
    norm = np.sqrt(sum(np.square(g).sum() for g in grads))
    return [g if norm < max_norm else g / norm * max_norm for g in grads]


def optax_clip(grads: Arrays, weights: Arrays, max_delta: float) -> Arrays:
    return [np.clip(g, -max_delta, max_delta) for g in grads]


def optax_adaptive_grad_clip(grads: Arrays, weights: Arrays, clipping: float) -> Arrays:
    """Clip units along the first dim, where torch has outputs. Optax has them along the last dim."""

    def units(x: NDArray[np.float64]) -> NDArray[np.float64]:
        axes = tuple(range(1, x.ndim)) if x.ndim > 1 else None
        return np.sqrt(np.square(x).sum(axis=axes, keepdims=True))

    clipped = []
    for g, w in zip(grads, weights, strict=True):
        bound = clipping * np.maximum(units(w), 1e-3)
        clipped.append(np.where(units(g) < bound, g, g * (bound / np.maximum(units(g), 1e-6))))
    return clipped


def keras_clipnorm(grads: Arrays, weights: Arrays, clipnorm: float) -> Arrays:
    return [g * clipnorm / np.maximum(np.sqrt(np.square(g).sum()), clipnorm) for g in grads]


def keras_global_clipnorm(grads: Arrays, weights: Arrays, clipnorm: float) -> Arrays:
    norm = np.sqrt(sum(np.square(g).sum() for g in grads))
    return [g * clipnorm * min(1 / norm, 1 / clipnorm) for g in grads]


@dataclass(frozen=True)
class Rule:
    """A rule of another framework.

    Args:
        formula: computes clipped gradients from gradients, weights and a bound.
        bound: argument of the formula.
        ours: the policy that equals the rule.
        off_by: relative difference by which our factor may be smaller.
    """

    formula: Callable[[Arrays, Arrays, float], Arrays]
    bound: float
    ours: Policy
    off_by: float = 0.0


RULES = {
    "optax.clip_by_global_norm": Rule(optax_clip_by_global_norm, 2.0, NormPolicy(Fixed(2.0), eps=0.0)),
    "optax.clip_by_global_norm, torch's 1e-6": Rule(optax_clip_by_global_norm, 2.0, global_norm(2.0), 5e-7),
    "optax.clip": Rule(optax_clip, 0.5, value(0.5)),
    "optax.adaptive_grad_clip": Rule(optax_adaptive_grad_clip, 0.05, agc(0.05)),
    "keras clipnorm": Rule(keras_clipnorm, 0.5, per_tensor_norm(0.5)),
    "keras clipvalue": Rule(optax_clip, 0.5, value(0.5)),
    "keras global_clipnorm": Rule(keras_global_clipnorm, 2.0, NormPolicy(Fixed(2.0), eps=0.0)),
}


def make_arrays(scale: float, shapes: Sequence[tuple[int, ...]] = SHAPES) -> tuple[Arrays, Arrays]:
    """Return gradients and weights, of which one gradient and one weight are zero."""
    generator = np.random.default_rng(7)
    grads = [np.asarray(generator.normal(size=shape) * scale) for shape in shapes]
    weights = [np.asarray(generator.normal(size=shape)) for shape in shapes]
    grads.append(np.zeros(3))
    weights.append(generator.normal(size=3))
    grads.append(generator.normal(size=3) * scale)
    weights.append(np.zeros(3))
    return grads, weights


def clip(policy: Policy, grads: Arrays, weights: Arrays, on_nonfinite: Any = "skip") -> Arrays:
    """Return the gradients after clipping."""
    named = []
    for i, (g, w) in enumerate(zip(grads, weights, strict=True)):
        param = torch.nn.Parameter(torch.tensor(w))
        param.grad = torch.tensor(g)
        named.append((f"p{i}", param))
    GradClipper(named, policy, on_nonfinite=on_nonfinite).clip()
    return [param.grad.numpy() for _, param in named if param.grad is not None]


def assert_close(ours: Arrays, theirs: Arrays, rtol: float) -> None:
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, two, rtol=rtol, atol=0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", RULES)
def test_policy_equals_the_formula(name: str, scale: float) -> None:
    rule = RULES[name]
    grads, weights = make_arrays(scale)
    expected = rule.formula(grads, weights, rule.bound)
    assert any((e != g).any() for e, g in zip(expected, grads, strict=True)) or scale < 1
    assert_close(clip(rule.ours, grads, weights), expected, rule.off_by + 1e-12)


def test_docs_list_the_same_rules() -> None:
    rows = re.findall(r"^\| `(.*)` \| `(.*)` \|$", (DOCS / "migration.md").read_text(encoding="utf-8"), re.MULTILINE)
    documented = {theirs: eval(here, vars(distclip)) for theirs, here in rows if "optax" in theirs or "keras" in theirs}
    assert {re.sub(r"[(=].*", "", theirs): policy for theirs, policy in documented.items()} == {
        name: rule.ours for name, rule in RULES.items() if "," not in name
    }
    for theirs in documented:
        name, bound = re.fullmatch(r"(.*)[(=]([\d.]+)\)?", theirs).groups()  # type: ignore[union-attr]
        assert RULES[name].bound == float(bound)


def test_torch_adds_an_epsilon_and_optax_and_keras_do_not() -> None:
    grads, weights = make_arrays(100.0)
    norm = np.sqrt(sum(np.square(g).sum() for g in grads))
    exact, torchs = (clip(p, grads, weights)[0] for p in (NormPolicy(Fixed(2.0), eps=0.0), global_norm(2.0)))
    np.testing.assert_allclose(torchs, exact * norm / (norm + 1e-6), rtol=1e-12)
    assert (torchs != exact).any()


def test_propagates_nonfinite_gradients_as_optax_does() -> None:
    """Propagate an infinite element, which becomes NaN, while the factor 2 / inf zeroes the others."""
    grads, weights = make_arrays(1.0)
    grads[0][0, 0] = np.inf
    with np.errstate(invalid="ignore"):
        expected = optax_clip_by_global_norm(grads, weights, 2.0)
    assert_close(clip(NormPolicy(Fixed(2.0), eps=0.0), grads, weights, "propagate"), expected, 0.0)
    assert np.isnan(expected[0][0, 0])
    assert (expected[1] == 0).all()


def move_rows_last(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert a weight of torch to the convention of JAX."""
    return np.moveaxis(x, 0, -1) if x.ndim > 1 else x


OPTAX: dict[str, tuple[Callable[[Any], Any], Policy, float]] = {
    "clip_by_global_norm": (lambda o: o.clip_by_global_norm(2.0), NormPolicy(Fixed(2.0), eps=0.0), 1e-5),
    "adaptive_grad_clip": (lambda o: o.adaptive_grad_clip(0.05), agc(0.05), 1e-5),
    "clip": (lambda o: o.clip(0.5), value(0.5), 1e-7),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", OPTAX)
@pytest.mark.filterwarnings("default")  # JAX warns
def test_policy_equals_optax(name: str, scale: float) -> None:
    optax = pytest.importorskip("optax")
    make, policy, rtol = OPTAX[name]
    grads, weights = ([x.astype(np.float32).astype(np.float64) for x in xs] for xs in make_arrays(scale))
    transform = make(optax)
    laid_out = [[move_rows_last(x).astype(np.float32) for x in xs] for xs in (grads, weights)]
    theirs, _ = transform.update(laid_out[0], transform.init(laid_out[1]), laid_out[1])
    assert_close(
        [move_rows_last(g) for g in clip(policy, grads, weights)], [np.asarray(t, np.float64) for t in theirs], rtol
    )


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("shape", [(4, 1), (4, 3, 2)])
def test_optax_clips_other_units_for_columns_and_three_dims(shape: tuple[int, ...]) -> None:
    """Clip a column, which is one unit to optax, and three dims, which are attention heads to it."""
    optax = pytest.importorskip("optax")
    grads, weights = make_arrays(100.0, [shape])
    transform = optax.adaptive_grad_clip(0.05)
    laid_out = [[move_rows_last(x).astype(np.float32) for x in xs] for xs in (grads, weights)]
    theirs, _ = transform.update(laid_out[0], transform.init(laid_out[1]), laid_out[1])
    ours = clip(agc(0.05), grads, weights)
    assert not np.allclose(move_rows_last(ours[0]), np.asarray(theirs[0]), rtol=1e-3)


def test_adaptive_clipping_per_tensor() -> None:
    """Clip each tensor as one unit, as optax does with a column or with `axis=None`."""
    grads, weights = make_arrays(100.0, [(4, 1)])
    ours = clip(NormPolicy(RelativeToWeight(0.05), per="tensor", eps=0.0), grads, weights)
    for g, w, after in zip(grads, weights, ours, strict=True):
        bound = 0.05 * max(float(np.sqrt(np.square(w).sum())), 1e-3)
        norm = float(np.sqrt(np.square(g).sum()))
        np.testing.assert_allclose(after, g * min(1.0, bound / norm) if norm else g, rtol=1e-12)
