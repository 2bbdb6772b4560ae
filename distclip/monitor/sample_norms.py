"""Measure how much each sample of a batch contributes to the gradient (`per_sample`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, short_repr
from ..functional import get_total_norm
from ..sharding.dtensor import is_dtensor
from .ghost_norms import RULES, Use, squared_norms

__all__ = ["PerSample", "Precision", "per_sample", "without_autocast"]


class PerSample:
    """Norms of the samples of one forward and backward pass, by sample and by tensor: see `per_sample`.

    Args:
        model: to measure.
        batch_size: number of samples; None for dim 0 of the first tensor that the model gets.

    Raises:
        ArgumentError: an argument is invalid.
    """

    def __init__(self, model: nn.Module, batch_size: int | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model={short_repr(model)}: not a torch.nn.Module. Pass the model.")
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ArgumentError(f"batch_size={batch_size!r:.40}: not an integer ≥ 1. Pass the number of samples.")
        self._model, self._batch_size, self._given = model, batch_size, batch_size
        self._positions: tuple[int, ...] = ()
        self._first_input: Tensor | None = None
        self._handles: list[Any] = []
        self._names: dict[int, str] = {}
        self._num_uses: dict[str, int] = {}
        self._uses: dict[str, list[Use]] = {}
        self._squares: dict[str, Tensor] = {}
        self._position_parts: list[tuple[Tensor, Tensor]] = []

    @property
    def by_tensor(self) -> Mapping[str, Tensor]:
        """Norm of each sample's part of the gradient by parameter, (samples,) float64 each."""
        return {name: squares.sqrt() for name, squares in self._squares.items()}

    @property
    def norms(self) -> Tensor:
        """Norm of each sample's part of the gradient, (samples,) float64, over the tensors in `by_tensor`.

        It is NaN or infinite for a sample whose part is not finite. (0,) before a backward pass.
        """
        if not self._squares:
            return torch.zeros(0, dtype=torch.float64)
        return torch.stack(list(self._squares.values())).sum(0).sqrt()

    @property
    def worst(self) -> int | None:
        """Index of the sample with the largest norm, the first one that is not finite if there is any.

        None before a backward pass. Host syncs: one.
        """
        norms = self.norms
        return int(norms.nan_to_num(torch.inf, torch.inf).argmax()) if len(norms) else None

    def position(self, sample: int) -> int | None:
        """Return the position (token) with the largest part of a sample's gradient, if it has any.

        Host syncs: one.
        """
        if not self._position_parts:
            return None
        squares = torch.stack([part[sample].double() * scale[sample] ** 2 for part, scale in self._position_parts])
        return int(squares.sum(0).nan_to_num(torch.inf, torch.inf).argmax())

    def token(self, sample: int) -> int | None:
        """Return the input at that position, if the inputs are integers. Host syncs: two."""
        position, inputs = self.position(sample), self._first_input
        if position is None or inputs is None or inputs.ndim != 2 or inputs.is_floating_point():
            return None
        return int(inputs[sample, position])

    def missing(self) -> dict[str, float]:
        """Return the parameters without a norm per sample, with their share of the squared norm of `.grad`.

        The share is NaN if there are no gradients.

        Collectives: call it on all ranks. One all-reduce for sharded gradients per such parameter, and one for all.
        """
        named = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
        missing = [(name, p) for name, p in named if _plain(name) not in self._squares]
        grads = [p.grad for _, p in named if p.grad is not None]
        if not missing or not grads:
            return {_plain(name): torch.nan for name, _ in missing}
        total = float(get_total_norm(grads))
        shares = {}
        for name, p in missing:
            norm = 0.0 if p.grad is None else float(get_total_norm([p.grad]))
            shares[_plain(name)] = (norm / total) ** 2 if total else torch.nan
        return shares

    def __enter__(self) -> PerSample:
        if self._handles:
            raise ArgumentError("per_sample: the block was entered twice. Make one for each block.")
        self._squares, self._uses, self._num_uses = {}, {}, {}
        self._batch_size, self._position_parts, self._first_input = self._given, [], None
        for name, parameter in self._model.named_parameters():
            self._names[id(parameter)] = _plain(name)
        self._handles = [
            self._model.register_forward_pre_hook(lambda _, *inputs: self.read_inputs(inputs), with_kwargs=True)
        ]
        for module in self._model.modules():
            rule = next((rule for kind, rule in RULES.items() if isinstance(module, kind)), None)
            # Of a sharded layer, the names are those of the parameters outside of its forward pass.
            names = {
                key: self._names[id(parameter)]
                for key, parameter in module.named_parameters(recurse=False)
                if parameter.requires_grad
            }
            if rule is not None and names:
                # Before hooks that redistribute the output, such as those of tensor parallelism.
                handle = module.register_forward_hook(self._forward_hook(rule, names), prepend=True)
                self._handles.append(handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for name, uses in self._uses.items():
            self._squares[name] = squared_norms(uses)
        self._uses = {}

    def read_inputs(self, inputs: Any) -> None:
        """Take the number of samples and of positions from the first tensor in the inputs, once.

        Args:
            inputs: nested lists, tuples and dictionaries with tensors.
        """
        first = next(_tensors(inputs), None)
        if first is None or first.ndim == 0 or self._first_input is not None:
            return
        self._first_input = _whole(first.detach())
        if self._given is None:
            self._batch_size = len(self._first_input)
        self._positions = tuple(self._first_input.shape[1:2])

    def _forward_hook(self, rule: Callable[..., dict[str, Use]], names: Mapping[str, str]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            inputs = next(_tensors(args), None)
            if inputs is None or not isinstance(output, Tensor) or not output.requires_grad:
                return
            inputs = inputs.detach()
            for name in names.values():
                self._num_uses[name] = self._num_uses.get(name, 0) + 1

            @torch.no_grad()
            def measure(grad: Tensor) -> None:
                self._measure(module, rule, names, inputs, grad)

            output.register_hook(measure)  # type: ignore[no-untyped-call]

        return hook

    def _measure(
        self,
        module: nn.Module,
        rule: Callable[..., dict[str, Use]],
        names: Mapping[str, str],
        inputs: Tensor,
        grad: Tensor,
    ) -> None:
        inputs, grad, size = _whole(inputs), _whole(grad), self._batch_size
        if size is None or not len(grad) or len(grad) % size or len(inputs) % size:
            return
        if not inputs.is_floating_point() and inputs.ndim < 2 <= len(self._positions) + 1:
            return  # positions that all samples share, such as arange(T)
        with torch.autocast(grad.device.type, enabled=False):
            uses = rule(module, inputs.float() if inputs.is_floating_point() else inputs, grad.float(), size)
        for key, name in names.items():
            use = uses[key]
            squares = use.position_squares()
            if squares is not None and tuple(squares.shape[1:]) == self._positions:
                # They are added up for `position`, which is called for few samples.
                self._position_parts.append((squares, use.scale.double()))
            if self._num_uses[name] == 1:
                self._squares[name] = squared_norms([use])
            else:
                self._uses.setdefault(name, []).append(use)


def per_sample(model: nn.Module, batch_size: int | None = None) -> PerSample:
    r"""Measure the norm of each sample's part of the gradient, without gradients per sample.

    In the block, run one forward and one backward pass. Afterwards `norms` has the norm of each sample's part, so that
    the parts add up to the gradient. With a loss that is a mean over B samples, a part is 1/B of the gradient of the
    sample's own loss. The parts of this rank's samples come before any mean over ranks.

    Linear, embedding, convolution and norm layers have rules, also if they share weights or are used several times.
    `PerSample.missing` names the parameters of other layers with their share of the gradient. The norms are computed in
    float32 from what the layers computed. They are exact, except that a batch norm in training mode mixes its samples.

    It works under DDP, FSDP2 and tensor parallelism. Of DTensors, whole activations are gathered on each rank of their
    mesh. Samples are rows of dim 0. A layer whose input has a multiple of the samples as rows is taken to have the rows
    of each sample one after another.

    Args:
        model: also wrapped or sharded.
        batch_size: number of samples; None for dim 0 of the first tensor that the model gets.

    Raises:
        ArgumentError: an argument is invalid.

    Collectives: gathers of activations that are DTensors. Host syncs: none. Memory: the inputs of all layers, which the
    backward pass keeps anyway, and those of recomputed blocks.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Linear(4, 1)
    >>> inputs = torch.ones(3, 4)
    >>> inputs[1] *= 100
    >>> with per_sample(model) as samples:
    ...     model(inputs).mean().backward()
    >>> samples.worst, [round(norm, 3) for norm in samples.norms.tolist()]
    (1, [0.745, 66.668, 0.745])
    """
    return PerSample(model, batch_size)


class Precision:
    """Use of autocast within a block."""

    def __init__(self) -> None:
        self.used_autocast = False
        """True if the program entered an enabled `torch.autocast`."""


@contextmanager
def without_autocast(*, only_watch: bool = False) -> Iterator[Precision]:
    """Disable `torch.autocast` within the block, also where the program enters it there.

    Args:
        only_watch: leave autocast as it is, and only find out whether it is used.
    """
    enter, precision = torch.autocast.__enter__, Precision()

    def enter_disabled(self: Any) -> Any:
        precision.used_autocast |= bool(self._enabled)
        if not only_watch:
            self._enabled = False
        return enter(self)  # type: ignore[no-untyped-call]

    torch.autocast.__enter__ = enter_disabled  # type: ignore[method-assign]
    try:
        yield precision
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


def _whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor of a DTensor, on every rank of its mesh."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def _plain(name: str) -> str:
    """Remove what DDP and activation checkpoints put into the name of a parameter."""
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
