"""Describe the hardware, the versions and the command of a benchmark."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

import distclip

__all__ = ["command_line", "machine", "versions"]


def machine(device: str) -> dict[str, str | int]:
    """Describe the processor, the number of usable CPUs, the GPU if it is used, and the system."""
    description: dict[str, str | int] = {"device": device, "cpu": _processor(), "cpus": _cpus()}
    if device == "cuda":
        description |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    return description | {"system": platform.platform()}


def versions() -> dict[str, str]:
    """Return the versions of the libraries and today's date."""
    return {
        "distclip": distclip.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def command_line() -> str:
    """Return the command that repeats the benchmark."""
    return shlex.join(["python", "-m", "distclip.bench", *sys.argv[1:]])


def _cpus() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
