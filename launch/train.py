"""Train a model, clipping its gradient: `torchrun ... launch/train.py [Hydra overrides]`, or `mpirun ...`."""

import sys
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import checkpoint
import loop
import replay
import settings
from layout import Copies
from probe import Probe
from processes import MPIRUN, RANK, WORLD, give_up, join_mpi, leave, pick_device
from record import Record
from terminal import Terminal

ON_NONFINITE = ("skip", "raise", "zero", "propagate")


def build(cfg: DictConfig) -> loop.Run:
    """Everything that can be refused is refused here, alike on every rank and before any waits."""
    for key in ("steps", "batch", "log.every"):
        if (value := OmegaConf.select(cfg, key)) < 1:
            raise SystemExit(f"{key}={value}: write 1 or more")
    if cfg.precision.dtype not in ("float32", "bfloat16", "float16"):
        raise SystemExit(f"precision.dtype={cfg.precision.dtype}: write precision=fp32, bf16 or fp16")
    if cfg.on_nonfinite not in ON_NONFINITE:
        raise SystemExit(f"on_nonfinite={cfg.on_nonfinite}: write {', '.join(ON_NONFINITE[:-1])} or {ON_NONFINITE[-1]}")
    if cfg.max_skips is not None and not (isinstance(cfg.max_skips, int) and cfg.max_skips > 0):
        raise SystemExit(f"max_skips={cfg.max_skips}: write 1 or more, or null for any number")
    start = checkpoint.check(cfg)
    layout, join = instantiate(cfg.parallel), instantiate(cfg.comm)
    if isinstance(layout, Copies) != (join.func is join_mpi):
        raise SystemExit(
            "comm=mpi trains copies of the whole model, averaged by mpi4py: write comm=mpi without parallel=, or any "
            "parallel= without comm=mpi, which mpirun starts as well"
        )
    if join.func is join_mpi and WORLD > 1 and not MPIRUN:
        raise SystemExit("comm=mpi: MPI did not start these ranks: write bash launch/mpirun.sh comm=mpi")
    shares = layout.shares(WORLD)
    if cfg.batch % shares:
        raise SystemExit(
            f"batch={cfg.batch} does not split over {shares} data-parallel ranks: "
            f"write batch={-(-cfg.batch // shares) * shares}"
        )
    device = pick_device(cfg.device)
    data = instantiate(cfg.data)(batch=cfg.batch)
    torch.manual_seed(cfg.seed)
    model = instantiate(cfg.model)(data)
    try:
        policy = instantiate(cfg.clip)
        instantiate(cfg.optim)(model.parameters())  # the real one gets the placed parameters
    except (InstantiationException, TypeError, ValueError) as error:
        raise SystemExit(f"clip or optim: {error.__cause__ or error}") from None
    inject = instantiate(cfg.get("inject"))
    if inject is not None:
        inject.check(model, range(start, cfg.steps + 1))
    probe = instantiate(cfg.get("probe")) or Probe()
    if probe.whole and not layout.whole:
        raise SystemExit(
            f"probe={cfg.probe._target_.split('.')[0]} looks at whole gradients, of which this layout leaves each rank "
            f"a piece: write parallel=ddp or parallel=single"
        )
    dtype = getattr(torch, cfg.precision.dtype)
    if dtype != torch.float32 and layout.autocast:
        for part in model:
            part.forward = torch.autocast(device.type, dtype)(part.forward)
    return loop.Run(cfg, data, model, policy, layout, join, device, inject, probe, start)


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    runs = {name: build(each) for name, each in settings.runs(cfg).items()}
    directory = Path(HydraConfig.get().runtime.output_dir)
    if directory.is_relative_to(Path.cwd()):
        directory = directory.relative_to(Path.cwd())
    terminal = Terminal(RANK)
    terminal.title(f"{settings.headline()}, {WORLD} rank(s)")
    outcomes = {}
    for run in runs.values():
        if run.layout.mesh:
            run.join(run.device)
    try:
        for name, run in runs.items():
            if name:
                terminal.title(name)
            record = Record(directory / name.replace(" ", "_"), run.cfg)
            outcome = loop.train(run, record, terminal)
            if outcome is not None:
                outcomes[name] = outcome
    except Exception:
        # A multirun would start its next job here while the other ranks wait in this one: exit.
        traceback.print_exc()
        raise SystemExit(1) from None
    if outcomes:
        terminal.outcomes(outcomes, cfg.note)
        if cfg.replay is not None:
            (run,) = runs.values()
            terminal.say(replay.verdict(run.cfg, run.data, directory))


if __name__ == "__main__":
    # Hydra takes this flag in front of overrides or behind them, and not between.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))
    # Hydra makes directories and files in every process: give all but rank 0 one that vanishes.
    try:
        with TemporaryDirectory() as scratch:
            if RANK != 0:
                sys.argv += [f"hydra.run.dir={scratch}", f"hydra.sweep.dir={scratch}"]
                sys.argv += ["hydra/hydra_logging=none"]
            main()
            leave()
    except SystemExit as reason:
        give_up(reason)
        raise
