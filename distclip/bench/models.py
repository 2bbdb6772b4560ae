"""Define the models: GPT-2 by its shapes, a model of very many tiny layers, and adapters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GPT", "Adapters", "Tiny", "gpt_shapes"]

HEADS = 12


class Block(nn.Module):
    """A transformer block with GPT-2's twelve tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0).transpose(-3, -2)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-3, -2).flatten(-2))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


class GPT(nn.Module):
    """GPT-2, by default the small one of 148 tensors with 124 M elements.

    Args:
        scale: 1 for the real width and vocabulary, smaller for tests.
        layers: number of blocks.
        width: width of the residual stream, at scale 1.
    """

    def __init__(self, scale: float = 1.0, layers: int = 12, width: int = 768) -> None:
        super().__init__()
        width = HEADS * max(1, round(width * scale / HEADS))
        self.token = nn.Embedding(max(16, round(50257 * scale)), width)
        self.position = nn.Embedding(max(16, round(1024 * scale)), width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[-1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.token.weight)


def gpt_shapes(scale: float = 1.0, layers: int = 12, width: int = 768) -> list[torch.Size]:
    """Return the shapes of `GPT`'s parameters in order, without allocating memory."""
    with torch.device("meta"):
        return [p.shape for p in GPT(scale, layers, width).parameters()]


class Pair(nn.Module):
    """Two linear layers on a residual stream: four tiny parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.tanh(self.up(x)))
        return y


class Tiny(nn.Module):
    """Model of very many small parameters.

    Args:
        count: number of parameters, a multiple of four.
        width: width of each layer.
    """

    def __init__(self, count: int, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.pairs = nn.ModuleList(Pair(width) for _ in range(count // 4))

    def forward(self, x: Tensor) -> Tensor:
        for pair in self.pairs:
            x = pair(x)
        return x


class Adapters(nn.Module):
    """A frozen layer, and LoRA adapters of rank 8 that are trained together.

    Args:
        count: number of adapters.
        width: width of the layer.
    """

    def __init__(self, count: int, width: int = 512) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(requires_grad=False)
        self.adapters = nn.ModuleDict(
            {
                f"tenant{i}": nn.Sequential(nn.Linear(width, 8, bias=False), nn.Linear(8, width, bias=False))
                for i in range(count)
            }
        )
