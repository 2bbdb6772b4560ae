"""A step inside a graph: no graph break, no number read on the host, and the numbers of a step outside."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import distclip
from distclip import ArgumentError, GradClipper
from distclip.policies import NormPolicy
from tests.ranks import on_ranks
from tests.tables.layouts.meshes import world_mesh
from tests.tables.layouts.model_parallel import PLAN, Block, _Replicated

NAN = float("nan")

BACKENDS = ("aot_eager", pytest.param("eager", marks=pytest.mark.slow))
"""Backends that compile in seconds. The first one traces autograd as well."""

POLICIES: dict[str, Callable[[], Any]] = {
    "global_norm": lambda: distclip.global_norm(0.1),
    "inf": lambda: distclip.global_norm(0.1, norm_type=float("inf")),
    "median_mad": lambda: distclip.median_mad(warmup=2, skip=True, watch="loss"),
    "zclip": lambda: distclip.zclip(warmup=2, cap=1.0),
    "per_tensor": lambda: distclip.per_tensor_norm(0.05),
    "group": lambda: distclip.group_norm({"head": ("^2", 0.05)}, 0.1),
    "adagc": lambda: distclip.adagc(cap=1.0),
    "value": lambda: distclip.value(0.01),
}


@pytest.fixture(autouse=True)
def graphs_of_backward() -> Any:
    """Let torch.compile trace `loss.backward()`, and forget what earlier tests have compiled."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def compiled(function: Any, backend: str) -> Any:
    return torch.compile(function, fullgraph=True, backend=backend)


def values_of(tensors: Any) -> list[list[float]]:
    """Return the numbers of tensors, with 0 for NaN."""
    return [(t.to_local() if isinstance(t, DTensor) else t).detach().double().nan_to_num().tolist() for t in tensors]


def fields_of(report: distclip.Report) -> dict[str, Any]:
    """Return the numbers of a report."""
    names = ("norm", "coef", "clipped", "finite", "skipped", "norms", "coefs")
    watch = {name: float(value.nan_to_num()) for name, value in (report.watch or {}).items()}
    return {name: getattr(report, name).double().nan_to_num().tolist() for name in names} | watch


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_functions_of_torch_are_graphs(backend: str) -> None:
    sides = make_model(), make_model()
    for model in sides:
        model(torch.ones(3, 4)).square().sum().backward()
    for arguments in ((0.1, 2.0), (0.01, float("inf")), (1e-3, 1.0)):
        norms = [distclip.clip_grad_norm_(sides[0].parameters(), *arguments)]
        norms.append(compiled(lambda a=arguments: distclip.clip_grad_norm_(sides[1].parameters(), *a), backend)())
        assert torch.equal(*norms)
    distclip.clip_grads_with_norm_(sides[0], 0.5, torch.tensor(2.0))
    compiled(lambda norm: distclip.clip_grads_with_norm_(sides[1], 0.5, norm), backend)(torch.tensor(2.0))
    distclip.clip_grad_value_(sides[0], 1e-5)
    compiled(lambda: distclip.clip_grad_value_(list(sides[1].parameters()), 1e-5), backend)()
    grads = [[param.grad for param in model.parameters()] for model in sides]
    assert values_of(grads[0]) == values_of(grads[1])
    assert torch.equal(compiled(distclip.get_total_norm, backend)(grads[1]), distclip.get_total_norm(grads[0]))


@pytest.mark.parametrize(
    ("policy", "backend"),
    # Those of the other policies are part of the graphs of whole steps.
    [
        *((policy, "eager") for policy in ("inf", "group", "adagc")),
        ("median_mad", "aot_eager"),
        ("per_tensor", "aot_eager"),
    ],
)
def test_clip_is_a_graph(policy: str, backend: str) -> None:
    models = [make_model(), make_model()]
    clippers = [GradClipper(model, POLICIES[policy]()) for model in models]
    clip = compiled(lambda loss: clippers[1].clip(watch={"loss": loss}), backend)
    calls = [lambda loss: clippers[0].clip(watch={"loss": loss}), clip]
    for factor in (1.0, 3.0, 2.0, NAN, 9.0):
        reports = []
        for model, call in zip(models, calls, strict=True):
            model.zero_grad()
            loss = model(torch.ones(3, 4)).square().sum() * factor
            loss.backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reports.append(fields_of(call(loss.detach())))
        assert reports[0] == reports[1], factor
        grads = [[torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()] for model in models]
        assert values_of(grads[0]) == values_of(grads[1])
    assert clippers[0].skipped == clippers[1].skipped > 0
    assert str(clippers[0].state_dict()) == str(clippers[1].state_dict())


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "adam": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.1), fused=True, amsgrad=True, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, fused=True, momentum=0.9),
}


