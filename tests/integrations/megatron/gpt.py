"""Megatron's GPT in two pipeline stages with a tied embedding, trained by its own schedule, beside the whole in one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.integrations.megatron import attach
from tests.integrations.megatron.model import Setting, megatron, optimizer_of
from tests.integrations.megatron.training import Truth, alike

VOCAB, LENGTH, ROWS, MICRO = 10, 6, 2, 2


def gpt(stages: int, stage: int) -> Any:
    """One of the stages."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_model_parallel_size=stages,
        pipeline_dtype=torch.float32,
        batch_p2p_sync=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        VOCAB,
        LENGTH,
        pre_process=stage == 0,
        post_process=stage == stages - 1,
        share_embeddings_and_output_weights=True,
    )


def batch(step: int, micro: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + micro)
    return torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=generator)


def losses(model: Any, tokens: Tensor) -> Tensor:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    # There is no dropout, and no generator of a GPU.
    with mock.patch.object(CudaRNGStatesTracker, "fork", return_value=nullcontext()):
        return model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])


def in_whole(name: str, stage: int) -> str:
    """The name in the whole model of a stage's parameter."""
    if name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    return re.sub(r"layers\.0\.", f"layers.{stage}.", name)


def as_one(policy: Any, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """The plain loop: weights before and after it, and the norms."""
    with megatron(Setting()):
        torch.manual_seed(0)
        model = gpt(1, 0)
        start = {name: param.detach().clone() for name, param in model.named_parameters()}
        truth, norms = Truth(start, policy), []
        for step in range(steps):
            model.zero_grad()
            for micro in range(MICRO):
                (losses(model, batch(step, micro)).mean() / MICRO).backward()
            norms.append(float(truth.step({name: param.grad for name, param in model.named_parameters()}).norm))
            with torch.no_grad():
                for name, param in model.named_parameters():
                    param.copy_(truth.params[name])
        return start, {name: param.detach() for name, param in model.named_parameters()}, norms


def trains(policy: Any, distributed: bool, steps: int = 4) -> None:
    """Steps of the schedule are those of the plain loop, and both copies of the embedding stay the same."""
    start, end, norms = as_one(policy, steps)
    setting = Setting(pp=2, distributed=distributed)
    with megatron(setting):
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.pipeline_parallel import get_forward_backward_func

        stage = dist.get_rank()
        model = gpt(2, stage)
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(start[in_whole(name, stage)])
        model.config.finalize_model_grads_func = finalize_model_grads
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
        model = DistributedDataParallel(model.config, ddp, model)
        optimizer = optimizer_of(model, setting)
        attached = attach(optimizer, policy, model=[model])

        def forward(data: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
            return losses(model, next(data)), lambda out: (out.mean(), {})

        for step in range(steps):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter([batch(step, micro) for micro in range(MICRO)]),
                model=[model],
                num_microbatches=MICRO,
                seq_length=LENGTH,
                micro_batch_size=ROWS,
                forward_only=False,
            )
            assert optimizer.step()[0]
            torch.testing.assert_close(float(attached.report.norm), norms[step], rtol=1e-4, atol=0)
        for name, param in model.module.named_parameters():
            torch.testing.assert_close(param.detach(), end[in_whole(name, stage)], rtol=1e-4, atol=1e-5, msg=name)
        alike(model.module.shared_embedding_or_output_weight().detach().numpy().tobytes())
        assert any(not torch.equal(start[name], end[name]) for name in start)
