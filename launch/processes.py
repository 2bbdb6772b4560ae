"""The processes of this job: what the launcher started, where they compute, how they add up."""

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

RANK = int(os.environ.get("RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))


def pick_device(wanted: str) -> torch.device:
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or not torch.cuda.is_available():
        raise SystemExit(f"device={wanted} is not to be had here: write device=auto or device=cpu")
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local > gpus:
        raise SystemExit(
            f"{local} ranks on this node, but it has {gpus} GPU(s): start {gpus} (NPROC={gpus}), or write device=cpu"
        )
    return torch.device("cuda", LOCAL_RANK)


def join(device: torch.device) -> None:
    """Start the default process group, once: the jobs of a Hydra multirun share it.

    A group for each would find the last one's addresses in the launcher's store, and hang.
    """
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def gathered(value: T) -> list[T]:
    """What each rank has, in the order of ranks."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def world_mean(values: Sequence[Tensor | None], device: torch.device) -> list[float]:
    """The mean of each value over the ranks that have it.

    That is the mean over the global batch in every layout: shares of the batch are equally
    large, and equally many ranks hold each of them.
    """
    totals = torch.zeros(2, len(values), dtype=torch.float64, device=device)
    for i, value in enumerate(values):
        if value is not None:
            totals[0, i], totals[1, i] = value, 1
    if dist.is_initialized():
        dist.all_reduce(totals)
    means: list[float] = (totals[0] / totals[1]).tolist()
    return means