def assert_steps_are_equal(
    make: Callable[[], tuple[nn.Module, Any]],
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    policy: Callable[[], Any],
    backend: str,
    *,
    with_backward: bool = True,
    **options: Any,
) -> None:
    """Assert that steps inside a graph are those outside of it, from the second step on.

    Args:
        make: makes a model and its input.
        make_optimizer: makes an optimizer of its parameters.
        policy: makes a policy.
        backend: of torch.compile.
        with_backward: whether forward and backward are part of the graph.
        options: of the clipper.
    """
    results = []
    for is_graph in (False, True):
        model, inputs = make()
        optimizer = make_optimizer(model.parameters())
        clipper = GradClipper(model, policy(), **options)

        def train(factor: Tensor, model: Any = model, clipper: Any = clipper, inputs: Any = inputs) -> Any:
            loss = model(inputs).square().mean() * factor
            loss.backward()
            return loss.detach()

        def step(loss: Tensor, clipper: Any = clipper, optimizer: Any = optimizer) -> Any:
            return clipper.step(optimizer, watch={"loss": loss, "tokens": (3, "sum"), "top": (loss, "max")})

        def both(factor: Tensor, train: Any = train, step: Any = step) -> Any:
            return step(train(factor))

        in_graph = compiled(both if with_backward else step, backend)
        reports = []
        for i, factor in enumerate((1.0, 1.0, NAN, 1.0, 50.0, 1.0)):
            optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if not is_graph or i == 0:
                    reports.append(fields_of(both(torch.tensor(factor))))
                elif with_backward:
                    reports.append(fields_of(in_graph(torch.tensor(factor))))
                else:
                    reports.append(fields_of(in_graph(train(torch.tensor(factor)))))
        state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        assert clipper.steps == 6
        results.append(
            (reports, values_of(model.parameters()), values_of(state), clipper.skipped, clipper.state_dict())
        )
    assert results[0][3] > 0
    assert results[0][0] == results[1][0]
    assert results[0][1:4] == results[1][1:4]
    assert str(results[0][4]) == str(results[1][4])


@pytest.mark.parametrize(
    ("policy", "optimizer", "backend"),
    [
        *((policy, "adamw", "aot_eager") for policy in ("global_norm", "median_mad")),
        ("zclip", "adam", "aot_eager"),
        ("value", "sgd", "eager"),
        ("per_tensor", "adamw", "eager"),
    ],
)
def test_forward_backward_and_step_are_one_graph(policy: str, optimizer: str, backend: str) -> None:
    assert_steps_are_equal(
        lambda: (make_model(), torch.ones(3, 4)), OPTIMIZERS[optimizer], POLICIES[policy], backend, replicas="warn"
    )


