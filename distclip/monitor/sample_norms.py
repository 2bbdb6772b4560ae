"""Measure how much each sample of a batch contributes to the gradient (`per_sample`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, short_repr
from ..functional import get_total_norm
from ..sharding.dtensor import is_dtensor
from .ghost_norms import RULES, Use, squared_norms, squares_of_vectors

__all__ = ["PerSample", "Precision", "per_sample", "without_autocast"]

SAME_VALUES = ("TBackward0", "TransposeBackward0", "ToCopyBackward0")
"""Operations that only transpose or cast a parameter. Several operations may use the copy that autocast makes."""


class PerSample:
    """Norms of the samples of one forward and backward pass, by sample and by tensor: see `per_sample`.

    Args:
        model: model to measure.
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
        self._num_uses: dict[str, int] = {}
        self._uses: dict[str, list[Use]] = {}
        self._squares: dict[str, Tensor] = {}
        self._vectors: dict[str, Tensor] = {}
        self._variables: dict[int, str] = {}
        self._incomplete: set[str] = set()
        self._position_parts: list[tuple[Sequence[Tensor], Tensor | None]] = []
        self._last_input: Tensor | None = None
        self._cache: dict[str, Any] = {}

    @property
    def by_tensor(self) -> Mapping[str, Tensor]:
        """Norm of each sample's part of the gradient by parameter, (samples,) float64 each."""
        return {name: squares.sqrt() for name, squares in self._squares.items()}

    @property
    def norms(self) -> Tensor:
        """Norm of each sample's part of the gradient, (samples,) float64, over the tensors in `by_tensor`.

        It is NaN or infinite for a sample whose part is not finite. Its shape is (0,) before a backward pass.
        """
        if not self._squares:
            return torch.zeros(0, dtype=torch.float64)
        return torch.stack(list(self._squares.values())).sum(0).sqrt()

    @property
    def worst(self) -> int | None:
        """Index of the sample with the largest norm, or of the first one that is not finite.

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
        squares = []
        for factors, scale in self._position_parts:
            part = torch.stack([factor[sample] for factor in factors]).double().prod(0)
            squares.append(part if scale is None else part * scale[sample].double().square())
        return int(torch.stack(squares).sum(0).nan_to_num(torch.inf, torch.inf).argmax())

    def token(self, sample: int) -> int | None:
        """Return the input at that position, if the inputs are integers. Host syncs: two."""
        position, inputs = self.position(sample), self._first_input
        if position is None or inputs is None or inputs.ndim != 2 or inputs.is_floating_point():
            return None
        return int(inputs[sample, position])

    def missing(self) -> dict[str, float]:
        """Return the parameters without a norm per sample, with their share of the squared norm of `.grad`.

        The share is NaN if there are no gradients.

        Collectives: call it on all ranks. If gradients are sharded, there is one all-reduce per such parameter, and one
        for all parameters.
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
        self._squares, self._uses, self._num_uses, self._vectors = {}, {}, {}, {}
        self._batch_size, self._position_parts, self._first_input = self._given, [], None
        self._variables, self._incomplete = {}, set()
        self._handles = [
            self._model.register_forward_pre_hook(lambda _, *inputs: self.read_inputs(inputs), with_kwargs=True),
            self._model.register_forward_hook(self._find_other_uses, prepend=True),
        ]
        names: dict[int, str] = {}
        for path, module in self._model.named_modules():
            if not (own := module._parameters):
                continue
            # A shared parameter gets its first name, as in named_parameters.
            prefix = _plain(f"{path}." if path else "")
            keys = {
                key: names.setdefault(id(parameter), prefix + key)
                for key, parameter in own.items()
                if parameter is not None and parameter.requires_grad
            }
            rule = _rule_of(module.__class__)
            if rule is not None and keys:
                # This hook runs before hooks that redistribute the output, such as those of tensor parallelism.
                hook = partial(self._follow, rule, keys)
                self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for name in self._incomplete:
            for uses_by_name in (self._squares, self._uses, self._vectors):
                uses_by_name.pop(name, None)
        squares = self._squares | {name: squared_norms(uses) for name, uses in self._uses.items()}
        squares |= zip(self._vectors, squares_of_vectors(list(self._vectors.values())), strict=True)
        if squares:
            device = next(iter(squares.values())).device
            # Rounding may move sums of products slightly below zero.
            table = torch.stack([values.to(device) for values in squares.values()]).double().clamp(min=0)
            squares = dict(zip(squares, table.unbind(), strict=True))
        self._squares, self._uses, self._vectors, self._last_input, self._cache = squares, {}, {}, None, {}

    def read_inputs(self, inputs: Any) -> None:
        """Read the numbers of samples and positions from the first tensor in the inputs, once.

        Args:
            inputs: nested lists, tuples and dictionaries with tensors.
        """
        is_new = (self._squares or self._vectors or self._uses) and torch._C._current_graph_task_id() == -1
        if is_new:
            # A new pass after a backward pass replaces it.
            self._squares, self._uses, self._num_uses, self._vectors = {}, {}, {}, {}
            self._variables, self._incomplete, self._position_parts, self._first_input = {}, set(), [], None
        first = next(_tensors(inputs), None)
        if first is None or first.ndim == 0 or self._first_input is not None:
            return
        self._first_input = _whole(first.detach())
        if self._given is None:
            self._batch_size = len(self._first_input)
        self._positions = tuple(self._first_input.shape[1:2])

    def _follow(
        self,
        rule: Callable[..., dict[str, Use]],
        names: Mapping[str, str],
        module: nn.Module,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> None:
        """Measure the parameters of a layer when the gradient of its output is computed."""
        inputs = args[0] if args and isinstance(args[0], Tensor) else next(_tensors((args, kwargs)), None)
        if inputs is None or not output.requires_grad:
            return
        for key, name in names.items():
            self._num_uses[name] = self._num_uses.get(name, 0) + 1
            # In its forward pass, a sharded layer has other parameter objects than outside.
            self._variables[id(module._parameters[key])] = name
        output.register_hook(partial(self._measure, module, rule, names, inputs.detach()))

    def _measure(
        self,
        module: nn.Module,
        rule: Callable[..., dict[str, Use]],
        names: Mapping[str, str],
        inputs: Tensor,
        grad: Tensor,
    ) -> None:
        # With create_graph=True, autograd would record the operations of hooks.
        inputs, grad, size = _whole(inputs), _whole(grad.detach()), self._batch_size
        has_samples = size is not None and grad.shape[0] and not grad.shape[0] % size and not inputs.shape[0] % size
        # Positions that all samples share, such as arange(T), have no samples.
        if not has_samples or (not inputs.is_floating_point() and inputs.ndim < 2 <= len(self._positions) + 1):
            self._incomplete.update(names.values())
            return
        # If the program runs its backward pass under autocast, the products would be rounded.
        enabled = torch.is_autocast_enabled(grad.device.type)
        with torch.autocast(grad.device.type, enabled=False) if enabled else nullcontext():
            cache = self._cache_of(inputs)
            dtype = torch.promote_types(grad.dtype, torch.float32)
            inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
            uses = rule(module, inputs, grad.to(dtype), size, names.keys(), cache)
            for key, name in names.items():
                # A subclass may have parameters that the rule does not cover.
                if key in uses:
                    self._add(name, uses[key])

    def _add(self, name: str, use: Use) -> None:
        """Measure one use of a parameter, or keep it for the other uses."""
        if self._num_uses[name] > 1:
            if name in self._squares or name in self._vectors:
                # A checkpointed block with another use is recomputed only now, after the first use was measured alone.
                self._incomplete.add(name)
            self._uses.setdefault(name, []).append(use)
        elif (vectors := use.vectors()) is not None:
            self._vectors[name] = vectors
        else:
            self._squares[name] = squared_norms([use])
        if use.num_positions is not None and (use.num_positions,) == self._positions:
            # `position` adds them up, and it is called for few samples.
            self._position_parts.append((use.position_squares(), use.scale))

    def _find_other_uses(self, module: nn.Module, args: Any, output: Any) -> None:
        """Find parameters that the forward pass also used without their layer, from the graph."""
        if torch._C._current_graph_task_id() != -1:
            return  # recomputed in a backward pass
        nodes = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
        users: dict[Any, list[Any]] = {node: [] for node in nodes}
        while nodes:
            node = nodes.pop()
            for child, _ in node.next_functions:
                if child is not None:
                    if child not in users:
                        users[child] = []
                        nodes.append(child)
                    users[child].append(node)
        for node in users:
            if node.next_functions or not node.name().endswith("AccumulateGrad"):
                continue
            name = self._variables.get(id(node.variable))
            if name is not None and _count_uses(node, users) > self._num_uses[name]:
                self._incomplete.add(name)

    def _cache_of(self, inputs: Tensor) -> dict[str, Any]:
        """Return the cache of the last input if this is the same one, as for queries, keys and values."""
        last = self._last_input
        is_same = (
            last is not None
            and inputs.data_ptr() == last.data_ptr()
            and (inputs.shape, inputs.stride(), inputs.dtype) == (last.shape, last.stride(), last.dtype)
            and inputs._version == last._version
        )
        if not is_same:
            # The reference also keeps its memory from being reused for another input.
            self._last_input, self._cache = inputs, {}
        return self._cache


def per_sample(model: nn.Module, batch_size: int | None = None) -> PerSample:
    r"""Measure the norm of each sample's part of the gradient, without gradients per sample.

    In the block, run one forward and one backward pass. If there are several, the last one counts. Afterwards `norms`
    has the norm of each sample's part. The parts add up to the gradient. With a loss that is a mean over B samples, a
    part is 1/B of the gradient of the sample's own loss. The parts of this rank's samples are measured before any mean
    over ranks.

    Linear, embedding, convolution and norm layers have rules, even if they share weights or are used several times.
    `PerSample.missing` names all other parameters with their share of the gradient: those of other layers, of
    subclasses that replace `forward`, and those that the model also uses without their layer, as in `F.linear(x,
    embedding.weight)`. The norms are computed in float32 from what the layers computed. They are exact, except that a
    batch norm in training mode mixes its samples.

    It works under DDP, FSDP2 and tensor parallelism. Activations that are DTensors are gathered whole on each rank of
    their mesh. Samples are rows of dim 0. If a layer's input has several rows per sample, the rows of each sample must
    be consecutive.

    Args:
        model: the model, which may be wrapped or sharded.
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
    """Disable `torch.autocast` within the block, even if the program enters it there.

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


@lru_cache
def _rule_of(kind: type[nn.Module]) -> Callable[..., dict[str, Use]] | None:
    """Return the rule of a kind of layer, or None if its forward pass is not the one of the rule."""
    return next(
        (rule for known, rule in RULES.items() if issubclass(kind, known) and kind.forward is known.forward), None
    )


def _count_uses(node: Any, users: Mapping[Any, Sequence[Any]]) -> int:
    """Return the number of operations that use a parameter, its transpose or a copy in another dtype."""
    return sum(_count_uses(user, users) if user.name() in SAME_VALUES else 1 for user in users[node])


def _whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor of a DTensor, on every rank of its mesh."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def _plain(name: str) -> str:
    """Remove the parts of a parameter's name that DDP and activation checkpoints add."""
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
