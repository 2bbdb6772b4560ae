"""Define the Triton kernels that `triton_launch` starts: one program for each chunk, or for each tensor.

`powers` does no float64 arithmetic per element. Some GPUs have 64 times fewer float64 units than float32 units (B300,
L4, L40S, RTX), and would wait for them instead of for their memory. Each lane adds up runs of eight elements in
float32, and the runs as a pair of float32 numbers, the rounded sum and the sum of the rounding errors. The sum of a
chunk becomes float64 when it is complete.

A chunk whose sum overflows float32, or is so small that squares may have underflowed, is summed again, multiplied by a
power of two that brings its largest element to about 2^45. The factor is exact, and is removed from the sum by its
exponent.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["ELEMENTS", "VERSION", "gather", "powers", "scale"]

VERSION: str = triton.__version__
"""Version of Triton."""

ELEMENTS = (tl.float64, tl.float32, tl.bfloat16, tl.float16)
"""Triton dtypes in the order of `tensor_table.DTYPES`."""

BLOCK = tl.constexpr(2048)
"""Number of elements that a program processes at a time: eight for each thread of eight warps."""

RUN = tl.constexpr(8)
"""Number of elements of a lane that are added up in float32, which loses at most 3e-7 of their sum."""

SMALLEST = tl.constexpr(0x14800000)
LARGEST = tl.constexpr(0x71800000)
"""Bits of 2^-86 and of 2^100, between which the largest sum of a lane is precise.

Squares below 2^-126 can underflow, and 65,536 of them are less than 1e-7 of 2^-86.
"""

INFINITY = tl.constexpr(0x7F800000)
"""Bits of the float32 infinity. Those of NaN are larger."""


@triton.jit
def _find_chunk(
    addresses, lengths, tensor_of, start_of, ELEMENT: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr
):
    """Return the address and the length of this program's chunk, and the index of the chunk's tensor."""
    chunk = tl.program_id(0)
    tensor = tl.load(tensor_of + chunk)
    start = tl.load(start_of + chunk)
    pointer = tl.load(addresses + tensor).to(tl.pointer_type(ELEMENT)) + start
    if ALIGNED:
        # With this hint the compiler emits loads of 16 bytes.
        pointer = tl.multiple_of(pointer, 16)
    return pointer, tl.minimum(tl.load(lengths + tensor) - start, CHUNK).to(tl.int32), tensor


@triton.jit
def _widen(x):
    """Convert to float32, which is exact."""
    if x.dtype == tl.bfloat16:
        # A bfloat16 number is the upper half of a float32.
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _bits(x):
    """Return the bits of |x|, integers in the same order as the numbers, with NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _add(total, x, OPERATION: tl.constexpr):
    """Add a block to `total`: squares, magnitudes, or the maximum of the bits of |x|."""
    if OPERATION == 0:
        total += x * x
    elif OPERATION == 1:
        total += tl.abs(x)
    # A floating-point maximum may drop a NaN.
    elif x.dtype == tl.float64:
        total = tl.maximum(total, x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF)
    else:
        total = tl.maximum(total, _bits(x))
    return total


@triton.jit
def _add_words(words, x):
    """Add the words of a block to `words`, which may wrap around, because only the sum modulo 2^32 counts."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        words += bits.to(tl.int32) + (bits >> 32).to(tl.int32)
    elif x.dtype == tl.float32:
        words += x.to(tl.int32, bitcast=True)
    else:
        words += x.to(tl.int16, bitcast=True).to(tl.int32)
    return words


@triton.jit
def _add_run(high, low, run):
    """Add a run to a pair: the rounded sum, and the sum of all rounding errors (Knuth's TwoSum)."""
    total = high + run
    rest = total - high
    return total, low + ((high - (total - rest)) + (run - rest))


@triton.jit
def _sum_lanes(high, low):
    """Return the sum of all lanes as a pair of float32 numbers. `high` must be finite and not negative."""
    # A large number is added to each lane and subtracted again. This keeps the high bits, which are multiples of one
    # common unit, and few enough that their sum is exact in any order. What is left over is at most 2^-11 of the sum.
    large = tl.max(high, 0) * 6144.0
    first = (high + large) - large
    return tl.sum(first, 0), tl.sum((high - first) + low, 0)


@triton.jit
def _sum_scaled(pointer, count, exponent, OPERATION: tl.constexpr):
    """Return Σ|2^exponent x|², or Σ|2^exponent x|, of the lanes of a chunk, as pairs of float32 numbers."""
    factor = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    lanes = tl.arange(0, BLOCK)
    high = tl.zeros((BLOCK,), tl.float32)
    low = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, count, BLOCK):
        x = _widen(tl.load(pointer + i + lanes, mask=i + lanes < count, other=0.0)) * factor
        high, low = _add_run(high, low, x * x if OPERATION == 0 else tl.abs(x))
    return high, low


