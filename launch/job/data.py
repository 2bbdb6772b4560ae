"""Provide data sets that need no download, as whole global batches.

The batches do not depend on the layout, so runs in different layouts can be compared.
"""

import math
import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Criterion = Callable[[Tensor, Tensor], Tensor]


class Batch(NamedTuple):
    """One global batch."""

    x: Tensor
    y: Tensor
    starts_pass: bool
    """True for the first batch of a pass over the text. A carried state is reset before it."""
    ids: Tensor
    """Indices of the samples in the data set. For text, the index of the batch in its pass."""


@dataclass(frozen=True)
class Data:
    """Training and held-out batches, with the numbers that a model must fit."""

    train: Callable[[int], Iterator[Batch]]
    """Function that maps a seed to an endless stream of training batches."""
    held_out: list[Batch]
    criterion: Criterion
    outputs: int
    """Number of outputs that a model must have."""
    guess: float
    """Held-out loss of a model that has learned nothing."""
    unit: str
    """Plural noun of the targets: "tokens" or "samples"."""
    variance: float | None
    """Variance of the held-out targets, the reference of R2. None unless the targets are quantities."""
    size: int
    """Number of ids that batches have."""


@dataclass(frozen=True)
class Text(Data):
    """A text as streams of characters."""

    vocabulary: int
    length: int
    """Number of characters in a row of a batch."""


@dataclass(frozen=True)
class Table(Data):
    """Samples with numeric features."""

    features: int


def require_text(data: Data, model: str) -> Text:
    """Return `data` if it is text, else exit with the overrides to use."""
    if not isinstance(data, Text):
        raise SystemExit(f"model={model}: needs text. Use model={model} data=topics")
    return data


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross entropy over all positions."""
    return F.cross_entropy(logits.float().flatten(0, -2), target.flatten())


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error."""
    return F.mse_loss(prediction.float(), target)


def topics(batch: int, length: int, held_out: float) -> Text:
    """Load Python's help topics as `batch` streams of characters, whose end is held out."""
    ids, vocabulary = _characters()
    num_train = int(len(ids) * (1 - held_out))
    train, test = _streams(ids[:num_train], batch, length), _streams(ids[num_train:], batch, length)

    def passes(seed: int) -> Iterator[Batch]:
        while True:
            yield from train

    guess = math.log(vocabulary)
    return Text(passes, test, cross_entropy, vocabulary, guess, "tokens", None, len(train), vocabulary, length)


# The runs of one job share the result.
@cache
def _characters() -> tuple[Tensor, int]:
    """Return Python's help topics as indices of characters, and the number of different characters."""
    texts = pydoc_data.topics.topics
    text = "\n".join(texts[name] for name in sorted(texts))
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([index[character] for character in text]), len(index)


def _streams(ids: Tensor, batch: int, length: int) -> list[Batch]:
    """Split a text into `batch` contiguous streams. A batch has the next `length` characters of each."""
    streams = ids[: len(ids) // batch * batch].view(batch, -1)
    n = (streams.shape[1] - 1) // length * length
    if n < 1:
        raise SystemExit(
            f"batch={batch}: so many streams of data.length={length} need more text than the {len(ids)} characters "
            "available. Use a smaller batch or data.length"
        )
    xs, ys = streams[:, :n].split(length, dim=1), streams[:, 1 : n + 1].split(length, dim=1)
    return [Batch(x, y, i == 0, torch.tensor([i])) for i, (x, y) in enumerate(zip(xs, ys, strict=True))]


def digits(batch: int, held_out: float) -> Table:
    """Load scikit-learn's handwritten digits."""
    # This import is here because it takes two seconds, and language models do not need it.
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    return _table(x.float() / 16, y, y, batch, held_out, cross_entropy, outputs=10)


def diabetes(batch: int, held_out: float, bad_label: float) -> Table:
    """Load scikit-learn's diabetes data, standardised. One training target is multiplied by `bad_label`."""
    from sklearn.datasets import load_diabetes

    x, y = (torch.tensor(array).float() for array in load_diabetes(return_X_y=True))
    bad = (y * bad_label - y.mean()) / y.std()
    x, y = ((values - values.mean(0)) / values.std(0) for values in (x, y))
    return _table(x, y[:, None], bad[:, None], batch, held_out, squared_error, outputs=1)


def regression(
    batch: int, held_out: float, samples: int, features: int, noise: float, standardised: bool, random_state: int
) -> Table:
    """Draw a linear regression problem with scikit-learn's make_regression."""
    from sklearn.datasets import make_regression

    arrays = make_regression(n_samples=samples, n_features=features, noise=noise, random_state=random_state)
    x, y = (torch.tensor(array).float() for array in arrays)
    if standardised:
        y = (y - y.mean()) / y.std()
    return _table(x, y[:, None], y[:, None], batch, held_out, squared_error, outputs=1)


def _table(x: Tensor, y: Tensor, bad: Tensor, batch: int, held_out: float, criterion: Criterion, outputs: int) -> Table:
    """Shuffle once and hold out whole batches. Every pass reshuffles the training samples by the seed.

    Args:
        bad: targets, one of which replaces the target of one training sample. The seed picks the sample.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y, bad = x[order], y[order], bad[order]
    num_held_out = int(len(x) * held_out) // batch * batch
    if num_held_out == 0 or len(x) - num_held_out < batch:
        raise SystemExit(
            f"batch={batch}: too large to hold out data.held_out={held_out} of {len(x)} samples in whole batches. "
            "Use a smaller batch"
        )
    test = [Batch(x[rows], y[rows], False, order[rows]) for rows in torch.arange(num_held_out).split(batch)]
    variance = float(y[:num_held_out].var(correction=0)) if outputs == 1 else None
    x, y, bad, ids = x[num_held_out:], y[num_held_out:], bad[num_held_out:], order[num_held_out:]

    def passes(seed: int) -> Iterator[Batch]:
        chosen = torch.randint(len(x), (1,), generator=torch.Generator().manual_seed(seed))
        targets = y.index_copy(0, chosen, bad[chosen])
        generator = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(len(x), generator=generator).split(batch):
                if len(rows) == batch:
                    yield Batch(x[rows], targets[rows], False, ids[rows])

    guess = math.log(outputs) if outputs > 1 else float(y.var())
    return Table(passes, test, criterion, outputs, guess, "samples", variance, len(x), x.shape[1])
