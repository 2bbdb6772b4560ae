r"""Compute the norm of each sample's gradient of a layer from its inputs and output gradients.

The gradient of a linear layer's weight from sample i is :math:`G_i = \sum_t b_{it} a_{it}^T` over its T positions, with
input a and output gradient b. Its norm needs only T × T products:

.. math:: \|G_i\|^2 = \sum_{s,t} \langle a_{is}, a_{it} \rangle \langle b_{is}, b_{it} \rangle

This is the ghost norm of Goodfellow (2015) and Li et al. (2022). The products are symmetric, so only those on one side
of the diagonal are computed. If T is so large that :math:`G_i` itself is cheaper, gradients are formed and dropped a
few at a time (Bu et al. 2022). A convolution is a linear layer over the patches of its input.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..devices import host_reads_free

__all__ = ["RULES", "Use", "squared_norms", "squares_of_vectors"]

MAX_GRAM = 1 << 24
"""Maximum number of elements of a block of products, patches or gradients."""

LEAF = 32
"""Number of positions whose products are computed at once, both sides of the diagonal."""

MIN_SQUARE, MAX_SQUARE = 1e-15, 1e14
"""Range of squared norms of positions whose squares and sums are exact enough in float32."""


Products = list[Tensor]
"""Products of the positions of each sample: of its halves, of the halves of each half, and so on, and of each leaf."""


class Use(ABC):
    """One use of a parameter in a forward pass: the parts of its per-sample gradients.

    Args:
        scale: (samples,) factor that the parts were divided by, so that squares do not overflow. None for 1. It is
            valid after `squares`.
    """

    scale: Tensor | None = None
    num_positions: int | None = None
    """Number of positions, if the gradient is a sum over positions."""

    @abstractmethod
    def squares(self) -> Tensor:
        """Return the squared norm of each sample's gradient without the scale, (samples,)."""

    @abstractmethod
    def gradient(self, sample: int) -> Tensor:
        """Return the elements of one sample's gradient, without the scale."""

    def position_squares(self) -> Sequence[Tensor]:
        """Return (samples, positions) factors of the squared norms of the parts, without the scale.

        Raises:
            NotImplementedError: there are no positions.
        """
        raise NotImplementedError

    def outer(self) -> Outer | None:
        """Return this use if it is a sum of outer products."""
        return None

    def rows(self) -> Rows | None:
        """Return this use if it is a sum of rows."""
        return None

    def vectors(self) -> Tensor | None:
        """Return the (samples, elements) gradients if this use forms them anyway."""
        return None


