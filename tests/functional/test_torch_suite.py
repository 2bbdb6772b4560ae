"""Run PyTorch's tests of gradient clipping on one process, with distclip's functions instead of torch's.

They are `test_clip_grad_norm`, `test_clip_grad_norm_error_if_nonfinite` and `test_clip_grad_value` of PyTorch's
test/test_nn.py. Two differences are documented: a gradient that is not clipped is not written, and the norm is float32
or wider. Torch's function clips a copy for comparison where it is exact enough.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from math import inf, nan

import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip import reference

NORMS = (0.5, 1.5, 2, 4, "inf")
"""Orders of PyTorch's list, in which the last one is a string too."""

MAX_NORM = 2


def parameters_with(grads: Iterable[Tensor | None]) -> list[nn.Parameter]:
    """Make parameters with copies of those gradients, with the same strides."""
    parameters: list[nn.Parameter] = []
    for grad in grads:
        param = nn.Parameter(torch.zeros(2) if grad is None else torch.zeros_like(grad))
        param.grad = None if grad is None else grad.clone()
        parameters.append(param)
    return parameters


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients that exist."""
    return [p.grad for p in parameters if p.grad is not None]


def large_grads() -> list[Tensor]:
    """Return gradients of a ten by ten linear layer far above the bound, the second very small."""
    return [torch.arange(1.0, 101.0).view(10, 10), torch.ones(10).div(1000)]


def small_grads() -> list[Tensor]:
    """Return gradients of that layer far below the bound for every norm of the list."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(10, 10, generator=generator).div(10000), torch.ones(10).div(500)]


def clip_in_one_call(parameters: Iterable[Tensor], norm_type: float, foreach: bool) -> Tensor:
    """Measure and scale in one call."""
    return distclip.clip_grad_norm_(parameters, MAX_NORM, norm_type=norm_type, foreach=foreach)


