"""Norms of the samples of a batch, against the gradient of each sample alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from distclip import ArgumentError
from distclip.monitor import per_sample
from distclip.monitor.sample_norms import without_autocast
from tests.ranks import on_ranks

SAMPLES, CLASSES, TOKENS = 5, 11, 8


class Tied(nn.Module):
    """An embedding that is also the head, and a layer that is used twice."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(CLASSES, 8, padding_idx=2)
        self.head = nn.Linear(8, CLASSES, bias=False)
        self.head.weight = self.embedding.weight
        self.layer = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the mean of the logits of all positions."""
        x = self.embedding(ids)
        logits: Tensor = self.head(x + self.layer(torch.tanh(self.layer(x)))).mean(1)
        return logits


class Block(nn.Module):
    """Layers as in a transformer, with names for tensor parallelism."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(CLASSES, 8)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the mean of the logits of all positions."""
        x = self.embedding(ids)
        logits: Tensor = self.head(x + self.down(torch.relu(self.up(self.norm(x))))).mean(1)
        return logits


class Checkpointed(Block):
    """A block whose activations are computed again during backward."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return the same logits."""
        x = self.embedding(ids)
        y = checkpoint(lambda x: self.down(torch.relu(self.up(self.norm(x)))), x, use_reentrant=False)
        logits: Tensor = self.head(x + y).mean(1)
        return logits


def flat(shape: tuple[int, ...], *layers: nn.Module) -> nn.Module:
    """Add a classifier behind layers that get inputs of this shape."""
    body = nn.Sequential(*layers, nn.Flatten())
    return nn.Sequential(body, nn.Linear(body(torch.zeros(2, *shape)).shape[1], CLASSES))


