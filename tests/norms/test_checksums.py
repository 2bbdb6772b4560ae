"""Checksums: the same number by every kernel, for equal elements in any memory, and another one for any other bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distclip.norms import kernels
from distclip.norms.kernels import native, torch_ops
from distclip.norms.kernels.native_library import load_library
from distclip.norms.kernels.tensor_table import DTYPES

triton_launch = pytest.importorskip("distclip.norms.kernels.triton_launch", reason="Triton is for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Checksums = Callable[[Sequence[Tensor]], Any]

KERNELS: dict[str, tuple[Checksums, str]] = {
    "operators": (lambda tensors: torch.tensor([int(torch_ops.checksum(tensor)) for tensor in tensors]), "cpu"),
    "native": (native.checksums, "cpu"),
    "native, with powers": (lambda tensors: native.power_sums(tensors, 2.0, with_checksums=True)[2], "cpu"),  # type: ignore[index]
    "native, with magnitudes": (lambda tensors: native.power_sums(tensors, 1.0, with_checksums=True)[2], "cpu"),  # type: ignore[index]
    "native, with maxima": (lambda tensors: native.power_sums(tensors, math.inf, with_checksums=True)[2], "cpu"),  # type: ignore[index]
    "triton": (triton_launch.checksums, DEVICE),
    "triton, with powers": (lambda tensors: triton_launch.power_sums(tensors, 2.0, with_checksums=True)[2], DEVICE),
}
TRITON, NUMPY = (tuple(map(int, metadata.version(name).split(".")[:2])) for name in ("triton", "numpy"))
OLD = TRITON < (3, 7) and NUMPY >= (2, 4) and DEVICE == "cpu"
interpreted = pytest.mark.skipif(OLD, reason="Triton's interpreter does not work with NumPy 2.4 before Triton 3.7")
each_kernel = pytest.mark.parametrize(
    "kernel", [pytest.param(name, marks=interpreted if "triton" in name else ()) for name in KERNELS]
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)

LENGTHS = [0, 1, 3, 15, 16, 17, 33, 1000, 2047, 2048, 2049, 4097, 16383, 16385, 65537, 262149]
"""Lengths around the sizes of lanes, runs, blocks and chunks."""


def checksums(kernel: str, tensors: Sequence[Tensor]) -> list[int]:
    """Return the checksums by a kernel."""
    compute, device = KERNELS[kernel]
    result = compute([tensor.to(device) for tensor in tensors])
    assert result.dtype == torch.int64
    numbers: list[int] = result.tolist()
    return numbers


def expected_checksum(tensor: Tensor) -> int:
    """Return the checksum by NumPy."""
    integer = np.dtype({1: "u1", 2: "i2"}.get(tensor.element_size(), "u4"))
    words = tensor.contiguous().view(torch.uint8).numpy().view(integer) if tensor.numel() else np.zeros(0, integer)
    return int(words.astype(np.int64).sum()) % 2**32


def random_bits(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return a tensor of any bits: NaN with any payload, infinities, subnormal numbers and zeros of both signs."""
    size = torch.empty(0, dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (math.prod(shape) * size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


@each_kernel
@each_dtype
def test_checksum_is_the_sum_of_the_words(kernel: str, dtype: torch.dtype) -> None:
    tensors = [random_bits(n, dtype=dtype, seed=n) for n in LENGTHS]
    assert checksums(kernel, tensors) == [expected_checksum(tensor) for tensor in tensors]


@each_kernel
@each_dtype
def test_order_strides_and_alignment_do_not_count(kernel: str, dtype: torch.dtype) -> None:
    tensor = random_bits(4, 6, 5, 8, dtype=dtype)
    flat = torch.zeros(tensor.numel() + 1, dtype=dtype)
    flat[1:] = tensor.reshape(-1)
    views = [tensor.contiguous(memory_format=torch.channels_last), tensor.permute(3, 1, 0, 2).contiguous(), flat[1:]]
    assert set(checksums(kernel, [tensor, *views])) == {expected_checksum(tensor)}


@each_kernel
@each_dtype
def test_each_single_bit_changes_the_checksum(kernel: str, dtype: torch.dtype) -> None:
    bits = torch.empty(0, dtype=dtype).element_size() * 8
    tensor = random_bits(2050, dtype=dtype)
    flipped = []
    for bit in range(bits):
        raw = tensor.clone().view(torch.uint8)
        raw[(61 * bit) % 2050 * (bits // 8) + bit // 8] ^= 1 << (bit % 8)
        flipped.append(raw.view(dtype))
    first, *others = checksums(kernel, [tensor, *flipped])
    assert first not in others


def test_sums_with_and_without_checksums_have_the_same_bits() -> None:
    tensors = [torch.randn(n).to(dtype) for n in LENGTHS for dtype in DTYPES]
    for norm_type in (1.0, 2.0, math.inf):
        alone, both = native.power_sums(tensors, norm_type), native.power_sums(tensors, norm_type, with_checksums=True)
        assert alone is not None
        assert both is not None
        assert torch.equal(alone[0], both[0])
        assert alone[2] is None


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_count(threads: int) -> None:
    tensor, before = random_bits(1_500_000, dtype=torch.float32), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert checksums("native", [tensor]) == [expected_checksum(tensor)]
    finally:
        torch.set_num_threads(before)


ODD = {
    "strided": torch.randn(12, 16)[::2, ::2],
    "column": torch.randn(6, 5, dtype=torch.float16)[:, 1],
    "expanded": torch.ones(3).expand(2, 3),
    "complex": torch.randn(4, 3, dtype=torch.complex64),
    "conjugated": torch.randn(4, 3, dtype=torch.complex64).conj(),
    "sparse": torch.eye(4).to_sparse(),
    "float8": torch.randn(9).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 3),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("has_library", [True, False])
def test_tensors_that_only_operators_take(odd: str, has_library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mix odd tensors with those that the kernels take, with and without the library."""
    if not has_library:
        monkeypatch.setattr(native, "load_library", lambda: None)
    else:
        assert load_library() is not None
    tensor = ODD[odd]
    dense = tensor.coalesce().values() if tensor.is_sparse else tensor.resolve_conj()
    tensors = [torch.ones(3), tensor, torch.ones(2).bfloat16()]
    expected = [expected_checksum(t) for t in (tensors[0], dense.contiguous(), tensors[2])]
    assert kernels.checksums(tensors, torch.device("cpu")).tolist() == expected
    if odd != "float8":
        words = kernels.power_sums(tensors, 3.0, torch.device("cpu"), with_checksums=True)[2]
        assert words is not None
        assert words.tolist() == expected
