"""Measure one local tensor: a probe gradient through the kernels of the norm, and a checksum of its values.

The elements of a probe are small integers that depend on their position in the whole parameter. Every sum of them is
exact, so an element that counts twice, or not at all, changes the total.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..devices import is_fake
from ..norms.kernels import power_sums

__all__ = ["Box", "Values", "measure_probe", "read_values", "sum_of_codes"]

Box: TypeAlias = tuple[tuple[int, int], ...]
"""(first index, length) along each dim of the whole parameter."""

_NUM_CODES = 251
"""Number of different codes, a prime. Integers up to 256 are exact in bfloat16, the coarsest dtype of a gradient."""

_CHUNK = 2**15
"""Elements that one kernel sums. Their sum is below 2^24, so a sum in float32 is exact too."""

_BATCH = 64 * _CHUNK
"""Elements of a probe that exist at the same time."""

_PROBE_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128),
}
_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


@dataclass(frozen=True, slots=True)
class Values:
    """Fingerprint of the values of a local tensor.

    Args:
        checksum: equal for equal bits. None if the tensor has no values, as on the meta device.
        is_constant: True if all elements are equal, so that equal values on other ranks prove nothing.
    """

    checksum: int | None = None
    is_constant: bool = True


def measure_probe(local: Tensor, box: Box | None, whole: tuple[int, ...]) -> int:
    """Sum the elements of a probe gradient with the kernel that sums gradients.

    Args:
        local: this rank's tensor. Only its shape, dtype and device are used.
        box: part of the whole parameter that the tensor holds. None if it is unknown. Elements are then numbered from
            0.
        whole: shape of the whole parameter. It is not used without a box.

    Returns:
        Sum of the codes, exact.

    Host syncs: one per two million elements.
    """
    device = torch.device("cpu") if local.device.type == "meta" or is_fake(local) else local.device
    dtype = local.dtype if local.dtype in _PROBE_DTYPES else torch.float32
    total = 0
    for first in range(0, local.numel(), _BATCH):
        index = torch.arange(first, min(first + _BATCH, local.numel()), device=device)
        if box is not None:
            index = _global_index(index, box, whole)
        codes = (index % _NUM_CODES + 1).to(dtype)
        chunks = torch.split(codes, _CHUNK)
        sums = power_sums(chunks, 1.0, device)[0]
        total += sum(int(number) for number in sums.tolist())
    return total


def sum_of_codes(num_elements: int) -> int:
    """Return the sum of the codes of a whole parameter.

    >>> sum_of_codes(3), sum_of_codes(252)
    (6, 31627)
    """
    rounds, remainder = divmod(num_elements, _NUM_CODES)
    return rounds * (_NUM_CODES * (_NUM_CODES + 1) // 2) + remainder * (remainder + 1) // 2


def read_values(local: Tensor) -> Values:
    """Return the fingerprint of a local tensor's values.

    Args:
        local: of any dtype, not changed.

    Host syncs: two.

    >>> read_values(torch.tensor([1.0, 2.0])) == read_values(torch.tensor([2.0, 1.0]))
    False
    >>> read_values(torch.zeros(3)).is_constant
    True
    """
    if local.device.type == "meta" or is_fake(local) or local.layout is not torch.strided:
        return Values()
    with torch.no_grad():
        flat = local.detach().resolve_conj().resolve_neg().reshape(-1)
        words = flat.contiguous().view(_WORD.get(flat.element_size(), torch.uint8))
        checksum = torch.zeros((), dtype=torch.int64, device=local.device)
        for chunk, first in _chunks(words):
            position = torch.arange(first, first + len(chunk), device=local.device)
            # An odd factor for each position, so that equal words in another order have another sum (modulo 2^64).
            factor = (position * 0x5851F42D4C957F2D + 0x14057B7EF767814F) | 1
            checksum += ((chunk.to(torch.int64) + 1) * factor).sum()
        is_constant = local.numel() < 2 or not bool((flat[1:] != flat[0]).any())
        return Values(int(checksum), is_constant)


def _chunks(words: Tensor) -> Iterator[tuple[Tensor, int]]:
    for first in range(0, len(words), _BATCH):
        yield words[first : first + _BATCH], first


def _global_index(index: Tensor, box: Box, whole: tuple[int, ...]) -> Tensor:
    """Convert positions in a box to positions in the whole, flattened parameter."""
    result = torch.zeros_like(index)
    for dim in reversed(range(len(box))):
        first, length = box[dim]
        result += (index % length + first) * math.prod(whole[dim + 1 :])
        index = index // length
    return result
