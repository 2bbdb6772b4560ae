"""Make incidents of six kinds, and count how often a replay names the right cause and the right sample.

Each run trains a small network for 40 steps with `Recorder(examine=...)`, and has an incident in one step:

- label: the target of a sample is a hundred to ten thousand times as large as usual.
- input: the features of a sample are that much larger than usual.
- mask: one position of a sample counts a hundredfold, as if all other positions were masked.
- numerics: the activations overflow float16, but not float32.
- hardware: an element of a gradient has a flipped bit in its exponent.
- optimizer: optimizer steps that were far too large have moved the parameters.

An incident whose norm is not an outlier is not replayed, and counts as wrong. The table has the numbers of incidents,
of right causes, and of right samples if the cause is a sample.

`python -m launch.comparison.incidents` takes a minute of one core. With `--cost` it measures the slowdown of the
forward and backward pass of small models by `per_sample`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import struct
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import distclip
from distclip.monitor import Recorder, per_sample

KINDS = {
    "label": "data",
    "input": "data",
    "mask": "data",
    "numerics": "numerics",
    "hardware": "hardware",
    "optimizer": "optimizer state",
}
"""Right cause of each kind."""

STEPS, SAMPLES, POSITIONS, FEATURES, CLASSES = 40, 16, 12, 8, 6


class Sequences(nn.Module):
    """Embedding, two layers with a norm, and a head, for the kinds with tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(CLASSES, 16), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs = self.embedding(tokens)
        outputs: Tensor = self.head(inputs + self.down(torch.relu(self.up(self.norm(inputs)))))
        return outputs


