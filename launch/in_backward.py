"""Compare clipping within backward with ordinary clipping: the bound, its cost, and held-out losses.

`python launch/in_backward.py --steps 100000` divides the bound over synthetic norms of 200 tensors.
`python launch/in_backward.py rescue lstm gpt --seeds 3` trains these experiments both ways, in one process. With
`--perturb 0.001` it compares ordinary clipping with itself at a bound that is larger by 0.1 %.
"""

from __future__ import annotations

import argparse
import math
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from distclip import GradClipper, budget, global_norm
from distclip.norms.reduce import Totals
from distclip.outcome import Outcome
from job.data import Data
from job.models.recurrent import reset_states

OVERRIDES = {
    "rescue": ([], 1.0),
    "lstm": (["model=lstm", "optim.lr=20.0"], 0.25),
    "gpt": (["model=gpt", "model.width=64", "model.layers=3", "optim.lr=0.5", "optim.momentum=0.9", "steps=250"], 1.0),
}
"""Settings and bound of the clipped run of each experiment in conf/experiment."""


def divide(num_steps: int, scatter: float, ratio: float) -> None:
    """Divide a bound over synthetic norms, and print the largest norm and the unnecessary clipping.

    Args:
        num_steps: number of steps. Two in a thousand are spikes, one of all tensors and one of a single tensor.
        scatter: standard deviation of the logarithm of one tensor's norm. A factor that all tensors share has one of
            0.25.
        ratio: bound divided by the median norm.
    """
    rng = np.random.default_rng(0)
    usual = np.exp(rng.normal(0, 1.0, 200))
    policy = budget(ratio * float(np.sqrt(np.sum(usual**2))))
    state = policy.init(len(usual), torch.device("cpu"))
    sizes, order = [1.0] * len(usual), range(len(usual))
    largest, removed, num_touched = 0.0, [], 0
    for step in range(num_steps):
        norms = usual * np.exp(0.25 * rng.normal() + scatter * rng.normal(size=len(usual)))
        if step % 1000 == 500:
            norms *= 50
        if step % 1000 == 0:
            norms[rng.integers(len(usual))] *= 300
        powers = norms**2
        allocation = policy.allocate(state, sizes, order)
        kept = sum(allocation.take(i, power) ** 2 * power for i, power in enumerate(powers.tolist()))
        largest = max(largest, math.sqrt(kept) / policy.max_norm)
        if step >= 50 and powers.sum() <= policy.max_norm**2:
            removed.append(max(0.0, 1 - kept / float(powers.sum())))
            num_touched += removed[-1] > 1e-12
        _, state = policy.decide(Totals(torch.from_numpy(powers)), state)
    print(
        f"scatter {scatter}, bound {ratio:g} x usual norm, {num_steps} steps: largest norm {largest:.7f} of the bound; "
        f"of {len(removed)} steps that need no clipping {num_touched / len(removed):.2%} lose something, "
        f"{np.mean(removed):.5%} of the squared norm on average and {max(removed):.2%} at most",
        flush=True,
    )


def train(
    experiment: str, seed: int, num_steps: int | None, decay: float, *, in_backward: bool, perturb: float = 0.0
) -> tuple[float, float, list[tuple[float, float]]]:
    """Train, and return the loss and the norms of the run.

    Args:
        experiment: key of `OVERRIDES`.
        seed, num_steps, decay: see the options.
        in_backward: whether to clip within backward, with `budget`.
        perturb: fraction by which the bound is larger.

    Returns:
        The held-out loss, the largest norm of a step divided by the bound, and for each step two numbers: its norm
        divided by that of ordinary clipping, and the cosine between the clipped and the whole gradient.
    """
    overrides, max_norm = OVERRIDES[experiment]
    max_norm *= 1 + perturb
    cfg = compose("config", [*overrides, f"seed={seed}"])
    data: Data = instantiate(cfg.data)(batch=cfg.batch)
    torch.manual_seed(cfg.seed)
    model: nn.Sequential = instantiate(cfg.model)(data)
    optimizer = instantiate(cfg.optim)(model.parameters())
    powers: list[float] = []

    def measure(stepped: torch.optim.Optimizer, *_: object) -> None:
        grads = [p.grad for group in stepped.param_groups for p in group["params"] if p.grad is not None]
        powers.append(sum(float(grad.double().square().sum()) for grad in grads))

    optimizer.register_step_pre_hook(measure)
    clipper = GradClipper(model, budget(max_norm, decay) if in_backward else global_norm(max_norm))
    if in_backward:
        clipper.in_backward(optimizer)
    steps: list[tuple[float, float]] = []
    clipper.observe(lambda outcome: steps.append(_compare(outcome, max_norm)))
    largest = 0.0
    for batch in islice(data.train(cfg.seed), num_steps or cfg.steps):
        if batch.starts_pass:
            reset_states(model)
        powers.clear()
        if not in_backward:
            optimizer.zero_grad()
        data.criterion(model(batch.x), batch.y).backward()
        if not in_backward:
            clipper.step(optimizer)
        largest = max(largest, math.sqrt(sum(powers)) / max_norm)
    model.eval()
    reset_states(model)
    with torch.no_grad():
        losses = [float(data.criterion(model(batch.x), batch.y)) for batch in data.held_out]
    return sum(losses) / len(losses), largest, steps


def _compare(outcome: Outcome, max_norm: float) -> tuple[float, float]:
    """Return a clipped gradient's norm relative to ordinary clipping, and its cosine with the whole one."""
    norms = outcome.totals.norms
    kept, norm = float((outcome.coefs * norms).norm()), float(norms.norm())
    return kept / min(norm, max_norm), float((outcome.coefs * norms.square()).sum()) / (kept * norm)


def _describe(steps: list[tuple[float, float]]) -> str:
    """Return the means of both numbers over the first steps and the later ones."""
    parts = {"step 1": steps[:1], "steps 2 to 10": steps[1:10], "to 30": steps[10:30], "later": steps[30:]}
    return ", ".join(
        f"{name} {np.mean([kept for kept, _ in part]):.3f} at cosine {np.mean([cosine for _, cosine in part]):.3f}"
        for name, part in parts.items()
        if part
    )


def main() -> None:
    """Run the selected comparison, and exit with an error if a bound was exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", choices=[[], *OVERRIDES], help="experiments to train")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--decay", type=float, default=0.99, help="decay of the budget")
    parser.add_argument("--steps", type=int, help="synthetic steps, or steps of each training")
    parser.add_argument("--perturb", type=float, default=0.0, help="compare with a larger bound, and not with budget")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.experiments:
        for scatter in (0.1, 0.3):
            for ratio in (2.0, 3.0):
                divide(options.steps or 100_000, scatter, ratio)
        return
    exceeded = False
    with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "conf"), version_base="1.3"):
        for experiment in options.experiments:
            for seed in range(options.seeds):
                common = experiment, seed, options.steps, options.decay
                ordinary, _, _ = train(*common, in_backward=False)
                perturb = options.perturb
                other, largest, steps = train(*common, in_backward=not perturb, perturb=perturb)
                exceeded |= largest > 1
                print(
                    f"{experiment}, seed {seed}: held-out loss {ordinary:.4f} with global_norm, {other:.4f} with "
                    f"{f'a bound {perturb:+.2%}' if perturb else 'budget'} ({other / ordinary - 1:+.2%}), largest norm "
                    f"of a step {largest:.7f} of the bound, norm by that of ordinary clipping: {_describe(steps)}",
                    flush=True,
                )
    if exceeded:
        raise SystemExit("a step exceeded the bound")


if __name__ == "__main__":
    main()
