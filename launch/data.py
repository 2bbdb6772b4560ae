"""Data that is already on board, as whole batches: the same global batches whatever the layout."""

import math
import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Batch(NamedTuple):
    x: Tensor
    y: Tensor
    first: bool
    """Whether a pass over the data starts here, so that a carried state starts from zero."""
    ids: Tensor
    """Which samples of the data set these are; of text, which batch of the pass this is."""


@dataclass(frozen=True)
class Data:
    """Training batches for ever, held-out batches once, and what a model has to know to fit."""

    train: Callable[[int], Iterator[Batch]]
    held_out: list[Batch]
    criterion: Callable[[Tensor, Tensor], Tensor]
    outputs: int
    guess: float
    """The held-out loss of a model that has learnt nothing."""
    unit: str
    """What the targets of a batch are counted in."""
    variance: float | None
    """Of the held-out targets, where they are quantities: what R2 compares with."""
    size: int
    """How many ids batches have."""


@dataclass(frozen=True)
class Text(Data):
    vocabulary: int
    length: int


@dataclass(frozen=True)
class Table(Data):
    features: int


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), target.flatten())


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(prediction.float(), target)


def topics(batch: int, length: int, held_out: float) -> Text:
    texts = pydoc_data.topics.topics
    text = "\n".join(texts[name] for name in sorted(texts))
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([index[character] for character in text])
    cut = int(len(ids) * (1 - held_out))
    train, rest = _streams(ids[:cut], batch, length), _streams(ids[cut:], batch, length)

    def passes(seed: int) -> Iterator[Batch]:
        while True:
            yield from train

    v = len(index)
    return Text(passes, rest, cross_entropy, v, math.log(v), "tokens", None, len(train), v, length)


def _streams(ids: Tensor, batch: int, length: int) -> list[Batch]:
    """Cut a text into `batch` contiguous streams, read side by side `length` characters a time."""
    rows = ids[: len(ids) // batch * batch].view(batch, -1)
    n = (rows.shape[1] - 1) // length * length
    if n < 1:
        raise SystemExit(
            f"batch={batch} streams of data.length={length} need more text than the "
            f"{len(ids)} characters there are: write a smaller batch or data.length"
        )
    xs, ys = rows[:, :n].split(length, dim=1), rows[:, 1 : n + 1].split(length, dim=1)
    return [Batch(x, y, i == 0, torch.tensor([i])) for i, (x, y) in enumerate(zip(xs, ys, strict=True))]


def digits(batch: int, held_out: float) -> Table:
    from sklearn.datasets import load_digits  # two seconds that a language model does not need

    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    return _table(x.float() / 16, y, y, batch, held_out, cross_entropy, outputs=10)


def diabetes(batch: int, held_out: float, bad_label: float) -> Table:
    from sklearn.datasets import load_diabetes

    x, y = (torch.tensor(a).float() for a in load_diabetes(return_X_y=True))
    bad = (y * bad_label - y.mean()) / y.std()
    x, y = ((a - a.mean(0)) / a.std(0) for a in (x, y))
    return _table(x, y[:, None], bad[:, None], batch, held_out, squared_error, outputs=1)


def regression(
    batch: int, held_out: float, samples: int, features: int, noise: float, standardised: bool, random_state: int
) -> Table:
    from sklearn.datasets import make_regression

    made = make_regression(n_samples=samples, n_features=features, noise=noise, random_state=random_state)
    x, y = (torch.tensor(a).float() for a in made)
    if standardised:
        y = (y - y.mean()) / y.std()
    return _table(x, y[:, None], y[:, None], batch, held_out, squared_error, outputs=1)


def _table(x: Tensor, y: Tensor, bad: Tensor, batch: int, held_out: float, criterion: Any, outputs: int) -> Table:
    """Shuffle once, hold out whole batches, reshuffle the rest with the seed on every pass.

    One training sample, which the seed picks, has the target that `bad` holds for it.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y, bad = x[order], y[order], bad[order]
    held = int(len(x) * held_out) // batch * batch
    if held == 0 or len(x) - held < batch:
        raise SystemExit(
            f"batch={batch} is too large to hold out data.held_out={held_out} of {len(x)} "
            f"samples in whole batches: write a smaller batch"
        )
    rest = [Batch(x[rows], y[rows], False, order[rows]) for rows in torch.arange(held).split(batch)]
    variance = float(y[:held].var(correction=0)) if outputs == 1 else None
    x, y, bad, ids = x[held:], y[held:], bad[held:], order[held:]

    def passes(seed: int) -> Iterator[Batch]:
        chosen = torch.randint(len(x), (1,), generator=torch.Generator().manual_seed(seed))
        targets = y.index_copy(0, chosen, bad[chosen])
        generator = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(len(x), generator=generator).split(batch):
                if len(rows) == batch:
                    yield Batch(x[rows], targets[rows], False, ids[rows])

    guess = math.log(outputs) if outputs > 1 else float(y.var())
    return Table(passes, rest, criterion, outputs, guess, "samples", variance, len(x), x.shape[1])
