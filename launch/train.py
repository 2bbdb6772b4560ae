"""Train a model and clip its gradients: `torchrun ... launch/train.py [Hydra overrides]`, or `mpirun ...`."""

import contextlib
import os
import sys
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from distclip.errors import printable
from job import loop, replay
from job.config import headline, run_configs
from job.elastic import find_job_directory, join_attempt
from job.log import RunLog
from job.overrides import REFUSED, explain
from job.processes import RANK, WORLD_SIZE, abort_mpi_job, leave
from job.run import build_run
from job.terminal import Terminal

PATIENCE = 10
"""Seconds within which launchers end the other ranks, once rank 0 has printed the error."""

WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
ATTEMPT = join_attempt()
JOB_DIRECTORY = find_job_directory(ATTEMPT, sys.argv)


def folder(name: str) -> str:
    """Return the name of a run's folder in the directory of the job."""
    return name.replace(" ", "_")


def refuse(text: str) -> SystemExit:
    """Print the error in the settings on one rank, and return the exception that ends this rank."""
    # Ranks do not communicate yet. If rank 0 does not reject the settings, the launcher does not end this rank.
    if RANK != 0:
        time.sleep(PATIENCE)
    # The text may contain names from the files of another run.
    print("\n".join(map(printable, text.splitlines())), file=sys.stderr, flush=True)
    return SystemExit(REFUSED)


def remove_if_empty(directory: Path) -> None:
    """Remove the directory that Hydra has made for a job, and `outputs` around it, if they are empty."""
    with contextlib.suppress(OSError):
        if not Path.cwd().is_relative_to(directory):
            directory.rmdir()
            if directory.parent == Path.cwd() / "outputs":
                directory.parent.rmdir()


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Train the runs of one job one after the other, and print their results."""
    # All runs are validated before the ranks communicate.
    hydra_cfg = HydraConfig.get()
    is_multirun = hydra_cfg.mode == RunMode.MULTIRUN
    shared = JOB_DIRECTORY / str(hydra_cfg.job.num) if JOB_DIRECTORY and is_multirun else JOB_DIRECTORY
    output = Path(hydra_cfg.runtime.output_dir)
    runs = {}
    try:
        for name, run_cfg in run_configs(cfg).items():
            run_directory = shared / folder(name) if shared else None
            is_restart = ATTEMPT is not None and str(run_directory) in ATTEMPT.started
            runs[name] = build_run(run_cfg, run_directory, is_restart=is_restart)
    except SystemExit:
        remove_if_empty(output)
        raise
    except (HydraException, OmegaConfBaseException) as error:
        remove_if_empty(output)
        if WANTS_TRACEBACK:
            raise
        raise SystemExit(explain(error, hydra_cfg.overrides.task)) from None
    directory = output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output
    terminal = Terminal(RANK)
    terminal.title(f"{headline()}, {WORLD_SIZE} rank(s)")
    for run in runs.values():
        if run.parallelism.mesh:
            run.backend.join(run.device, None if ATTEMPT is None else ATTEMPT.store)
    summaries = {}
    try:
        for name, run in runs.items():
            if name:
                terminal.title(name)
            log = RunLog(directory / folder(name), run.cfg)
            if ATTEMPT is not None and RANK == 0:
                ATTEMPT.record(output.parent if is_multirun else output, output / folder(name))
            summary = loop.train(run, log, terminal)
            if summary is not None:
                summaries[name] = summary
    except Exception:
        # Without this, Hydra would start the next job of a multirun here, while the other ranks wait in this one.
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
    overrides = sys.argv[1:]
    # Hydra would print its own text on every rank. With the variable, it raises the error instead.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        # Hydra creates directories and files in every process. Ranks other than 0 get a temporary directory.
        with TemporaryDirectory() as scratch:
            if RANK != 0:
                sys.argv += [f"hydra.run.dir={scratch}", f"hydra.sweep.dir={scratch}"]
                sys.argv += ["hydra/hydra_logging=none"]
            elif ATTEMPT is not None and ATTEMPT.directory is not None:
                # Hydra's default directory contains the time. Quotes allow any character in the path.
                quoted = str(ATTEMPT.directory).replace("'", "\\'")
                sys.argv += [f"hydra.run.dir='{quoted}'", f"hydra.sweep.dir='{quoted}'"]
            main()
            leave()
    except SystemExit as reason:
        end = refuse(reason.code) if isinstance(reason.code, str) else reason
        abort_mpi_job(int(end.code or 0))
        raise end from None
    except (HydraException, OmegaConfBaseException) as error:
        if WANTS_TRACEBACK:
            raise
        raise refuse(explain(error, overrides)) from None
