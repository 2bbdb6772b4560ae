"""Build and validate one run before its ranks communicate.

Every rank validates the same config, so all ranks exit with the same error, and none waits for another one.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from distclip import ArgumentError, GradClipper, LocalComm, Policy

from .checkpoint import Source, check_policy, find_source, first_step
from .data import Data
from .devices import choose_device
from .inject import Inject
from .mesh import Parallelism
from .probes.probe import Probe
from .processes import UNDER_MPIRUN, WORLD_SIZE, Backend


@dataclass(frozen=True)
class Run:
    """One run: its config and what was built from it."""

    cfg: DictConfig
    data: Data
    model: nn.Sequential
    policy: Policy
    parallelism: Parallelism
    backend: Backend
    device: torch.device
    inject: Inject | None
    probe: Probe
    source: Source | None
    """Run to continue."""
    first_step: int


def build_run(cfg: DictConfig, directory: Path | None = None, *, is_restart: bool = False) -> Run:
    """Build a run, or exit with an error about a wrong setting.

    Args:
        directory: directory of the run, if all ranks know it.
        is_restart: an earlier attempt of this job has started the run.
    """
    source = find_source(cfg, directory, is_restart=is_restart)
    step = first_step(cfg, source)
    parallelism: Parallelism = instantiate(cfg.parallel)
    backend: Backend = instantiate(cfg.comm)
    _check_ranks(cfg, parallelism, backend)
    device = choose_device(cfg.device)
    data: Data = instantiate(cfg.data)(batch=cfg.batch)
    torch.manual_seed(cfg.seed)
    model: nn.Sequential = instantiate(cfg.model)(data)
    try:
        policy: Policy = instantiate(cfg.clip)
        # These two only check the arguments. The run builds others for the distributed parameters.
        instantiate(cfg.optim)(model.parameters())
        clipper = GradClipper(model, policy, comm=LocalComm(), on_nonfinite=cfg.on_nonfinite, max_skips=cfg.max_skips)
    except (ArgumentError, InstantiationException, TypeError, ValueError) as error:
        raise SystemExit(f"clip or optim: {error.__cause__ or error}") from None
    if source is not None:
        check_policy(source.run, cfg, model, clipper)
    inject: Inject | None = instantiate(cfg.get("inject"))
    if inject is not None:
        inject.check(model, range(step, cfg.steps + 1))
    probe: Probe = instantiate(cfg.get("probe")) or Probe()
    if probe.whole_gradients and not parallelism.whole_gradients:
        raise SystemExit(
            f"probe={cfg.probe._target_.split('.')[-2]}: reads whole gradients, but this layout shards them. "
            "Use parallel=ddp or parallel=single"
        )
    dtype = getattr(torch, cfg.precision.dtype)
    if dtype != torch.float32 and parallelism.autocast:
        for part in model:
            part.forward = torch.autocast(device.type, dtype)(part.forward)
    return Run(cfg, data, model, policy, parallelism, backend, device, inject, probe, source, step)


def _check_ranks(cfg: DictConfig, parallelism: Parallelism, backend: Backend) -> None:
    """Exit unless the layout fits the launcher, the number of ranks and the batch."""
    if parallelism.mpi_only != backend.mpi_only:
        raise SystemExit(
            "comm=mpi: trains replicas of the model, without torch.distributed. Use comm=mpi without parallel=, or any "
            "parallel= without comm=mpi (mpirun starts both)"
        )
    if backend.mpi_only and WORLD_SIZE > 1 and not UNDER_MPIRUN:
        raise SystemExit("comm=mpi: MPI has not started these ranks. Use bash launch/mpirun.sh comm=mpi")
    num_shares = parallelism.num_data_shares(WORLD_SIZE)
    if cfg.batch % num_shares:
        raise SystemExit(
            f"batch={cfg.batch}: not divisible by {num_shares} data-parallel ranks. "
            f"Use batch={-(-cfg.batch // num_shares) * num_shares}"
        )
