"""Training and evaluation: the same in every layout."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

import checkpoint
from data import Batch, Data
from distclip import FrequentClippingWarning, NonFiniteWarning
from distclip.monitor import Recorder
from inject import Inject
from layout import Layout, share
from models import reset_state
from parallel import Placed
from probe import Probe
from processes import RANK, WORLD, gathered, world_mean
from record import Outcome, Record
from terminal import Terminal


@dataclass(frozen=True)
class Run:
    """One run, built and checked, before it meets a process group."""

    cfg: DictConfig
    data: Data
    model: nn.Sequential
    policy: Any
    layout: Layout
    join: Callable[[torch.device], None]
    """Starts what the ranks talk over, if nothing has yet."""
    device: torch.device
    inject: Inject | None
    probe: Probe
    start: int
    """The first step."""


def train(run: Run, record: Record, terminal: Terminal) -> Outcome | None:
    """To the end; what came of it is for rank 0 to know."""
    cfg, data = run.cfg, run.data
    mesh = run.layout.build(run.device.type, WORLD)

    def mine(batch: Batch) -> tuple[Tensor, Tensor]:
        return share(batch.x, mesh).to(run.device), share(batch.y, mesh).to(run.device)

    example, _ = mine(data.held_out[0])
    placed = run.layout.place(run.model.to(run.device), mesh, data.criterion, example)
    guard = {"on_nonfinite": cfg.on_nonfinite, "max_skips": cfg.max_skips}
    stepping = placed.stepping(instantiate(cfg.optim), run.policy, guard, cfg.precision, run.device)
    clipper = stepping.clipper
    strike = run.inject.aim(stepping.pieces()) if run.inject else None
    progress = stepping.progress(mesh, len(example))
    if cfg.resume is not None:
        progress.load(checkpoint.newest(Path(cfg.resume), cfg.replay)[1])
    run.probe.watch(placed.module)
    directory = gathered(record.directory.resolve())[0]
    recorder = Recorder(
        clipper,
        directory,
        every=cfg.log.every,
        per_tensor=cfg.log.per_tensor,
        sinks=[record.add],
        facts={
            "batch": cfg.batch,
            "precision": cfg.precision.dtype,
            "optimizer": cfg.optim._target_,
            "dataset_size": data.size,
        },
    )

    start = time.perf_counter()
    with terminal.bar(cfg.log.bar) as bar, warnings.catch_warnings():
        for category in (FrequentClippingWarning, NonFiniteWarning):  # all ranks would say the same
            warnings.simplefilter("default" if RANK == 0 else "ignore", category)
        task = bar.add_task("", total=cfg.steps, completed=run.start - 1)
        for step, batch in enumerate(islice(data.train(cfg.seed), run.start - 1, cfg.steps), run.start):
            if batch.first:
                reset_state(placed.module)
            stepping.zero_grad()
            loss = placed.train(*mine(batch))
            if strike is not None:
                strike(step)
            run.probe.before()
            report = stepping.step()
            if clipper.incidents:
                warnings.simplefilter("ignore", NonFiniteWarning)  # once is enough: the table names all
            bar.advance(task)
            recorder.note(step=step, lr=stepping.lr, ids=batch.ids, **{data.unit: step * batch.y.numel()})
            recorder.note(**({} if loss is None else {"loss": loss}), **run.probe.after(report))
            saving = bool(cfg.checkpoint.every) and step % cfg.checkpoint.every == 0
            lining = step % cfg.log.every == 0 or step == cfg.steps
            if lining or saving:
                recorder.flush()
            if cfg.log.lines and lining and record.rows:
                terminal.line(record.rows[-1], cfg.steps, record.clip_rate)
            if saving:
                checkpoint.save(progress, directory, step)
    recorder.close()
    held_out = evaluate(placed, [mine(batch) for batch in data.held_out], run.device)
    if not record.rows:
        return None
    measures = run.probe.close(record.rows, directory)
    return record.close(held_out, data, time.perf_counter() - start, measures, clipper.incidents)


def evaluate(placed: Placed, batches: list[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """The mean loss over all held-out data; batches are equally large, so it is a mean of means."""
    placed.module.eval()
    reset_state(placed.module)
    losses = world_mean([placed.evaluate(x, y) for x, y in batches], device)
    placed.module.train()
    return sum(losses) / len(losses)
