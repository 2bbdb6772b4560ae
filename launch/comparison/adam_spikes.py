"""Induce spikes of Adam on small models, and count the spikes that are announced and that update_clip prevents.

A spike of Adam is a rise of the loss after a step that is too large, because the second moments are too old for the
gradients. Each seed trains a model. Then one of three changes happens, none of which changes the loss by itself:

- rows: rows of an embedding return after a pause, in which their moments have decayed to a millionth.
- feature: inputs that were 0 so far get values, on weights that are 0.
- task: the loss of a second head, which had a weight of a thousandth, counts fully.

A spike is a loss above mean + 6 standard deviations of the last 128 steps, at the earliest one step after the change.
It is announced if the largest RMS of g / sqrt(v) reaches the alarm of `distclip.monitor` at an earlier step. It is
prevented if the same steps with `distclip.update_clip()` have no such loss. The published rule, which has no warm-up
after a spike, is `update_clip(recovery=0)`. All other steps are healthy, so an alarm in them is false.

`python -m launch.comparison.adam_spikes` takes 8 minutes of one core. `--seeds 2` shows how it works.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import distclip
from distclip.monitor.jsonl import UPDATE_RMS_ALARM

KINDS = ("rows", "feature", "task")

WARM_UP, AFTER, WINDOW, SKIPPED = 300, 30, 128, 100
"""Numbers of steps: before the change, after it, for the usual loss, and at the start without counting as healthy."""

NUM_ROWS, NUM_FEATURES, WIDTH, NUM_OUTPUTS, BATCH, BAG = 64, 64, 64, 8, 32, 8


class Net(nn.Module):
    """Bags of rows and features in, two heads out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(NUM_ROWS, NUM_FEATURES, mode="sum")
        nn.init.normal_(self.embedding.weight, std=0.2)
        self.first, self.second = nn.Linear(2 * NUM_FEATURES, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.main, self.other = nn.Linear(WIDTH, NUM_OUTPUTS), nn.Linear(WIDTH, NUM_OUTPUTS)

    def forward(self, rows: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.first(torch.cat([self.embedding(rows), features], 1)))
        hidden = torch.tanh(self.second(hidden))
        return self.main(hidden), self.other(hidden)


@dataclass
class Training:
    """A model in training.

    Args:
        kind: kind of the change.
        noise: standard deviation of the targets around those of the teacher.
    """

    kind: str
    seed: int
    lr: float
    noise: float

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.teacher, self.model = Net(), Net()
        if self.kind == "feature":
            with torch.no_grad():
                for net in (self.teacher, self.model):
                    net.first.weight[:, 3 * NUM_FEATURES // 2 :] = 0
        self.optimizer = torch.optim.Adam(self.model.parameters(), self.lr)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.has_changed = False

    def change(self) -> None:
        """Make the change of the seed."""
        self.has_changed = True
        if self.kind == "rows":
            state = self.optimizer.state[self.model.embedding.weight]
            # This equals a pause of 13,800 steps in which the rows have no gradient.
            state["exp_avg_sq"][8:] *= 1e-6
            state["exp_avg"][8:] = 0

    def run(self, clipper: distclip.GradClipper, steps: int) -> Iterator[tuple[float, float]]:
        """Train, and yield the loss and the largest RMS of each step."""
        found: list[Tensor] = []
        clipper.observe(lambda outcome: found.append(outcome.measured.update_rms.nan_to_num().max()))
        for _ in range(steps):
            rows = torch.randint(0, NUM_ROWS, (BATCH, BAG), generator=self.generator)
            features = torch.randn(BATCH, NUM_FEATURES, generator=self.generator).abs()
            if self.kind == "feature" and not self.has_changed:
                features[:, NUM_FEATURES // 2 :] = 0
            with torch.no_grad():
                targets = [
                    target + self.noise * torch.randn(target.shape, generator=self.generator)
                    for target in self.teacher(rows, features)
                ]
            main, other = (
                (output - target).square().mean()
                for output, target in zip(self.model(rows, features), targets, strict=True)
            )
            self.optimizer.zero_grad()
            (main + (1.0 if self.has_changed or self.kind != "task" else 1e-3) * other).backward()
            clipper.step(self.optimizer)
            yield float(main.detach() + other.detach()), float(found.pop())

    def clipper(self, policy: distclip.Policy | None) -> distclip.GradClipper:
        """Return a clipper that scales updates, or one that only measures them."""
        if policy is not None:
            return distclip.GradClipper(self.model, policy)
        clipper = distclip.GradClipper(self.model, distclip.global_norm(float("inf")))
        clipper.measure_tensors()
        clipper.measure_updates()
        return clipper


@dataclass
class Result:
    """Result of one seed.

    Args:
        spike: first step after the change with a spike, 0-based. None without a spike.
        alarm: first step after the change with an alarm, 0-based. None without an alarm.
        prevented: for each policy, whether there is no spike.
        sizes: largest loss after the change, relative to the usual one, without a policy and with each.
        false_alarms: number of healthy steps with an alarm.
        healthy: number of healthy steps.
        largest: largest RMS of a healthy step.
    """

    spike: int | None
    alarm: int | None
    prevented: list[bool]
    sizes: list[float]
    false_alarms: int
    healthy: int
    largest: float


def measure(kind: str, seed: int, lr: float, noise: float, policies: Sequence[distclip.Policy], after: int) -> Result:
    """Train one seed up to the change, and then without a policy and with each policy.

    Args:
        kind, seed, lr, noise: see `Training`.
        policies: update_clip policies with different arguments.
        after: number of steps with a policy.
    """
    training = Training(kind, seed, lr, noise)
    losses, sizes = zip(*training.run(training.clipper(None), WARM_UP), strict=True)
    healthy = torch.tensor(sizes[SKIPPED:])
    usual = torch.tensor(losses[-WINDOW:])
    bound = float(usual.mean() + 6 * usual.std())
    branches: list[tuple[list[float], list[float]]] = []
    for policy in (None, *policies):
        branch = copy.copy(training)
        branch.model, branch.optimizer = copy.deepcopy((training.model, training.optimizer))
        branch.generator = torch.Generator().set_state(training.generator.get_state())
        branch.change()
        numbers = list(branch.run(branch.clipper(policy), AFTER if policy is None else after))
        branches.append(([loss for loss, _ in numbers], [rms for _, rms in numbers]))
    spikes = [next((i for i, loss in enumerate(losses) if loss > bound), None) for losses, _ in branches]
    return Result(
        spikes[0],
        next((i for i, rms in enumerate(branches[0][1]) if rms >= UPDATE_RMS_ALARM), None),
        [spike is None for spike in spikes[1:]],
        [max(losses) / float(usual.mean()) for losses, _ in branches],
        int((healthy >= UPDATE_RMS_ALARM).sum()),
        len(healthy),
        float(healthy.max()),
    )


def main() -> None:
    """Print a table with a row for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=80, help="number of seeds of each kind (default: 80)")
    parser.add_argument("--first", type=int, default=0, help="first seed (default: 0)")
    parser.add_argument("--max-rms", type=float, default=1.0, help="of update_clip (default: 1.0)")
    parser.add_argument(
        "--recovery", type=float, nargs="+", default=[0.0, 1.0], help="of update_clip, one after another"
    )
    parser.add_argument("--after", type=int, default=AFTER, help=f"steps with update_clip (default: {AFTER})")
    parser.add_argument("--lr", type=float, nargs="+", default=[0.005, 0.01], help="learning rates, in turn")
    parser.add_argument("--noise", type=float, default=0.02)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rates = ", ".join(map(str, options.lr))
    print(f"alarm at an RMS of {UPDATE_RMS_ALARM}, lr {rates}, noise {options.noise}, max_rms {options.max_rms}\n")
    policies = [distclip.update_clip(options.max_rms, recovery=recovery) for recovery in options.recovery]
    titles = [f"prevented, recovery={recovery:g} | size" for recovery in options.recovery]
    print(f"| change | seeds | spikes | announced | size | {' | '.join(titles)} | false alarms | steps |")
    print("|---|" + "--:|" * (6 + 2 * len(titles)))
    everything: list[Result] = []
    for kind in KINDS:
        results = [
            measure(kind, seed, options.lr[seed % len(options.lr)], options.noise, policies, options.after)
            for seed in range(options.first, options.first + options.seeds)
        ]
        everything += results
        print(describe(kind, results), flush=True)
    print(describe("all", everything))
    print("\nSizes are medians of the largest loss after the change, in units of the usual loss.")
    print(f"Largest RMS of a healthy step: {max(result.largest for result in everything):.2f}")


def describe(name: str, results: list[Result]) -> str:
    """Return a row of the table."""
    # If the loss is unusual in the step of the change itself, no optimizer step has caused it.
    spikes = [result for result in results if result.spike]
    announced = [r for r in spikes if r.alarm is not None and r.spike is not None and r.alarm < r.spike]
    num_policies = len(results[0].prevented)
    sizes = [f"{statistics.median(r.sizes[i] for r in spikes):.1f}" if spikes else "-" for i in range(1 + num_policies)]
    prevented = [sum(r.prevented[i] for r in spikes) for i in range(num_policies)]
    cells = [name, len(results), len(spikes), len(announced), *sizes[:1]]
    cells += [cell for pair in zip(prevented, sizes[1:], strict=True) for cell in pair]
    cells += [sum(r.false_alarms for r in results), sum(r.healthy for r in results)]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