@triton.jit
def _store_pair(position, high, low, exponent):
    """Store (high + low) / 2^exponent, as float64 or as a pair of float32 numbers."""
    if position.dtype.element_ty == tl.float64:
        value = high.to(tl.float64) + low.to(tl.float64)
        # Subtracting from the bits of the exponent costs no float64 multiplication.
        bits = value.to(tl.int64, bitcast=True) - (exponent.to(tl.int64) << 52)
        tl.store(position, bits.to(tl.float64, bitcast=True))
    else:
        # The factor is applied in four parts, each of which is a normal float32 number.
        factor = ((127 - exponent // 4) << 23).to(tl.float32, bitcast=True)
        last = ((127 - (exponent - exponent // 4 * 3)) << 23).to(tl.float32, bitcast=True)
        tl.store(position, high * factor * factor * factor * last)
        tl.store(position + 1, low * factor * factor * factor * last)


@triton.jit
def _add_block(total, low, largest, words, y, OPERATION: tl.constexpr, WORDS: tl.constexpr, PAIRS: tl.constexpr):
    """Add one block to all accumulators."""
    if WORDS:
        words = _add_words(words, y)
    if PAIRS:
        x = _widen(y)
        largest = tl.maximum(largest, tl.abs(x))
        total, low = _add_run(total, low, x * x if OPERATION == 0 else tl.abs(x))
    elif OPERATION != 3:
        total = _add(total, y if y.dtype == tl.float64 else _widen(y), OPERATION)
    return total, low, largest, words


@triton.jit(do_not_specialize=["first"])
def powers(
    addresses, lengths, tensor_of, start_of, partial, partial_words, first,
    OPERATION: tl.constexpr, ELEMENT: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Store Σ|x|², Σ|x|, max|x| or 0 of this program's chunk in partial[first + chunk].

    With WORDS, store the sum of the words in partial_words[first + chunk] as well.
    """
    pointer, count, _ = _find_chunk(addresses, lengths, tensor_of, start_of, ELEMENT, CHUNK, ALIGNED)
    # Sums of float64 numbers are float64. All others are pairs of float32 numbers.
    PAIRS: tl.constexpr = OPERATION < 2 and tl.float64 != ELEMENT
    lanes = tl.arange(0, BLOCK)
    if OPERATION == 2:
        total = tl.zeros((BLOCK,), tl.int64 if tl.float64 == ELEMENT else tl.int32)
    else:
        total = tl.zeros((BLOCK,), tl.float64 if tl.float64 == ELEMENT else tl.float32)
    low = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    words = tl.zeros((BLOCK,), tl.int32)
    # Full blocks need no masks, so that nothing separates the loads.
    full = count // (BLOCK * RUN) * (BLOCK * RUN)
    for i in range(0, full, BLOCK * RUN):
        if PAIRS:
            run = tl.zeros((BLOCK,), tl.float32)
            for j in tl.static_range(RUN):
                x = tl.load(pointer + i + j * BLOCK + lanes)
                if WORDS:
                    words = _add_words(words, x)
                x = _widen(x)
                largest = tl.maximum(largest, tl.abs(x))
                run = _add(run, x, OPERATION)
            total, low = _add_run(total, low, run)
        else:
            for j in tl.static_range(RUN):
                x = tl.load(pointer + i + j * BLOCK + lanes)
                total, low, largest, words = _add_block(total, low, largest, words, x, OPERATION, WORDS, PAIRS)
    blocks = count // BLOCK * BLOCK
    for k in range(full, blocks, BLOCK):
        y = tl.load(pointer + k + lanes)
        total, low, largest, words = _add_block(total, low, largest, words, y, OPERATION, WORDS, PAIRS)
    if blocks < count:
        z = tl.load(pointer + blocks + lanes, mask=blocks + lanes < count, other=0.0)
        total, low, largest, words = _add_block(total, low, largest, words, z, OPERATION, WORDS, PAIRS)
    if WORDS:
        tl.store(partial_words + first + tl.program_id(0), tl.sum(words.to(tl.int64), 0))
    # Without float64, each chunk has a pair of numbers.
    position = partial + (first + tl.program_id(0)) * (1 if partial.dtype.element_ty == tl.float64 else 2)
    if PAIRS:
        top = tl.max(_bits(total), 0)
        exponent = 0
        if (top < SMALLEST) | (top > LARGEST):
            # A NaN is in `top` already. Zeros and infinities need no second sum.
            peak = tl.max(_bits(largest), 0)
            if (peak > 0) & (peak < INFINITY) & (top <= INFINITY):
                exponent = tl.minimum(172 - (peak >> 23), 126)
                total, low = _sum_scaled(pointer, count, exponent, OPERATION)
                top = tl.max(_bits(total), 0)
                exponent = exponent * (2 if OPERATION == 0 else 1)
        if top < INFINITY:
            high, rest = _sum_lanes(total, low)
        else:
            high = top.to(tl.float32, bitcast=True)
            rest = tl.zeros_like(high)
        _store_pair(position, high, rest, exponent)
    elif OPERATION == 2:
        maximum = tl.max(total, 0)
        if tl.float64 == ELEMENT:
            tl.store(position, maximum.to(tl.float64, bitcast=True))
        else:
            tl.store(position, maximum.to(tl.float32, bitcast=True).to(partial.dtype.element_ty))
    else:
        tl.store(position, tl.sum(total, 0).to(partial.dtype.element_ty))


@triton.jit
def gather(partial, partial_words, bounds, sums, checksums, OPERATION: tl.constexpr, WORDS: tl.constexpr):
    """Store the sum, or the maximum, over the chunks of this program's tensor in sums[tensor].

    With WORDS, store the checksum in checksums[tensor] as well. With float32 sums, `partial` has a pair for each chunk.
    """
    # Chunks are added in order, so that the bits are reproducible.
    tensor = tl.program_id(0)
    start, end = tl.load(bounds + tensor), tl.load(bounds + tl.num_programs(0) + tensor)
    PAIRS: tl.constexpr = partial.dtype.element_ty == tl.float32
    lanes = tl.arange(0, 128)
    if PAIRS:
        total = tl.zeros((128,), tl.int32 if OPERATION == 2 else tl.float32)
    else:
        total = tl.zeros((128,), tl.int64 if OPERATION == 2 else tl.float64)
    low = tl.zeros((128,), tl.float32)
    words = tl.zeros((128,), tl.int64)
    for i in range(start, end, 128):
        mask = i + lanes < end
        if WORDS:
            words += tl.load(partial_words + i + lanes, mask=mask, other=0)
        if PAIRS:
            x = tl.load(partial + 2 * (i + lanes), mask=mask, other=0.0)
            if OPERATION == 2:
                total = tl.maximum(total, _bits(x))
            else:
                total, low = _add_run(total, low, x)
                low += tl.load(partial + 2 * (i + lanes) + 1, mask=mask, other=0.0)
        else:
            y = tl.load(partial + i + lanes, mask=mask, other=0.0)
            if OPERATION == 2:
                total = tl.maximum(total, y.to(tl.int64, bitcast=True))
            else:
                total += y
    if WORDS:
        tl.store(checksums + tensor, tl.sum(words, 0) & 0xFFFFFFFF)
    if PAIRS:
        top = tl.max(total if OPERATION == 2 else _bits(total), 0)
        result = top.to(tl.float32, bitcast=True)
        if OPERATION != 2 and top < INFINITY:
            # The large number in `_sum_lanes` must not overflow.
            factor = tl.where(top > LARGEST, 0.0001220703125, 1.0)
            high, rest = _sum_lanes(total * factor, low * factor)
            result = (high + rest) / factor
        tl.store(sums + tensor, result)
    elif OPERATION == 2:
        tl.store(sums + tensor, tl.max(total, 0).to(tl.float64, bitcast=True))
    else:
        tl.store(sums + tensor, tl.sum(total, 0))


@triton.jit
def scale(
    addresses, lengths, tensor_of, start_of, coefs, per_tensor,
    ELEMENT: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Multiply this program's chunk by its tensor's factor, or by the only one if per_tensor is 0."""
    pointer, count, tensor = _find_chunk(addresses, lengths, tensor_of, start_of, ELEMENT, CHUNK, ALIGNED)
    coef = tl.load(coefs + tensor * per_tensor)
    # A step that is not clipped, the usual case, costs no memory traffic.
    if coef != 1.0:
        factor = coef if tl.float64 == ELEMENT else coef.to(tl.float32)
        lanes = tl.arange(0, BLOCK)
        if count == CHUNK:
            for i in range(0, CHUNK, BLOCK):
                x = tl.load(pointer + i + lanes).to(factor.dtype)
                tl.store(pointer + i + lanes, (x * factor).to(ELEMENT))
        else:
            for j in range(0, count, BLOCK):
                mask = j + lanes < count
                x = tl.load(pointer + j + lanes, mask=mask).to(factor.dtype)
                tl.store(pointer + j + lanes, (x * factor).to(ELEMENT), mask=mask)
