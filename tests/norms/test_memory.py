"""Clip gradients that share memory, repeat elements or are lazily negated, each as if it were alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.two_tensor import TwoTensor

import distclip
from distclip import GradClipper, LayoutError
from distclip.norms import memory
from tests.ranks import on_ranks
from tests.rig import assert_raises_on_ranks
from tests.tables.layouts.meshes import world_mesh

GRADIENTS: dict[str, Callable[[], list[Tensor]]] = {
    "one tensor twice": lambda: [g := torch.randn(6), g],
    "one tensor three times, and another": lambda: [g := torch.randn(6), torch.randn(2), g, g],
    "one memory, two tensors": lambda: [g := torch.randn(6), g.view(2, 3)],
    "a part of another": lambda: [g := torch.randn(8), g[2:5]],
    "the whole after its parts": lambda: [g[:3], g[3:], g] if (g := torch.randn(6)) is not None else [],
    "overlapping ends": lambda: [g[:5], g[3:]] if (g := torch.randn(8)) is not None else [],
    "a row and a column": lambda: [g[1], g[:, 2]] if (g := torch.randn(4, 4)) is not None else [],
    "two dtypes": lambda: [g := torch.randn(8).bfloat16(), g.view(torch.float16)[2:6]],
    "transposed": lambda: [g := torch.randn(3, 4), g.t()],
    "expanded": lambda: [torch.randn(3), torch.tensor(10.0).expand(4), torch.tensor([[5.0], [1.0]]).expand(2, 3)],
    "sliding windows": lambda: [torch.randn(8).unfold(0, 3, 1)],
    "negated": lambda: [torch.tensor([3 + 4j, 1j]).conj().imag, torch.tensor([2j]).conj().imag, torch.randn(3)],
    "negated and dense": lambda: [torch._neg_view(torch.randn(5)), torch.randn(3)],
    "conjugated": lambda: [torch.randn(3, dtype=torch.complex64).conj(), torch.randn(3)],
    "half precision": lambda: [g := torch.randn(6).half(), g],
    "empty": lambda: [g := torch.randn(4), g[2:2], g[1:1], torch.randn(0)],
    "inference": lambda: [made_in_inference_mode(), torch.randn(3)],
}
"""Gradients by what is unusual about their memory."""

DISJOINT: dict[str, Callable[[], list[Tensor]]] = {
    "buckets": lambda: list(torch.randn(12).split([3, 4, 5])),
    "columns": lambda: list(torch.randn(4, 6).split(2, 1)),
    "every other element": lambda: [g[::2], g[1::2]] if (g := torch.randn(8)) is not None else [],
    "gaps": lambda: [torch.randn(4, 6)[:, :2], torch.randn(3)],
    "dims in another order": lambda: [torch.randn(2, 3, 4).permute(2, 0, 1), torch.randn(3)],
}
"""Gradients whose elements all have different addresses."""


def made_in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.randn(4)


def make_parameters(grads: Sequence[Tensor]) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def wide(grad: Tensor) -> Tensor:
    return grad.detach().clone().to(torch.complex128 if grad.is_complex() else torch.float64)


def norm_of(grads: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(grad.abs().square().sum()) for grad in grads))


def check_clipped(grads: Sequence[Tensor], policy: Any) -> list[nn.Parameter]:
    """Clip by a policy of bound 1, and compare with the formulas in float64."""
    params, before = make_parameters(grads), [wide(grad) for grad in grads]
    named = [(f"p{i}", param) for i, param in enumerate(params)]
    GradClipper(named, policy).clip()
    whole = min(1.0, 1 / (norm_of(before) + 1e-6))
    for param, old in zip(params, before, strict=True):
        if policy.spec.limits is not None:
            expected = old.clamp(-1, 1)
        else:
            expected = old * (whole if policy.spec.per == "model" else min(1.0, 1 / (norm_of([old]) + 1e-6)))
        tolerance = 1e-2 if param.dtype in (torch.float16, torch.bfloat16) else 1e-5
        torch.testing.assert_close(wide(param.grad), expected, rtol=tolerance, atol=1e-7)
    return params


@pytest.mark.parametrize("policy", [distclip.global_norm(1.0), distclip.per_tensor_norm(1.0), distclip.value(1.0)])
@pytest.mark.parametrize("name", [*GRADIENTS, *DISJOINT])
def test_clips_each_gradient_as_if_it_were_alone(name: str, policy: Any) -> None:
    grads = (GRADIENTS | DISJOINT)[name]()
    if policy.spec.limits is not None and any(grad.is_complex() for grad in grads):
        pytest.skip("complex numbers have no order")
    check_clipped(grads, policy)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("name", [*GRADIENTS, *DISJOINT])
def test_drop_ins(name: str, foreach: bool | None) -> None:
    grads = (GRADIENTS | DISJOINT)[name]()
    params, before = make_parameters(grads), [wide(grad) for grad in grads]
    norm = distclip.clip_grad_norm_(params, 1.0, foreach=foreach)
    assert float(norm) == pytest.approx(norm_of(before), rel=1e-5)
    left = float(distclip.get_total_norm([p.grad for p in params]))
    assert left == pytest.approx(min(1.0, norm_of(before)), rel=1e-2)
    for param, grad in zip(params, (GRADIENTS | DISJOINT)[name](), strict=True):
        param.grad = grad
    before = [wide(param.grad) for param in params]
    distclip.clip_grads_with_norm_(params, 1.0, torch.tensor(norm_of(before)), foreach=foreach)
    assert norm_of([wide(param.grad) for param in params]) == pytest.approx(min(1.0, norm_of(before)), rel=1e-2)
    if not any(grad.is_complex() for grad in grads):
        distclip.clip_grad_value_(params, 0.1, foreach=foreach)
        assert max(float(param.grad.abs().max()) for param in params if param.numel()) <= 0.1001


@st.composite
def views_of_one_buffer(draw: st.DrawFn) -> list[tuple[list[int], list[int], int]]:
    """Draw (size, stride, offset) of some gradients in a buffer of 48 elements."""
    views = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
        stride = [draw(st.integers(0, 7)) for _ in size]
        reach = sum(max(0, n - 1) * s for n, s in zip(size, stride, strict=True))
        views.append((size, stride, draw(st.integers(0, 47 - reach))))
    return views


@settings(max_examples=150)
@given(views_of_one_buffer(), st.sampled_from(["model", "tensor"]))
def test_any_views_of_one_buffer(views: list[tuple[list[int], list[int], int]], per: str) -> None:
    buffer = torch.arange(1.0, 49.0)
    grads = [buffer.as_strided(*view) for view in views]
    used: set[int] = set()
    disjoint = True
    for grad in grads:
        addresses = torch.arange(48).as_strided(grad.shape, grad.stride(), grad.storage_offset()).flatten().tolist()
        disjoint &= len(set(addresses)) == len(addresses) and used.isdisjoint(addresses)
        used.update(addresses)
    params = check_clipped(grads, distclip.global_norm(1.0) if per == "model" else distclip.per_tensor_norm(1.0))
    if disjoint and all(overlap_is_known(grad) for grad in grads):
        assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))


def overlap_is_known(grad: Tensor) -> bool:
    """Return whether the strides alone show that no element repeats: each is longer than the dims within it."""
    reach = 1
    for stride, size in sorted(zip(grad.stride(), grad.shape, strict=True)):
        if size > 1 and stride < reach:
            return False
        reach += stride * (size - 1)
    return True


@pytest.mark.parametrize("name", DISJOINT)
def test_gradients_with_own_elements_stay_where_they_are(name: str) -> None:
    grads = DISJOINT[name]()
    addresses = [grad.data_ptr() for grad in grads]
    params = make_parameters(grads)
    distclip.clip_grad_norm_(params, 1e-3)
    assert [param.grad.data_ptr() for param in params] == addresses
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))


def test_only_one_gradient_is_copied() -> None:
    """The first keeps its memory, because another program may refer to it."""
    grad = torch.randn(4)
    one, two = make_parameters([grad, grad])
    distclip.clip_grad_norm_([one, two], 1.0)
    assert one.grad is grad
    assert two.grad is not grad


def test_addresses_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    overlap = memory._overlap
    monkeypatch.setattr(memory, "_overlap", lambda *columns: calls.append(1) or overlap(*columns))
    params = make_parameters([torch.randn(3) for _ in range(5)])
    clipper = GradClipper(params, distclip.global_norm(1.0))
    for _ in range(3):
        clipper.clip()
    assert len(calls) == 1
    params[2].grad = params[1].grad
    clipper.clip()
    assert len(calls) > 1
    assert params[2].grad is not params[1].grad


@on_ranks(2)
def test_shards_that_share_memory() -> None:
    mesh = world_mesh("dp")
    grad = torch.arange(1.0, 7.0)
    params = [nn.Parameter(DTensor.from_local(torch.zeros(3), mesh, [Shard(0)])) for _ in range(2)]
    local = grad.chunk(2)[dist.get_rank()].clone()
    for param in params:
        param.grad = DTensor.from_local(local, mesh, [Shard(0)])
    named = [("one", params[0]), ("two", params[1])]
    GradClipper(named, distclip.per_tensor_norm(1.0)).clip()
    for param in params:
        assert param.grad.placements == (Shard(0),)
        torch.testing.assert_close(param.grad.full_tensor(), grad / grad.norm())


@on_ranks(2)
def test_odd_gradient_on_one_rank() -> None:
    """A gradient that has to be copied on one rank changes nothing for the other."""
    mesh = world_mesh("pp")
    grad = torch.full((4,), 10.0) if dist.get_rank() == 0 else torch.tensor(10.0).expand(4)
    (param,) = make_parameters([grad])
    distclip.clip_grad_norm_([param], 1.0, split_over=mesh["pp"])
    torch.testing.assert_close(param.grad, torch.full((4,), 8**-0.5))


# ---- Gradients that cannot be clipped ----


class Named(torch.Tensor):
    """Overrides nothing that computes."""


class Packed(torch.Tensor):
    """Supports few operators, as quantized tensors do."""

    operators: tuple[Any, ...] = (torch.ops.aten.detach.default,)
    codes: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    def __repr__(self) -> str:
        return "Packed"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in cls.operators:
            return cls(args[0].codes)
        raise NotImplementedError(f"{func} of packed weights")


class Forgetful(Packed):
    """Accepts every operator and does nothing."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0]


