"""Compare every kernel with float64, for tensors of any dtype, length, strides and magnitude."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distclip
from distclip.bench.counters import peak_bytes
from distclip.norms import kernels
from distclip.norms.kernels import native, torch_ops
from distclip.norms.kernels.native_library import load_library
from distclip.norms.kernels.tensor_table import DTYPES, TensorTable, _fill, describe_tensors
from distclip.sharding.shard import Rows

triton_launch = pytest.importorskip("distclip.norms.kernels.triton_launch", reason="Triton is for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

PowerSums = Callable[[Sequence[Tensor], float], Any]


def operator_power_sums(
    tensors: Sequence[Tensor], norm_type: float, description: None = None, with_checksums: bool = False
) -> tuple[Tensor, bool, Tensor]:
    """Compute power sums and checksums by operators of torch, which take one dtype at a time."""
    sums = torch.empty(len(tensors), dtype=torch.float64)
    for kind in {(t.dtype, torch_ops.is_dense(t)) for t in tensors}:
        chosen = [i for i, t in enumerate(tensors) if (t.dtype, torch_ops.is_dense(t)) == kind]
        sums[chosen] = torch_ops.power_sums([tensors[i] for i in chosen], norm_type)
    return sums, False, torch.tensor([int(torch_ops.checksum(tensor)) for tensor in tensors])


KERNELS: dict[str, tuple[PowerSums, str]] = {
    "operators": (operator_power_sums, "cpu"),
    "native": (native.power_sums, "cpu"),
    "triton_launch": (triton_launch.power_sums, DEVICE),
}
TRITON, NUMPY = (tuple(map(int, metadata.version(name).split(".")[:2])) for name in ("triton", "numpy"))
OLD = TRITON < (3, 7) and NUMPY >= (2, 4) and DEVICE == "cpu"
interpreted = pytest.mark.skipif(OLD, reason="Triton's interpreter does not work with NumPy 2.4 before Triton 3.7")
gpu_kernels = pytest.param("triton_launch", marks=interpreted)
each_kernel = pytest.mark.parametrize("kernel", ["operators", "native", gpu_kernels])

LENGTHS = [0, 1, 3, 15, 16, 17, 33, 1000, 2047, 2048, 2049, 4096, 4097, 16383, 16384, 16385, 65536, 65537, 262149]
"""Lengths around the sizes of lanes, runs, blocks and chunks."""

SCALES = {torch.float64: 1e100, torch.float32: 1e25, torch.bfloat16: 1e25, torch.float16: 1e3}


def sums(kernel: str, tensors: Sequence[Tensor], norm_type: float) -> list[float]:
    """Return the power sums by a kernel."""
    compute, device = KERNELS[kernel]
    result = compute([tensor.to(device) for tensor in tensors], norm_type)
    assert result is not None
    assert result[0].dtype == torch.float64
    assert result[0].shape == (len(tensors),)
    return result[0].tolist()


def expected_sum(tensor: Tensor, norm_type: float) -> float:
    """Return the power sum in float64, or the maximum."""
    size = tensor.double().abs()
    if norm_type == math.inf:
        return float(size.max()) if tensor.numel() else 0.0
    return float(size.pow(norm_type).sum())


def test_c_library_is_built() -> None:
    """Load the library, without which all tests would pass by operators of torch."""
    assert load_library() is not None, "not built from the present native.c: run pip install -e ."


@each_kernel
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_and_magnitudes(kernel: str, dtype: torch.dtype, norm_type: float) -> None:
    """Sum squares that overflow or underflow in the dtype, up to the end of every block."""
    generator = torch.Generator().manual_seed(0)
    scales = [1.0, SCALES[dtype], 1 / SCALES[dtype]]
    drawn = [torch.randn(n, generator=generator, dtype=torch.float64).clamp_(-3, 3) for n in LENGTHS]
    tensors = [(x * scales[i % 3]).to(dtype) for i, x in enumerate(drawn)]
    for tensor, result in zip(tensors, sums(kernel, tensors, norm_type), strict=True):
        assert result == pytest.approx(expected_sum(tensor, norm_type), rel=1e-7, abs=0), f"{tensor.numel()} elements"


@each_kernel
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_elements_change_the_sum_of_their_tensor(
    kernel: str, dtype: torch.dtype, norm_type: float, bad: float
) -> None:
    """Write NaN and infinity at any index, and NaN before and after infinity."""
    tensors = [torch.ones(5000, dtype=dtype) for _ in range(5)]
    for tensor, place in zip(tensors, [0, 77, 4999], strict=False):
        tensor[place] = bad
    tensors[4][[10, 20, 4000]] = torch.tensor([math.inf, math.nan, math.inf], dtype=dtype)
    result = sums(kernel, tensors, norm_type)
    assert [repr(x) for x in result[:3]] == [repr(abs(bad))] * 3
    assert math.isfinite(result[3])
    assert math.isnan(result[4])


@each_kernel
def test_every_float16_number(kernel: str) -> None:
    """Sum all float16 numbers, including subnormal ones."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = numbers[numbers.isfinite()]
    assert sums(kernel, [finite], 2.0) == [pytest.approx(expected_sum(finite, 2.0), rel=1e-6, abs=0)]
    assert sums(kernel, [finite], 1.0) == [pytest.approx(expected_sum(finite, 1.0), rel=1e-7, abs=0)]
    parts = list(finite.split(1500))
    assert sums(kernel, parts, math.inf) == [expected_sum(part, math.inf) for part in parts]