class Twice(nn.Module):
    """A layer that is used twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        """Return its output for its own output."""
        outputs: Tensor = self.layer(torch.tanh(self.layer(inputs)))
        return outputs


class Attention(nn.Module):
    """Queries, keys and values of the same input, which products are shared by."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.queries, self.keys, self.values = (nn.Linear(40, 40, bias=False) for _ in range(3))
        self.head = nn.Linear(40, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits of each position."""
        inputs = torch.tanh(inputs + 0.1)  # no sample of zeros, which is measured again with a scale
        heads = self.queries(inputs), self.keys(inputs), self.values(inputs)
        logits: Tensor = self.head(nn.functional.scaled_dot_product_attention(*heads))
        return logits


IMAGE = (4, 6, 5)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tied weights, used twice, padding": (Tied, ()),
    "embedding and layer norm": (Block, ()),
    "recomputed": (Checkpointed, ()),
    "few positions": (lambda: flat((3, 9), nn.Linear(9, 8), nn.RMSNorm(8)), (3, 9)),
    "many positions": (lambda: flat((40, 3), nn.Linear(3, 2, bias=False), nn.Tanh()), (40, 3)),
    "flattened positions": (
        lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(9, CLASSES), nn.Unflatten(0, (-1, 3)), nn.Flatten(2)),
        (3, 9),
    ),
    "groups and strides": (
        lambda: flat(IMAGE, nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.GroupNorm(3, 6)),
        IMAGE,
    ),
    "same padding": (lambda: flat(IMAGE, nn.Conv2d(4, 3, (2, 3), padding="same", dilation=2)), IMAGE),
    "circular padding": (lambda: flat(IMAGE, nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular")), IMAGE),
    "transposed": (lambda: flat(IMAGE, nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1)), IMAGE),
    "large convolution": (lambda: flat((24, 9, 9), nn.Conv2d(24, 40, 5, groups=2), nn.ReLU(inplace=True)), (24, 9, 9)),
    "large kernel, few patches": (lambda: flat((16, 6, 6), nn.Conv2d(16, 16, 5)), (16, 6, 6)),
    "transposed in groups": (
        lambda: flat(IMAGE, nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=3, output_padding=2)),
        IMAGE,
    ),
    "convolution used twice": (lambda: flat(IMAGE, Twice(nn.Conv2d(4, 4, 3, padding=1))), IMAGE),
    "norm used twice": (lambda: flat((3, 9), Twice(nn.LayerNorm(9))), (3, 9)),
    "same input": (Attention, (6, 40)),
    "halves of positions": (lambda: flat((96, 200), nn.Linear(200, 150, bias=False), nn.Tanh()), (96, 200)),
    "one dim": (lambda: flat((4, 9), nn.Conv1d(4, 3, 3), nn.BatchNorm1d(3).eval()), (4, 9)),
    "three dims": (
        lambda: flat((2, 3, 4, 5), nn.Conv3d(2, 3, 2, bias=False), nn.InstanceNorm3d(3, affine=True)),
        (2, 3, 4, 5),
    ),
}


def make_batch(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return inputs of very different sizes, or token ids for an empty shape, and labels."""
    torch.manual_seed(1)
    sizes = torch.tensor([1.0, 30.0, 0.01, 0.0, 3.0]).reshape(-1, *[1] * len(shape))
    inputs = torch.randn(SAMPLES, *shape) * sizes if shape else torch.randint(0, CLASSES, (SAMPLES, TOKENS))
    return inputs, torch.randint(0, CLASSES, (SAMPLES,))


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the losses, so that a part is the gradient of one loss."""
    if outputs.ndim == 3:
        outputs = outputs.mean(1)
    return nn.functional.cross_entropy(outputs, labels, reduction="sum")


def each_alone(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the norm of the gradient of each sample alone, by parameter."""
    norms: dict[str, list[Tensor]] = {}
    for i in range(SAMPLES):
        model.zero_grad()
        loss_of(model(inputs[i : i + 1]), labels[i : i + 1]).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            norms.setdefault(name, []).append(parameter.grad.double().norm())
    model.zero_grad()
    return {name: torch.stack(values) for name, values in norms.items()}


@pytest.mark.parametrize("name", MODELS)
def test_norms_are_those_of_each_sample_alone(name: str) -> None:
    make, shape = MODELS[name]
    model, (inputs, labels) = make(), make_batch(shape)
    expected = each_alone(model, inputs, labels)
    with per_sample(model) as samples:
        loss_of(model(inputs), labels).backward()
    assert samples.by_tensor.keys() == expected.keys()
    for parameter, norms in expected.items():
        torch.testing.assert_close(samples.by_tensor[parameter], norms, rtol=1e-5, atol=1e-6, msg=parameter)
    assert samples.worst == int(samples.norms.argmax())
    assert samples.missing() == {}


def test_norms_are_those_of_vmap() -> None:
    model, (inputs, labels) = Block(), make_batch(())
    gradients = vmap(
        grad(lambda p, x, y: loss_of(functional_call(model, p, (x[None],)), y[None])), in_dims=(None, 0, 0)
    )(dict(model.named_parameters()), inputs, labels)
    squares = [gradient.flatten(1).double().square().sum(1) for gradient in gradients.values()]
    with per_sample(model) as samples:
        loss_of(model(inputs), labels).backward()
    torch.testing.assert_close(samples.norms, torch.stack(squares).sum(0).sqrt(), rtol=1e-5, atol=0)


def test_large_and_nonfinite_samples() -> None:
    """Squares of float32 would overflow. The first sample that is not finite is the worst."""
    torch.manual_seed(0)
    for layer, shape in (
        (nn.Conv2d(24, 40, 5), (4, 24, 9, 9)),
        (nn.Linear(8, 9), (4, 30, 8)),
        (nn.Linear(8, 9), (4, 8)),
    ):
        values = torch.randn(*shape)
        with per_sample(layer) as usual:
            layer(values).square().mean().backward()
        for factor in (1e20, 1e-20):
            with per_sample(layer) as scaled:
                (layer(values).square().mean() * factor).backward()
            weights = (samples.by_tensor["weight"] for samples in (scaled, usual))
            torch.testing.assert_close(next(weights), next(weights) * factor, rtol=1e-5, atol=0)
    model = nn.Linear(3, 1)
    inputs = torch.ones(4, 3)
    inputs[2] = 1e30
    with per_sample(model) as samples:
        model(inputs).sum().backward()
    torch.testing.assert_close(samples.norms[2].item(), 3**0.5 * 1e30, rtol=1e-5, atol=0)
    inputs[1, 0] = torch.nan
    with per_sample(model) as samples:
        model(inputs).sum().backward()
    assert (samples.worst, samples.norms.isfinite().tolist()) == (1, [True, False, True, True])


def test_token() -> None:
    model, (ids, labels) = Block(), make_batch(())
    ids[:] = 3
    ids[4, 5] = 9
    with torch.no_grad():
        model.embedding.weight[9] *= 1e3
    with per_sample(model) as samples:
        loss_of(model(ids), labels).backward()
    assert (samples.position(4), samples.token(4), samples.token(0)) == (5, 9, 3)


class Partly(nn.Module):
    """Layers of which two have no rule: a recurrent one, and positions that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positions, self.rnn = nn.Embedding(TOKENS, 4), nn.RNN(4, 4, batch_first=True)
        self.head, self.scale = nn.Linear(4, CLASSES), nn.Parameter(torch.tensor(1e-3))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits."""
        hidden, _ = self.rnn(inputs + self.positions(torch.arange(TOKENS)))
        logits: Tensor = self.head(hidden[:, -1]) * (1 + self.scale)
        return logits


def test_layers_without_a_rule_are_named() -> None:
    model = Partly()
    inputs, labels = make_batch((TOKENS, 4))
    with per_sample(model) as samples:
        loss_of(model(inputs), labels).backward()
    assert set(samples.by_tensor) == {"head.weight", "head.bias"}
    squares = {name: float(p.grad.square().sum()) for name, p in model.named_parameters() if p.grad is not None}
    expected = {name: square / sum(squares.values()) for name, square in squares.items() if not name.startswith("head")}
    assert samples.missing() == pytest.approx(expected, rel=1e-5)
    model.zero_grad()
    assert all(share != share for share in samples.missing().values())


class Scaled(nn.Embedding):
    """A subclass whose gradient is another than that of its output."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return scaled rows."""
        return super().forward(ids) * 3


class Functional(nn.Module):
    """A linear layer of which a function uses the weight too, and a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled, self.shared = Scaled(CLASSES, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the mean of the logits of all positions."""
        x = self.scaled(ids)
        logits: Tensor = self.head(self.shared(x) + nn.functional.linear(x, self.shared.weight)).mean(1)
        return logits


class Segments(nn.Module):
    """A layer in two blocks, each of which is recomputed during backward, after the other was measured."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(CLASSES, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the mean of the logits of all positions."""
        x = self.embedding(ids)
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=True)
        logits: Tensor = self.head(x).mean(1)
        return logits


