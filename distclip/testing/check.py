"""Build a case on this rank, call distclip, and compare the results with whole gradients in float64."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .. import Fixed, GradClipper, NormPolicy, annotate_, clip_grad_norm_, reference
from ..comm import ProcessGroupComm
from ..errors import DistclipError
from .cases import Case, MeshShape, components_of
from .gradients import Unit, units_of

__all__ = ["Answer", "check_case", "find_failure"]


@dataclass(frozen=True, slots=True)
class Answer:
    """Result of one case on one rank.

    Args:
        bits: bytes of the norms, which must be equal on all ranks.
        refusal: name and text of the error of distclip, or None.
        failure: description of the failure, or None.
        is_comparison: whether the call returned on this rank, with another result than expected.
    """

    bits: bytes = b""
    refusal: str | None = None
    failure: str | None = None
    is_comparison: bool = False


def check_case(case: Case) -> Answer:
    """Run a case on this rank. Call it on every rank of a world of `case.num_ranks` gloo ranks.

    Args:
        case: see `random_case`.

    Returns:
        The answer of this rank. `find_failure` compares those of all ranks.

    Collectives: those of a clipper or a function, and those of new meshes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _Run(case).answer()
    except AssertionError as error:
        return Answer(failure=str(error), is_comparison=True)
    except DistclipError as error:
        return Answer(refusal=f"{type(error).__name__}: {error}")
    except Exception as error:
        return Answer(failure=f"{type(error).__name__}: {error}")


def find_failure(case: Case, answers: Sequence[Answer]) -> str | None:
    """Compare the answers of all ranks.

    Returns: Description of the failure, or None.

    >>> from .cases import random_case
    >>> find_failure(random_case(0, 2), [Answer(b"1"), Answer(b"2")])
    'ranks [0, 1] have different bits'
    """
    for rank, answer in enumerate(answers):
        if answer.failure is not None:
            return f"rank {rank}: {answer.failure}"
    refusals = [answer.refusal for answer in answers]
    if any(refusals):
        if not all(refusals):
            return f"only some ranks refuse it: {refusals}"
        return None if case.may_be_refused else f"refused: {refusals[0]}"
    for component in components_of(case):
        if len({answers[rank].bits for rank in component}) > 1:
            return f"ranks {sorted(component)} have different bits"
    return None


@cache
def _mesh(shape: MeshShape) -> DeviceMesh:
    return DeviceMesh("cpu", torch.tensor(shape.ranks).view(shape.shape), mesh_dim_names=tuple(shape.axes))


