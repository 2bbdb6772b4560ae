"""Define the Triton kernels that `triton_launch` starts: one program for each chunk, or for each tensor."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["ELEMENTS", "gather", "powers", "scale"]

ELEMENTS = (tl.float64, tl.float32, tl.bfloat16, tl.float16)
"""Triton dtypes in the order of `tensor_table.DTYPES`."""

BLOCK = tl.constexpr(2048)
"""Number of elements that a program processes at a time: eight for each thread of eight warps."""


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
    return pointer, tl.minimum(tl.load(lengths + tensor) - start, CHUNK), tensor


@triton.jit
def _add(total, x, OPERATION: tl.constexpr):
    """Add a block to `total`."""
    if OPERATION == 0:
        total += x.to(tl.float64) * x.to(tl.float64)
    elif OPERATION == 1:
        total += tl.abs(x.to(tl.float64))
    # The maximum is kept as the bits of |x|. As integers they have the same order as the numbers, and NaN is above all
    # others: a floating-point maximum may drop it.
    elif x.dtype == tl.float64:
        total = tl.maximum(total, x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF)
    else:
        total = tl.maximum(total, (x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64))
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
        words += x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return words


@triton.jit(do_not_specialize=["first"])
def powers(
    addresses, lengths, tensor_of, start_of, partial, partial_words, first,
    OPERATION: tl.constexpr, ELEMENT: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Store Σ|x|², Σ|x|, max|x| or 0 of this program's chunk in partial[first + chunk].

    With WORDS, store the sum of the words in partial_words[first + chunk] as well.
    """
    pointer, count, _ = _find_chunk(addresses, lengths, tensor_of, start_of, ELEMENT, CHUNK, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int64 if OPERATION == 2 else tl.float64)
    words = tl.zeros((BLOCK,), tl.int32)
    if count == CHUNK:
        # A full chunk needs no masks, so that nothing separates the loads.
        for i in range(0, CHUNK, BLOCK):
            x = tl.load(pointer + i + lanes)
            if OPERATION != 3:
                total = _add(total, x, OPERATION)
            if WORDS:
                words = _add_words(words, x)
    else:
        for j in range(0, count, BLOCK):
            y = tl.load(pointer + j + lanes, mask=j + lanes < count, other=0.0)
            if OPERATION != 3:
                total = _add(total, y, OPERATION)
            if WORDS:
                words = _add_words(words, y)
    if WORDS:
        tl.store(partial_words + first + tl.program_id(0), tl.sum(words.to(tl.int64), 0))
    if OPERATION == 2:
        maximum = tl.max(total, 0)
        if tl.float64 == ELEMENT:
            value = maximum.to(tl.float64, bitcast=True)
        else:
            value = maximum.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)
    else:
        value = tl.sum(total, 0)
    tl.store(partial + first + tl.program_id(0), value)


@triton.jit
def gather(partial, partial_words, bounds, sums, checksums, OPERATION: tl.constexpr, WORDS: tl.constexpr):
    """Store the sum, or the maximum, over the chunks of this program's tensor in sums[tensor].

    With WORDS, store the checksum in checksums[tensor] as well.
    """
    # Chunks are added in order, so that the bits are reproducible.
    tensor = tl.program_id(0)
    start, end = tl.load(bounds + tensor), tl.load(bounds + tl.num_programs(0) + tensor)
    lanes = tl.arange(0, 128)
    total = tl.zeros((128,), tl.int64 if OPERATION == 2 else tl.float64)
    words = tl.zeros((128,), tl.int64)
    for i in range(start, end, 128):
        if WORDS:
            words += tl.load(partial_words + i + lanes, mask=i + lanes < end, other=0)
        x = tl.load(partial + i + lanes, mask=i + lanes < end, other=0.0)
        if OPERATION == 2:
            total = tl.maximum(total, x.to(tl.int64, bitcast=True))
        else:
            total += x
    if WORDS:
        tl.store(checksums + tensor, tl.sum(words, 0) & 0xFFFFFFFF)
    if OPERATION == 2:
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
    # The usual case of a step that is not clipped: no memory traffic.
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