@pytest.mark.parametrize(
    ("make", "names"),
    [(Functional, {"scaled.weight", "shared.weight"}), (Segments, {"layer.weight", "layer.bias"})],
)
def test_parameters_with_unknown_uses_are_named(make: Callable[[], nn.Module], names: set[str]) -> None:
    """A part of the uses would give a wrong norm."""
    torch.manual_seed(0)
    model, (ids, labels) = make(), make_batch(())
    expected = each_alone(model, ids, labels)
    with per_sample(model) as samples:
        loss_of(model(ids), labels).backward()
    assert set(samples.missing()) == names
    for name, norms in samples.by_tensor.items():
        torch.testing.assert_close(norms, expected[name], rtol=1e-5, atol=1e-6)
    assert samples.by_tensor.keys() | names == expected.keys()


def test_the_last_pass_counts() -> None:
    model, (ids, labels) = Block(), make_batch(())
    with per_sample(model) as expected:
        loss_of(model(ids), labels).backward()
    with per_sample(model) as samples:
        for tokens in (ids[:3], ids):
            loss_of(model(tokens), labels[: len(tokens)]).backward()
    assert torch.equal(samples.norms, expected.norms)
    assert samples.position(1) == expected.position(1)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_layers_and_no_gradients(frozen: bool) -> None:
    model, (inputs, labels) = Block(), make_batch(())
    model.up.requires_grad_(not frozen)
    with per_sample(model) as samples, torch.set_grad_enabled(frozen):
        loss = loss_of(model(inputs), labels)
        if frozen:
            loss.backward()
    assert ("up.weight" in samples.by_tensor, samples.worst is None, "up.weight" in samples.missing()) == (
        False,
        not frozen,
        not frozen,
    )


