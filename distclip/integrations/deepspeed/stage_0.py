"""Adapt ZeRO stage 0, plain data parallelism: every rank has all averaged gradients in `.grad`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..monkeypatch import MethodPatches
from .adapter import Adapter, Decide, Write
from .foreign import FP16Optimizer, TorchOptimizer

__all__ = ["HalfPrecision", "SinglePrecision"]


class _WholeParameters(Adapter):
    """Parameters that each rank has as a whole, with gradients in `.grad`."""

    _params: list[Tensor]

    def attach_grads(self) -> None:
        for piece, param in zip(self.pieces, self._params, strict=True):
            self.set_grad(piece, param.grad)


class SinglePrecision(_WholeParameters):
    """A torch optimizer over float32 parameters, which the engine steps itself."""

    optimizer: TorchOptimizer

    def find_pieces(self) -> None:
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        self.groups = [[self.piece(param, param, self.topology.replica_group(param)) for param in params]]
        self._params = params

    def install(self, patches: MethodPatches, decide: Decide, write: Write) -> None:
        optimizer, optimizer_step = self.optimizer, self.optimizer.step

        @wraps(optimizer_step)
        def step(closure: Any = None) -> Any:
            # As with its other optimizers, the engine reads `overflow` to count skipped steps and hold its scheduler.
            optimizer.overflow = skip = decide()
            if skip:
                return None
            pairs = [(p, param.grad) for p, param in zip(self.pieces, self._params, strict=True)]
            with_grad = [(piece, grad) for piece, grad in pairs if grad is not None]
            write([piece for piece, _ in with_grad], [grad for _, grad in with_grad])
            return optimizer_step()

        patches.replace(optimizer, "step", step)
        patches.replace(optimizer, "overflow", False)
        patches.replace(optimizer, "_global_grad_norm", None)
        patches.replace(self.engine, "clip_fp32_gradients", lambda: None)


class HalfPrecision(_WholeParameters):
    """FP16_Optimizer and FP16_UnfusedOptimizer.

    Parameters are float16 or bfloat16, and their float32 copies are stepped.
    """

    optimizer: FP16Optimizer

    def find_pieces(self) -> None:
        optimizer = self.optimizer
        self._is_flat = hasattr(optimizer, "fp32_groups_flat")
        self._params = [param for group in optimizer.fp16_groups for param in group]
        for i, params in enumerate(optimizer.fp16_groups):
            pairs = zip(params, self._copies(i), strict=True)
            self.groups.append([self.piece(param, copy, self.topology.replica_group(param)) for param, copy in pairs])

    def install(self, patches: MethodPatches, decide: Decide, write: Write) -> None:
        optimizer = self.optimizer

        def step(closure: Any = None) -> bool:
            # DeepSpeed's own step treats an infinite norm as an overflow, regardless of `on_nonfinite`.
            if decide():
                optimizer._skip_invalid_grad_norm()
                return True
            optimizer.overflow = False
            for i, group in enumerate(self.groups):
                write(group, self._copy_grads(i))
            optimizer._update_scale(False)
            optimizer.optimizer.step()
            self._copy_weights_back()
            return False

        patches.replace(optimizer, "step", step)
        if optimizer.low_precision_dtype == torch.float16:
            patches.replace(self.engine, "backward", self._scaled_backward(self.engine.backward))

    def _stepped(self, i: int) -> list[Tensor]:
        """Return the float32 tensors of a group that the optimizer steps: one per parameter, or one flat copy."""
        return [self.optimizer.fp32_groups_flat[i]] if self._is_flat else self.optimizer.fp32_groups[i]

    def _by_param(self, i: int, stepped: list[Tensor]) -> list[Tensor]:
        """Return a group's stepped tensors, or their gradients, parameter by parameter."""
        return list(_views(stepped[0], self.optimizer.fp16_groups[i])) if self._is_flat else stepped

    def _copies(self, i: int) -> list[Tensor]:
        """Return the float32 copies of a group's parameters."""
        return self._by_param(i, [tensor.detach() for tensor in self._stepped(i)])

    def _copy_grads(self, i: int) -> list[Tensor]:
        """Copy a group's gradients to where the optimizer reads them, in float32.

        A missing gradient becomes zeros.
        """
        grads = [torch.zeros_like(tensor) for tensor in self._stepped(i)]
        for tensor, grad in zip(self._stepped(i), grads, strict=True):
            tensor.grad = grad
        copies = self._by_param(i, grads)
        for copy, param in zip(copies, self.optimizer.fp16_groups[i], strict=True):
            if param.grad is not None:
                copy.copy_(param.grad)
        return copies

    def _copy_weights_back(self) -> None:
        """Update the parameters from their float32 copies, and free the copies' gradients."""
        for i, params in enumerate(self.optimizer.fp16_groups):
            for param, copy in zip(params, self._copies(i), strict=True):
                param.data.copy_(copy)
            for tensor in self._stepped(i):
                tensor.grad = None

    def _scaled_backward(self, backward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the engine's `backward`, with the loss multiplied by the scale that the step divides by."""

        def scaled_backward(loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
            scale, num_micro_batches = float(self.optimizer.loss_scale), self.engine.gradient_accumulation_steps()
            unscaled = 1 / num_micro_batches if scale_wrt_gas else 1.0

            def scale_once(grad: Tensor) -> Tensor | None:
                # A later DeepSpeed may multiply by the scale too. This hook then divides by it once.
                return grad / scale if scale > 1 and float(grad) > unscaled * scale / 2 else None

            product = loss.float() * scale
            product.register_hook(scale_once)  # type: ignore[no-untyped-call]
            return backward(product, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas) / scale

        return scaled_backward


def _views(flat: Tensor, params: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the parts of a flat tensor, each in the shape of its parameter."""
    at = 0
    for param in params:
        yield flat.narrow(0, at, param.numel()).view(param.shape)
        at += param.numel()
