"""Train a model and clip its gradients: `torchrun ... launch/train.py [Hydra overrides]`, or `mpirun ...`."""

import sys
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from job import loop, replay
from job.config import headline, run_configs
from job.log import RunLog
from job.processes import RANK, WORLD_SIZE, abort_mpi_job, leave
from job.run import build_run
from job.terminal import Terminal


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Train the runs of one job one after the other, and print their results."""
    # All runs are validated before the ranks communicate.
    runs = {name: build_run(run_cfg) for name, run_cfg in run_configs(cfg).items()}
    directory = Path(HydraConfig.get().runtime.output_dir)
    if directory.is_relative_to(Path.cwd()):
        directory = directory.relative_to(Path.cwd())
    terminal = Terminal(RANK)
    terminal.title(f"{headline()}, {WORLD_SIZE} rank(s)")
    for run in runs.values():
        if run.parallelism.mesh:
            run.backend.join(run.device)
    summaries = {}
    try:
        for name, run in runs.items():
            if name:
                terminal.title(name)
            summary = loop.train(run, RunLog(directory / name.replace(" ", "_"), run.cfg), terminal)
            if summary is not None:
                summaries[name] = summary
    except Exception:
        # Hydra would start the next job of a multirun here, while the other ranks wait in this one.
        traceback.print_exc()
        raise SystemExit(1) from None
    if summaries:
        terminal.results(summaries, cfg.note)
        if cfg.replay is not None:
            (run,) = runs.values()
            terminal.paragraph(replay.compare(run.cfg, run.data, directory))


if __name__ == "__main__":
    # Hydra accepts this flag before or after the overrides, but not between them.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))
    try:
        # Hydra creates directories and files in every process. Ranks other than 0 get a temporary directory.
        with TemporaryDirectory() as scratch:
            if RANK != 0:
                sys.argv += [f"hydra.run.dir={scratch}", f"hydra.sweep.dir={scratch}"]
                sys.argv += ["hydra/hydra_logging=none"]
            main()
            leave()
    except SystemExit as reason:
        abort_mpi_job(reason)
        raise