class Outer(Use):
    """Weight of a linear layer: a sum of outer products over positions.

    Args:
        left: (samples, positions, out) output gradients.
        right: (samples, positions, in) inputs.
        cache: cache of the products of the inputs. Layers with the same inputs share it.
    """

    def __init__(self, left: Tensor, right: Tensor, cache: dict[str, Products] | None = None) -> None:
        self.left, self.right, self._cache = left, right, cache
        self._norms: tuple[Tensor, Tensor] | None = None
        self.num_positions = left.shape[1]

    def squares(self) -> Tensor:
        """Return the squared norms."""
        # Checking the result is faster than reading all elements before the products are computed.
        squares, norms = self._squares(self._cache)
        if not _is_exact(squares if norms is None else torch.stack(norms).amax(2)):
            (self.left, one), (self.right, other) = _normalize(self.left), _normalize(self.right)
            self.scale = one * other
            squares, norms = self._squares(None)
        self._norms = norms
        return squares

    def _squares(self, cache: dict[str, Products] | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the squared norms, and those of positions if they are a by-product."""
        left, right = self.left, self.right
        positions, rows, columns = left.shape[1], left.shape[2], right.shape[2]
        if positions == 1:
            one, other = _squares_of_last(left), _squares_of_last(right)
            return (one * other).flatten(), (one, other)
        if gram_cost(positions, rows + columns) > positions * rows * columns:
            block = max(1, MAX_GRAM // (rows * columns))
            parts = zip(torch.split(left, block), torch.split(right, block), strict=True)
            return torch.cat([_dot(g := one.mT @ other, g) for one, other in parts]), None
        block = max(1, MAX_GRAM // positions**2)
        if block < left.shape[0]:
            parts = zip(torch.split(left, block), torch.split(right, block), strict=True)
            results = [_gram_squares(_products(one), _products(other)) for one, other in parts]
            norms = torch.cat([norms[0] for _, norms in results]), torch.cat([norms[1] for _, norms in results])
            return torch.cat([squares for squares, _ in results]), norms
        products = _products(right) if cache is None or "products" not in cache else cache["products"]
        if cache is not None:
            cache["products"] = products
        return _gram_squares(_products(left), products)

    def gradient(self, sample: int) -> Tensor:
        """Return the gradient of one sample."""
        return self.left[sample].T @ self.right[sample]

    def position_squares(self) -> Sequence[Tensor]:
        """Return the squared norms of both factors of each outer product."""
        return self._norms or [_squares_of_last(values) for values in (self.left, self.right)]

    def outer(self) -> Outer:
        """Return this use."""
        return self


class Rows(Use):
    """Weight of an embedding: a sum of output gradients in rows.

    Args:
        ids: (samples, positions) rows.
        grads: (samples, positions, columns) output gradients.
        num_rows: number of rows of the weight.
    """

    def __init__(self, ids: Tensor, grads: Tensor, num_rows: int) -> None:
        self.ids, self.grads, self.num_rows = ids, grads, num_rows
        self._squares: Tensor | None = None
        self.num_positions = ids.shape[1]

    def squares(self) -> Tensor:
        """Return the squared norms."""
        self._squares = _squares_of_last(self.grads)
        if not _is_exact(self._squares.amax(1)):
            self.grads, self.scale = _normalize(self.grads)
            self._squares = _squares_of_last(self.grads)
        samples = torch.arange(len(self.ids), device=self.ids.device)
        keys, num_keys = self.ids + samples[:, None] * self.num_rows, len(self.ids) * self.num_rows
        if num_keys > 4 * keys.numel():
            keys, index = torch.unique(keys, return_inverse=True)
            samples, num_keys = keys // self.num_rows, len(keys)
        else:
            index, samples = keys, samples.repeat_interleave(self.num_rows)
        rows = self.grads.new_zeros(num_keys, self.grads.shape[2])
        rows.index_add_(0, index.flatten(), self.grads.flatten(0, 1))
        return self.grads.new_zeros(len(self.ids)).index_add_(0, samples, _squares_of_last(rows))

    def gradient(self, sample: int) -> Tensor:
        """Return the gradient of one sample."""
        rows = self.grads.new_zeros(self.num_rows, self.grads.shape[2])
        return rows.index_add_(0, self.ids[sample], self.grads[sample])

    def position_squares(self) -> Sequence[Tensor]:
        """Return the squared norm of each output gradient."""
        return [_squares_of_last(self.grads) if self._squares is None else self._squares]

    def rows(self) -> Rows:
        """Return this use."""
        return self


class Vectors(Use):
    """Weight of a norm layer, or a bias, whose gradients are formed for all samples.

    Args:
        values: (samples, elements) gradients.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def squares(self) -> Tensor:
        """Return the squared norms."""
        return squares_of_vectors([self._values])[0]

    def gradient(self, sample: int) -> Tensor:
        """Return the gradient of one sample."""
        return self._values[sample]

    def vectors(self) -> Tensor:
        """Return the gradients."""
        return self._values


class Convolution(Use):
    """Weight of a convolution: outer products of output gradients and patches of the input.

    Args:
        layer: layer of the weight.
        inputs: (rows, channels, ...), padded.
        grads: (rows, channels, ...) output gradients.
        num_samples: each has the same number of consecutive rows.
    """

    def __init__(self, layer: Any, inputs: Tensor, grads: Tensor, num_samples: int) -> None:
        self.layer, self.inputs, self.grads, self.num_samples = layer, inputs, grads, num_samples
        self.rows_per_sample = len(inputs) // num_samples
        padding = layer.padding
        if layer.padding_mode != "zeros" or padding == "valid":
            padding = (0,) * len(layer.kernel_size)
        elif padding == "same":
            padding = tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        self.padding: tuple[int, ...] = padding
        # The weight of a sharded layer is not whole during backward.
        channels = (layer.out_channels, layer.in_channels // layer.groups)
        if layer.transposed:
            channels = (layer.in_channels, layer.out_channels // layer.groups)
        self._shape: tuple[int, ...] = (*channels, *layer.kernel_size)

    def squares(self) -> Tensor:
        """Return the squared norms."""
        # A transposed convolution takes patches of its output instead.
        images, maps = (self.grads, self.inputs) if self.layer.transposed else (self.inputs, self.grads)
        num_patches = maps[0, 0].numel()
        patch_size = images.shape[1] * math.prod(self.layer.kernel_size)
        cost = num_patches * patch_size * maps.shape[1] // self.layer.groups
        if images.is_cpu and gram_cost(num_patches, patch_size + maps.shape[1]) > cost / 2:
            return self._squares_of_gradients()
        rows = self.rows_per_sample * max(1, MAX_GRAM // max(1, self.rows_per_sample * patch_size * num_patches))
        parts = zip(torch.split(images, rows), torch.split(maps, rows), strict=True)
        return torch.cat([self._squares_by_patches(some_images, some_maps) for some_images, some_maps in parts])

    def _squares_by_patches(self, images: Tensor, maps: Tensor) -> Tensor:
        groups, size = self.layer.groups, maps.shape[2:]
        left, right = (
            values.reshape(-1, self.rows_per_sample, groups, values.shape[1] // groups, size.numel())
            .permute(0, 2, 1, 4, 3)
            .flatten(2, 3)
            .flatten(0, 1)
            for values in (maps, self._patches(images, size))
        )
        use = Outer(left, right)
        return squared_norms([use]).view(-1, groups).sum(1)

    def _squares_of_gradients(self) -> Tensor:
        block = max(1, MAX_GRAM // math.prod(self._shape))
        parts = [slice(begin, begin + block) for begin in range(0, self.num_samples, block)]
        for is_last in (False, True):
            squares = torch.cat([_squares_of_last(self._gradients(part).flatten(1)) for part in parts])
            if is_last or _is_exact(squares):
                break
            (inputs, one), (grads, other) = (
                _normalize(values.reshape(self.num_samples, -1)) for values in (self.inputs, self.grads)
            )
            self.inputs, self.grads, self.scale = inputs.view_as(self.inputs), grads.view_as(self.grads), one * other
        return squares

    def _patches(self, images: Tensor, size: Sequence[int]) -> Tensor:
        """Return the inputs that each output reads: (rows, channels · kernel, outputs).

        Args:
            images: (rows, channels, ...).
            size: numbers of outputs.
        """
        layer = self.layer
        padded = F.pad(images, [p for p in reversed(self.padding) for _ in range(2)])
        strides = padded.stride()[2:]
        within = [step * stride for step, stride in zip(layer.dilation, strides, strict=True)]
        between = [step * stride for step, stride in zip(layer.stride, strides, strict=True)]
        patches = padded.as_strided(
            (*padded.shape[:2], *layer.kernel_size, *size), (*padded.stride()[:2], *within, *between)
        )
        # This is the only copy, of the elements that the layer reads.
        return patches.reshape(len(images), -1, math.prod(size))

    def gradient(self, sample: int) -> Tensor:
        """Return the gradient of one sample."""
        return self._gradients(slice(sample, sample + 1))[0]

    def _gradients(self, part: slice) -> Tensor:
        """Return the gradients of some samples, from one convolution with a group for each sample."""
        layer = self.layer
        # (rows of a sample, samples and channels, ...)
        grads, inputs = (
            values.reshape(self.num_samples, -1, *values.shape[1:])[part].transpose(0, 1).flatten(1, 2)
            for values in (self.grads, self.inputs)
        )
        num_samples = inputs.shape[1] // layer.in_channels
        _, gradient, _ = torch.ops.aten.convolution_backward(
            grads,
            inputs,
            # Only the shape is read.
            self.inputs.new_empty(()).expand(num_samples * self._shape[0], *self._shape[1:]),
            None,
            layer.stride,
            self.padding,
            layer.dilation,
            layer.transposed,
            layer.output_padding,
            num_samples * layer.groups,
            (False, True, False),
        )
        return gradient.view(num_samples, -1, *gradient.shape[1:])  # type: ignore[no-any-return]


def squared_norms(uses: Sequence[Use]) -> Tensor:
    """Return the squared norm of each sample's gradient of one parameter, (samples,).

    It is float64, or float32 if the squares are exact in float32.

    Args:
        uses: uses of the parameter in one forward pass, at least one. A tied weight has several.
    """
    if len(uses) == 1:
        squares, scale = uses[0].squares(), uses[0].scale
        return squares if scale is None else squares.double() * scale.double().square()
    vectors = [values for use in uses if (values := use.vectors()) is not None]
    if len(vectors) == len(uses):
        return squares_of_vectors([torch.stack(vectors).sum(0)])[0]
    outers = [one for one in (use.outer() for use in uses) if one is not None]
    rows = [one for one in (use.rows() for use in uses) if one is not None]
    if len(outers) + len(rows) < len(uses):
        norms = []
        for sample in range(len(uses[0].squares())):
            total: Tensor | float = 0.0
            for use in uses:
                gradient = use.gradient(sample).double().flatten()
                total = total + (gradient if use.scale is None else gradient * use.scale[sample].double())
            norms.append(torch.as_tensor(total).square().sum())
        return torch.stack(norms)
    # All uses together are like one use with the positions of all.
    if outers:
        outer = Outer(torch.cat([one.left for one in outers], 1), torch.cat([one.right for one in outers], 1))
    if rows:
        ids, grads = torch.cat([one.ids for one in rows], 1), torch.cat([one.grads for one in rows], 1)
        row = Rows(ids, grads, rows[0].num_rows)
    if not outers or not rows:
        return squared_norms([outer] if outers else [row])
    squares = squared_norms([outer]).double() + squared_norms([row]).double()
    # The inner product of both gradients multiplies each output gradient of the embedding by the row of its id in the
    # other gradient.
    positions = row.ids[:, None].expand(-1, outer.left.shape[1], -1)
    cross = _dot(outer.left.gather(2, positions), outer.right @ row.grads.mT).double()
    for scale in (outer.scale, row.scale):
        cross = cross if scale is None else cross * scale.double()
    return squares + 2 * cross


def squares_of_vectors(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Return the (samples,) float64 squared norms of gradients with few elements.

    Args:
        vectors: (samples, elements) gradients. Gradients of equal shape are summed in one operation.
    """
    by_shape: dict[Any, list[int]] = {}
    for i, values in enumerate(vectors):
        by_shape.setdefault((values.shape, values.device), []).append(i)
    squares: list[Tensor] = [torch.empty(0)] * len(vectors)
    for indices in by_shape.values():
        # Squares in float64 need no scale.
        group = torch.stack([vectors[i] for i in indices]).double()
        for i, result in zip(indices, _squares_of_last(group).unbind(), strict=True):
            squares[i] = result
    return squares


def _linear(
    layer: nn.Linear, inputs: Tensor, grads: Tensor, num_samples: int, keys: Collection[str], cache: dict[str, Products]
) -> dict[str, Use]:
    left = _positions(grads, num_samples)
    uses: dict[str, Use] = {}
    if "weight" in keys:
        uses["weight"] = Outer(left, _positions(inputs, num_samples), cache)
    if "bias" in keys:
        uses["bias"] = Vectors(left.sum(1) if left.shape[1] > 1 else left[:, 0])
    return uses


def _embedding(
    layer: nn.Embedding, inputs: Tensor, grads: Tensor, num_samples: int, keys: Collection[str], cache: Any
) -> dict[str, Use]:
    ids, grads = inputs.reshape(num_samples, -1), _positions(grads, num_samples)
    if layer.padding_idx is not None:
        grads = grads.masked_fill((ids == layer.padding_idx)[:, :, None], 0)
    if layer.scale_grad_by_freq:
        grads = grads / torch.bincount(ids.flatten())[ids][:, :, None]
    return {"weight": Rows(ids, grads, layer.num_embeddings)}


def _convolution(
    layer: Any, inputs: Tensor, grads: Tensor, num_samples: int, keys: Collection[str], cache: Any
) -> dict[str, Use]:
    if layer.padding_mode != "zeros":
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    elif layer.padding == "same" and any(p % 2 for p in _total_padding(layer)):
        # If the total padding is odd, the end has one more element.
        inputs = F.pad(inputs, [x for total in reversed(_total_padding(layer)) for x in (0, total % 2)])
    uses: dict[str, Use] = {"weight": Convolution(layer, inputs, grads, num_samples)}
    if "bias" in keys:
        values = grads.flatten(2).sum(2)
        uses["bias"] = Vectors(values.view(num_samples, -1, values.shape[1]).sum(1))
    return uses


def _norm(normalize: Callable[[Any, Tensor], Tensor], is_last: bool) -> Callable[..., dict[str, Use]]:
    """Return the rule of a norm layer: normalized input times weight, plus bias.

    Args:
        normalize: function of the layer and its input that returns the normalized input.
        is_last: whether the weights are for the last dims, rather than for the channels in dim 1.
    """

    def rule(
        layer: Any, inputs: Tensor, grads: Tensor, num_samples: int, keys: Collection[str], cache: Any
    ) -> dict[str, Use]:
        def add_positions(values: Tensor) -> Tensor:
            if is_last:
                return values.reshape(num_samples, -1, layer.weight.numel()).sum(1)
            values = values.reshape(len(values), values.shape[1], -1).sum(2)
            return values.reshape(num_samples, -1, values.shape[1]).sum(1)

        uses: dict[str, Use] = {}
        if "weight" in keys:
            uses["weight"] = Vectors(add_positions(grads * normalize(layer, inputs)))
        if "bias" in keys:
            uses["bias"] = Vectors(add_positions(grads))
        return uses

    return rule


def _batch_norm(layer: Any, inputs: Tensor) -> Tensor:
    uses_batch = layer.training or layer.running_mean is None
    mean, var = (
        (None, None) if uses_batch else (layer.running_mean.to(inputs.dtype), layer.running_var.to(inputs.dtype))
    )
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
"""Rule by layer: a function of the layer and of its input and output gradient.

Further arguments are the number of samples, the names in the layer of the parameters to measure, and a cache that
belongs to the input.

It returns a use of each parameter by its name in the layer."""


def _positions(values: Tensor, num_samples: int) -> Tensor:
    """Return values as (samples, positions, features)."""
    return (
        values
        if values.ndim == 3 and values.shape[0] == num_samples
        else values.reshape(num_samples, -1, values.shape[-1])
    )


def gram_cost(num_positions: int, num_elements: int) -> float:
    """Return the number of multiplications for the products of positions.

    Both sides of the diagonal of each leaf are computed.
    """
    return num_positions * min(num_positions, (num_positions + LEAF) / 2) * num_elements


def _is_exact(squares: Tensor) -> bool:
    """Return whether the host can read that squares are far from overflow and underflow in float32."""
    if not host_reads_free(squares.device) or not squares.numel():
        return False
    # With a NaN, both ends are NaN, which is in no range.
    least, largest = torch.aminmax(squares)
    return float(least) > MIN_SQUARE and float(largest) < MAX_SQUARE


def _squares_of_last(values: Tensor) -> Tensor:
    """Return the sums of the squares along the last dim, without a tensor of the squares."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=-1)
    return norms.square()


def _products(values: Tensor) -> Products:
    """Return the products of the positions of each sample.

    Args:
        values: (samples, positions, elements).
    """
    products = []
    while (positions := values.shape[1]) > LEAF and positions % 2 == 0:
        halves = values.view(values.shape[0], 2, positions // 2, values.shape[2])
        products.append(torch.bmm(halves[:, 0], halves[:, 1].transpose(1, 2)))
        values = halves.flatten(0, 1)
    return [*products, torch.bmm(values, values.transpose(1, 2))]


def _gram_squares(left: Products, right: Products) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the sums of the products of products, (samples,), and the squared norms of positions.

    Args:
        left: products of output gradients.
        right: products of inputs.
    """
    # The first level has one block per sample.
    num_samples, squares = left[0].shape[0], None
    for one, other in zip(reversed(left), reversed(right), strict=True):
        part = _dot(one.view(num_samples, -1), other.view(num_samples, -1))
        squares = part if squares is None else squares + 2 * part
    assert squares is not None
    one, other = (products[-1].diagonal(dim1=1, dim2=2).reshape(num_samples, -1) for products in (left, right))
    return squares, (one, other)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of the products of all elements, by index along the first dim."""
    # A batched product needs no tensor of the elementwise products.
    return torch.bmm(one.flatten(1).unsqueeze(1), other.flatten(1).unsqueeze(2)).flatten()


def _normalize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each sample by its largest element, and return the result and the (samples,) divisors."""
    largest = values.flatten(1).abs().amax(1) if values.numel() else values.new_ones(len(values))
    divisor = torch.where(largest > 0, largest, 1.0)
    return values / divisor.reshape(-1, *[1] * (values.ndim - 1)), divisor


def _total_padding(layer: Any) -> list[int]:
    return [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
