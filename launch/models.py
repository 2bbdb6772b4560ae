"""Small models, each a sequence of parts: any run of parts is a pipeline stage."""

from collections.abc import Callable

import torch
from torch import Tensor, autocast, nn

from data import Data, Table, Text


class Recurrence(nn.Module):
    """One recurrent layer that carries its state, cut off from its history, to the next batch."""

    def __init__(self, cell: nn.RNNBase) -> None:
        super().__init__()
        self.cell = cell
        self.state: Tensor | tuple[Tensor, ...] | None = None

    def reset(self) -> None:
        self.state = None

    def forward(self, x: Tensor) -> Tensor:
        # A state that lives for the whole text adds up rounding errors: never below fp32, unless the weights are.
        with autocast(x.device.type, enabled=False):
            y, state = self.cell(x.to(next(self.cell.parameters()).dtype), self.state)
        self.state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        return y.contiguous()  # a view of time-first data, which a pipeline can't send

    def zeros(self, rows: int) -> tuple[Tensor, ...]:
        """A state of the right shape for so many rows of a batch, along dim 1."""
        shape, device = (self.cell.num_layers, rows, self.cell.hidden_size), next(self.cell.parameters()).device
        return tuple(torch.zeros(shape, device=device) for _ in range(2 if isinstance(self.cell, nn.LSTM) else 1))


def bare(name: str) -> str:
    """The name of a part or a parameter without what DDP and FSDP1 put into it."""
    return ".".join(part for part in name.split(".") if part != "_fsdp_wrapped_module").removeprefix("module.")


def recurrences(model: nn.Module) -> dict[str, Recurrence]:
    """The parts that carry a state, by their bare names."""
    return {bare(name): part for name, part in model.named_modules() if isinstance(part, Recurrence)}


def reset_state(model: nn.Module) -> None:
    for part in recurrences(model).values():
        part.reset()


def carries_state(model: nn.Module) -> bool:
    return bool(recurrences(model))


def needs_text(data: Data, model: str) -> Text:
    if not isinstance(data, Text):
        raise SystemExit(f"model={model} reads characters: write model={model} data=topics")
    return data


def rnn(data: Data, hidden: int, layers: int) -> nn.Sequential:
    return _recurrent(needs_text(data, "rnn"), nn.RNN, hidden, layers)


def lstm(data: Data, hidden: int, layers: int) -> nn.Sequential:
    return _recurrent(needs_text(data, "lstm"), nn.LSTM, hidden, layers)


def _recurrent(data: Text, cell: Callable[..., nn.RNNBase], hidden: int, layers: int) -> nn.Sequential:
    embedding, head = nn.Embedding(data.vocabulary, hidden), nn.Linear(hidden, data.vocabulary)
    for weight in (embedding.weight, head.weight):
        nn.init.uniform_(weight, -0.1, 0.1)
    nn.init.zeros_(head.bias)
    middle = (Recurrence(cell(hidden, hidden, batch_first=True)) for _ in range(layers))
    return nn.Sequential(embedding, *middle, head)


def mlp(data: Data, hidden: int, layers: int) -> nn.Sequential:
    if not isinstance(data, Table):
        raise SystemExit("model=mlp reads numbers: write model=mlp data=digits (or diabetes, regression)")
    parts: list[nn.Module] = []
    width = data.features
    for _ in range(layers):
        parts += [nn.Linear(width, hidden), nn.ReLU()]
        width = hidden
    return nn.Sequential(*parts, nn.Linear(width, data.outputs))
