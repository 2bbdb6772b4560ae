"""ZeRO stage 3: every parameter is cut into equal pieces, one for each rank, the last of them padded with zeros."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..monkeypatch import Patches
from .adapter import Decide, Hold, Piece, Write, go_on

__all__ = ["Stage3"]


class Stage3(Hold):
    """DeepSpeedZeroOptimizer_Stage3, with and without its optimizer on the CPU."""

    def find(self) -> None:
        zero = self.optimizer
        self._lengths: list[list[tuple[int, Piece | None]]] = []
        for i, params in enumerate(zero.fp16_groups):
            master, at = zero.fp32_partitioned_groups_flat[i], 0
            held: list[tuple[int, Piece | None]] = []
            group: list[Piece] = []
            for param in params:
                length, process_group = int(param.partition_numel()), zero._get_param_partition_group(param)
                start = zero._get_param_partition_rank(param) * length
                n = min(length, max(0, int(param.ds_numel) - start))
                if n:
                    group.append(self.piece(param, master.narrow(0, at, n), process_group, start=start, offset=at))
                held.append((length, group[-1] if n else None))
                at += length
            self.groups.append(group)
            self._lengths.append(held)

    def look(self) -> None:
        zero = self.optimizer
        for i, held in enumerate(self._lengths):
            master = zero.fp32_partitioned_groups_flat[i]
            self.renew(i, master)
            if zero.offload_optimizer:
                for piece in self.groups[i]:
                    self.lay(piece, piece.of(master.grad))
                continue
            for (length, own), grad in zip(held, zero.averaged_gradients[i], strict=True):
                if own is not None:
                    whole = grad.numel() == length
                    self.lay(own, grad.view(-1)[: own.tensor.numel()] if whole else grad)

    def take(self, patches: Patches, decide: Decide, write: Write) -> None:
        zero = self.optimizer

        def measure() -> list[Tensor]:
            return [go_on(decide(), zero.device)]

        def clip(group: int, norm: Any) -> None:
            flat = zero.fp32_partitioned_groups_flat[group].grad
            write(self.groups[group], [piece.of(flat) for piece in self.groups[group]])

        patches.put(zero, "_get_norm_groups", measure)
        patches.put(zero, "unscale_and_clip_grads", clip)
        # What is not finite is in the norm.
        patches.put(zero, "check_overflow", lambda *args, **kwargs: None)
