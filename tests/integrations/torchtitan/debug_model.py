"""Build torchtitan's debug model, made small, with random tokens, on CPUs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
from torchtitan.models.llama3.config_registry import llama3_debugmodel

VOCABULARY = 2048

_CPU = SimpleNamespace(
    set_device=lambda device: None,
    current_device=lambda: 0,
    device_count=lambda: 1,
    synchronize=lambda: None,
    empty_cache=lambda: None,
    reset_peak_memory_stats=lambda: None,
    memory_stats=lambda device: {},
    get_device_name=lambda device: "CPU",
    get_device_properties=lambda device: SimpleNamespace(total_memory=1 << 30),
)
"""Functions of torch.cuda that torchtitan calls."""


def use_cpus() -> None:
    """Make torchtitan compute on CPUs. It takes a device without an accelerator for a GPU."""
    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan"):
            known = {"device_module": _CPU, "device_type": "cpu"}.items()
            vars(module).update((key, value) for key, value in known if key in vars(module))
    if not hasattr(dist, "set_timeout"):
        # torchtitan 0.3 is made for a later torch than 2.13.
        dist.set_timeout = lambda timeout, group: None  # type: ignore[attr-defined]


class RandomTokens(BaseDataLoader):
    """Loader of random tokens, other ones on each data-parallel rank."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """Config without an option."""

    def __init__(self, config: Any, *, dp_rank: int, seq_len: int, local_batch_size: int, **kwargs: Any) -> None:
        self.rank, self.shape, self.num_batches = dp_rank, (local_batch_size, seq_len + 1), 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            seed = torch.Generator().manual_seed(1000 * self.rank + self.num_batches)
            self.num_batches += 1
            tokens = torch.randint(0, VOCABULARY, self.shape, generator=seed)
            yield {"input": tokens[:, :-1]}, tokens[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"num_batches": self.num_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_batches = state_dict["num_batches"]


class NoTokenizer(BaseTokenizer):
    """Tokenizer of texts that do not exist."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """Config without an option."""

    def __init__(self, config: Any, *, tokenizer_path: str) -> None:
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        return []

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return VOCABULARY


def debug_config(folder: str, steps: int, max_norm: float = 1.0) -> Any:
    """Return the config of a run on CPUs."""
    config = llama3_debugmodel()
    model: Any = config.model_spec.model
    del model.layers[2:]
    for _, _, parent, name in list(model.traverse(FlexAttention.Config)):
        setattr(parent, name, ScaledDotProductAttention.Config())
    config.dump_folder, config.dataloader, config.tokenizer = folder, RandomTokens.Config(), NoTokenizer.Config()
    config.training.local_batch_size, config.training.seq_len = 2, 32
    config.training.steps, config.training.max_norm = steps, max_norm
    config.training.disable_cuda_graphs = True
    # Its default needs a later FSDP2 than that of torch 2.13.
    config.parallelism.spmd_backend = "partial_dtensor"
    config.validator.enable, config.debug.seed = False, 0
    return config