def clip_in_two_calls(parameters: Iterable[Tensor], norm_type: float, foreach: bool) -> Tensor:
    """Measure, then scale by the measured norm."""
    params = list(parameters)
    norm = distclip.get_total_norm(gradients(params), norm_type=norm_type, foreach=foreach)
    distclip.clip_grads_with_norm_((p for p in params), MAX_NORM, norm, foreach=foreach)
    return norm


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("norm_type", NORMS)
class TestClipGradNorm:
    """PyTorch's test_clip_grad_norm, one test for each of its assertions."""

    @pytest.mark.parametrize("clip", [clip_in_one_call, clip_in_two_calls])
    def test_large_norm_is_scaled_to_the_bound(
        self, norm_type: float, foreach: bool, clip: Callable[..., Tensor]
    ) -> None:
        """Return the norm before clipping, scale to the bound, and multiply every element by one factor."""
        parameters, whole = parameters_with(large_grads()), [g.double() for g in large_grads()]
        before = reference.total_norm(whole, float(norm_type))
        norm = clip(parameters, norm_type, foreach)
        torch.testing.assert_close(norm.double(), before, rtol=1e-7, atol=0)
        after = reference.total_norm(gradients(parameters), float(norm_type))
        torch.testing.assert_close(float(after), float(MAX_NORM), rtol=1e-6, atol=1e-6)
        assert after <= before
        factors = torch.cat([(g.double() / w).view(-1) for g, w in zip(gradients(parameters), whole, strict=True)])
        expected = reference.clip_coefficient(before, MAX_NORM)
        torch.testing.assert_close(factors, expected.expand_as(factors), rtol=2e-7, atol=0)

    @pytest.mark.parametrize("clip", [clip_in_one_call, clip_in_two_calls])
    def test_equals_torch(self, norm_type: float, foreach: bool, clip: Callable[..., Tensor]) -> None:
        """Compare with torch's function, whose float32 sums are exact enough at this size."""
        ours, theirs = parameters_with(large_grads()), parameters_with(large_grads())
        norm = clip(ours, norm_type, foreach)
        expected = nn.utils.clip_grad_norm_(theirs, MAX_NORM, norm_type=norm_type, foreach=foreach)
        torch.testing.assert_close(norm, expected)
        torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=2e-6, atol=0)

    @pytest.mark.parametrize("clip", [clip_in_one_call, clip_in_two_calls])
    def test_small_norm_writes_nothing(self, norm_type: float, foreach: bool, clip: Callable[..., Tensor]) -> None:
        """Multiply by exactly 1 below the bound, which, other than in torch, writes nothing."""
        parameters = parameters_with(small_grads())
        versions = [g._version for g in gradients(parameters)]
        norm = clip(parameters, norm_type, foreach)
        torch.testing.assert_close(
            norm.double(), reference.total_norm(small_grads(), float(norm_type)), rtol=1e-7, atol=0
        )
        assert norm < MAX_NORM
        assert all(torch.equal(g, s) for g, s in zip(gradients(parameters), small_grads(), strict=True))
        assert [g._version for g in gradients(parameters)] == versions

    def test_one_tensor(self, norm_type: float, foreach: bool) -> None:
        """Take a tensor for a list of one parameter, and not for an iterable of its rows."""
        one, listed = torch.randn(10, 10), torch.randn(10, 10)
        one.grad, listed.grad = large_grads()[0], large_grads()[0]
        norms = [clip_in_one_call(one, norm_type, foreach), clip_in_one_call([listed], norm_type, foreach)]
        assert torch.equal(norms[0], norms[1])
        assert torch.equal(one.grad, listed.grad)
        assert not torch.equal(one.grad, large_grads()[0])
        assert torch.equal(distclip.get_total_norm(large_grads()[0], norm_type, foreach=foreach), norms[0])

    def test_exhausted_generator_warns_once(self, norm_type: float, foreach: bool) -> None:
        """Pass an exhausted `model.parameters()`, a mistake of which torch warns in the same words."""
        layer = nn.Linear(10, 10)
        parameters = layer.parameters()
        list(parameters)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            norm = clip_in_one_call(parameters, norm_type, foreach)
        assert [str(w.message) for w in caught] == [
            "`parameters` is an empty generator, no gradient clipping will occur."
        ]
        assert [w.category for w in caught] == [UserWarning]
        assert norm == 0

    @pytest.mark.parametrize("empty", [[], [None], [None, None]])
    def test_no_gradients_give_zero(self, norm_type: float, foreach: bool, empty: list[None]) -> None:
        """Pass an empty list or unused parameters, which gives torch's zero without a warning."""
        norm = clip_in_one_call(parameters_with(empty), norm_type, foreach)
        expected = nn.utils.clip_grad_norm_(parameters_with(empty), MAX_NORM, norm_type, foreach=foreach)
        assert torch.equal(norm, expected)
        assert norm.dtype == expected.dtype
        assert torch.equal(distclip.get_total_norm([], norm_type, foreach=foreach), expected)
        assert distclip.clip_grads_with_norm_(parameters_with(empty), MAX_NORM, norm, foreach) is None

    def test_ignores_parameters_without_a_gradient(self, norm_type: float, foreach: bool) -> None:
        """Pass missing gradients among others, which stay None."""
        parameters = parameters_with([None, large_grads()[0], None, large_grads()[1]])
        theirs = parameters_with(large_grads())
        expected = nn.utils.clip_grad_norm_(theirs, MAX_NORM, norm_type, foreach=foreach)
        torch.testing.assert_close(clip_in_one_call(parameters, norm_type, foreach), expected)
        assert [p.grad is None for p in parameters] == [True, False, True, False]
        torch.testing.assert_close(gradients(parameters), gradients(theirs), rtol=2e-6, atol=0)


DTYPES: tuple[tuple[torch.dtype, float], ...] = (
    (torch.float64, 1e-14),
    (torch.float32, 1e-6),
    (torch.bfloat16, 1e-2),
    (torch.float16, 1e-3),
    (torch.complex64, 1e-6),
    (torch.complex128, 1e-14),
)
"""Dtypes with the relative error of torch's norm, which is rounded to the dtype of the gradient."""