@pytest.mark.slow
def test_inductor_differs_by_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile forward, backward and step by inductor, whose kernels of the model round differently than torch's.

    This shows from the second step on, also if the model alone is compiled, or if torch clips.
    """
    from torch._inductor import config

    # Other processes would import torch before they compile.
    monkeypatch.setattr(config, "compile_threads", 1)
    results = []
    for is_graph in (False, True):
        model, inputs = make_model(), torch.ones(3, 4)
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        clipper = GradClipper(model, distclip.global_norm(0.1))

        def step(
            factor: Tensor, model: Any = model, inputs: Any = inputs, clipper: Any = clipper, optimizer: Any = optimizer
        ) -> Any:
            loss = model(inputs).square().mean() * factor
            loss.backward()
            return clipper.step(optimizer, watch={"loss": loss.detach()})

        # The first step makes the state of the optimizer, which the graph needs.
        steps = [step] + 5 * [compiled(step, "inductor") if is_graph else step]
        numbers: list[Tensor] = []
        for call, factor in zip(steps, (1.0, 1.0, NAN, 1.0, 50.0, 1.0), strict=True):
            optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                report = call(torch.tensor(factor))
            numbers += [report.norm.double(), report.coef, report.skipped.double(), report.watch["loss"].double()]
        state = [value for one in optimizer.state.values() for value in one.values()]
        tensors = [torch.stack(numbers), *model.parameters(), *state]
        results.append([tensor.detach().double() for tensor in tensors])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


class Gather(nn.Module):
    """Gather a parameter in forward, and average and scatter its gradient in backward."""

    def forward(self, param: Any) -> Tensor:
        whole: Tensor = param.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial("avg")])
        return whole


def simple_fsdp(model: nn.Module, mesh: Any) -> nn.Module:
    """Shard parameters by a parametrization, as torchtitan's experiment simple_fsdp does, without hooks."""
    for module in list(model.modules()):
        for name, param in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(distribute_tensor(param.data, mesh, [Shard(0)])))
            parametrize.register_parametrization(module, name, Gather(), unsafe=True)
    return model


def model_on_ranks(kind: str) -> tuple[nn.Module, Tensor]:
    """Return a model over all ranks, and the input of this rank."""
    if kind == "ddp":
        return DistributedDataParallel(make_model()), torch.ones(3, 4) * (1 + dist.get_rank())
    if kind == "fsdp2":
        model = make_model()
        fully_shard(model, mesh=world_mesh("dp")["dp"])
        return model, torch.ones(3, 4) * (1 + dist.get_rank())
    if kind == "simple_fsdp":
        return simple_fsdp(make_model(), world_mesh("dp")["dp"]), torch.ones(3, 4) * (1 + dist.get_rank())
    mesh = world_mesh("dp", "tp")
    block = parallelize_module(Block(), mesh["tp"], PLAN)
    parallelize_module(block.norm, mesh["tp"], _Replicated())
    fully_shard(block, mesh=mesh["dp"])
    return block, torch.ones(2, 4, 8) * (1 + mesh["dp"].get_local_rank())


@pytest.mark.parametrize(
    ("kind", "num_ranks", "backend"), [("ddp", 2, "eager"), ("fsdp2", 2, "aot_eager"), ("fsdp2_tp", 4, "eager")]
)
@on_ranks()
def test_step_on_ranks_is_a_graph(kind: str, backend: str) -> None:
    torch._dynamo.reset()
    options: dict[str, Any] = {"replicas": "warn", "with_backward": False}
    make = functools.partial(model_on_ranks, kind)
    assert_steps_are_equal(make, OPTIMIZERS["adamw"], POLICIES["median_mad"], backend, **options)


@pytest.mark.slow
@on_ranks(2)
def test_forward_backward_and_step_on_ranks_are_one_graph() -> None:
    torch._dynamo.reset()
    make = functools.partial(model_on_ranks, "simple_fsdp")
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        assert_steps_are_equal(make, OPTIMIZERS["adamw"], POLICIES["median_mad"], "aot_eager", replicas="warn")


@pytest.mark.slow
@on_ranks(2)
def test_the_function_of_torch_on_ranks_is_a_graph() -> None:
    torch._dynamo.reset()
    results = []
    for is_graph in (False, True):
        model, inputs = model_on_ranks("fsdp2")
        model(inputs).square().sum().backward()
        params = list(model.parameters())
        clip, measure = distclip.clip_grad_norm_, distclip.get_total_norm
        if is_graph:
            clip, measure = compiled(clip, "eager"), compiled(measure, "eager")
        # All arguments by position, as torch's own callers pass them: p is not a bound, and foreach no flag of errors.
        grads = [param.grad for param in params]
        norms = [float(measure(grads, p, False, True)) for p in (2.0, float("inf"), -float("inf"))]
        norms += [float(clip(params, 0.1, 1.0, False, True)), float(clip(params, 0.01, float("inf")))]
        results.append((norms, values_of([param.grad for param in params])))
    assert results[0] == results[1]


