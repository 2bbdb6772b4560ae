"""Train and evaluate a run, in any layout."""

import time
import warnings
from contextlib import nullcontext
from itertools import islice

import torch
from hydra.utils import instantiate
from torch import Tensor

from distclip import ExplodedWarmupWarning, FrequentClippingWarning, NonFiniteWarning
from distclip.monitor import Recorder

from . import checkpoint
from .data import Batch
from .log import RunLog, Summary
from .models.recurrent import reset_states
from .parallel.base import ParallelModel, StepConfig
from .processes import RANK, WORLD_SIZE, gather, mean_over_ranks
from .replay import record_samples
from .run import Run
from .terminal import Terminal


def train(run: Run, log: RunLog, terminal: Terminal) -> Summary | None:
    """Train to the last step, evaluate, and return the summary on rank 0. Other ranks return None.

    With `audit=true`, print the distribution of the model and return None, or exit with status 1 if the audit finds a
    problem.
    """
    cfg, data = run.cfg, run.data
    ranks = run.parallelism.build(run.device.type, WORLD_SIZE)

    def to_rank(batch: Batch) -> tuple[Tensor, Tensor]:
        """Return this rank's rows on this rank's device."""
        return ranks.local_rows(batch.x).to(run.device), ranks.local_rows(batch.y).to(run.device)

    # Build: model, optimizer with its clipper, recorder.
    example, _ = to_rank(data.held_out[0])
    model: ParallelModel = run.parallelism.place(run.model.to(run.device), ranks.handle, data.criterion, example)
    optimizer = model.build_optimizer(
        StepConfig(instantiate(cfg.optim), run.policy, cfg.on_nonfinite, cfg.max_skips, cfg.precision, run.device)
    )
    clipper = optimizer.clipper
    if cfg.audit:
        report = optimizer.audit()
        terminal.audit(report)
        if not report.ok:
            raise SystemExit(1)
        return None
    corrupt = run.inject.select(optimizer.gradients()) if run.inject else None
    state = optimizer.training_state(ranks, len(example))
    first_step = 1
    if run.source is not None:
        first_step = 1 + run.source.load(state)
        terminal.paragraph(f"continues {run.source.run} after step {first_step - 1}")
    run.probe.start(model.module)
    if RANK == 0:
        checkpoint.remove_leftovers(log.directory)
    directory = gather(log.directory.resolve())[0]
    recorder = Recorder(
        clipper,
        directory,
        every=cfg.log.every,
        per_tensor=cfg.log.per_tensor,
        log=cfg.log.format,
        sinks=[log.add],
        facts={
            "batch": cfg.batch,
            "precision": cfg.precision.dtype,
            "optimizer": cfg.optim._target_,
            "dataset_size": data.size,
        },
    )

    start = time.perf_counter()
    with terminal.progress_bar(cfg.log.bar) as bar, warnings.catch_warnings():
        # Without this, all ranks would print the same warnings.
        for category in (ExplodedWarmupWarning, FrequentClippingWarning, NonFiniteWarning):
            warnings.simplefilter("default" if RANK == 0 else "ignore", category)
        task = bar.add_task("", total=cfg.steps, completed=first_step - 1)
        batches = islice(data.train(cfg.seed), first_step - 1, cfg.steps)
        for step, batch in enumerate(batches, first_step):
            if batch.starts_pass:
                reset_states(model.module)
            optimizer.zero_grad()
            samples = model.measure_samples() if step == cfg.replay else None
            with samples or nullcontext():
                loss = model.forward_backward(*to_rank(batch))
            if samples is not None:
                record_samples(samples, step, batch, ranks.local_rows(torch.arange(len(batch.x))), directory)
            if corrupt is not None:
                corrupt(step)
            run.probe.before_clipping()
            report = optimizer.step()
            if clipper.incidents:
                # One warning is enough, because the closing table lists every incident.
                warnings.simplefilter("ignore", NonFiniteWarning)
            bar.advance(task)
            recorder.note(step=step, lr=optimizer.lr, ids=batch.ids, **{data.unit: step * batch.y.numel()})
            recorder.note(**({} if loss is None else {"loss": loss}), **run.probe.after_step(report))

            saves = bool(cfg.checkpoint.every) and step % cfg.checkpoint.every == 0
            prints = step % cfg.log.every == 0 or step == cfg.steps
            if prints or saves:
                recorder.flush()
            if cfg.log.lines and prints and log.rows:
                terminal.step(log.rows[-1], cfg.steps, log.clip_rate)
            if saves:
                checkpoint.save(state, directory, step)
    recorder.close()
    held_out = evaluate(model, [to_rank(batch) for batch in data.held_out], run.device)
    if not log.rows:
        return None
    metrics = run.probe.finish(log.rows, directory)
    return log.summarize(held_out, data, time.perf_counter() - start, metrics, clipper.incidents)


def evaluate(model: ParallelModel, batches: list[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Return the mean loss over all held-out batches, which are equally large."""
    model.module.eval()
    reset_states(model.module)
    losses = mean_over_ranks([model.evaluate(x, y) for x, y in batches], device)
    model.module.train()
    return sum(losses) / len(losses)
