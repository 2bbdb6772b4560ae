"""ZeRO stage 0: data parallelism. Every rank has the whole averaged gradient, in `.grad`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..monkeypatch import Patches
from .adapter import Decide, Hold, Write, skipped

__all__ = ["HalfPrecision", "SinglePrecision"]


class Whole(Hold):
    """Parameters that each rank has as a whole, with gradients of their own."""

    _params: list[Any]

    def look(self) -> None:
        for piece, param in zip(self.pieces, self._params, strict=True):
            self.lay(piece, param.grad)


class SinglePrecision(Whole):
    """A torch optimizer, stepped by the engine itself; parameters are float32."""

    def find(self) -> None:
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.groups = [[self.piece(param, param, self.ranks.copies_of(param)) for param in params]]
        self._params = params

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


class HalfPrecision(Whole):
    """FP16_Optimizer and FP16_UnfusedOptimizer, for bfloat16 too: parameters in 16 bits, copies of them in float32."""

    def find(self) -> None:
        own = self.optimizer
        self._is_flat = hasattr(own, "fp32_groups_flat")
        self._params = [param for group in own.fp16_groups for param in group]
        for i, params in enumerate(own.fp16_groups):
            pairs = zip(params, self._parts(i), strict=True)
            self.groups.append([self.piece(param, master, self.ranks.copies_of(param)) for param, master in pairs])

    def take(self, patches: Patches, decide: Decide, write: Write) -> None:
        own = self.optimizer

        def step(closure: Any = None) -> bool:
            """DeepSpeed's own, without its norms: it would take inf for an overflow whatever `on_nonfinite` says."""
            if skipped(decide()):
                own._skip_invalid_grad_norm()
                return True
            own.overflow = False
            for i, group in enumerate(self.groups):
                write(group, self._copied(i))
            own._update_scale(False)
            own.optimizer.step()
            self._hand_back()
            return False

        patches.put(own, "step", step)
        if own.low_precision_dtype == torch.float16:
            patches.put(self.engine, "backward", self._scaled(self.engine.backward))

    def _stepped(self, i: int) -> list[Tensor]:
        """What the optimizer steps of a group: the float32 copies of its parameters, or one flat copy of all."""
        own = self.optimizer
        return [own.fp32_groups_flat[i]] if self._is_flat else own.fp32_groups[i]

    def _parts(self, i: int, *, grads: bool = False) -> list[Tensor]:
        """The same, or its gradients, parameter by parameter."""
        stepped = [tensor.grad if grads else tensor.detach() for tensor in self._stepped(i)]
        return list(_views(stepped[0], self.optimizer.fp16_groups[i])) if self._is_flat else stepped  # type: ignore[arg-type,return-value]

    def _copied(self, i: int) -> list[Tensor]:
        """Copies of a group's gradients in float32, where the optimizer looks for them; zeros if one is missing."""
        for tensor in self._stepped(i):
            tensor.grad = torch.zeros_like(tensor)
        num_replicas = self._parts(i, grads=True)
        for copy, param in zip(num_replicas, self.optimizer.fp16_groups[i], strict=True):
            if param.grad is not None:
                copy.copy_(param.grad)
        return num_replicas

    def _hand_back(self) -> None:
        """Parameters from their copies, whose gradients are not needed any more."""
        for i, params in enumerate(self.optimizer.fp16_groups):
            for param, master in zip(params, self._parts(i), strict=True):
                param.data.copy_(master)
            for tensor in self._stepped(i):
                tensor.grad = None

    def _scaled(self, backward: Any) -> Any:
        """An engine's `backward` that multiplies the loss by the scale which the step divides by."""

        def scaled(loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
            scale, gas = float(self.optimizer.loss_scale), self.engine.gradient_accumulation_steps()
            usual = 1 / gas if scale_wrt_gas else 1.0

            def once(grad: Tensor) -> Tensor | None:
                # A DeepSpeed that scales it too: then ours is taken out again.
                return grad / scale if scale > 1 and float(grad) > usual * scale / 2 else None

            product = loss.float() * scale
            product.register_hook(once)  # type: ignore[no-untyped-call]
            returned: Tensor = backward(product, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
            return returned / scale

        return scaled


def _views(flat: Tensor, params: list[Any]) -> Iterator[Tensor]:
    """The parts of a flat tensor, each of the shape of its parameter."""
    at = 0
    for param in params:
        yield flat.detach().narrow(0, at, param.numel()).view(param.shape)
        at += param.numel()