class Sum(Packed):
    """Computes with the sum of two tensors, so that what is written to the sum is lost."""

    def __init__(self, codes: Tensor) -> None:
        self.codes, self.other = codes, codes.clone()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Sum:
        return Sum(inner["codes"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        one, *rest = (arg.codes + arg.other if isinstance(arg, Sum) else arg for arg in args)
        return func(one, *rest, **(kwargs or {}))


REFUSED: dict[str, Callable[[], Tensor]] = {
    "few operators": lambda: Packed(torch.ones(4, dtype=torch.int8)),
    "operators that do nothing": lambda: Forgetful(torch.ones(4, dtype=torch.int8)),
    "writes that are lost": lambda: Sum(torch.ones(4)),
    "meta": lambda: torch.ones(4, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(2)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(2)], layout=torch.jagged),
    "float8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "masked": lambda: torch.masked.masked_tensor(torch.ones(4), torch.tensor([True, False, True, True])),
}


def parameter_with(grad: Tensor) -> nn.Parameter:
    """Make a parameter whose gradient torch would not let a program assign."""
    param = nn.Parameter(torch.zeros(4))
    object.__setattr__(param, "main_grad", grad)
    return param


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name_before_anything_is_written(name: str) -> None:
    (other,) = make_parameters([torch.full((3,), 10.0)])
    named = [("other", other), ("odd", parameter_with(REFUSED[name]()))]
    for clip in (
        lambda: distclip.clip_grad_norm_(named, 1.0),
        lambda: distclip.clip_grads_with_norm_(named, 1.0, torch.tensor(20.0)),
        lambda: distclip.clip_grad_value_(named, 1.0),
        lambda: GradClipper(named, distclip.per_tensor_norm(1.0)).clip(),
    ):
        with pytest.raises(LayoutError, match="odd"):
            clip()
        assert torch.equal(other.grad, torch.full((3,), 10.0))


@on_ranks(2)
def test_all_ranks_refuse_together() -> None:
    mesh = world_mesh("pp")
    (param,) = make_parameters([torch.full((4,), 10.0)])
    odd = [("odd", parameter_with(REFUSED["few operators"]()))] if dist.get_rank() == 1 else []
    named = [("param", param), *odd]
    assert_raises_on_ranks(
        lambda: distclip.clip_grad_norm_(named, 1.0, split_over=mesh["pp"]), LayoutError, "odd", unchanged=param.grad
    )
    distclip.clip_grad_norm_([("param", param)], 1.0, split_over=mesh["pp"])


def test_classes_that_only_override_functions_are_clipped() -> None:
    (param,) = make_parameters([torch.tensor([3.0, 4.0]).as_subclass(Named)])
    distclip.clip_grad_norm_([param], 1.0)
    torch.testing.assert_close(param.grad.as_subclass(Tensor), torch.tensor([0.6, 0.8]))


def test_classes_whose_operators_work_are_clipped() -> None:
    param = nn.Parameter(TwoTensor(torch.zeros(3), torch.zeros(3)))
    param.grad = TwoTensor(torch.full((3,), 10.0), torch.full((3,), 10.0))
    (other,) = make_parameters([torch.full((2,), 10.0)])
    distclip.clip_grad_norm_([param, other], 1.0)
    torch.testing.assert_close(param.grad.a, torch.full((3,), 5**-0.5))
    torch.testing.assert_close(other.grad, torch.full((2,), 5**-0.5))


def test_refuses_jagged_parameters_where_shapes_matter() -> None:
    """A frozen one has no slot."""
    (other,) = make_parameters([torch.full((3,), 10.0)])
    odd = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    with pytest.raises(LayoutError, match="odd is a NestedTensor"):
        GradClipper([("other", other), ("odd", odd.requires_grad_())], distclip.per_tensor_norm(1.0))
    frozen = nn.Parameter(odd.detach(), requires_grad=False)
    assert GradClipper([("other", other), ("odd", frozen)], distclip.per_tensor_norm(1.0)).slots == ("other",)


def test_refuses_weights_that_cannot_be_read() -> None:
    """Only a policy by weights needs them."""
    weight, (other,) = nn.Parameter(Packed(torch.ones(4, 4))), make_parameters([torch.full((3,), 10.0)])
    named = [("weight", weight), ("other", other)]
    with pytest.raises(LayoutError, match="weight is a Packed"):
        GradClipper(named, distclip.agc()).clip()
    assert torch.equal(other.grad, torch.full((3,), 10.0))
    GradClipper(named, distclip.per_tensor_norm(1.0)).clip()
    assert float(other.grad.norm()) == pytest.approx(1.0)


def test_refuses_lazy_parameters_where_shapes_matter() -> None:
    module = nn.LazyLinear(3)
    assert GradClipper(module, distclip.global_norm(1.0)).clip().as_dict()["norm"] == 0.0
    with pytest.raises(LayoutError, match="lazy module"):
        GradClipper(module, distclip.agc())


def test_refuses_a_main_grad_that_shares_memory() -> None:
    """A copy would not be what the framework reads."""
    grad = torch.full((4,), 10.0)
    one, two = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    one.main_grad, two.main_grad = grad, grad
    with pytest.raises(LayoutError, match="two"):
        distclip.clip_grad_norm_([("one", one), ("two", two)], 1.0)
    assert torch.equal(grad, torch.full((4,), 10.0))


# ---- Gradients in the memory of a parameter ----

OF_PARAMETERS: dict[str, Callable[[nn.Parameter, nn.Parameter], Tensor]] = {
    "its own": lambda own, other: own.data,
    "its own, transposed": lambda own, other: own.data.t(),
    "another one's": lambda own, other: other.data,
    "overlapping ends": lambda own, other: other.data.as_strided((3, 3), (3, 1), 6),
    "a column too many": lambda own, other: other.data.as_strided((3, 3), (6, 1), 2),
}
"""Gradients by the parameter whose memory they share. The other parameter is every other column of a matrix."""


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("name", OF_PARAMETERS)
def test_refuses_a_gradient_in_the_memory_of_a_parameter(name: str, is_mixed: bool) -> None:
    """Scaling the gradient would scale the parameter."""
    own, other = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 6)[:, ::2])
    named = [("own", own), ("other", other)]
    for _, param in named:
        param.grad = torch.full((3, 3), 10.0)
    if is_mixed:
        # Complex gradients are not read by a kernel.
        named += [("complex", param) for param in make_parameters([torch.ones(2, dtype=torch.complex64)])]
    clipper = GradClipper(named, distclip.per_tensor_norm(1.0))
    clipper.clip()
    own.grad = OF_PARAMETERS[name](own, other)
    before = [tensor.detach().clone() for _, param in named for tensor in (param, param.grad)]
    for clip in (
        clipper.clip,
        lambda: clipper.step(torch.optim.SGD([param for _, param in named], lr=0.1)),
        lambda: distclip.clip_grad_norm_(named, 1.0),
        lambda: distclip.clip_grads_with_norm_(named, 1.0, torch.tensor(20.0)),
        lambda: distclip.clip_grad_value_(named[:2], 1.0),
    ):
        with pytest.raises(LayoutError, match="the gradient of own is in the memory of the parameter o"):
            clip()
        assert all(map(torch.equal, before, [tensor for _, param in named for tensor in (param, param.grad)]))


