"""Train Megatron's GPT with a tied embedding in two pipeline stages, by its schedule, against one process."""

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
from tests.integrations.megatron.integration import OneProcess, check_equal_on_ranks
from tests.integrations.megatron.model import Setting, build_optimizer, megatron

VOCAB, LENGTH, NUM_ROWS, NUM_MICRO_BATCHES = 10, 6, 2, 2


def build_gpt(num_stages: int, stage: int) -> Any:
    """Build one of the stages."""
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
        pipeline_model_parallel_size=num_stages,
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
        post_process=stage == num_stages - 1,
        share_embeddings_and_output_weights=True,
    )


def tokens_of(step: int, micro_batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + micro_batch)
    return torch.randint(VOCAB, (NUM_ROWS, LENGTH + 1), generator=generator)


def losses_of(model: Any, tokens: Tensor) -> Tensor:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    positions = torch.arange(LENGTH).expand(NUM_ROWS, LENGTH)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    # Without dropout, no random generator of a GPU is used.
    with mock.patch.object(CudaRNGStatesTracker, "fork", return_value=nullcontext()):
        return model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])


def name_in_full_model(name: str, stage: int) -> str:
    """Return the name in the full model of a stage's parameter."""
    if name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    return re.sub(r"layers\.0\.", f"layers.{stage}.", name)


def train_in_one_process(policy: Any, num_steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Return the weights before and after training, and the norms."""
    with megatron(Setting()):
        torch.manual_seed(0)
        model = build_gpt(1, 0)
        start = {name: param.detach().clone() for name, param in model.named_parameters()}
        one_process, norms = OneProcess(start, policy), []
        for step in range(num_steps):
            model.zero_grad()
            for i in range(NUM_MICRO_BATCHES):
                (losses_of(model, tokens_of(step, i)).mean() / NUM_MICRO_BATCHES).backward()
            grads = {name: param.grad for name, param in model.named_parameters()}
            norms.append(float(one_process.step(grads).norm))
            with torch.no_grad():
                for name, param in model.named_parameters():
                    param.copy_(one_process.params[name])
        return start, {name: param.detach() for name, param in model.named_parameters()}, norms


def check_gpt(policy: Any, distributed: bool, num_steps: int = 4) -> None:
    """Compare Megatron's schedule with one process, and the two copies of the embedding with each other."""
    start, end, norms = train_in_one_process(policy, num_steps)
    setting = Setting(pp=2, distributed=distributed)
    with megatron(setting):
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.pipeline_parallel import get_forward_backward_func

        stage = dist.get_rank()
        model = build_gpt(2, stage)
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(start[name_in_full_model(name, stage)])
        model.config.finalize_model_grads_func = finalize_model_grads
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
        model = DistributedDataParallel(model.config, ddp, model)
        optimizer = build_optimizer(model, setting)
        attachment = attach(optimizer, policy, model=[model])

        def forward(data: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
            return losses_of(model, next(data)), lambda losses: (losses.mean(), {})

        for step in range(num_steps):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter([tokens_of(step, i) for i in range(NUM_MICRO_BATCHES)]),
                model=[model],
                num_microbatches=NUM_MICRO_BATCHES,
                seq_length=LENGTH,
                micro_batch_size=NUM_ROWS,
                forward_only=False,
            )
            assert optimizer.step()[0]
            assert attachment.report is not None
            torch.testing.assert_close(float(attachment.report.norm), norms[step], rtol=1e-4, atol=0)
        for name, param in model.module.named_parameters():
            torch.testing.assert_close(
                param.detach(), end[name_in_full_model(name, stage)], rtol=1e-4, atol=1e-5, msg=name
            )
        check_equal_on_ranks(model.module.shared_embedding_or_output_weight().detach().numpy().tobytes())
        assert any(not torch.equal(start[name], end[name]) for name in start)