@each_kernel
@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 3e38, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_elements(kernel: str, dtype: torch.dtype, value: float) -> None:
    """Sum equal elements, whose rounding errors in float32 have one sign (1e-4 in torch's dot)."""
    tensor = torch.full((300_000,), value).to(dtype)
    norm = math.sqrt(sums(kernel, [tensor], 2.0)[0])
    assert norm == pytest.approx(math.sqrt(expected_sum(tensor, 2.0)), rel=1e-6, abs=0)


CHUNKS: dict[str, Callable[[], Tensor]] = {
    "tiny among zeros": lambda: torch.zeros(18_500).index_fill_(0, torch.tensor([3, 18_499]), 1e-30),
    "subnormal": lambda: torch.full((18_500,), 1e-42),
    "smallest": lambda: torch.zeros(18_500).index_fill_(0, torch.tensor([17_000]), 1.4e-45),
    "tiny in the first chunk": lambda: torch.cat([torch.full((65_536,), 1e-25), torch.rand(40)]),
    "tiny and huge": lambda: torch.cat([torch.full((9000,), 1e-38), torch.full((9000,), 3e38)]),
    "one overflows": lambda: torch.ones(18_500).index_fill_(0, torch.tensor([17]), 3e19),
    "sum overflows": lambda: torch.full((18_500,), 1.2e18),
    "sum is large": lambda: torch.full((18_500,), 3e17),
    "small": lambda: torch.full((18_500,), 1e-13),
}
"""Tensors of which a chunk is at an end of the range that float32 sums have."""


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_chunks_at_the_ends_of_the_float32_range(kernel: str, dtype: torch.dtype, norm_type: float) -> None:
    """Sum chunks that overflow or underflow as a whole or in part, in both signs."""
    tensors = [make().to(dtype) for make in CHUNKS.values()]
    for tensor in tensors:
        tensor[::2] *= -1
    for name, tensor, found in zip(CHUNKS, tensors, sums(kernel, tensors, norm_type), strict=True):
        assert found == pytest.approx(expected_sum(tensor, norm_type), rel=5e-7, abs=0), name


@each_kernel
@pytest.mark.parametrize("value", [1e-42, 1.0, 3e38])
def test_nonfinite_element_in_a_chunk_that_leaves_the_range(kernel: str, value: float) -> None:
    tensors = [torch.full((4100,), value).index_fill_(0, torch.tensor([4000]), bad) for bad in (math.inf, math.nan)]
    tensors[1][0] = math.inf
    for norm_type in (1.0, 2.0):
        assert [repr(found) for found in sums(kernel, tensors, norm_type)] == ["inf", "nan"]


@interpreted
def test_sums_of_a_tensor_do_not_depend_on_its_neighbours() -> None:
    """Measure tensors alone, in two orders and among others: the same bits, from other programs of the launch."""
    tensors = [torch.randn(n).mul_(10.0**i) for i, n in enumerate([140_000, 5, 65_536, 3000])]
    alone = [sums("triton_launch", [tensor], 2.0)[0] for tensor in tensors]
    assert sums("triton_launch", tensors[::-1], 2.0) == alone[::-1]
    assert sums("triton_launch", [torch.full((70_000,), 1e25), *tensors], 2.0)[1:] == alone


