"""Run PyTorch's tests of gradient clipping over ranks on gloo, with distclip's function instead of torch's.

They are from test/distributed/_composable/fsdp/test_fully_shard_clip_grad_norm_.py (FSDP2, alone and over tensor
parallelism) and test/distributed/fsdp/test_fsdp_clip_grad_norm.py (FSDP1, without offloading, for which torch pins
memory and needs an accelerator). Two differences are documented: the norm is a plain tensor in float32 or wider, and
it costs one all-reduce for any number of mesh axes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import reference
from tests.ranks import gather_from_ranks, on_ranks
from tests.tables.layouts.meshes import world_mesh

VOCABULARY, LENGTH, DIM, HEADS = 8, 16, 16, 4


class Attention(nn.Module):
    """Self-attention with the heads of this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        weights = (q @ k.transpose(2, 3)).div((DIM // HEADS) ** 0.5).softmax(-1)
        return self.wo((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward pair, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(DIM), Attention()
        self.ffn_norm, self.w1, self.w2 = nn.LayerNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x))
        return h + self.w2(nn.functional.gelu(self.w1(self.ffn_norm(h))))


class Transformer(nn.Module):
    """A short form of PyTorch's test transformer: two blocks, the output tied to the token embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, DIM), nn.Embedding(LENGTH, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.output = nn.LayerNorm(DIM), nn.Linear(DIM, VOCABULARY, bias=False)
        self.output.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            h = block(h)
        # The local part of a DTensor is a view, of which FSDP2 warns.
        return self.output(self.norm(h)).clone()


BLOCK_PLAN = {
    "attention_norm": SequenceParallel(),
    "attention": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
    "attention.wq": ColwiseParallel(),
    "attention.wk": ColwiseParallel(),
    "attention.wv": ColwiseParallel(),
    "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
    "ffn_norm": SequenceParallel(),
    "w1": ColwiseParallel(input_layouts=Shard(1)),
    "w2": RowwiseParallel(output_layouts=Shard(1)),
}

ROOT_PLAN = {
    "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "positions": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
    "norm": SequenceParallel(),
    "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}


def with_tensor_parallelism(model: Transformer, mesh: DeviceMesh) -> None:
    """Apply PyTorch's plan for its transformer, with sequence parallelism, and tie the weights again."""
    parallelize_module(model, mesh, ROOT_PLAN)
    for block in model.blocks:
        parallelize_module(block, mesh, BLOCK_PLAN)
    model.output.weight = model.tokens.weight


def norms_of(grads: Iterable[Tensor], norm_type: float) -> list[float]:
    """Return the norm of each gradient."""
    return [float(torch.linalg.vector_norm(g, norm_type)) for g in grads]


def check_fully_shard(norm_type: float, tensor_parallel: bool, steps: int = 2) -> None:
    """Run PyTorch's _test_clip_grad_norm, which compares FSDP2 with data parallelism in ten equal steps.

    The first step clips in one call, the second in two calls, on gradients and then on parameters.
    """
    max_norm = 1
    mesh = world_mesh("dp", "tp") if tensor_parallel else world_mesh("dp")
    dp = mesh["dp"]
    torch.manual_seed(42)
    model = Transformer()
    whole = DistributedDataParallel(copy.deepcopy(model), process_group=dp.get_group())
    if tensor_parallel:
        with_tensor_parallelism(model, mesh["tp"])
    for block in model.blocks:
        fully_shard(block, mesh=dp)
    fully_shard(model, mesh=dp)
    torch.manual_seed(42 + dp.get_local_rank() + 1)
    tokens = torch.randint(0, VOCABULARY, (3, LENGTH))
    for i in range(steps):
        for one in (whole, model):
            one.zero_grad()
            one(tokens).square().sum().backward()
        expected_grads = [p.grad.clone() for p in whole.parameters()]
        before = [p.grad.to_local().clone() for p in model.parameters()]
        assert len(before) == len(expected_grads)
        for param, expected in zip(model.parameters(), expected_grads, strict=True):
            torch.testing.assert_close(param.grad.full_tensor(), expected, rtol=1e-4, atol=1e-3)
        # Otherwise clipping by the norm of a rank's shards, or of each tensor, could pass.
        for grads in (expected_grads, before):
            assert min(norms_of(grads, norm_type)) > max_norm, "not every norm is above the bound"

        expected_norm = nn.utils.clip_grad_norm_(whole.parameters(), max_norm=max_norm, norm_type=norm_type)
        with CommDebugMode() as counter:
            if i % 2 == 0:
                norm = distclip.clip_grad_norm_(model.parameters(), max_norm, norm_type=norm_type, foreach=True)
            else:
                norm = distclip.get_total_norm([p.grad for p in model.parameters()], norm_type, foreach=True)
                distclip.clip_grads_with_norm_(model.parameters(), max_norm, norm, foreach=True)
        assert type(norm) is Tensor
        assert norm.dtype == torch.float32
        torch.testing.assert_close(norm, expected_norm, rtol=1e-5, atol=0)
        counts = {str(op): n for op, n in counter.get_comm_counts().items()}
        assert counts == {"c10d.allreduce_": 2 if norm_type == float("inf") else 1}, f"{counts}"

        after = [p.grad.to_local() for p in model.parameters()]
        for clipped, old in ((after, before), ([p.grad for p in whole.parameters()], expected_grads)):
            assert max(norms_of(clipped, norm_type)) <= max_norm
            for new, grad in zip(clipped, old, strict=True):
                assert not torch.equal(new, grad) or not torch.count_nonzero(grad), "a gradient was not changed"
        for param, reference_param in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(param.grad.full_tensor(), reference_param.grad, rtol=1e-4, atol=1e-6)


@on_ranks(2)
@pytest.mark.parametrize("norm_type", [2, 1, float("inf")])
def test_fully_shard_1d(norm_type: float) -> None:
    check_fully_shard(norm_type, tensor_parallel=False)


@on_ranks(4)
@pytest.mark.parametrize("norm_type", [2, 3, float("inf")])
def test_fully_shard_2d(norm_type: float) -> None:
    """Shard over tensor and sequence parallelism: one all-reduce, where torch has one per axis."""
    check_fully_shard(norm_type, tensor_parallel=True)


class SharedWeights(nn.Module):
    """A short form of PyTorch's TransformerWithSharedParams, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(23, 16)
        self.transformer = nn.Transformer(16, 8, 2, 2, 8, dropout=0.0, batch_first=True)
        self.output_proj = nn.Linear(16, 23)
        self.output_proj.weight = self.embed_tokens.weight

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        return self.output_proj(self.transformer(self.embed_tokens(src), self.embed_tokens(tgt)))


LAYERS = ModuleWrapPolicy({nn.TransformerEncoderLayer, nn.TransformerDecoderLayer})


def sharded_by_fsdp1(strategy: str, **options: Any) -> FullyShardedDataParallel:
    """Wrap the layers of the model. The strategy "mixed" replicates the encoder and shards the others."""
    model = SharedWeights()
    options["device_id"] = torch.device("cpu")
    if strategy != "mixed":
        return FullyShardedDataParallel(
            model, sharding_strategy=ShardingStrategy[strategy], auto_wrap_policy=LAYERS, **options
        )
    inner = model.transformer
    inner.encoder = FullyShardedDataParallel(inner.encoder, sharding_strategy=ShardingStrategy.NO_SHARD, **options)
    inner.decoder = FullyShardedDataParallel(inner.decoder, sharding_strategy=ShardingStrategy.FULL_SHARD, **options)
    return FullyShardedDataParallel(model, sharding_strategy=ShardingStrategy.FULL_SHARD, **options)


@on_ranks(2)
@pytest.mark.parametrize(("max_norm", "norm_type"), [(2.5, 1), (1, 2), (1, float("inf"))])
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "NO_SHARD", "mixed"])
def test_fsdp1_ddp_parity(strategy: str, use_orig_params: bool, max_norm: float, norm_type: float) -> None:
    """Run PyTorch's _test_ddp_parity: FSDP1 has the norms and the training of data parallelism."""
    ddp = DistributedDataParallel(SharedWeights())
    fsdp = sharded_by_fsdp1(strategy, use_orig_params=use_orig_params)
    # PyTorch uses Adam, whose steps hardly depend on a common factor of all gradients.
    ddp_optim, fsdp_optim = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (ddp, fsdp))
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    src, tgt = (torch.randint(0, 23, (2, n), generator=generator) for n in (6, 4))
    for model in (ddp, fsdp):
        nn.functional.cross_entropy(model(src, tgt).flatten(0, 1), tgt.flatten(), reduction="sum").backward()
        for param in model.parameters():
            if param.grad is not None:
                param.grad *= 100
    old_ddp, old_fsdp = ([None if p.grad is None else p.grad.clone() for p in m.parameters()] for m in (ddp, fsdp))
    check_same_norm(ddp, fsdp, max_norm, norm_type)
    for model, old in ((ddp, old_ddp), (fsdp, old_fsdp)):
        for param, grad in zip(model.parameters(), old, strict=True):
            # With use_orig_params a rank may hold nothing of a parameter.
            assert (param.grad is None) == (grad is None)
            assert grad is None or grad.numel() == 0 or not torch.equal(param.grad, grad), "not changed"
    check_same_step(ddp, fsdp, ddp_optim, fsdp_optim)
    for i in range(2):
        for model, optim in ((ddp, ddp_optim), (fsdp, fsdp_optim)):
            optim.zero_grad(set_to_none=i % 2 == 0)
            model(src, tgt).sum().backward()
        check_same_norm(ddp, fsdp, max_norm, norm_type)
        check_same_step(ddp, fsdp, ddp_optim, fsdp_optim)


def check_same_norm(ddp: nn.Module, fsdp: nn.Module, max_norm: float, norm_type: float) -> None:
    """Clip one model by torch and one by distclip, and compare the norms, which must be above the bound."""
    expected = nn.utils.clip_grad_norm_(ddp.parameters(), max_norm=max_norm, norm_type=norm_type)
    norm = distclip.clip_grad_norm_(fsdp, max_norm=max_norm, norm_type=norm_type)
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
    assert expected > max_norm, "nothing to clip"


def check_same_step(
    ddp: nn.Module, fsdp: FullyShardedDataParallel, ddp_optim: torch.optim.Optimizer, fsdp_optim: torch.optim.Optimizer
) -> None:
    """Step both optimizers and compare the parameters."""
    ddp_optim.step()
    fsdp_optim.step()
    with FullyShardedDataParallel.summon_full_params(fsdp):
        theirs = [(name.replace("_fsdp_wrapped_module.", ""), p.detach()) for name, p in fsdp.named_parameters()]
        ours = [(name, p.detach()) for name, p in ddp.module.named_parameters()]
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        for (name, one), (_, two) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def nested(**options: Any) -> FullyShardedDataParallel:
    """Make PyTorch's NestedWrappedModule: FSDP1 within FSDP1 within FSDP1."""
    torch.manual_seed(0)

    def wrapped(module: nn.Module) -> FullyShardedDataParallel:
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **options)

    return wrapped(
        nn.Sequential(
            nn.Linear(8, 4),
            wrapped(nn.Sequential(wrapped(nn.Linear(4, 16)), nn.Linear(16, 16))),
            wrapped(nn.Linear(16, 4)),
            nn.Linear(4, 8),
        )
    )


