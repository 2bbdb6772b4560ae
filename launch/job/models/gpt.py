"""Build a decoder-only transformer. Its attention adapts to the number of heads that the projections return."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Data, require_text


class Embed(nn.Module):
    """Token embedding plus learned position embedding."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))


class Block(nn.Module):
    """Pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        # Under tensor parallelism the projections of a rank return the heads of that rank only.
        q, k, v = (part(y).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def gpt(data: Data, width: int, layers: int, heads: int) -> nn.Sequential:
    """Build a GPT with `layers` blocks."""
    if width % heads:
        raise SystemExit(
            f"model.width={width}: not divisible by model.heads={heads}. "
            f"Use model.width={width // heads * heads or heads}"
        )
    text = require_text(data, "gpt")
    model = nn.Sequential(
        Embed(text.vocabulary, text.length, width),
        *(Block(width, heads) for _ in range(layers)),
        nn.LayerNorm(width),
        nn.Linear(width, text.vocabulary, bias=False),
    )
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
    return model
