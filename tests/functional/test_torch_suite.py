"""PyTorch's own tests of gradient clipping on one process, restated, with distclip's functions in place of torch's.

After `test_clip_grad_norm`, `test_clip_grad_norm_error_if_nonfinite` and `test_clip_grad_value` of PyTorch's
test/test_nn.py. What is declared to be different is not asked for: nothing is written where nothing is clipped, and
the norm is float32 or wider. Where torch is right its own function runs beside, on a copy.
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
"""PyTorch's list; the last one is a string there too."""

MAX_NORM = 2


def parameters_with(grads: Iterable[Tensor | None]) -> list[nn.Parameter]:
    """Parameters with copies of those gradients, laid out alike."""
    made: list[nn.Parameter] = []
    for grad in grads:
        param = nn.Parameter(torch.zeros(2) if grad is None else torch.zeros_like(grad))
        param.grad = None if grad is None else grad.clone()
        made.append(param)
    return made


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients that exist."""
    return [p.grad for p in parameters if p.grad is not None]


def large() -> list[Tensor]:
    """The gradients of a ten by ten linear layer, far above the bound; the second is tiny beside the first."""
    return [torch.arange(1.0, 101.0).view(10, 10), torch.ones(10).div(1000)]


def small() -> list[Tensor]:
    """The same, far below the bound for every norm of the list."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(10, 10, generator=generator).div(10000), torch.ones(10).div(500)]


def at_once(parameters: Iterable[Tensor], norm_type: float, foreach: bool) -> Tensor:
    """Measure and scale in one call."""
    return distclip.clip_grad_norm_(parameters, MAX_NORM, norm_type=norm_type, foreach=foreach)


