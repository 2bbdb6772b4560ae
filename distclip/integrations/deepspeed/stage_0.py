"""ZeRO stage 0: data parallelism. Every rank has the whole averaged gradient, in `.grad`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .holds import Decide, Hold, Write, skipped
from .patches import Patches

__all__ = ["HalfPrecision", "SinglePrecision"]


class SinglePrecision(Hold):
    """A torch optimizer, stepped by the engine itself; parameters are float32."""

    def find(self) -> None:
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.groups = [[self.piece(param, param, self.ranks.copies_of(param)) for param in params]]
        self._params = params

    def look(self) -> None:
        for piece, param in zip(self.pieces, self._params, strict=True):
            self.lay(piece, param.grad)

    def take(self, patches: Patches, decide: Decide, write: Write) -> None:
        optimizer, its_step = self.optimizer, self.optimizer.step

        @wraps(its_step)
        def step(closure: Any = None) -> Any:
            decision = decide()
            # What the engine asks of its other optimizers: it counts skipped steps and holds its scheduler by it.
            optimizer.overflow = skipped(decision)
            if skipped(decision):
                return None
            there = [
                (p, param.grad) for p, param in zip(self.pieces, self._params, strict=True) if param.grad is not None
            ]
            write([piece for piece, _ in there], [grad for _, grad in there])
            return its_step()

        patches.put(optimizer, "step", step)
        patches.put(optimizer, "overflow", False)
        patches.put(optimizer, "_global_grad_norm", None)
        patches.put(self.engine, "clip_fp32_gradients", lambda: None)


class HalfPrecision(Hold):
    """FP16_Optimizer and FP16_UnfusedOptimizer, for bfloat16 too: parameters in 16 bits, copies of them in float32."""

    @property
    def loss_scale(self) -> float | None:
        own = self.optimizer
        return float(own.loss_scale) if own.low_precision_dtype == torch.float16 else None

    def find(self) -> None:
        self._params: list[Any] = []
        for params, masters in zip(self.optimizer.fp16_groups, self._masters(), strict=True):
            self.groups.append(
                [
                    self.piece(param, master, self.ranks.copies_of(param))
                    for param, master in zip(params, masters, strict=True)
                ]
            )
            self._params += params

    def look(self) -> None:
        for piece, param in zip(self.pieces, self._params, strict=True):
            self.lay(piece, param.grad)

    def take(self, patches: Patches, decide: Decide, write: Write) -> None:
        own = self.optimizer

        def step(closure: Any = None) -> bool:
            """DeepSpeed's own, without its norms: it would take inf for an overflow whatever `on_nonfinite` says."""
            if skipped(decide()):
                own._skip_invalid_grad_norm()
                return True
            own.overflow = False
            for group, copies in zip(self.groups, self._copied(), strict=True):
                write(group, copies)
            own._update_scale(False)
            own.optimizer.step()
            self._hand_back()
            return False

        patches.put(own, "step", step)
        if own.low_precision_dtype == torch.float16:
            patches.put(self.engine, "backward", self._scaled(self.engine.backward))

    def _masters(self) -> list[list[Tensor]]:
        """The float32 copies of the parameters, by group."""
        own = self.optimizer
        if hasattr(own, "fp32_groups"):
            return own.fp32_groups  # type: ignore[no-any-return]
        return [list(_views(flat, group)) for flat, group in zip(own.fp32_groups_flat, own.fp16_groups, strict=True)]

    def _copied(self) -> list[list[Tensor]]:
        """Copies of all gradients in float32, where the optimizer will find them; zeros for one that is missing."""
        own = self.optimizer
        owners = own.fp32_groups if hasattr(own, "fp32_groups") else [[flat] for flat in own.fp32_groups_flat]
        copied = []
        for params, masters in zip(own.fp16_groups, owners, strict=True):
            for master in masters:
                master.grad = torch.zeros_like(master)
            flat = hasattr(own, "fp32_groups_flat")
            grads = list(_views(masters[0].grad, params)) if flat else [master.grad for master in masters]
            for grad, param in zip(grads, params, strict=True):
                if param.grad is not None:
                    grad.copy_(param.grad)
            copied.append(grads)
        return copied

    def _hand_back(self) -> None:
        """Parameters from their copies, whose gradients are not needed any more."""
        own = self.optimizer
        for params, masters in zip(own.fp16_groups, self._masters(), strict=True):
            for param, master in zip(params, masters, strict=True):
                param.data.copy_(master.data)
        for group in own.fp32_groups if hasattr(own, "fp32_groups") else [own.fp32_groups_flat]:
            for master in group:
                master.grad = None

    def _scaled(self, backward: Any) -> Any:
        """An engine's `backward` that multiplies the loss by the scale which the step divides by."""

        def scaled(loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            scale, gas = float(self.optimizer.loss_scale), self.engine.gradient_accumulation_steps()
            usual = 1 / gas if kwargs.get("scale_wrt_gas", True) else 1.0

            def once(grad: Tensor) -> Tensor | None:
                # A DeepSpeed that scales it too: then ours is taken out again.
                return grad / scale if scale > 1 and float(grad) > usual * scale / 2 else None

            product = loss.float() * scale
            product.register_hook(once)  # type: ignore[no-untyped-call]
            returned: Tensor = backward(product, *args, **kwargs)
            return returned / scale

        return scaled


def _views(flat: Tensor, params: list[Any]) -> Iterator[Tensor]:
    """The parts of a flat tensor, each of the shape of its parameter."""
    at = 0
    for param in params:
        yield flat.detach().narrow(0, at, param.numel()).view(param.shape)
        at += param.numel()
