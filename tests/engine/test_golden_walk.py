"""Replay recorded calls: the order of collectives, the bits of every result and the errors, on every rank.

`python -c "from tests.engine.test_golden_walk import main; main()"` records golden_walk.json again, for a change of
behaviour that is intended.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

import distclip
from distclip import GradClipper
from tests.ranks import World, worlds
from tests.tables.layouts import LAYOUTS
from tests.tables.layouts.meshes import world_mesh
from tests.tables.layouts.tensors import dtensor_param, plain_param, random_grad

GOLDEN = Path(__file__).with_name("golden_walk.json")

SCALE = 2.0**10

Step = dict[str, Any]
"""One call on one rank, or on all of them."""

KERNELS_BUILT = any(Path(distclip.__file__).parent.rglob("_native.*"))
"""Availability of the C kernels, without which torch's operators add in another order."""

LAST_BITS = ("norms", "coefs", "coef", "bounds")
"""Float64 results that depend on the order of a sum."""

COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "monitored_barrier",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
)


@contextlib.contextmanager
def recorded_collectives() -> Iterator[list[str]]:
    """Collect the kind and the global ranks of each collective, but not the size of its buffer."""
    walk: list[str] = []

    def recorded(kind: str) -> Callable[..., Any]:
        inner = getattr(dist, kind)

        @functools.wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            ranks = dist.get_process_group_ranks(kwargs.get("group") or dist.group.WORLD)
            walk.append(f"{kind}({','.join(map(str, ranks))})")
            return inner(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for kind in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, kind, recorded(kind)))
        yield walk


class CountingSGD(torch.optim.Optimizer):
    """An optimizer that counts its steps, so that no bit depends on torch's arithmetic."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.num_steps = 0
        self.received: list[str] = []

    def step(self, closure: Any = None) -> None:
        self.num_steps += 1


class CountingFused(CountingSGD):
    """A fused optimizer that records the `grad_scale` and the `found_inf` that a step receives."""

    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor

    def __init__(self, params: Any) -> None:
        super().__init__([{**group, "fused": True} for group in params])

    def step(self, closure: Any = None) -> None:
        scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        self.received.append(f"grad_scale={exact(scale)} found_inf={exact(found_inf)}")
        self.num_steps += 1


def exact(value: Any) -> Any:
    """Return the bits of a number, or of each of several, in a form that JSON can hold."""
    if value is None:
        return None
    if value.dtype == torch.bool:
        return value.tolist()
    bits = [float(v).hex() for v in value.view(-1)]
    if value.ndim == 0:
        return bits[0]
    return bits


def short_hash(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()[:10]


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Model:
    """A row of the table of layouts whose gradients have the same bits on any CPU.

    Replicas stay equal because a new element depends on the sign of the old one and its position in the shard alone.
    The mantissas are full, so that the bits of a sum depend on its order.
    """

    def __init__(self, layout: str) -> None:
        case = LAYOUTS[layout].build()
        self.split_over = case.split_over
        self.module = case.parameters if isinstance(case.parameters, nn.Module) else None
        named = self.module.named_parameters() if self.module is not None else enumerate(case.parameters)
        self.named = [(str(name), param) for name, param in named]
        self.grads = [param.grad for _, param in self.named]
        for (_, param), (number, grad) in zip(self.named, enumerate(self.grads), strict=True):
            for tensor in () if grad is None else (local(grad), local(param.data)):
                values = 1 + (torch.arange(tensor.numel()) * 17 + number * 31) % 61
                values = values.to(tensor.dtype).view(tensor.shape) * 0.0161803
                tensor.copy_(torch.where(tensor > 0, 2.0, -1.0) * values)
        self.values = [None if grad is None else local(grad).clone() for grad in self.grads]

    @property
    def parameters(self) -> Any:
        return self.module if self.module is not None else [param for _, param in self.named]

    @property
    def pairs(self) -> Any:
        return self.module if self.module is not None else self.named

    def fill(self, scale: float = 1.0, *, nan_on: int | None = None) -> None:
        """Write the gradients of a call, with a NaN on one rank."""
        for (_, param), grad, values in zip(self.named, self.grads, self.values, strict=True):
            # DTensor's own operators would add up a Partial gradient.
            if grad is not None:
                local(grad).copy_(values * scale)
            param.grad = grad
        if nan_on == dist.get_rank():
            grads = [local(p.grad) for _, p in self.named if p.grad is not None]
            next(grad for grad in grads if grad.numel()).view(-1)[0] = float("nan")

    def hash(self) -> str | None:
        """Return a hash of this rank's gradients, None if the call has removed all of them."""
        grads = [local(p.grad) for _, p in self.named if p.grad is not None]
        return short_hash(b"".join(grad.contiguous().numpy().tobytes() for grad in grads)) if grads else None

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [param for _, param in self.named]}]

    def clipper(self, policy: Any, **options: Any) -> GradClipper:
        return GradClipper(self.pairs, policy, split_over=self.split_over, **options)


