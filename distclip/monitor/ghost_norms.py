r"""Compute the norm of each sample's gradient of a layer from its inputs and output gradients.

The gradient of a linear layer's weight from sample i is :math:`G_i = \sum_t b_{it} a_{it}^T` over its T positions, with
input a and output gradient b. Its norm needs only T × T products:

.. math:: \|G_i\|^2 = \sum_{s,t} \langle a_{is}, a_{it} \rangle \langle b_{is}, b_{it} \rangle

That is the ghost norm of Goodfellow (2015) and Li et al. (2022). If T is so large that :math:`G_i` is cheaper, the
gradient of one sample at a time is formed and dropped, as always for convolutions (Bu et al. 2022).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..devices import host_reads_free

__all__ = ["RULES", "Use", "squared_norms"]

MAX_GRAM = 1 << 24
"""Maximum number of elements of a block of products."""

MIN_NORM, MAX_NORM = 1e-8, 1e8
"""Norms of positions whose fourth powers and sums are exact enough in float32."""


class Use(ABC):
    """One use of a parameter in a forward pass: the parts of its per-sample gradients.

    Args:
        scale: (samples,) factor that was taken out of the parts, so that squares do not overflow.
    """

    scale: Tensor

    @abstractmethod
    def squares(self) -> Tensor:
        """Return the squared norm of each sample's gradient without the scale, (samples,)."""

    @abstractmethod
    def gradient(self, sample: int) -> Tensor:
        """Return the elements of one sample's gradient, without the scale."""

    def position_squares(self) -> Tensor | None:
        """Return (samples, positions) squared norms of parts without the scale, if there are any."""
        return None

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return (samples, positions, ...) factors with outer products as parts, if there are any."""
        return None


class Outer(Use):
    """Weight of a linear layer: a sum of outer products over positions.

    Args:
        left: (samples, positions, out) output gradients.
        right: (samples, positions, in) inputs.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        (self.left, one, self._left_norms), (self.right, other, self._right_norms) = _scale(left), _scale(right)
        self.scale = one * other

    def squares(self) -> Tensor:
        """Return the squared norms."""
        positions, rows, columns = self.left.shape[1], self.left.shape[2], self.right.shape[2]
        if positions * (rows + columns) > rows * columns and positions > 1:
            block = max(1, MAX_GRAM // (rows * columns))
            samples = [slice(start, start + block) for start in range(0, len(self.left), block)]
            return torch.cat([_dot(g := self.left[part].mT @ self.right[part], g) for part in samples])
        total = self.left.new_zeros(len(self.left))
        block = max(1, MAX_GRAM // max(1, len(self.left) * positions))
        for start in range(0, positions, block):
            part = slice(start, start + block)
            products = self.left[:, part] @ self.left.transpose(1, 2)
            total += _dot(products, self.right[:, part] @ self.right.transpose(1, 2))
        return total.clamp(min=0)

    def gradient(self, sample: int) -> Tensor:
        """Return the gradient of one sample."""
        return self.left[sample].T @ self.right[sample]

    def position_squares(self) -> Tensor:
        """Return the squared norm of each outer product."""
        return (self._left_norms * self._right_norms).square()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors with the scale."""
        return self.left * self.scale[:, None, None], self.right


class Rows(Use):
    """Weight of an embedding: output gradients that are added to rows.

    Args:
        ids: (samples, positions) rows.
        grads: (samples, positions, columns) output gradients.
        num_rows: of the weight.
    """

    def __init__(self, ids: Tensor, grads: Tensor, num_rows: int) -> None:
        self.grads, self.scale, self._norms = _scale(grads)
        self.ids, self.num_rows = ids, num_rows

    def squares(self) -> Tensor:
        """Return the squared norms."""
        sample = torch.arange(len(self.ids), device=self.ids.device)[:, None]
        keys, index = torch.unique(self.ids + sample * self.num_rows, return_inverse=True)
        rows = self.grads.new_zeros(len(keys), self.grads.shape[2])
        rows.index_add_(0, index.flatten(), self.grads.flatten(0, 1))
        return self.grads.new_zeros(len(self.ids)).index_add_(0, keys // self.num_rows, rows.square().sum(1))

    def gradient(self, sample: int) -> Tensor:
        """Return the gradient of one sample."""
        rows = self.grads.new_zeros(self.num_rows, self.grads.shape[2])
        return rows.index_add_(0, self.ids[sample], self.grads[sample])

    def position_squares(self) -> Tensor:
        """Return the squared norm of each output gradient."""
        return self._norms.square()


class Vectors(Use):
    """Weight of a norm layer, or a bias, whose gradients are formed for all samples.

    Args:
        values: (samples, elements) gradients.
    """

    def __init__(self, values: Tensor) -> None:
        # They are few, so that squares in float64 need no scale.
        self.values, self.scale = values, values.new_ones(len(values))

    def squares(self) -> Tensor:
        """Return the squared norms."""
        return self.values.double().square().sum(1)

    def gradient(self, sample: int) -> Tensor:
        """Return the gradient of one sample."""
        return self.values[sample]


class Convolution(Use):
    """Weight of a convolution, whose gradient is formed for one sample at a time.

    Args:
        layer: of the weight.
        inputs: (rows, channels, ...), padded.
        grads: (rows, channels, ...) output gradients.
        num_samples: each has the same number of consecutive rows.
    """

    def __init__(self, layer: Any, inputs: Tensor, grads: Tensor, num_samples: int) -> None:
        self.scale = inputs.new_ones(num_samples)
        self.layer, self.inputs, self.grads = layer, inputs, grads
        self.rows = len(inputs) // num_samples
        transposed, groups = layer.transposed, layer.groups
        channels = (layer.in_channels, layer.out_channels // groups)
        if not transposed:
            channels = (layer.out_channels, layer.in_channels // groups)
        # Only the shape is read. The weight of a sharded layer is not whole during backward.
        self.weight = inputs.new_empty(*channels, *layer.kernel_size)

    def squares(self) -> Tensor:
        """Return the squared norms."""
        return torch.stack([self.gradient(i).square().sum() for i in range(len(self.scale))])

    def gradient(self, sample: int) -> Tensor:
        """Return the gradient of one sample."""
        layer, part = self.layer, slice(sample * self.rows, (sample + 1) * self.rows)
        padding = layer.padding
        if layer.padding_mode != "zeros" or padding == "valid":
            padding = (0,) * len(layer.kernel_size)
        elif padding == "same":
            padding = tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        _, gradient, _ = torch.ops.aten.convolution_backward(
            self.grads[part],
            self.inputs[part],
            self.weight,
            None,
            layer.stride,
            padding,
            layer.dilation,
            layer.transposed,
            layer.output_padding,
            layer.groups,
            (False, True, False),
        )
        return gradient  # type: ignore[no-any-return]


def squared_norms(uses: Sequence[Use]) -> Tensor:
    """Return the squared norm of each sample's gradient of one parameter, (samples,) float64.

    Args:
        uses: of the parameter in one forward pass, at least one. A tied weight has several.
    """
    if len(uses) == 1:
        return uses[0].squares().double() * uses[0].scale.double().square()
    factors = [pair for use in uses if (pair := use.factors()) is not None]
    if len(factors) == len(uses):
        # The positions of all uses are those of one.
        left, right = (torch.cat(parts, 1) for parts in zip(*factors, strict=True))
        return squared_norms([Outer(left, right)])
    norms = []
    for sample in range(len(uses[0].scale)):
        total = sum(use.gradient(sample).double().flatten() * use.scale[sample].double() for use in uses)
        norms.append(torch.as_tensor(total).square().sum())
    return torch.stack(norms)


def _linear(layer: nn.Linear, inputs: Tensor, grads: Tensor, num_samples: int) -> dict[str, Use]:
    left, right = _positions(grads, num_samples), _positions(inputs, num_samples)
    return {"weight": Outer(left, right), "bias": Vectors(left.sum(1))}


def _embedding(layer: nn.Embedding, inputs: Tensor, grads: Tensor, num_samples: int) -> dict[str, Use]:
    ids, grads = inputs.reshape(num_samples, -1), _positions(grads, num_samples)
    if layer.padding_idx is not None:
        grads = grads.masked_fill((ids == layer.padding_idx)[:, :, None], 0)
    if layer.scale_grad_by_freq:
        grads = grads / torch.bincount(ids.flatten())[ids][:, :, None]
    return {"weight": Rows(ids, grads, layer.num_embeddings)}


def _convolution(layer: Any, inputs: Tensor, grads: Tensor, num_samples: int) -> dict[str, Use]:
    if layer.padding_mode != "zeros":
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    elif layer.padding == "same" and any(p % 2 for p in _total_padding(layer)):
        # An odd total is padded by one more at the end.
        inputs = F.pad(inputs, [x for total in reversed(_total_padding(layer)) for x in (0, total % 2)])
    bias = grads.reshape(num_samples, -1, *grads.shape[1:]).transpose(1, 2).flatten(2).sum(2)
    return {"weight": Convolution(layer, inputs, grads, num_samples), "bias": Vectors(bias)}


def _norm(normalize: Callable[[Any, Tensor], Tensor], is_last: bool) -> Callable[..., dict[str, Use]]:
    """Return the rule of a norm layer: normalized input times weight, plus bias.

    Args:
        normalize: function of the layer and its input that returns the normalized input.
        is_last: whether weights belong to the last dims, and not to the channels in dim 1.
    """

    def rule(layer: Any, inputs: Tensor, grads: Tensor, num_samples: int) -> dict[str, Use]:
        def add_positions(values: Tensor) -> Tensor:
            if is_last:
                return values.reshape(num_samples, -1, layer.weight.numel()).sum(1)
            values = values.reshape(len(values), values.shape[1], -1).sum(2)
            return values.reshape(num_samples, -1, values.shape[1]).sum(1)

        return {
            "weight": Vectors(add_positions(grads * normalize(layer, inputs))),
            "bias": Vectors(add_positions(grads)),
        }

    return rule


def _batch_norm(layer: Any, inputs: Tensor) -> Tensor:
    uses_batch = layer.training or layer.running_mean is None
    mean, var = (None, None) if uses_batch else (layer.running_mean.float(), layer.running_var.float())
    return F.batch_norm(inputs, mean, var, training=uses_batch, eps=layer.eps)


RULES: Mapping[type[nn.Module], Callable[..., dict[str, Use]]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _convolution),
    nn.LayerNorm: _norm(lambda layer, x: F.layer_norm(x, layer.normalized_shape, eps=layer.eps), True),
    nn.RMSNorm: _norm(lambda layer, x: F.rms_norm(x, layer.normalized_shape, eps=layer.eps), True),
    nn.GroupNorm: _norm(lambda layer, x: F.group_norm(x, layer.num_groups, eps=layer.eps), False),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _norm(_batch_norm, False)),
    **dict.fromkeys(
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        _norm(lambda layer, x: F.instance_norm(x, eps=layer.eps), False),
    ),
}
"""Rule by layer: a function of the layer, its input, its output gradient and the number of samples.

It returns a use of each parameter by its name in the layer."""


def _positions(values: Tensor, num_samples: int) -> Tensor:
    """Return values as (samples, positions, features)."""
    return values.reshape(num_samples, -1, values.shape[-1])


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of the products of all elements, by index along the first dim."""
    # Without a tensor of the products.
    return torch.bmm(one.flatten(1).unsqueeze(1), other.flatten(1).unsqueeze(2)).flatten()


def _scale(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divide the samples by a number if squares of their elements could overflow or vanish.

    Args:
        values: (samples, positions, elements).

    Returns:
        The result, the (samples,) divisors, and the (samples, positions) norms of the result.
    """
    norms = torch.linalg.vector_norm(values, dim=2)
    if host_reads_free(values.device) and values.numel():
        low, high = norms.amax(1).aminmax()
        # Reading all elements twice more takes longer than the products.
        if float(low) > MIN_NORM and float(high) < MAX_NORM:
            return values, values.new_ones(len(values)), norms
    values, divisor = _normalize(values)
    return values, divisor, torch.linalg.vector_norm(values, dim=2)


def _normalize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each sample by its largest element, and return the result and the (samples,) divisors."""
    largest = values.flatten(1).abs().amax(1) if values.numel() else values.new_ones(len(values))
    divisor = torch.where(largest > 0, largest, 1.0)
    return values / divisor.reshape(-1, *[1] * (values.ndim - 1)), divisor


def _total_padding(layer: Any) -> list[int]:
    return [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
