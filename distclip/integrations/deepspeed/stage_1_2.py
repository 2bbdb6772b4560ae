"""Adapt ZeRO stages 1 and 2: each rank steps one contiguous partition of every group's flattened parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from ..monkeypatch import MethodPatches
from .adapter import Adapter, Decide, Piece, Write, norm_signal
from .foreign import ZeroStages12

__all__ = ["Stages12", "overlaps"]

P = TypeVar("P", bound=Tensor)


class Stages12(Adapter):
    """DeepSpeedZeroOptimizer, with its optimizer on the device or on the CPU.

    A partition begins and ends anywhere within a parameter, and alignment puts zeros between parameters and at the end.
    Pieces are therefore found by the offsets of the parameters, and not by counting gradients.
    """

    optimizer: ZeroStages12
    slices_alone = False

    def find_pieces(self) -> None:
        zero = self.optimizer
        self._by_param: list[dict[int, Piece]] = []
        for i, params in enumerate(zero.round_robin_bit16_groups):
            process_group, size = zero.real_dp_process_group[i], int(zero.partition_size[i])
            begin, weights = dist.get_rank(process_group) * size, zero.single_partition_of_fp32_groups[i]
            by_param: dict[int, Piece] = {}
            for param, start, at, n in overlaps(params, zero.round_robin_bit16_offsets[i], begin, size):
                part = weights.narrow(0, at, n)
                by_param[id(param)] = self.piece(param, part, process_group, start=start, offset=at)
            self.groups.append(list(by_param.values()))
            self._by_param.append(by_param)

    def attach_grads(self) -> None:
        zero = self.optimizer
        for i, group in enumerate(self.groups):
            weights = zero.single_partition_of_fp32_groups[i]
            self.share_weights(i, weights)
            if zero.cpu_offload:
                # The copies on the CPU are complete before the step.
                for piece in group:
                    self.set_grad(piece, piece.view_in(weights.grad))  # type: ignore[arg-type]
                continue
            grads = (grad for grad in zero.averaged_gradients[i] if not getattr(grad, "_zero_padding", False))
            # Whatever follows the last parameter is padding, and not all of it is marked.
            for param, grad in zip(zero.params_in_partition[i], grads, strict=False):
                if (own_piece := self._by_param[i].get(id(param))) is not None:
                    self.set_grad(own_piece, grad)

    def install(self, patches: MethodPatches, decide: Decide, write: Write) -> None:
        zero = self.optimizer

        def scaled_global_norm(norm_type: float = 2) -> Tensor:
            return norm_signal(decide(), zero.device)

        def unscale_and_clip_grads(partitions: Sequence[Tensor], norm: Any) -> None:
            for flat in partitions:
                i = next(i for i, weights in enumerate(zero.single_partition_of_fp32_groups) if weights.grad is flat)
                write(self.groups[i], [piece.view_in(flat) for piece in self.groups[i]])

        patches.replace(zero, "scaled_global_norm", scaled_global_norm)
        patches.replace(zero, "unscale_and_clip_grads", unscale_and_clip_grads)
        # The measurement already finds non-finite gradients. The two flags make DeepSpeed read the norm, because its
        # config may turn that off for bfloat16.
        patches.replace(zero, "check_overflow", lambda *args, **kwargs: None)
        patches.replace(zero, "check_grad_overflow", True)
        patches.replace(zero, "compute_grad_norm", True)


def overlaps(params: Sequence[P], offsets: Sequence[int], begin: int, size: int) -> Iterator[tuple[P, int, int, int]]:
    """Find the parts of flattened parameters that are in one partition.

    Args:
        params: parameters of a group, in the order of the flat buffer.
        offsets: the index of each parameter's first element in the flat buffer.
        begin: the index of the partition's first element in the flat buffer.
        size: number of elements of the partition.

    Yields:
        (parameter, index in the parameter, index in the partition, number of elements) of each part.

    >>> import torch
    >>> list(overlaps([torch.ones(5), torch.ones(2, 3)], [0, 5], 4, 4))[1][1:]
    (0, 1, 3)
    """
    for param, offset in zip(params, offsets, strict=True):
        start, end = max(offset, begin), min(offset + param.numel(), begin + size)
        if start < end:
            yield param, start - offset, start - begin, end - start