def recorded(call: Callable[[], Any], model: Model) -> Step:
    """Record one call on this rank."""
    step: Step = {"collectives": "", "error": None, "message": None}
    result = None
    with recorded_collectives() as walk, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call()
        except Exception as error:
            step["error"], step["message"] = type(error).__name__, str(error)
        else:
            if isinstance(result, Tensor):
                step["norm"] = exact(result)
            elif result is not None:
                fields = ("norm", "coef", "norms", "coefs", "bounds", "clipped", "finite", "skipped")
                step |= {field: exact(getattr(result, field)) for field in fields}
    step["collectives"] = " ".join(walk)
    if result is not None or step["error"]:
        step["grads"] = model.hash()
    step["warnings"] = [warning.category.__name__ for warning in caught]
    return step


class Calls:
    """The calls of one job, by name."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.steps: dict[str, Step] = {}

    def record(self, name: str, call: Callable[[], Any]) -> Step:
        self.steps[name] = recorded(call, self.model)
        return self.steps[name]

    def record_clipper(self, name: str, policy: Any, way: str, nan_on: int | None = None, **options: Any) -> None:
        """Record two calls of a new clipper, the first one with a NaN on the rank `nan_on`.

        Args:
            name: of the record.
            policy: of the clipper.
            way: words: "clip" or "step", then "fused" and "scaler".
            nan_on: rank, or None.
            options: of the clipper.
        """
        model, words = self.model, way.split()
        clipper: list[GradClipper] = []
        self.record(f"{name}, bind", lambda: clipper.append(model.clipper(policy, **options)))
        optimizer = (CountingFused if "fused" in words else CountingSGD)(model.groups())
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE) if "scaler" in words else None
        if scaler is not None:
            scaler.scale(torch.ones(()))

        def call() -> Any:
            if "step" in words:
                return clipper[0].step(optimizer, scaler)
            return clipper[0].clip() if scaler is None else clipper[0].clip(optimizer, scaler)

        for number in (1, 2):
            model.fill(1.0 if scaler is None else scaler.get_scale(), nan_on=nan_on if number == 1 else None)
            step = self.record(f"{name}, call {number}", call)
            if scaler is not None:
                if "clip" in words:
                    scaler.step(optimizer)
                scaler.update()
                step["scale"] = scaler.get_scale()
            step |= {"num_steps": optimizer.num_steps, "received": optimizer.received[:]}
            step["num_skipped"] = clipper[0].skipped
            step["incidents"] = [f"{i.action}: {', '.join(map(str, i.culprits))}" for i in clipper[0].incidents]


WAYS = ["clip", "step", "step fused", "clip scaler", "step scaler", "step fused scaler"]


def finite(layout: str) -> dict[str, Step]:
    """Record every way to clip finite gradients."""
    model = Model(layout)
    calls = Calls(model)
    for max_norm in (1.0, float("inf")):
        for norm_type in (2.0, float("inf")):
            model.fill()
            calls.record(
                f"clip_grad_norm_, max_norm={max_norm}, p={norm_type}",
                lambda max_norm=max_norm, norm_type=norm_type: distclip.clip_grad_norm_(
                    model.parameters, max_norm, norm_type, split_over=model.split_over
                ),
            )
    for way in WAYS:
        calls.record_clipper(f"global_norm, {way}", distclip.global_norm(1.0), way)
    for name, policy in [
        ("per_tensor_norm", distclip.per_tensor_norm(0.5)),
        ("agc", distclip.agc(0.1)),
        ("value", distclip.value(0.5)),
    ]:
        calls.record_clipper(f"{name}, clip", policy, "clip")
    return calls.steps


def nonfinite(layout: str) -> dict[str, Step]:
    """Record calls with a NaN on one rank."""
    model = Model(layout)
    calls = Calls(model)
    for error_if_nonfinite in (False, True):
        model.fill(nan_on=1)
        calls.record(
            f"clip_grad_norm_, error_if_nonfinite={error_if_nonfinite}",
            lambda error_if_nonfinite=error_if_nonfinite: distclip.clip_grad_norm_(
                model.parameters, 1.0, error_if_nonfinite=error_if_nonfinite, split_over=model.split_over
            ),
        )
    for action in ("skip", "zero", "propagate", "raise"):
        for way in ("clip", "step", "step fused", "step scaler", "step fused scaler"):
            name = f"on_nonfinite={action}, {way}"
            calls.record_clipper(name, distclip.global_norm(1.0), way, nan_on=1, on_nonfinite=action)
    return calls.steps


def failures(layout: str) -> dict[str, Step]:
    """Record calls in which rank 1 alone fails."""
    model = Model(layout)
    calls, here = Calls(model), dist.get_rank() == 1

    def interrupted() -> Iterator[Tensor]:
        yield from model.parameters[:1]
        raise KeyError("no such layer")

    def clip(parameters: Any = None, max_norm: float = 1.0) -> Tensor:
        parameters = model.parameters if parameters is None else parameters
        return distclip.clip_grad_norm_(parameters, max_norm, split_over=model.split_over)

    model.fill()
    # The first call with a mesh, the calls after it, and a call that nothing is wrong with.
    for when in ("first", "later"):
        calls.record(f"max_norm=-1, {when}", lambda: clip(max_norm=-1.0 if here else 1.0))
        model.fill()
        calls.record(f"nothing wrong, {when}", clip)
        model.fill()
        # Without an axis, a rank without parameters finds no other rank.
        if model.split_over is not None:
            calls.record(f"interrupted parameters, {when}", lambda: clip(interrupted() if here else None))
    calls.record("policy='clip'", lambda: model.clipper("clip" if here else distclip.agc()))
    calls.record(
        "on_nonfinite='ignore'", lambda: model.clipper(distclip.agc(), on_nonfinite="ignore" if here else "skip")
    )

    clipper, optimizer = model.clipper(distclip.global_norm(1.0)), CountingSGD(model.groups())
    calls.record("optimizer=3, first", lambda: clipper.step(3 if here else optimizer))
    calls.record("optimizer, nothing wrong", lambda: clipper.step(optimizer))
    model.fill()
    calls.record("optimizer=3, later", lambda: clipper.step(3 if here else optimizer))
    calls.record("scaler=3", lambda: clipper.step(optimizer, 3 if here else torch.amp.GradScaler("cpu")))
    calls.record("scaler without a loss", lambda: clipper.step(optimizer, torch.amp.GradScaler("cpu")))

    # A failure in the middle of measuring: bounds of elements cannot be compared with a complex gradient.
    odd = plain_param(random_grad(3))
    pairs = [*model.named, ("odd", odd)]
    by_value = GradClipper(pairs, distclip.value(1.0), split_over=model.split_over)
    calls.record("measuring, nothing wrong", by_value.clip)
    model.fill()
    if here:
        odd.grad, odd.main_grad = None, torch.complex(random_grad(3), random_grad(3))
    calls.record("measuring a complex gradient", by_value.clip)
    return calls.steps


def wider(layout: str) -> dict[str, Step]:
    """Record plain stages first, and then parameters whose mesh reaches another pipeline too."""
    model = Model(layout)
    calls, mesh = Calls(model), world_mesh("pp", "dp")
    model.fill()
    stage = plain_param(torch.arange(3.0) + dist.get_rank())
    param = dtensor_param(random_grad(6, 4, seed=mesh.get_local_rank("pp")), mesh["dp"], [Shard(0)])
    for name, parameters in [("narrow", [stage]), ("wide", [stage, param] if dist.get_rank() < 2 else [stage])]:
        for number in (1, 2):
            calls.record(
                f"{name}, call {number}",
                lambda parameters=parameters: distclip.clip_grad_norm_(parameters, float("inf"), split_over=mesh["pp"]),
            )
    clipper = GradClipper([("stage", stage)], distclip.global_norm(1.0), split_over=mesh["pp"])
    calls.record("clipper", clipper.clip)
    return calls.steps


JOBS: dict[str, Callable[[str], dict[str, Step]]] = {job.__name__: job for job in (finite, nonfinite, failures, wider)}

CASES = [
    ("finite", "ddp", 1),
    ("finite", "ddp", 4),
    ("finite", "fsdp2", 4),
    ("finite", "fsdp2_one_rank_without", 4),
    ("finite", "hsdp", 4),
    ("finite", "fsdp2_tp", 4),
    ("finite", "tp_plain_norm", 4),
    ("finite", "experts", 4),
    ("finite", "experts_plain", 4),
    ("finite", "stages", 4),
    ("finite", "stages_fsdp2", 4),
    ("finite", "fsdp1_full_shard_orig", 4),
    ("finite", "partial", 4),
    ("finite", "partial_missing_on_one", 4),
    ("finite", "many_meshes", 4),
    ("finite", "crossing_axes", 4),
    ("nonfinite", "fsdp2", 4),
    ("nonfinite", "stages_fsdp2", 4),
    ("nonfinite", "partial", 4),
    ("failures", "fsdp2", 4),
    ("failures", "stages_fsdp2", 4),
    ("failures", "tp_plain_norm", 4),
    ("wider", "stages", 4),
]
"""(job, layout, number of ranks)."""


def comparable(ranks: list[Step]) -> Step:
    """Return one call of all ranks: what all ranks share once, anything else as {"by rank": [...]}.

    Of a message, only the argument that it names and the rank that it comes from are compared: its wording is free.
    """
    own = {step["message"] for step in ranks if step["message"] and not step["message"].startswith("rank ")}
    for step in ranks:
        if step["message"] is not None:
            for message in own:
                argument = re.match(r"\w+=\S+(?=:)", message)
                step["message"] = step["message"].replace(message, f"{argument[0] if argument else ''} ...".strip())
    compared = [key for step in ranks for key in step if KERNELS_BUILT or key not in LAST_BITS]
    fields = {
        key: values[0] if all(v == values[0] for v in values[1:]) else {"by rank": values}
        for key in dict.fromkeys(compared)
        for values in [[step.get(key) for step in ranks]]
    }
    return {key: value for key, value in fields.items() if value not in (None, [])}


def replay(world: Callable[[int], World], job: str, layout: str, size: int) -> dict[str, Step]:
    """Run a job on every rank and return its calls by name."""
    by_rank = world(size).run(JOBS[job], layout=layout)
    assert all(list(steps) == list(by_rank[0]) for steps in by_rank)
    return {name: comparable([steps[name] for steps in by_rank]) for name in by_rank[0]}


@functools.cache
def golden() -> dict[str, dict[str, Step]]:
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize(("job", "layout", "size"), CASES)
def test_same_walk(world: Callable[[int], World], job: str, layout: str, size: int) -> None:
    expected, walk = golden()[f"{job} {layout} {size}"], replay(world, job, layout, size)
    if not KERNELS_BUILT:
        expected = {name: {k: v for k, v in step.items() if k not in LAST_BITS} for name, step in expected.items()}
    assert list(walk) == list(expected)
    different = {name: (walk[name], expected[name]) for name in walk if not same(walk[name], expected[name])}
    assert not different


def same(step: Step, expected: Step) -> bool:
    """Return whether two steps are equal: to the last bit, except for sums over ranks.

    The order in which a backend adds up an element depends on the length of the buffer, which is no part of the walk.
    """
    if step.keys() != expected.keys():
        return False
    return all(
        (numbers(value) == pytest.approx(numbers(expected[key]), rel=1e-14, nan_ok=True))
        if key in LAST_BITS
        else value == expected[key]
        for key, value in step.items()
    )


def numbers(value: Any) -> list[float]:
    """Return the numbers that `exact` has written, of all ranks."""
    if isinstance(value, dict):
        return [number for rank in value["by rank"] for number in numbers(rank)]
    if value is None:
        return []
    return [float.fromhex(number) for number in ([value] if isinstance(value, str) else value)]


def main() -> None:
    assert KERNELS_BUILT, "Build the C kernels first: pip install -e . with a C compiler."
    with worlds() as world:
        walks = {f"{job} {layout} {size}": replay(world, job, layout, size) for job, layout, size in CASES}
    lines = ",\n".join(
        f" {json.dumps(case)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(step)}" for name, step in walk.items())
        + "\n }"
        for case, walk in walks.items()
    )
    GOLDEN.write_text(f"{{\n{lines}\n}}\n")
