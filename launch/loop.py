"""Training and evaluation: the same in every layout."""

import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from data import Batch, Data
from distclip import GradClipper
from layout import Layout, share
from models import reset_state
from parallel import Placed
from processes import WORLD, world_mean
from record import Outcome, Record, Row
from terminal import Terminal


@dataclass(frozen=True)
class Run:
    """One run, built and checked, before it meets a process group."""

    cfg: DictConfig
    data: Data
    model: nn.Sequential
    policy: Any
    layout: Layout
    device: torch.device


def train(run: Run, record: Record, terminal: Terminal) -> Outcome:
    cfg, data = run.cfg, run.data
    mesh = run.layout.build(run.device.type, WORLD)

    def mine(batch: Batch) -> tuple[Tensor, Tensor]:
        return share(batch.x, mesh).to(run.device), share(batch.y, mesh).to(run.device)

    example, _ = mine(data.held_out[0])
    placed = run.layout.place(run.model.to(run.device), mesh, data.criterion, example)
    optimizer = instantiate(cfg.optim)(placed.module.parameters())
    clipper = GradClipper(placed.module, run.policy, split_over=placed.split_over)

    start = time.perf_counter()
    pending: list[tuple[Row, Tensor | None, Any]] = []
    with terminal.bar(cfg.log.bar) as bar:
        task = bar.add_task("", total=cfg.steps)
        for step, batch in enumerate(islice(data.train(cfg.seed), cfg.steps), 1):
            if batch.first:
                reset_state(placed.module)
            optimizer.zero_grad()
            loss = placed.train(*mine(batch))
            report = clipper.clip()
            optimizer.step()
            bar.advance(task)
            row = {"step": step, "lr": optimizer.param_groups[0]["lr"]}
            row[data.unit] = step * batch.y.numel()
            pending.append((row, loss, report))
            # Nothing above waits for the device: losses and reports are read a few steps at a time.
            if step % cfg.log.every == 0 or step == cfg.steps:
                record.add(_settle(pending, run.device))
                pending.clear()
                if cfg.log.lines:
                    terminal.line(record.rows[-1], cfg.steps, record.clip_rate)
    held_out = evaluate(placed, [mine(batch) for batch in data.held_out], run.device)
    return record.close(held_out, data.guess, time.perf_counter() - start)


def _settle(pending: list[tuple[Row, Tensor | None, Any]], device: torch.device) -> list[Row]:
    losses = world_mean([loss for _, loss, _ in pending], device)
    return [row | {"loss": loss} | report.as_dict() for (row, _, report), loss in zip(pending, losses, strict=True)]


def evaluate(placed: Placed, batches: list[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """The mean loss over all held-out data; batches are equally large, so it is a mean of means."""
    placed.module.eval()
    reset_state(placed.module)
    losses = world_mean([placed.evaluate(x, y) for x, y in batches], device)
    placed.module.train()
    return sum(losses) / len(losses)
