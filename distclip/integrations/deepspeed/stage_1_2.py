"""ZeRO stages 1 and 2: each rank steps one contiguous partition of every group's flattened parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..monkeypatch import Patches
from .adapter import Decide, Hold, Piece, Write, go_on

__all__ = ["Stage12", "overlaps"]


class Stage12(Hold):
    """DeepSpeedZeroOptimizer, with and without its optimizer on the CPU.

    A partition begins and ends anywhere within a parameter, and zeros for alignment lie between parameters and at the
    end: pieces are told by the parameters' offsets, not by counting gradients.
    """

    def find(self) -> None:
        zero = self.optimizer
        self._by_param: list[dict[int, Piece]] = []
        for i, params in enumerate(zero.round_robin_bit16_groups):
            process_group, size = zero.real_dp_process_group[i], int(zero.partition_size[i])
            begin, master = dist.get_rank(process_group) * size, zero.single_partition_of_fp32_groups[i]
            group: dict[int, Piece] = {}
            for param, start, at, n in overlaps(params, zero.round_robin_bit16_offsets[i], begin, size):
                part = master.narrow(0, at, n)
                group[id(param)] = self.piece(param, part, process_group, start=start, offset=at)
            self.groups.append(list(group.values()))
            self._by_param.append(group)

    def look(self) -> None:
        zero = self.optimizer
        for i, group in enumerate(self.groups):
            master = zero.single_partition_of_fp32_groups[i]
            self.renew(i, master)
            if zero.cpu_offload:
                for piece in group:
                    self.lay(piece, piece.of(master.grad))
                continue
            grads = (g for g in zero.averaged_gradients[i] if not getattr(g, "_zero_padding", False))
            # What follows the last parameter is padding, marked or not.
            for param, grad in zip(zero.params_in_partition[i], grads, strict=False):
                if (own := self._by_param[i].get(id(param))) is not None:
                    self.lay(own, grad)

    def take(self, patches: Patches, decide: Decide, write: Write) -> None:
        zero = self.optimizer

        def measure(norm_type: float = 2) -> Tensor:
            return go_on(decide(), zero.device)

        def clip(partitions: Sequence[Tensor], norm: Any) -> None:
            for flat in partitions:
                i = next(i for i, own in enumerate(zero.single_partition_of_fp32_groups) if own.grad is flat)
                write(self.groups[i], [piece.of(flat) for piece in self.groups[i]])

        patches.put(zero, "scaled_global_norm", measure)
        patches.put(zero, "unscale_and_clip_grads", clip)
        # What is not finite is in the norm. That it is looked at: bfloat16 may be configured not to.
        patches.put(zero, "check_overflow", lambda *args, **kwargs: None)
        patches.put(zero, "check_grad_overflow", True)
        patches.put(zero, "compute_grad_norm", True)


def overlaps(
    params: Sequence[Any], offsets: Sequence[int], begin: int, size: int
) -> Iterator[tuple[Any, int, int, int]]:
    """The parts of flattened parameters that lie in one partition.

    Args:
        params: parameters of a group, in the order of the flat buffer.
        offsets: where each of them begins in it.
        begin: where the partition does.
        size: of the partition.

    Yields:
        (parameter, its first element here, where that lies in the partition, how many elements).

    >>> import torch
    >>> list(overlaps([torch.ones(5), torch.ones(2, 3)], [0, 5], 4, 4))[1][1:]
    (0, 1, 3)
    """
    for param, offset in zip(params, offsets, strict=True):
        start, end = max(offset, begin), min(offset + param.numel(), begin + size)
        if start < end:
            yield param, start - offset, start - begin, end - start