def test_gradients_between_the_elements_of_a_parameter_are_clipped() -> None:
    matrix = torch.full((3, 6), 10.0)
    param, other = nn.Parameter(matrix[:, ::2]), nn.Parameter(torch.zeros(6))
    param.grad, other.grad = matrix[:, 1::2], torch.zeros(12)[6:]
    assert float(distclip.clip_grad_norm_([param, other], 3.0)) == 30.0
    assert param.data.unique().item() == 10.0
    assert param.grad.unique().item() == pytest.approx(1.0)


# ---- Sparse gradients ----


def repeated_rows() -> tuple[nn.Embedding, Tensor]:
    """Make an embedding whose gradient stores row 0 in three summands, and its true gradient."""
    table = nn.Embedding(3, 2, sparse=True)
    (0.3 * table(torch.tensor([0, 0, 0, 1])).sum()).backward()
    return table, table.weight.grad.to_dense()


def test_sparse_elements_are_clamped_and_not_their_summands() -> None:
    table, true = repeated_rows()
    distclip.clip_grad_value_(table, 0.5)
    torch.testing.assert_close(table.weight.grad.to_dense(), true.clamp(-0.5, 0.5))
    table, _ = repeated_rows()
    assert bool(GradClipper(table, distclip.value(0.5)).clip().clipped)
    torch.testing.assert_close(table.weight.grad.to_dense(), true.clamp(-0.5, 0.5))


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, math.inf])
def test_norms_of_sparse_elements(norm_type: float) -> None:
    table, true = repeated_rows()
    table.weight.grad._values()[0] *= -1
    true = table.weight.grad.to_dense()
    norm = distclip.clip_grad_norm_(table, 0.1, norm_type)
    assert float(norm) == pytest.approx(float(torch.linalg.vector_norm(true, norm_type)), rel=1e-5)
    torch.testing.assert_close(table.weight.grad.to_dense(), true * 0.1 / norm, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::distclip.NonFiniteWarning")
def test_summands_of_a_sparse_element_that_overflow() -> None:
    """Each summand is finite in float16, and their sum is not."""
    grad = torch.sparse_coo_tensor(
        [[0, 0, 1]], torch.tensor([60000.0, 60000.0, 1.0]).half(), (3,), check_invariants=True
    )
    (param,) = make_parameters([grad])
    clipper = GradClipper([("w", param)], distclip.global_norm(1.0), on_nonfinite="zero")
    clipper.clip()
    assert param.grad.to_dense().tolist() == [0.0, 1.0, 0.0]
    assert clipper.incidents[0].culprits[0].infs == 1


def test_one_sparse_gradient_for_two_parameters() -> None:
    table, true = repeated_rows()
    other = nn.Parameter(torch.zeros(3, 2))
    other.grad = table.weight.grad
    GradClipper([("one", table.weight), ("two", other)], distclip.per_tensor_norm(0.1)).clip()
    for param in (table.weight, other):
        torch.testing.assert_close(param.grad.to_dense(), true * 0.1 / true.norm(), rtol=1e-4, atol=1e-6)