def in_two_steps(parameters: Iterable[Tensor], norm_type: float, foreach: bool) -> Tensor:
    """Measure, then scale by what was measured."""
    kept = list(parameters)
    norm = distclip.get_total_norm(gradients(kept), norm_type=norm_type, foreach=foreach)
    distclip.clip_grads_with_norm_((p for p in kept), MAX_NORM, norm, foreach=foreach)
    return norm


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("norm_type", NORMS)
class TestClipGradNorm:
    """PyTorch's test_clip_grad_norm, one test per thing that it asks."""

    @pytest.mark.parametrize("clip", [at_once, in_two_steps])
    def test_long_gradients_are_scaled_to_the_bound(
        self, norm_type: float, foreach: bool, clip: Callable[..., Tensor]
    ) -> None:
        """The norm from before is returned, the one after is the bound, and every element got the same factor."""
        parameters, whole = parameters_with(large()), [g.double() for g in large()]
        before = reference.total_norm(whole, float(norm_type))
        norm = clip(parameters, norm_type, foreach)
        torch.testing.assert_close(norm.double(), before, rtol=1e-7, atol=0)
        after = reference.total_norm(gradients(parameters), float(norm_type))
        torch.testing.assert_close(float(after), float(MAX_NORM), rtol=1e-6, atol=1e-6)
        assert after <= before
        factors = torch.cat([(g.double() / w).view(-1) for g, w in zip(gradients(parameters), whole, strict=True)])
        expected = reference.clip_coefficient(before, MAX_NORM)
        torch.testing.assert_close(factors, expected.expand_as(factors), rtol=2e-7, atol=0)

    @pytest.mark.parametrize("clip", [at_once, in_two_steps])
    def test_the_same_as_torch(self, norm_type: float, foreach: bool, clip: Callable[..., Tensor]) -> None:
        """Norm and gradients are those of torch's function, whose float32 sums are good enough at this size."""
        ours, theirs = parameters_with(large()), parameters_with(large())
        norm = clip(ours, norm_type, foreach)
        expected = nn.utils.clip_grad_norm_(theirs, MAX_NORM, norm_type=norm_type, foreach=foreach)
        torch.testing.assert_close(norm, expected)
        torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=2e-6, atol=0)

    @pytest.mark.parametrize("clip", [at_once, in_two_steps])
    def test_short_gradients_are_left_alone(self, norm_type: float, foreach: bool, clip: Callable[..., Tensor]) -> None:
        """Below the bound the factor is exactly 1; and, other than with torch, nothing is written."""
        parameters = parameters_with(small())
        versions = [g._version for g in gradients(parameters)]
        norm = clip(parameters, norm_type, foreach)
        torch.testing.assert_close(norm.double(), reference.total_norm(small(), float(norm_type)), rtol=1e-7, atol=0)
        assert norm < MAX_NORM
        assert all(torch.equal(g, s) for g, s in zip(gradients(parameters), small(), strict=True))
        assert [g._version for g in gradients(parameters)] == versions

    def test_one_tensor(self, norm_type: float, foreach: bool) -> None:
        """A tensor instead of an iterable means a list of one; its rows must not be taken for parameters."""
        one, listed = torch.randn(10, 10), torch.randn(10, 10)
        one.grad, listed.grad = large()[0], large()[0]
        norms = [at_once(one, norm_type, foreach), at_once([listed], norm_type, foreach)]
        assert torch.equal(norms[0], norms[1])
        assert torch.equal(one.grad, listed.grad)
        assert not torch.equal(one.grad, large()[0])
        assert torch.equal(distclip.get_total_norm(large()[0], norm_type, foreach=foreach), norms[0])

    def test_a_used_up_generator_warns_once(self, norm_type: float, foreach: bool) -> None:
        """Passing `model.parameters()` a second time is a mistake that would go unnoticed; torch's exact words."""
        layer = nn.Linear(10, 10)
        parameters = layer.parameters()
        list(parameters)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            norm = at_once(parameters, norm_type, foreach)
        assert [str(w.message) for w in caught] == [
            "`parameters` is an empty generator, no gradient clipping will occur."
        ]
        assert [w.category for w in caught] == [UserWarning]
        assert norm == 0

    @pytest.mark.parametrize("empty", [[], [None], [None, None]])
    def test_no_gradient_at_all(self, norm_type: float, foreach: bool, empty: list[None]) -> None:
        """An empty list and parameters that were not used give a zero of torch's kind, and no warning."""
        norm = at_once(parameters_with(empty), norm_type, foreach)
        expected = nn.utils.clip_grad_norm_(parameters_with(empty), MAX_NORM, norm_type, foreach=foreach)
        assert torch.equal(norm, expected)
        assert norm.dtype == expected.dtype
        assert torch.equal(distclip.get_total_norm([], norm_type, foreach=foreach), expected)
        assert distclip.clip_grads_with_norm_(parameters_with(empty), MAX_NORM, norm, foreach) is None

    def test_parameters_without_a_gradient_are_passed_over(self, norm_type: float, foreach: bool) -> None:
        """A missing gradient among others is no zero to be made and no end to the list."""
        parameters = parameters_with([None, large()[0], None, large()[1]])
        theirs = parameters_with(large())
        expected = nn.utils.clip_grad_norm_(theirs, MAX_NORM, norm_type, foreach=foreach)
        torch.testing.assert_close(at_once(parameters, norm_type, foreach), expected)
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
"""Each with how far torch's norm may lie from ours, its own being rounded to the gradient's dtype."""


@pytest.mark.parametrize("foreach", [False, True, None])
@pytest.mark.parametrize(("dtype", "rtol"), DTYPES)
@pytest.mark.parametrize("norm_type", [1, 2, 3, inf, -inf, -1])
def test_every_dtype_is_clipped_as_torch_does(
    norm_type: float, dtype: torch.dtype, rtol: float, foreach: bool | None
) -> None:
    """All dtypes that a gradient can have; negative orders are odd, and torch takes them."""
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
    # Whether one element alone is bad, whether a parameter with a good gradient comes first, the bad numbers, and the
    # orders whose norm is not finite then. The orders that are left give a finite one.
    (False, False, (inf, -inf), NOT_ZERO),
    (False, True, (inf, -inf), POSITIVE),
    (True, False, (inf, -inf), POSITIVE),
    (True, True, (inf, -inf), POSITIVE),
    (False, False, (nan,), NOT_ZERO),
    (False, True, (nan,), NOT_ZERO),
    (True, False, (nan,), NOT_ZERO),
    (True, True, (nan,), NOT_ZERO),
    # Large, and no error for any order.
    (False, False, (2e22, -2e22), ()),
    (False, True, (2e22, -2e22), ()),
    (True, False, (2e22, -2e22), ()),
    (True, True, (2e22, -2e22), ()),
    # So large that the power of it does not fit into float64, nor (below 0) the root of its inverse.
    (False, False, (2e200, -2e200), OVERFLOWING),
    (False, True, (2e200, -2e200), (3.5, 2)),
    (True, False, (2e200, -2e200), (3.5, 2)),
    (True, True, (2e200, -2e200), (3.5, 2)),
)