@interpreted
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_triton_pairs_on_a_device_without_float64(norm_type: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Store pairs of float32 numbers, which are as precise, and words, which are the same."""
    monkeypatch.setattr(triton_launch, "accumulation_dtype", lambda device: torch.float32)
    tensors = [torch.full((140_000,), 0.1), torch.rand(3000).half(), torch.full((2100,), 1e17), torch.zeros(0)]
    tensors += [torch.full((2100,), 1e-17), torch.tensor([1.0, math.inf]), torch.tensor([math.inf, math.nan])]
    result = triton_launch.power_sums([tensor.to(DEVICE) for tensor in tensors], norm_type, with_checksums=True)
    assert result is not None
    found, _, words = result
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([expected_sum(t, norm_type) for t in tensors], rel=2e-7, abs=0, nan_ok=True)
    assert words is not None
    assert words.tolist() == kernels.checksums(tensors, torch.device("cpu")).tolist()


@each_kernel
def test_strides_alignment_and_mixed_dtypes(kernel: str) -> None:
    """Sum permuted, unaligned and one-element tensors, mixed dtypes, and a parameter."""
    flat = torch.randn(200)
    tensors = [
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(7, 9).t(),
        flat[1:178],
        torch.tensor(3.0),
        torch.randn(33).bfloat16(),
        torch.randn(5, dtype=torch.float64),
        torch.nn.Parameter(torch.randn(6, 1, 2)),
    ]
    with torch.no_grad():
        result = sums(kernel, tensors, 2.0)
    assert result == [pytest.approx(expected_sum(tensor.detach(), 2.0), rel=1e-7, abs=0) for tensor in tensors]


@pytest.mark.parametrize("kernel", ["native", gpu_kernels])
@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(12, 16)[::2, ::2],
        torch.ones(3).expand(2, 3),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, dtype=torch.int32),
    ],
    ids=["strided", "expanded", "complex", "sparse", "int"],
)
def test_kernels_refuse_tensors_that_operators_take(kernel: str, odd: Tensor) -> None:
    compute, device = KERNELS[kernel]
    assert compute([torch.ones(3, device=device), odd.to(device)], 2.0) is None
    assert compute([torch.ones(3, device=device)], 3.0) is None
    expected = float(odd.to_dense().abs().double().square().sum()) if odd.dtype != torch.int32 else 2.0
    result, wide, _ = kernels.power_sums([torch.ones(3), odd, torch.ones(2).bfloat16()], 2.0, torch.device("cpu"))
    assert result.tolist() == [3.0, expected, 2.0]
    assert not wide


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((5, 7), Rows(0, 5)),
        ((3, 2, 4), Rows(4, 3)),
        ((6, 0), Rows(0, 6)),
        ((0, 4), Rows(0, 0)),
        ((0,), Rows(3, 0, 0, 5)),
        ((20,), Rows(1, 5, 3, 5)),
        ((2,), Rows(1, 1, 2, 5)),
        ((5,), Rows(0, 1, 0, 5)),
        ((2100, 130), Rows(0, 2100)),
        ((3001,), Rows(0, 61, 30, 50)),
    ],
)
def test_rows(shape: tuple[int, ...], rows: Rows, dtype: torch.dtype, norm_type: float) -> None:
    """Sum whole rows, and slices of a flattened parameter that begin and end anywhere."""
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    result = native.row_powers(grad, rows, norm_type)
    assert result is not None
    assert result.shape == (rows.count,)
    torch.testing.assert_close(result, torch_ops.row_powers(grad, rows, norm_type), rtol=1e-7, atol=0)


@pytest.mark.parametrize("width", [3, 50, 3000, 20_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(dtype: torch.dtype, width: int) -> None:
    """Sum rows together, which the kernel may read as several streams, and one by one."""
    grad = torch.randn((11, width), generator=torch.Generator().manual_seed(0)).to(dtype)
    together = native.row_powers(grad, Rows(0, 11), 2.0)
    alone: Any = [native.row_powers(grad[i : i + 1], Rows(i, 1), 2.0) for i in range(11)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0)


@pytest.mark.parametrize("width", [1, 16, 40, 515, 2047])
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-15, 1.0, 1e15, 1e30])
def test_rows_of_bfloat16_overflow_and_vanish_nowhere(width: int, size: float) -> None:
    """Sum rows whose squares float32 cannot hold, between ordinary ones, and rows with single odd elements."""
    grad = torch.randn((9, width), generator=torch.Generator().manual_seed(0)).bfloat16()
    grad[1::2] *= size
    grad[4, -1], grad[6, width // 2], grad[8, 0] = math.nan, math.inf, size
    found = native.row_powers(grad, Rows(0, 9), 2.0)
    expected = grad.double().square().sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_rows_of_many_tensors_equal_those_of_each() -> None:
    """Sum rows of different widths and dtypes in one call, some of them cut, empty, or wider than a block."""
    shapes = [(5, 7), (3, 300_000), (700, 130), (0, 4), (6, 0)]
    grads = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, [*DTYPES, torch.float32], strict=True)]
    rows = [Rows(0, shape[0]) for shape in shapes]
    grads.append(torch.randn(20))
    rows.append(Rows(1, 5, 3, 5))
    grads[1][1, 299_999] = math.nan
    for norm_type in (1.0, 2.0, math.inf):
        together = native.powers_by_row(grads, rows, norm_type)
        alone = [native.row_powers(grad, one, norm_type) for grad, one in zip(grads, rows, strict=True)]
        assert together is not None
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0, equal_nan=True)  # type: ignore[arg-type]
        expected = [torch_ops.row_powers(grad, one, norm_type) for grad, one in zip(grads, rows, strict=True)]
        torch.testing.assert_close(together, torch.cat(expected), rtol=1e-6, atol=0, equal_nan=True)
    assert native.powers_by_row([torch.ones(4, 4)[:, ::2], *grads], [Rows(0, 4), *rows], 2.0) is None


def test_tables_with_and_without_dlpack_are_equal() -> None:
    """Describe tensors through DLPack, which C reads, and from Python."""
    tensors = [torch.randn(3, 4, dtype=dtype)[1:] for dtype in DTYPES] + [torch.zeros(0, 3), torch.tensor(1.0)]
    result, other = describe_tensors(tensors, "cpu"), TensorTable(len(tensors))
    assert result is not None
    assert _fill(other, tensors, "cpu")
    assert vars(result) == vars(other)
    assert list(result.addresses) == [t.data_ptr() for t in tensors]
    assert result.has_float64


@pytest.mark.parametrize("odd", [torch.ones(2, 2).to_sparse(), torch.zeros(4, 4)[::2], torch.ones(2).to(torch.int8)])
def test_c_kernel_without_dlpack(odd: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove DLPack, as in an old torch: tensors are described from Python."""
    tensors = [torch.randn(3, 4), torch.randn(100).bfloat16()]
    expected = sums("native", tensors, 2.0)
    monkeypatch.setattr(load_library(), "dlpack", None)
    assert sums("native", tensors, 2.0) == expected
    assert native.power_sums([*tensors, odd], 2.0) is None


def test_c_and_torch_agree_on_dense_tensors() -> None:
    """Describe permuted, strided, expanded and empty tensors."""
    base = torch.zeros(2, 3, 4)
    shapes = [base.permute(order) for order in ((0, 1, 2), (2, 0, 1), (1, 0, 2), (2, 1, 0))]
    shapes += [
        base[:, :1],
        base[:1],
        base[:, 1:2, :],
        base.expand(2, 2, 3, 4),
        base.as_strided((3, 1, 2), (1, 7, 3)),
        base.as_strided((2, 2), (1, 1)),
        base[..., ::2],
        base[:0],
        base.view(24, 1),
    ]
    for tensor in shapes:
        assert (describe_tensors([tensor], "cpu") is not None) == torch_ops.is_dense(tensor), tensor.stride()


@pytest.mark.parametrize("openmp", [True, False])
def test_bits_do_not_depend_on_threads_or_alignment(openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not openmp:
        monkeypatch.setattr(load_library(), "openmp", None)
    base = torch.randn(1 << 21)
    tensors = [base[i : i + 1_500_000] for i in range(4)]
    copies = [tensor.clone() for tensor in tensors]
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results += [sums("native", tensors, 2.0), sums("native", copies, 2.0)]
    finally:
        torch.set_num_threads(threads)
    assert all(result == results[0] for result in results)


def test_operators_repeat_a_sum_in_float64_only_if_float32_is_too_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum large float32 tensors by operators, whose squares do or do not fit into float32."""
    widened: list[int] = []
    real = torch_ops._to_float64
    monkeypatch.setattr(torch_ops, "_to_float64", lambda piece: widened.append(piece.numel()) or real(piece))
    torch_ops.power_sum(torch.randn(8192), 2.0)
    assert not widened
    for scale in (1e25, 1e-25, 0.0):
        widened.clear()
        torch_ops.power_sum(torch.randn(8192) * scale, 2.0)
        assert sum(widened) == 8192


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_positive_elements(dtype: torch.dtype) -> None:
    """Sum 16 M elements. Torch's norm has an error of 3e-3, which grows with their number."""
    tensor = torch.rand(1 << 24).to(dtype)
    for compute in (native.power_sums, operator_power_sums):
        result = compute([tensor], 2.0)
        assert result is not None
        error = abs(math.sqrt(float(result[0])) / math.sqrt(expected_sum(tensor, 2.0)) - 1)
        assert error < 1e-6, compute


def test_no_temporary_grows_with_the_model() -> None:
    """Sum 64 MB in one tensor and in many. A table costs 20 bytes per tensor, widening by operators 8 MB."""
    one, many = torch.randn(1 << 24), list(torch.randn(1 << 24).split(1 << 14))
    assert peak_bytes(lambda: native.power_sums([one], 2.0)) < 1 << 12
    assert peak_bytes(lambda: native.power_sums(many, 2.0)) < 1 << 16
    for tensor in (one, one.bfloat16()):
        assert peak_bytes(lambda tensor=tensor: operator_power_sums([tensor], 2.0)) < 10 << 20  # type: ignore[misc]


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coefs", [[0.3], [1.0], [math.nan], [0.5, 1.0, 0.25, 1.0]])
def test_conditional_scale(dtype: torch.dtype, coefs: list[float]) -> None:
    """Multiply in at least float32, except by 1, and increase the versions, which autograd reads."""
    drawn = [torch.randn(70_000), torch.randn(5, 3), torch.randn(0), torch.randn(4097)[1:]]
    tensors = [x.to(dtype).to(DEVICE) for x in drawn]
    before = [tensor.clone() for tensor in tensors]
    versions = [tensor._version for tensor in tensors]
    assert triton_launch.scale_(tensors, torch.tensor(coefs, dtype=torch.float64, device=DEVICE))
    wide = torch.promote_types(dtype, torch.float32)
    for i, (tensor, old) in enumerate(zip(tensors, before, strict=True)):
        coef = coefs[i % len(coefs)]
        expected = old if coef == 1 else (old.to(wide) * torch.tensor(coef, dtype=wide)).to(dtype)
        # The interpreter cuts float32 to bfloat16, a GPU rounds it.
        rtol = 2**-7 if coef != 1 and dtype == torch.bfloat16 and DEVICE == "cpu" else 0
        torch.testing.assert_close(tensor, expected, rtol=rtol, atol=0, equal_nan=True)
    assert all(tensor._version > version for tensor, version in zip(tensors, versions, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.3, 1e-30, math.nan, 0.0])
def test_scale_equals_mul_bit_by_bit(dtype: torch.dtype, factor: float) -> None:
    """Scale every length, NaN, infinities and subnormals, on one thread and on several."""
    drawn = [torch.randn(n, dtype=torch.float64) for n in (*LENGTHS, 1_500_000)]
    drawn += [torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 3e38] * 20), torch.randn(6, 4).t()]
    tensors = [x.to(dtype) for x in drawn] + [torch.randn(101).to(dtype)[1:]]
    expected = [tensor.clone().mul_(factor) for tensor in tensors]
    versions = [tensor._version for tensor in tensors]
    assert native.scale_(tensors, factor)
    for tensor, other in zip(tensors, expected, strict=True):
        assert torch.equal(tensor.isnan(), other.isnan())
        assert torch.equal(tensor.nan_to_num(7.0), other.nan_to_num(7.0))
        assert torch.equal(tensor.signbit() | tensor.isnan(), other.signbit() | other.isnan())
    assert all(tensor._version > version for tensor, version in zip(tensors, versions, strict=True))


