"""Build a multilayer perceptron."""

from torch import nn

from ..data import Data, Table


def mlp(data: Data, hidden: int, layers: int) -> nn.Sequential:
    """Build an MLP with ReLU over the features of a table."""
    if not isinstance(data, Table):
        raise SystemExit("model=mlp: needs numeric features. Use model=mlp data=digits (or diabetes, regression)")
    parts: list[nn.Module] = []
    width = data.features
    for _ in range(layers):
        parts += [nn.Linear(width, hidden), nn.ReLU()]
        width = hidden
    return nn.Sequential(*parts, nn.Linear(width, data.outputs))