@pytest.mark.parametrize("foreach", [False, True, None])
@pytest.mark.parametrize(("dtype", "rtol"), DTYPES)
@pytest.mark.parametrize("norm_type", [1, 2, 3, inf, -inf, -1])
def test_every_dtype_equals_torch(norm_type: float, dtype: torch.dtype, rtol: float, foreach: bool | None) -> None:
    """Clip every dtype that a gradient can have, also by the negative orders that torch allows."""
    grads = [(torch.arange(1.0, 13.0).view(3, 4) * 0.5).to(dtype), torch.full((5,), -2.0, dtype=dtype)]
    ours, theirs = parameters_with(grads), parameters_with(grads)
    norm = distclip.clip_grad_norm_(ours, 0.25, norm_type, foreach=foreach)
    expected = nn.utils.clip_grad_norm_(theirs, 0.25, norm_type, foreach=foreach)
    assert norm.dtype == (torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32)
    torch.testing.assert_close(norm.double(), expected.double(), rtol=rtol, atol=0)
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=4 * rtol, atol=0)


POSITIVE = (0.1, 1, 2, 3.5, inf)
NEGATIVE = (-0.1, -1, -2, -3.5)
NOT_ZERO = (*POSITIVE, *NEGATIVE)
OVERFLOWING = (3.5, 2, -2, -3.5)

NONFINITE: tuple[tuple[bool, bool, tuple[float, ...], tuple[float, ...]], ...] = (
    # One element or all of them are bad, a parameter with a good gradient comes first or not, the bad numbers, and the
    # orders whose norm is then not finite. The norms of the other orders are finite.
    (False, False, (inf, -inf), NOT_ZERO),
    (False, True, (inf, -inf), POSITIVE),
    (True, False, (inf, -inf), POSITIVE),
    (True, True, (inf, -inf), POSITIVE),
    (False, False, (nan,), NOT_ZERO),
    (False, True, (nan,), NOT_ZERO),
    (True, False, (nan,), NOT_ZERO),
    (True, True, (nan,), NOT_ZERO),
    # Large numbers, which are no error for any order.
    (False, False, (2e22, -2e22), ()),
    (False, True, (2e22, -2e22), ()),
    (True, False, (2e22, -2e22), ()),
    (True, True, (2e22, -2e22), ()),
    # So large that their power overflows float64, as does (below 0) the root of their inverse.
    (False, False, (2e200, -2e200), OVERFLOWING),
    (False, True, (2e200, -2e200), (3.5, 2)),
    (True, False, (2e200, -2e200), (3.5, 2)),
    (True, True, (2e200, -2e200), (3.5, 2)),
)


def bad_parameters(number: float, one_element: bool, good_first: bool) -> list[nn.Parameter]:
    """Make PyTorch's gen_parameters: ten elements, all or one of them bad, maybe another parameter first."""
    grad = torch.full((10,), number, dtype=torch.float64)
    if one_element:
        grad[0] = 0
        grad[2:] = 0
    return parameters_with([torch.ones(1, dtype=torch.float64), grad] if good_first else [grad])


def every_nonfinite_case() -> list[tuple[float, float, bool, bool, bool]]:
    """Return (order, number, one element, good first, norm is not finite) of all cases."""
    return [
        (norm_type, number, one_element, good_first, norm_type in nonfinite)
        for one_element, good_first, numbers, nonfinite in NONFINITE
        for number in numbers
        for norm_type in (*NOT_ZERO, 0)
    ]