def test_rounds_every_bfloat16_number_as_torch_does() -> None:
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for factor in (0.3337, 1.0, 1e-3, 255.7):
        expected, tensor = numbers.clone().mul_(factor), numbers.clone()
        assert native.scale_([tensor], factor)
        assert torch.equal(tensor.isnan(), expected.isnan())
        assert torch.equal(tensor[~tensor.isnan()], expected[~expected.isnan()])


def test_scale_refuses_tensors_that_operators_take() -> None:
    for odd in (torch.ones(3).half(), torch.ones(4, 4)[::2], torch.ones(2, dtype=torch.complex64)):
        assert not native.scale_([torch.ones(2), odd], 0.5)
        assert (odd == 1).all()


def test_table_is_reused_until_an_address_or_a_length_changes() -> None:
    """Request tables after an address changed, which keeps the chunks, and after a length changed."""
    from distclip.norms.kernels.gpu_tables import get_table

    tensors = [torch.ones(100, device=DEVICE), torch.ones(70_000, device=DEVICE)]
    table = get_table(tensors)
    assert table is not None
    assert table is get_table(list(tensors))
    assert table.num_chunks == 3
    other = get_table([tensors[0].clone(), tensors[1]])
    assert other is not None
    assert other is not table
    assert other.bounds is table.bounds
    assert [launch.aligned for launch in table.launches] == [True]
    odd = get_table([torch.ones(100, device=DEVICE)[1:], tensors[1]])
    assert odd is not None
    assert [launch.aligned for launch in odd.launches] == [False]
    assert get_table([torch.ones(101, device=DEVICE), tensors[1]]).bounds is not table.bounds  # type: ignore[union-attr]