def bad_parameters(number: float, one_element: bool, good_first: bool) -> list[nn.Parameter]:
    """PyTorch's gen_parameters: ten elements, all or one of them that number (the others 0), maybe another 1 first."""
    grad = torch.full((10,), number, dtype=torch.float64)
    if one_element:
        grad[0] = 0
        grad[2:] = 0
    return parameters_with([torch.ones(1, dtype=torch.float64), grad] if good_first else [grad])


def every_nonfinite_case() -> list[tuple[float, float, bool, bool, bool]]:
    """(order, number, one element, good first, whether the norm is not finite), the table above written out."""
    return [
        (norm_type, number, one_element, good_first, norm_type in nonfinite)
        for one_element, good_first, numbers, nonfinite in NONFINITE
        for number in numbers
        for norm_type in (*NOT_ZERO, 0)
    ]


class TestErrorIfNonfinite:
    """PyTorch's test_clip_grad_norm_error_if_nonfinite, the whole table."""

    @pytest.mark.parametrize(("norm_type", "number", "one_element", "good_first", "nonfinite"), every_nonfinite_case())
    def test_raises_and_changes_nothing_or_is_silent(
        self, norm_type: float, number: float, one_element: bool, good_first: bool, nonfinite: bool
    ) -> None:
        """With the flag a norm that is not finite raises torch's words before any gradient is touched."""
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
    def test_without_the_flag_the_result_is_torchs(
        self, norm_type: float, number: float, one_element: bool, good_first: bool, nonfinite: bool
    ) -> None:
        """Scaled by a norm that is not finite all the same: where torch has NaN, 0 or inf, we have it too."""
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
    def test_every_element_ends_within_the_bounds(self, foreach: bool, with_bias: bool) -> None:
        """Above, below and within the bounds, with and without a gradient of the second parameter; torch's bits."""
        clip_value = 2.5
        grads = [torch.arange(-50.0, 50.0).view(10, 10) / 5, torch.full((10,), 2.0) if with_bias else None]
        ours, theirs = parameters_with(grads), parameters_with(grads)
        assert distclip.clip_grad_value_((p for p in ours), clip_value, foreach=foreach) is None
        nn.utils.clip_grad_value_(theirs, clip_value, foreach=foreach)
        assert all(g.abs().max() <= clip_value for g in gradients(ours))
        assert len(gradients(ours)) == 1 + with_bias
        assert all(torch.equal(a, b) for a, b in zip(gradients(ours), gradients(theirs), strict=True))

    def test_one_tensor(self, foreach: bool) -> None:
        """A tensor instead of an iterable means a list of one."""
        one, listed = torch.randn(10, 10), torch.randn(10, 10)
        one.grad, listed.grad = (torch.arange(-50.0, 50.0).view(10, 10) / 5 for _ in range(2))
        distclip.clip_grad_value_(one, 2.5, foreach=foreach)
        distclip.clip_grad_value_([listed], 2.5, foreach=foreach)
        assert torch.equal(one.grad, listed.grad)
        assert one.grad.abs().max() == 2.5

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_every_real_dtype_nan_and_inf(self, foreach: bool, dtype: torch.dtype) -> None:
        """Infinity is clamped and NaN stays, as with torch, in every dtype."""
        grads: Sequence[Tensor] = [torch.tensor([nan, inf, -inf, 0.0, -0.0, 0.25, 1e4], dtype=dtype)]
        ours, theirs = parameters_with(grads), parameters_with(grads)
        distclip.clip_grad_value_(ours, 0.5, foreach=foreach)
        nn.utils.clip_grad_value_(theirs, 0.5, foreach=foreach)
        torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=0, atol=0, equal_nan=True)