class TestErrorIfNonfinite:
    """PyTorch's test_clip_grad_norm_error_if_nonfinite, the whole table."""

    @pytest.mark.parametrize(("norm_type", "number", "one_element", "good_first", "nonfinite"), every_nonfinite_case())
    def test_raises_before_any_write_if_the_norm_is_not_finite(
        self, norm_type: float, number: float, one_element: bool, good_first: bool, nonfinite: bool
    ) -> None:
        """Pass the flag, with which a norm that is not finite raises torch's message."""
        parameters = bad_parameters(number, one_element, good_first)
        before = [g.clone() for g in gradients(parameters)]
        if not nonfinite:
            norm = distclip.clip_grad_norm_(parameters, 1, norm_type=norm_type, error_if_nonfinite=True)
            assert norm.isfinite()
            return
        message = f"^The total norm of order {float(norm_type)} for gradients"
        with pytest.raises(RuntimeError, match=message) as caught:
            distclip.clip_grad_norm_(parameters, 1, norm_type=norm_type, error_if_nonfinite=True)
        assert isinstance(caught.value, distclip.NonFiniteError)
        torch.testing.assert_close(gradients(parameters), before, rtol=0, atol=0, equal_nan=True)
        with pytest.raises(RuntimeError, match=message):
            distclip.get_total_norm(before, norm_type=norm_type, error_if_nonfinite=True)

    @pytest.mark.parametrize(
        ("norm_type", "number", "one_element", "good_first", "nonfinite"),
        [case for case in every_nonfinite_case() if case[0] != 0],
    )
    def test_equals_torch_without_the_flag(
        self, norm_type: float, number: float, one_element: bool, good_first: bool, nonfinite: bool
    ) -> None:
        """Scale by a norm that is not finite, which gives NaN, 0 or inf where torch does."""
        ours, theirs = (bad_parameters(number, one_element, good_first) for _ in range(2))
        norm = distclip.clip_grad_norm_(ours, 1, norm_type=norm_type, error_if_nonfinite=False)
        expected = nn.utils.clip_grad_norm_(theirs, 1, norm_type=norm_type, error_if_nonfinite=False)
        torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0, equal_nan=True)
        torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-12, atol=0, equal_nan=True)
        assert bool(norm.isfinite()) is not nonfinite


@pytest.mark.parametrize("foreach", [False, True])
class TestClipGradValue:
    """PyTorch's test_clip_grad_value."""

    @pytest.mark.parametrize("with_bias", [True, False])
    def test_clamps_every_element(self, foreach: bool, with_bias: bool) -> None:
        """Compare bit by bit with torch, with and without a gradient of the second parameter."""
        clip_value = 2.5
        grads = [torch.arange(-50.0, 50.0).view(10, 10) / 5, torch.full((10,), 2.0) if with_bias else None]
        ours, theirs = parameters_with(grads), parameters_with(grads)
        assert distclip.clip_grad_value_((p for p in ours), clip_value, foreach=foreach) is None
        nn.utils.clip_grad_value_(theirs, clip_value, foreach=foreach)
        assert all(g.abs().max() <= clip_value for g in gradients(ours))
        assert len(gradients(ours)) == 1 + with_bias
        assert all(torch.equal(a, b) for a, b in zip(gradients(ours), gradients(theirs), strict=True))

    def test_one_tensor(self, foreach: bool) -> None:
        """Take a tensor for a list of one parameter."""
        one, listed = torch.randn(10, 10), torch.randn(10, 10)
        one.grad, listed.grad = (torch.arange(-50.0, 50.0).view(10, 10) / 5 for _ in range(2))
        distclip.clip_grad_value_(one, 2.5, foreach=foreach)
        distclip.clip_grad_value_([listed], 2.5, foreach=foreach)
        assert torch.equal(one.grad, listed.grad)
        assert one.grad.abs().max() == 2.5

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_clamps_inf_and_keeps_nan(self, foreach: bool, dtype: torch.dtype) -> None:
        """Clamp infinity and keep NaN in every real dtype, as torch does."""
        grads: Sequence[Tensor] = [torch.tensor([nan, inf, -inf, 0.0, -0.0, 0.25, 1e4], dtype=dtype)]
        ours, theirs = parameters_with(grads), parameters_with(grads)
        distclip.clip_grad_value_(ours, 0.5, foreach=foreach)
        nn.utils.clip_grad_value_(theirs, 0.5, foreach=foreach)
        torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=0, atol=0, equal_nan=True)