def test_gpus_use_the_triton_kernels() -> None:
    """Import the kernels by name. With a wrong name every GPU would silently use operators of torch."""
    assert all(kernels.gpu_kernels(torch.device(kind)) is triton_launch for kind in ("cuda", "xpu"))
    assert all(kernels.gpu_kernels(torch.device(kind)) is None for kind in ("cpu", "mps", "meta"))


def test_old_triton_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend an older version, which operators of torch would hide by being slow."""
    monkeypatch.setattr(triton_launch.triton_kernels, "VERSION", "2.3.1")
    with pytest.raises(distclip.ArgumentError, match=r"triton=.*too old.*3\.6"):
        kernels.gpu_kernels(torch.device("cuda"))
    assert kernels.gpu_kernels(torch.device("cpu")) is None


@interpreted
def test_clipper_with_the_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clip with policies of one norm and of many, in comparison with operators of torch."""
    monkeypatch.setattr(kernels, "gpu_kernels", lambda device: triton_launch)
    for policy in (distclip.global_norm(0.5), distclip.per_tensor_norm(0.5), distclip.global_norm(1e9)):
        params = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 700, 12)]
        twins = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 700, 12)]
        for param, twin in zip(params, twins, strict=True):
            param.grad = torch.randn(param.shape)
            twin.grad = param.grad.clone()
        report = distclip.GradClipper([(f"p{i}", p) for i, p in enumerate(params)], policy).clip()
        with monkeypatch.context() as plain:
            plain.setattr(kernels, "gpu_kernels", lambda device: None)
            other = distclip.GradClipper([(f"p{i}", p) for i, p in enumerate(twins)], policy).clip()
        torch.testing.assert_close(report.norms, other.norms, rtol=1e-7, atol=0)
        for param, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(param.grad, twin.grad, rtol=3e-7, atol=0)