def test_autocast_is_computed_in_float32() -> None:
    """Norms come close in bfloat16, and are exact without autocast, also where a program enters it."""
    model, (inputs, labels) = Block(), make_batch(())
    with per_sample(model) as exact:
        loss_of(model(inputs), labels).backward()
    with torch.autocast("cpu", torch.bfloat16), per_sample(model) as rounded:
        loss_of(model(inputs), labels).backward()
    with per_sample(model) as same, without_autocast(), torch.autocast("cpu", torch.bfloat16):
        loss_of(model(inputs), labels).backward()
    torch.testing.assert_close(rounded.norms, exact.norms, rtol=0.05, atol=0)
    assert not torch.equal(rounded.norms, exact.norms)
    assert torch.equal(same.norms, exact.norms)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.up(torch.zeros(1, 8)).dtype == torch.bfloat16


def test_hooks_are_removed() -> None:
    model, (inputs, labels) = Block(), make_batch(())
    with pytest.raises(ZeroDivisionError), per_sample(model):
        raise ZeroDivisionError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with per_sample(model) as samples:
        loss_of(model(inputs), labels).backward()
    assert len(samples.norms) == SAMPLES


@pytest.mark.parametrize("arguments", [(3,), (nn.Linear(1, 1), 0), (nn.Linear(1, 1), "5")])
def test_invalid_arguments(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ArgumentError):
        per_sample(*arguments)


@on_ranks(2)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "tp", "sequence parallel"])
def test_layouts(layout: str) -> None:
    """Every layout has the norms of the whole model. Each rank has another batch, except in tensor parallelism."""
    inputs, labels = make_batch(())
    inputs = (inputs + (dist.get_rank() if layout in ("ddp", "fsdp2") else 0)) % CLASSES
    model = Block()
    with per_sample(model) as expected:
        loss_of(model(inputs), labels).backward()
    plan: dict[str, Any] = {
        "embedding": ColwiseParallel(output_layouts=Replicate()),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    mesh = dist.init_device_mesh("cpu", (2,))
    sharded: nn.Module = Block()
    if layout == "ddp":
        sharded = DistributedDataParallel(sharded)
    elif layout == "fsdp2":
        for module in (sharded.up, sharded.down, sharded):
            fully_shard(module, mesh=mesh)
    else:
        if layout == "sequence parallel":
            plan["embedding"] = ColwiseParallel(output_layouts=Shard(1), use_local_output=False)
            plan["norm"] = SequenceParallel()
            plan["up"] = ColwiseParallel(input_layouts=Shard(1))
            plan["down"] = RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
            plan["head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
        parallelize_module(sharded, mesh, plan)
    with per_sample(sharded) as samples:
        loss_of(sharded(inputs), labels).backward()
    assert samples.by_tensor.keys() == expected.by_tensor.keys()
    torch.testing.assert_close(samples.norms, expected.norms, rtol=1e-5, atol=0)
    assert samples.missing() == {}
    assert (samples.worst, samples.position(0)) == (expected.worst, expected.position(0))