def gather_grads(model: nn.Module) -> list[Tensor]:
    """Gather the local gradients of all ranks of a model that is sharded over all ranks."""
    local = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [grad for grads in gather_from_ranks(local) for grad in grads]


@on_ranks(2)
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "NO_SHARD"])
def test_fsdp1_low_precision_grads(strategy: str, use_orig_params: bool) -> None:
    """Run PyTorch's _test_low_precision_grads: the norm is that of the float16 numbers, in float32."""
    for max_norm in (1, 2.5):
        for norm_type in (1, 2, float("inf")):
            model = nested(
                sharding_strategy=ShardingStrategy[strategy],
                use_orig_params=use_orig_params,
                mixed_precision=MixedPrecision(torch.float16, torch.float16, keep_low_precision_grads=True),
            )
            torch.manual_seed(1 + dist.get_rank())
            (model(torch.rand(4, 8)).sum() * 30).backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            assert {g.dtype for g in grads} == {torch.float16}
            whole = gather_grads(model) if strategy == "FULL_SHARD" else [g.clone() for g in grads]
            norm = distclip.clip_grad_norm_(model, max_norm, norm_type)
            assert norm.dtype == torch.float32
            expected = reference.total_norm(whole, norm_type)
            assert expected > max_norm, "nothing to clip"
            torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
            assert max(norms_of((g.double() for g in grads), norm_type)) <= max_norm * (1 + 1e-3)
            left = reference.total_norm(gather_grads(model) if strategy == "FULL_SHARD" else grads, norm_type)
            torch.testing.assert_close(float(left), float(max_norm), rtol=1e-3, atol=0)


