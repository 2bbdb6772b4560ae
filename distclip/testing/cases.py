"""Generate random layouts: meshes, their parameters, and a call. All of it is plain data that follows from a seed."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, TypeAlias

from ..norms.spec import Per

__all__ = ["Case", "MeshShape", "ParamCase", "components_of", "random_case"]

Kind: TypeAlias = Literal["dtensor", "annotated", "plain", "tagged"]

NORM_TYPES = (2.0, 2.0, 2.0, 1.0, 3.0, 0.5, math.inf)
DTYPES = ("float32", "float32", "float32", "bfloat16", "float16", "float64", "complex64")


@dataclass(frozen=True, slots=True)
class MeshShape:
    """A mesh: its ranks in order, and its shape. The axes are named "x", "y" and "z"."""

    ranks: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def axes(self) -> str:
        """Names of the axes."""
        return "xyz"[: len(self.shape)]

    def coordinates(self, rank: int) -> tuple[int, ...] | None:
        """Return the coordinates of a rank, or None for a rank that is not in the mesh."""
        if rank not in self.ranks:
            return None
        return list(itertools.product(*map(range, self.shape)))[self.ranks.index(rank)]


@dataclass(frozen=True, slots=True)
class ParamCase:
    """A parameter with a gradient.

    Args:
        name: name of the parameter.
        seed: seed of its numbers.
        shape: shape of the whole parameter.
        dtype: dtype of the gradient.
        scale: magnitude of the gradient.
        kind: how the layout is declared.
        mesh: index of the mesh in the case, or -1 for a plain tensor on all ranks.
        axes: axes of the mesh that the parameter spans.
        cuts: for each of these axes, the dim that it shards, or None.
        partial: for each of these axes, True if the gradient is a summand along it.
        mean: True if partial gradients are averaged, and False if they are added up.
        missing: fraction of the shards that have no gradient.
        stages: coordinates along the first axis of `split_over` that hold the parameter. None without stages.
    """

    name: str
    seed: int
    shape: tuple[int, ...]
    dtype: str
    scale: float
    kind: Kind = "plain"
    mesh: int = -1
    axes: str = ""
    cuts: tuple[int | None, ...] = ()
    partial: tuple[bool, ...] = ()
    mean: bool = False
    missing: float = 0.0
    stages: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """A layout, and a call that must be correct in it.

    Args:
        seed: seed of the case.
        num_ranks: size of the world.
        meshes: meshes of the parameters.
        params: all parameters of all ranks.
        split: axes of the first mesh that are passed as `split_over`.
        named: whether the parameters are passed with names.
        over_world: whether a communicator over all ranks is passed.
        per: granularity of the policy. None for the function `clip_grad_norm_`.
        norm_type: p of the norm.
        fraction: bound relative to the norm. inf for no bound.
        nonfinite: name of a parameter with a NaN in its gradient, or None.
        loss_scale: factor of a GradScaler, or None.
    """

    seed: int
    num_ranks: int
    meshes: tuple[MeshShape, ...]
    params: tuple[ParamCase, ...]
    split: str = ""
    named: bool = True
    over_world: bool = False
    per: Per | None = None
    norm_type: float = 2.0
    fraction: float = math.inf
    nonfinite: str | None = None
    loss_scale: float | None = None

    @property
    def may_be_refused(self) -> bool:
        """True if ranks hold different lists of parameters without names."""
        return not self.named


def random_case(seed: int, num_ranks: int) -> Case:
    """Generate a layout.

    Args:
        seed: determines the case, together with the number of ranks.
        num_ranks: size of the world, ≥ 2.

    >>> random_case(1, 4) == random_case(1, 4)
    True
    """
    rng = random.Random(1000 * seed + num_ranks)
    meshes = _meshes(rng, num_ranks)
    style = rng.choice(["meshes", "meshes", "stages", "tags"])
    split = ""
    if style != "meshes" and len(meshes[0].shape) > 1:
        # The first axis is that of stages. With tags, the last one is that of tensor-parallel shards.
        split = "x" + (meshes[0].axes[-1] if style == "tags" else "")
    loss_scale = 2.0 ** rng.randint(1, 12) if rng.random() < 0.15 else None
    params = [_param(rng, i, meshes, split, num_ranks) for i in range(rng.randint(1, 6))]
    is_joined = bool(split) or rng.random() < 0.7
    if is_joined and not split:
        # A parameter over all ranks makes them one component.
        anchor = _param(rng, len(params), meshes[:1], "", num_ranks)
        cuts = tuple(rng.choice((None, 0)) for _ in meshes[0].axes)
        anchor = replace(anchor, kind="dtensor", mesh=0, axes=meshes[0].axes, cuts=cuts, partial=(False,) * len(cuts))
        params.insert(rng.randrange(len(params) + 1), replace(anchor, shape=(rng.randint(1, 7), 3), missing=0.0))
    if loss_scale is not None:
        # An optimizer steps here, and torch's operators would sum partial gradients within the step.
        whole = [replace(p, partial=(False,) * len(p.partial)) for p in params]
        params = [replace(p, dtype="float32", scale=min(max(p.scale, 1e-3), 1e3)) for p in whole]
    case = Case(
        seed,
        num_ranks,
        tuple(meshes),
        tuple(params),
        split,
        named=rng.random() < 0.75,
        over_world=not is_joined,
        per=None if loss_scale is None and rng.random() < 0.5 else rng.choice(("model", "group", "tensor", "row")),
        norm_type=rng.choice(NORM_TYPES),
        fraction=rng.choice((math.inf, 0.5, 0.1, 2.0)),
        nonfinite=rng.choice(params).name if rng.random() < 0.08 else None,
        loss_scale=loss_scale,
    )
    # Norms per group, tensor and row identify parameters by their names.
    return case if case.per in (None, "model") else replace(case, named=True)


def components_of(case: Case) -> list[set[int]]:
    """Return the ranks that share meshes or axes, and therefore one all-reduce with the same bits.

    >>> mesh = MeshShape((0, 1, 2, 3), (2, 2))
    >>> components_of(Case(0, 4, (mesh,), (), split="x"))
    [{0, 2}, {1, 3}]
    """
    if case.over_world:
        return [set(range(case.num_ranks))]
    spans: list[tuple[MeshShape, str, tuple[int, ...] | None]] = [(case.meshes[0], axis, None) for axis in case.split]
    spans += [(case.meshes[p.mesh], p.axes, p.stages) for p in case.params if p.kind in ("dtensor", "annotated")]
    components = [{rank} for rank in range(case.num_ranks)]
    for mesh, axes, stages in spans:
        lines: dict[tuple[int, ...], set[int]] = {}
        for rank in mesh.ranks:
            at = mesh.coordinates(rank) or ()
            if stages is None or at[0] in stages:
                others = tuple(i for i, axis in zip(at, mesh.axes, strict=True) if axis not in axes)
                lines.setdefault(others, set()).add(rank)
        for line in lines.values():
            joined = set[int]().union(*(c for c in components if c & line))
            components = [c for c in components if not c & line] + [joined]
    return sorted(components, key=min)


def _meshes(rng: random.Random, num_ranks: int) -> list[MeshShape]:
    """Return a mesh over all ranks, and others over all or some of them."""
    whole, others = _pool(num_ranks)
    return [rng.choice(whole), *(rng.choice(others) for _ in range(rng.randint(0, 2)))]


@cache
def _pool(num_ranks: int) -> tuple[list[MeshShape], list[MeshShape]]:
    """Return the meshes over all ranks, and others over all or some of them."""
    # All cases share them, because the process groups of a mesh take threads and some milliseconds.
    rng, ascending = random.Random(num_ranks), tuple(range(num_ranks))
    whole = [MeshShape(ascending, shape) for shape in dict.fromkeys(_shapes(num_ranks))]
    permuted = (rng.choice(_shapes(num_ranks)), _shapes(num_ranks)[-1])
    whole += [MeshShape(tuple(rng.sample(ascending, num_ranks)), shape) for shape in permuted]
    others = list(whole)
    for _ in range(8):
        some = rng.sample(ascending, rng.randint(1, num_ranks))
        if rng.random() < 0.7:
            some.sort()
        others.append(MeshShape(tuple(some), rng.choice(_shapes(len(some)))))
    return whole, others


def _shapes(size: int) -> list[tuple[int, ...]]:
    """Return the shapes of meshes of that size, with 1 to 3 axes."""
    pairs = [(a, size // a) for a in range(2, size) if size % a == 0]
    triples = [(a, b, c) for a in range(2, size) for b in range(2, size) for c in range(2, size) if a * b * c == size]
    return [(size,), *pairs, *pairs, *triples, *triples]


def _param(rng: random.Random, i: int, meshes: Sequence[MeshShape], split: str, num_ranks: int) -> ParamCase:
    shape = tuple(rng.choice((1, 2, 3, 4, 5, 7)) for _ in range(rng.choice((1, 1, 2, 2, 2, 3))))
    dtype = rng.choice(DTYPES)
    exponent = rng.uniform(-2, 2) if dtype == "float16" else rng.choice((0.0, 0.0, rng.uniform(-25, 25)))
    param = ParamCase(f"{rng.choice('ab')}{i}", rng.getrandbits(30), shape, dtype, 10.0**exponent)
    if split:
        # This is a parameter of some stages, on axes of the mesh within a stage.
        num_stages = meshes[0].shape[0]
        stages = tuple(s for s in range(num_stages) if rng.random() < 0.7) or (rng.randrange(num_stages),)
        param = replace(param, stages=stages)
        if len(split) > 1:
            if rng.random() < 0.6:
                cuts = (rng.randrange(len(shape)),)
                # Megatron cuts into equal shards.
                size = meshes[0].shape[-1]
                shape = tuple(size * n if dim == cuts[0] else n for dim, n in enumerate(shape))
                return replace(param, shape=shape, kind="tagged", mesh=0, axes=split[1], cuts=cuts, partial=(False,))
            return replace(param, kind="tagged", mesh=0, axes=split[1], cuts=(None,), partial=(False,))
        choices = [axes for n in (1, 2) for axes in map("".join, itertools.combinations(meshes[0].axes[1:], n))]
        mesh, axes = 0, rng.choice(choices)
    elif rng.random() < 0.2:
        return param
    else:
        mesh = rng.randrange(len(meshes))
        shape_of = meshes[mesh].axes
        axes = rng.choice([shape_of, shape_of, "".join(a for a in shape_of if rng.random() < 0.7) or shape_of])
    kind: Kind = rng.choice(("dtensor", "dtensor", "dtensor", "annotated", "plain" if split else "dtensor"))
    if kind == "plain":
        return param
    cuts = tuple(rng.choice((None, *range(len(shape)))) for _ in axes)
    partial = tuple(cut is None and rng.random() < 0.15 for cut in cuts)
    missing = rng.choice((0.0, 0.0, 0.0, 0.3, 0.7, 1.0))
    return replace(
        param, kind=kind, mesh=mesh, axes=axes, cuts=cuts, partial=partial, mean=rng.random() < 0.3, missing=missing
    )