@pytest.fixture(scope="module")
def gpu_code() -> dict[str, dict[str, int]]:
    """Compile the kernels for several GPUs, none of which is needed, and count instructions."""
    environment = {"PATH": "/usr/bin:/bin", "TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("gpu_code.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    facts: dict[str, dict[str, int]] = json.loads(done.stdout)
    return facts


@pytest.mark.slow
def test_gpu_code_has_few_float64_instructions(gpu_code: dict[str, dict[str, int]]) -> None:
    """Count them in machine code: at most one for 64 elements, of which a thread takes 256, and none in a loop."""
    for name, facts in gpu_code.items():
        if "fp64" not in name and not name.startswith("gather s"):
            assert facts["float64"] <= 256 / 64, name
            assert facts.get("float64_in_loops", 0) == 0, name
        if "pairs" in name:
            assert facts["float64"] == 0, name
    assert gpu_code["scale fp64 sm_90"]["float64_in_loops"] > 0, "the counter sees no float64 instructions"


@pytest.mark.slow
def test_gpu_code_uses_wide_loads_and_few_registers(gpu_code: dict[str, dict[str, int]]) -> None:
    """Expect loads and stores of 16 bytes, at least 512 threads on a multiprocessor, and no spilled registers."""
    for name, facts in gpu_code.items():
        assert facts["wide_loads"] >= 8 or name.startswith("gather"), name
        assert facts["registers"] <= 128, name
        assert facts["spilled"] == 0, name
        assert facts.get("wide_stores", 0) >= 8 or not name.startswith("scale"), name