@pytest.mark.parametrize("function", ["clip_grad_norm_", "GradClipper.clip"])
def test_what_a_graph_contains(function: str) -> None:
    model = make_model()
    params = list(model.parameters())
    grads = [torch.full_like(param, 0.5) for param in params]
    clipper = GradClipper(model, distclip.median_mad(warmup=1))

    def clip(*grads: Tensor) -> Tensor:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        return distclip.clip_grad_norm_(params, 0.1) if function == "clip_grad_norm_" else clipper.clip().norm

    mode = "fake" if function == "clip_grad_norm_" else "real"
    graph = make_fx(clip, tracing_mode=mode)(*grads)
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert targets.count("distclip.power_sums.default") == targets.count("distclip.scale_.default") == 1
    assert not [target for target in targets if ".item" in target or "_local_scalar_dense" in target]
    norm = graph(*(4 * grad for grad in grads))
    assert float(norm) == pytest.approx(2.0 * sum(param.numel() for param in params) ** 0.5)


class Clip(nn.Module):
    """Give tensors their gradients, and call one of the functions of torch."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *grads: Tensor) -> list[Tensor]:
        tensors = [torch.empty_like(grad) for grad in grads]
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = grad.clone()
        norm = grads[0].sum()
        if self.name == "clip_grad_norm_":
            norm = distclip.clip_grad_norm_(tensors, 0.5, 3.0, False, None)
        elif self.name == "get_total_norm":
            norm = distclip.get_total_norm([tensor.grad for tensor in tensors], -float("inf"))  # type: ignore[arg-type]
        elif self.name == "clip_grads_with_norm_":
            distclip.clip_grads_with_norm_(tensors, 0.5, norm.double())
        else:
            distclip.clip_grad_value_(tensors, 0.1)
        return [norm, *(tensor.grad for tensor in tensors)]  # type: ignore[list-item]


def traced(way: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> Any:
    """Return the graph of a module, which one of torch's tracers has found."""
    if way.startswith("export"):
        return torch.export.export(module, arguments, strict=way == "export strict").module()
    mode, _, above_autograd = way.partition(" ")
    return make_fx(module, tracing_mode=mode, pre_dispatch=bool(above_autograd))(*arguments)


@pytest.mark.parametrize("way", ["real", "fake", "symbolic", "real before autograd", "export", "export strict"])
def test_the_functions_of_torch_are_graphs_of_every_tracer(way: str) -> None:
    seen = tuple(torch.full((3, 2), value) for value in (0.5, 0.25))
    other = tuple(torch.arange(6.0).view(3, 2) + 1 + i for i in range(2))
    names = ("clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_", "clip_grad_value_")
    # The strict way is slow, and it is that of torch.compile, which has tests of all four.
    for name in names[:1] if way == "export strict" else names:
        module = Clip(name)
        found, expected = traced(way, module, seen)(*other), module(*other)
        assert all(map(torch.equal, found, expected)), name


@pytest.mark.parametrize("way", ["real", "fake", "symbolic", "real before autograd", "export", "export strict"])
def test_a_clipper_is_a_graph_of_real_tensors_or_refuses(way: str) -> None:
    """Trace `clip` with a policy that has state, whose numbers go on from one call of the graph to the next."""

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()
            # A list, because torch.export looks for tensors in the attributes of a module.
            self.clippers = [GradClipper(self.model, distclip.ema(1.5, cap=1.0))]

        def forward(self, *grads: Tensor) -> Tensor:
            for param, grad in zip(self.model.parameters(), grads, strict=True):
                param.grad = grad.clone()
            return self.clippers[0].clip().coefs.clone()

    sides = Step(), Step()
    grads = tuple(torch.ones_like(param) for param in sides[0].model.parameters())
    reasons = {"fake": "real tensors", "symbolic": "real tensors", "export": "strict=True"}
    if way in reasons:
        with pytest.raises(ArgumentError, match=reasons[way]):
            traced(way, sides[1], grads)
        return
    with warnings.catch_warnings():
        # torch names the attributes that the graph changes.
        warnings.filterwarnings("ignore", "While compiling, we found certain side effects")
        graph = traced(way, sides[1], grads)
    # A tracer of real tensors has run the step once, and torch.export has not.
    if not way.startswith("export"):
        sides[0](*grads)
    for factor in (2.0, 0.01, 5.0):
        several = tuple(grad * factor for grad in grads)
        assert torch.equal(graph(*several), sides[0](*several))