class Block(nn.Module):
    """A transformer layer. All of its modules have a rule in `per_sample`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.inputs, self.outputs = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inputs(self.norms[0](x)).chunk(3, -1)
        x = x + self.outputs(nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True))
        output: Tensor = x + self.down(torch.relu(self.up(self.norms[1](x))))
        return output


@dataclass
class Incident:
    """An incident, and the result of its replay.

    Args:
        kind: one of `KINDS`.
        verdict: cause that the replay named. Empty if there was no replay.
        is_right: whether it is the right cause.
        is_right_sample: whether it named the right sample. None for a kind without one.
    """

    kind: str
    verdict: str
    is_right: bool
    is_right_sample: bool | None


def make_incident(kind: str, seed: int, directory: Path) -> Incident:
    """Train a network with one incident, and read the result of its replay."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    step, sample, size = draw.randrange(25, STEPS - 2), draw.randrange(SAMPLES), 10 ** draw.uniform(2, 4)
    model = Sequences() if kind == "mask" else nn.Sequential(nn.Linear(FEATURES, 24), nn.ReLU(), nn.Linear(24, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    clipper = distclip.GradClipper(model, distclip.global_norm(1.0))
    loss_of = make_loss(kind, model, seed, step, sample, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Recorder(clipper, directory, every=10, examine=loss_of) as recorder:
            for number in range(1, STEPS + 1):
                if kind == "optimizer" and number == step:
                    # This has the effect of a step that was far too large.
                    with torch.no_grad():
                        for parameter in model.parameters():
                            parameter.add_(torch.randn_like(parameter), alpha=size / 20)
                optimizer.zero_grad()
                loss = loss_of(number)
                loss.backward()  # type: ignore[no-untyped-call]
                if kind == "hardware" and number == step:
                    set_bit(model, draw)
                clipper.step(optimizer)
                recorder.note(loss=loss, ids=range(SAMPLES * number, SAMPLES * (number + 1)))
    found: dict[str, Any] = {}
    path = directory / "spikes" / f"{step}.json"
    if path.exists():
        found = json.loads(path.read_text())
    verdict = str(found.get("verdict", ""))
    is_right_sample = None
    if KINDS[kind] == "data":
        named = found.get("sample") or {}
        is_right_sample = (named.get("index"), named.get("id")) == (sample, SAMPLES * step + sample)
    return Incident(kind, verdict, verdict == KINDS[kind], is_right_sample)


def make_loss(kind: str, model: nn.Module, seed: int, step: int, sample: int, size: float) -> Callable[[int], Tensor]:
    """Return the function of a step that computes its loss, with the incident in its data."""

    def of_sequences(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        tokens = torch.randint(0, CLASSES, (SAMPLES, POSITIONS + 1), generator=generator)
        weights = torch.full((SAMPLES, POSITIONS), 1.0 / POSITIONS)
        if number == step:
            weights[sample, int(torch.randint(0, POSITIONS, (), generator=generator))] = 100.0
        targets = tokens[:, 1:].flatten()
        losses = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), targets, reduction="none")
        return (losses * weights.flatten()).sum() / SAMPLES

    def of_vectors(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
        targets = inputs.sum(1, keepdim=True) + 0.1 * torch.randn(SAMPLES, 1, generator=generator)
        if number == step and kind == "label":
            targets[sample] = size
        if number == step and kind == "input":
            inputs[sample] *= size
        if kind != "numerics":
            loss: Tensor = nn.functional.mse_loss(model(inputs), targets)
            return loss
        assert isinstance(model, nn.Sequential)
        with torch.autocast("cpu", torch.float16):
            hidden = model[0](inputs) * (1e5 * size if number == step else 1.0)
            hidden = torch.tanh(hidden / hidden.norm())
            return nn.functional.mse_loss(model[2](hidden).float(), targets)

    return of_sequences if kind == "mask" else of_vectors


def set_bit(model: nn.Module, draw: random.Random) -> None:
    """Set a bit in the exponent of one element of a gradient, so that the element gets larger."""
    grads = [parameter.grad.view(-1) for parameter in model.parameters() if parameter.grad is not None]
    grad = draw.choice(grads)
    index = draw.randrange(len(grad))
    (bits,) = struct.unpack("<I", struct.pack("<f", float(grad[index]) or 1e-3))
    # The highest bit of the exponent is 0 for all numbers below 2.
    zeros = [bit for bit in (30, 29, 28, 27) if not bits >> bit & 1]
    (value,) = struct.unpack("<f", struct.pack("<I", bits | 1 << zeros[0]))
    grad[index] = value


def main() -> None:
    """Print a table with a row for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--incidents", type=int, default=300, metavar="N", help="of all kinds together (default: 300)")
    parser.add_argument("--cost", action="store_true", help="measure the cost of per_sample instead")
    options = parser.parse_args()
    number = options.incidents
    torch.set_num_threads(1)
    if options.cost:
        print("| model | batch | forward and backward pass, ms | with per_sample |\n|---|---|--:|--:|")
        for name, model, inputs in models():
            milliseconds, ratio = measure_cost(model, inputs)
            size = "x".join(map(str, inputs.shape))
            print(f"| {name} | {size} | {milliseconds:.1f} | {ratio:.2f} x |", flush=True)
        return
    print("| incident | number | right cause | right sample | other verdicts |\n|---|--:|--:|--:|---|")
    everything: list[Incident] = []
    with tempfile.TemporaryDirectory() as folder:
        for i, kind in enumerate(KINDS):
            seeds = range(number // len(KINDS) + (i < number % len(KINDS)))
            incidents = [make_incident(kind, seed, Path(folder) / f"{kind}{seed}") for seed in seeds]
            everything += incidents
            print(describe(kind, incidents), flush=True)
    print(describe("all", everything))


def models() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield the models whose cost is measured: name, model, inputs."""
    for width, samples, positions in ((64, 16, 32), (256, 16, 128), (768, 4, 128)):
        model = nn.Sequential(nn.Embedding(96, width), Block(width), Block(width), nn.Linear(width, 96))
        yield f"transformer, width {width}", model, torch.randint(0, 96, (samples, positions))
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    yield "perceptron", model, torch.randn(512, 64)
    convolutions: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    for _ in range(2):
        convolutions += [nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU()]
    yield (
        "convolutions",
        nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32 * 256, 10)),
        torch.randn(32, 3, 16, 16),
    )


def measure_cost(model: nn.Module, inputs: Tensor) -> tuple[float, float]:
    """Return the CPU time of a pass in ms and the relative time within `per_sample`, medians of 15 passes."""
    plain, ratios = [], []
    for _ in range(15):
        passes = []
        for measured in (False, True):
            model.zero_grad()
            begin = time.thread_time()
            with per_sample(model) if measured else nullcontext():
                outputs = model(inputs).flatten(0, -2)
                loss = nn.functional.cross_entropy(outputs, torch.zeros(len(outputs), dtype=torch.long))
                loss.backward()  # type: ignore[no-untyped-call]
            passes.append(time.thread_time() - begin)
        plain.append(1e3 * passes[0])
        ratios.append(passes[1] / passes[0])
    return statistics.median(plain), statistics.median(ratios)


def describe(name: str, incidents: list[Incident]) -> str:
    """Return a row of the table."""
    wrong = sorted({incident.verdict or "no replay" for incident in incidents if not incident.is_right})
    samples = [incident.is_right_sample for incident in incidents if incident.is_right_sample is not None]
    right_samples = f"{sum(samples)} of {len(samples)}" if samples else ""
    cells = [name, len(incidents), sum(one.is_right for one in incidents), right_samples, ", ".join(wrong)]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