class _Run:
    """A case on this rank."""

    def __init__(self, case: Case) -> None:
        self.case, self.rank = case, dist.get_rank()
        self.meshes = [_mesh(shape) for shape in case.meshes]
        self.units = units_of(case)
        self.wholes = {unit.name: unit.whole for unit in self.units}
        self.own = [(unit, self._param(unit)) for unit in self.units if unit.coordinates(self.rank) is not None]
        self.options: dict[str, Any] = {}
        if case.split:
            first = self.meshes[0]
            axes = {"pp": first["x"], "tp": first[case.split[1]]} if len(case.split) > 1 else first["x"]
            self.options["split_over"] = axes
        if case.over_world:
            assert dist.group.WORLD is not None
            self.options["comm"] = ProcessGroupComm(dist.group.WORLD)
        pairs = [(unit.param.name, param) for unit, param in self.own]
        self.parameters: Any = pairs if case.named else [param for _, param in pairs]

    def answer(self) -> Answer:
        """Make the call, and compare."""
        case = self.case
        is_finite = all(bool(whole.isfinite().all()) for whole in self.wholes.values())
        if case.per is not None:
            return self._clip(is_finite)
        expected = reference.total_norm(self.wholes.values(), case.norm_type)
        bound = case.fraction * float(expected) if is_finite and expected > 0 else math.inf
        norm = clip_grad_norm_(self.parameters, bound, case.norm_type, **self.options)
        self._check_norms(norm.view(1), expected.view(1))
        if is_finite:
            self._check_grads({name: reference.clip_coefficient(expected, bound) for name in self.wholes})
        return Answer(norm.double().numpy().tobytes())

    def _clip(self, is_finite: bool) -> Answer:
        case, scale = self.case, self.case.loss_scale
        norms = self._norms()
        positive = sorted(n for some in norms.values() for n in some.tolist() if n > 0)
        bound = case.fraction * positive[len(positive) // 2] if is_finite and positive else math.inf
        groups = {"first": f"^{case.params[0].name[0]}"} if case.per == "group" else {}
        policy = NormPolicy(Fixed(bound), case.norm_type, per=case.per or "model", groups=groups, eps=0.0)
        clipper = GradClipper(self.parameters, policy, replicas="raise", **self.options)
        if scale is None:
            report = clipper.clip()
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            scaler.scale(torch.ones(()))
            params = [param for _, param in self.own]
            report = clipper.step(torch.optim.SGD(params, lr=1.0, foreach=False) if params else [], scaler)
        found = report.norms
        if bool(report.skipped) == is_finite:
            return Answer(failure=f"skipped is {bool(report.skipped)}")
        if is_finite:
            self._check_norms(found.sort().values, torch.cat(list(norms.values())).sort().values)
            coefs = {slot: torch.where(some <= bound, 1.0, bound / some) for slot, some in norms.items()}
            self._check_grads({unit.name: coefs[self._slot(unit)] for unit in self.units})
        return Answer(found.numpy().tobytes())

    def _param(self, unit: Unit) -> nn.Parameter:
        """Make the parameter of this rank, with its gradient."""
        param, rank = unit.param, self.rank
        grad = unit.local(rank)
        if grad is not None and self.case.loss_scale is not None:
            grad = grad * self.case.loss_scale
        local = torch.zeros(unit.local_shape(rank), dtype=unit.dtype)
        if param.kind == "dtensor":
            mesh = self.meshes[param.mesh]
            mesh = mesh if param.axes == unit.mesh.axes else mesh[tuple(param.axes)]
            placements = [Replicate() if cut is None else Shard(cut) for cut in param.cuts]
            sums = [
                Partial("avg" if param.mean else "sum") if partial else placement
                for placement, partial in zip(placements, param.partial, strict=True)
            ]
            made = nn.Parameter(self._dtensor(local, unit, mesh, placements))
            made.grad = None if grad is None else self._dtensor(grad, unit, mesh, sums)
            return made
        made = nn.Parameter(local)
        made.grad = grad
        if param.kind == "annotated":
            mesh = self.meshes[param.mesh]
            mesh = mesh if param.axes == unit.mesh.axes else mesh[tuple(param.axes)]
            shards = [Replicate() if cut is None else Shard(cut) for cut in param.cuts]
            annotate_(
                made, mesh, [Partial() if partial else s for s, partial in zip(shards, param.partial, strict=True)]
            )
        elif param.kind == "tagged":
            tags = {"tensor_model_parallel": param.cuts[0] is not None, "partition_dim": param.cuts[0]}
            vars(made).update({name: value for name, value in tags.items() if value is not None})
        return made

    def _dtensor(self, local: Tensor, unit: Unit, mesh: DeviceMesh, placements: Sequence[Any]) -> DTensor:
        shape = torch.Size(unit.param.shape)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)

    def _slot(self, unit: Unit) -> str:
        """Return the name of the slot that a unit counts in."""
        if self.case.per == "group":
            return str(unit.param.name[0] == self.case.params[0].name[0])
        return "model" if self.case.per == "model" else unit.name

    def _norms(self) -> dict[str, Tensor]:
        """Return the norms of every slot: one, or one for each row."""
        p, norms = self.case.norm_type, dict[str, Tensor]()
        for slot, units in itertools.groupby(sorted(self.units, key=self._slot), key=self._slot):
            wholes = [self.wholes[unit.name] for unit in units]
            if self.case.per == "row" and wholes[0].ndim > 1:
                norms[slot] = torch.stack([reference.total_norm([row], p) for row in wholes[0]])
            else:
                norms[slot] = reference.total_norm(wholes, p).view(1)
        if self.case.per == "group":
            norms.setdefault("False", torch.zeros(1, dtype=torch.float64))
        return norms

    def _check_norms(self, found: Tensor, expected: Tensor) -> None:
        # Partial gradients are added up in float32.
        rtol = 2e-5 if any(any(param.partial) for param in self.case.params) else 2e-6
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=0, equal_nan=True)

    def _check_grads(self, factors: dict[str, Tensor]) -> None:
        """Check the gradients of this rank, or the parameters that an optimizer has stepped from 0."""
        for unit, param in self.own:
            factor = factors[unit.name]
            factor = factor.view(-1, *[1] * (len(unit.param.shape) - 1)) if factor.numel() > 1 else factor
            expected = unit.local(self.rank, factor)
            got = param.grad if self.case.loss_scale is None else -param.detach()
            if expected is None or got is None:
                assert expected is None or got is not None, f"{unit.name}: the gradient is gone"
                continue
            local = got.to_local() if isinstance(got, DTensor) else got
            # A factor below the smallest normal float32 has fewer bits.
            before = unit.local(self.rank)
            largest = 0.0 if before is None or not before.numel() else float(before.abs().max())
            rtol = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(local.dtype, 2e-5)
            torch.testing.assert_close(
                local.to(expected.dtype),
                expected,
                rtol=rtol,
                atol=float(torch.finfo(local.dtype).tiny) + largest * 2.0**-149,
                equal_nan=True,
                msg=f"gradient of {unit.name}: {local} in place of {expected}",
            )
