"""Build recurrent language models, whose state is carried from one batch to the next."""

from collections.abc import Callable

import torch
from torch import Tensor, autocast, nn

from ..data import Data, Text, require_text


class Recurrence(nn.Module):
    """One recurrent layer. Its state is carried to the next batch, without the state's graph."""

    def __init__(self, cell: nn.RNNBase) -> None:
        super().__init__()
        self.cell = cell
        self.state: Tensor | tuple[Tensor, ...] | None = None

    def reset(self) -> None:
        """Clear the state, so that the next batch starts from zero."""
        self.state = None

    def forward(self, x: Tensor) -> Tensor:
        # Rounding errors accumulate in a state that is carried through the whole text. So the state stays in fp32,
        # unless the weights have lower precision.
        with autocast(x.device.type, enabled=False):
            y, state = self.cell(x.to(next(self.cell.parameters()).dtype), self.state)
        self.state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        # `y` may be a view of time-first data, which a pipeline cannot send.
        return y.contiguous()

    def zeros(self, rows: int) -> tuple[Tensor, ...]:
        """Return the tensors of a zero state for `rows` rows of a batch, along dim 1."""
        shape, device = (self.cell.num_layers, rows, self.cell.hidden_size), next(self.cell.parameters()).device
        return tuple(torch.zeros(shape, device=device) for _ in range(2 if isinstance(self.cell, nn.LSTM) else 1))


def original_name(name: str) -> str:
    """Remove the parts that DDP and FSDP1 add to the name of a module or a parameter."""
    return ".".join(part for part in name.split(".") if part != "_fsdp_wrapped_module").removeprefix("module.")


def recurrences(model: nn.Module) -> dict[str, Recurrence]:
    """Return the layers that carry a state, by their original names."""
    return {original_name(name): part for name, part in model.named_modules() if isinstance(part, Recurrence)}


def reset_states(model: nn.Module) -> None:
    """Reset every carried state of a model."""
    for part in recurrences(model).values():
        part.reset()


def rnn(data: Data, hidden: int, layers: int) -> nn.Sequential:
    """Build a character-level tanh RNN."""
    return _language_model(require_text(data, "rnn"), nn.RNN, hidden, layers)


def lstm(data: Data, hidden: int, layers: int) -> nn.Sequential:
    """Build a character-level LSTM."""
    return _language_model(require_text(data, "lstm"), nn.LSTM, hidden, layers)


def _language_model(data: Text, cell: Callable[..., nn.RNNBase], hidden: int, layers: int) -> nn.Sequential:
    embedding, head = nn.Embedding(data.vocabulary, hidden), nn.Linear(hidden, data.vocabulary)
    for weight in (embedding.weight, head.weight):
        nn.init.uniform_(weight, -0.1, 0.1)
    nn.init.zeros_(head.bias)
    recurrent_layers = (Recurrence(cell(hidden, hidden, batch_first=True)) for _ in range(layers))
    return nn.Sequential(embedding, *recurrent_layers, head)