def test_reasons_against_a_graph() -> None:
    model = make_model()
    assert GradClipper(model, distclip.global_norm(1.0)).capturable() is True
    for options, word in [
        ({"on_nonfinite": "raise"}, "on_nonfinite"),
        ({"on_nonfinite": "zero"}, "on_nonfinite"),
        ({"max_skips": 3}, "max_skips"),
        ({"isolate": True}, "isolated"),
    ]:
        reasons = GradClipper(model, distclip.global_norm(1.0), **options).capturable()  # type: ignore[arg-type]
        assert isinstance(reasons, list)
        assert word in reasons[0]
    clipper = GradClipper(model, distclip.global_norm(1.0))
    clipper.observe(lambda outcome: None)
    assert "observers" in clipper.capturable()[0]  # type: ignore[index]
    assert "moments" in GradClipper(model, distclip.update_clip(1.0)).capturable()[0]  # type: ignore[index]
    assert "per row" in GradClipper(model, distclip.agc(0.1)).capturable()[0]  # type: ignore[index]
    model(torch.ones(3, 4)).sum().backward()
    with pytest.raises(Exception, match="observers"):
        compiled(clipper.clip, "eager")()


def test_a_graph_before_the_first_step_is_refused() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    clipper = GradClipper(model, distclip.global_norm(1.0))
    model(torch.ones(3, 4)).sum().backward()
    with pytest.raises(Exception, match="has made no step"):
        compiled(lambda: clipper.step(optimizer), "eager")()
    plain = torch.optim.AdamW(model.parameters())
    with pytest.raises(Exception, match="not fused"):
        compiled(lambda: clipper.step(plain), "eager")()


def test_steps_outside_of_graphs_go_on_from_those_inside() -> None:
    model = make_model()
    clipper = GradClipper(model, NormPolicy(distclip.median_mad(warmup=2).threshold))
    clip = compiled(clipper.clip, "eager")
    for step in range(6):
        model.zero_grad()
        (model(torch.ones(3, 4)).square().sum() * (step + 1)).backward()
        (clip if step % 2 else clipper.clip)()
        assert clipper.steps == step + 1
    assert int(clipper._engine.state["count"][0]) == 6
    clip()
    with pytest.raises(ArgumentError, match="discard"):
        clipper.discard()


def test_calls_that_no_graph_can_contain_run_outside_of_it() -> None:
    model = make_model()
    clipper = GradClipper(model, distclip.global_norm(1.0), on_nonfinite="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls: list[Callable[[], Any]] = [
        clipper.clip,
        lambda: clipper.step(optimizer),
        lambda: distclip.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True),
    ]
    for i, call in enumerate(calls):

        def train(call: Any = call) -> Any:
            model(torch.ones(3, 4)).square().sum().backward()
            call()
            return [param.grad for param in model.parameters()]

        torch._dynamo.reset()
        model.zero_grad()
        grads = torch.compile(train, backend="eager")()
        assert float(distclip.get_total_norm(grads)) == pytest.approx(1.0, rel=1e-4)
        assert clipper.steps == min(i + 1, 2)
    with pytest.raises(ArgumentError, match="max_norm=-1"):
        torch.compile(lambda: distclip.clip_grad_norm_(model.parameters(), -1), backend="eager")()
    with pytest.raises(Exception, match="error_if_nonfinite=True needs the host"):
        compiled(lambda: distclip.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True), "eager")()
