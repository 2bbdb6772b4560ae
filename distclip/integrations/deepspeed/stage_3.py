"""Adapt ZeRO stage 3: every parameter is cut into equal pieces, one per rank, and the last piece is padded."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..monkeypatch import MethodPatches
from .adapter import Adapter, Decide, Piece, Write, norm_signal
from .foreign import ZeroStage3

__all__ = ["Stage3"]


class Stage3(Adapter):
    """DeepSpeedZeroOptimizer_Stage3, with its optimizer on the device or on the CPU."""

    optimizer: ZeroStage3

    def find_pieces(self) -> None:
        zero = self.optimizer
        # (padded length, piece) of every parameter by group. A rank that has only padding has no piece.
        self._by_param: list[list[tuple[int, Piece | None]]] = []
        for i, params in enumerate(zero.fp16_groups):
            weights, offset = zero.fp32_partitioned_groups_flat[i], 0
            by_param: list[tuple[int, Piece | None]] = []
            group: list[Piece] = []
            for param in params:
                length, process_group = int(param.partition_numel()), zero._get_param_partition_group(param)
                start = zero._get_param_partition_rank(param) * length
                n = min(length, max(0, int(param.ds_numel) - start))
                if n:
                    part = weights.narrow(0, offset, n)
                    group.append(self.piece(param, part, process_group, start=start, offset=offset))
                by_param.append((length, group[-1] if n else None))
                offset += length
            self.groups.append(group)
            self._by_param.append(by_param)

    def attach_grads(self) -> None:
        zero = self.optimizer
        for i, by_param in enumerate(self._by_param):
            weights = zero.fp32_partitioned_groups_flat[i]
            self.share_weights(i, weights)
            if zero.offload_optimizer:
                # The copies on the CPU are complete before the step.
                for piece in self.groups[i]:
                    self.set_grad(piece, piece.view_in(weights.grad))  # type: ignore[arg-type]
                continue
            for (length, own_piece), grad in zip(by_param, zero.averaged_gradients[i], strict=True):
                if own_piece is not None:
                    padded = grad.numel() == length
                    self.set_grad(own_piece, grad.view(-1)[: own_piece.stand_in.numel()] if padded else grad)

    def install(self, patches: MethodPatches, decide: Decide, write: Write) -> None:
        zero = self.optimizer

        def get_norm_groups() -> list[Tensor]:
            return [norm_signal(decide(), zero.device)]

        def unscale_and_clip_grads(group: int, norm: Any) -> None:
            flat = zero.fp32_partitioned_groups_flat[group].grad
            assert flat is not None
            write(self.groups[group], [piece.view_in(flat) for piece in self.groups[group]])

        patches.replace(zero, "_get_norm_groups", get_norm_groups)
        patches.replace(zero, "unscale_and_clip_grads", unscale_and_clip_grads)
        # The measurement already finds non-finite gradients.
        patches.replace(zero, "check_overflow", lambda *args, **kwargs: None)