@on_ranks(2)
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_no_gradients(use_orig_params: bool) -> None:
    """Run PyTorch's _test_no_gradients: a forward under mixed precision, and a norm of zero in float32."""
    model = FullyShardedDataParallel(
        nn.Linear(24, 24),
        sharding_strategy=ShardingStrategy.SHARD_GRAD_OP,
        mixed_precision=MixedPrecision(torch.float16, torch.float32, torch.float32),
        device_id=torch.device("cpu"),
        use_orig_params=use_orig_params,
    )
    model(torch.randn(32, 24))
    with warnings.catch_warnings():
        # Between forward and backward the parameters are views, which torch's method also warns of.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        norm = distclip.clip_grad_norm_(model, 1)
    assert norm.dtype == torch.float32
    assert torch.equal(norm, torch.zeros(())), f"{norm}"


@on_ranks(2)
def test_fsdp1_non_uniform_grad_dtype() -> None:
    """Run PyTorch's test_non_uniform_grad_dtype: one norm over bfloat16 and float32, in float32."""
    torch.manual_seed(0)
    bf16 = MixedPrecision(param_dtype=torch.bfloat16, keep_low_precision_grads=True, cast_forward_inputs=True)
    fp32 = MixedPrecision(param_dtype=torch.float32, cast_forward_inputs=True)
    model = FullyShardedDataParallel(
        nn.Sequential(
            *(
                FullyShardedDataParallel(nn.Linear(5, 5), mixed_precision=policy, device_id=torch.device("cpu"))
                for policy in (bf16, fp32)
            )
        ),
        device_id=torch.device("cpu"),
    )
    torch.manual_seed(1 + dist.get_rank())
    model(torch.randn(2, 5)).sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.bfloat16, torch.float32}
    whole = gather_grads(model)
    norm = distclip.clip_grad_norm_(model, max_norm=1)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), reference.total_norm(whole), rtol=1e-6, atol=0)
    left = reference.total_norm(gather_grads(model))
    torch.testing.assert_close(float(left), 1.0, rtol=4e-3, atol=0)
