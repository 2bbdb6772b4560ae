"""What it ran on."""

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
    """What is measured, processor, how many of them this process may use, the GPU if that is it, and the system."""
    found: dict[str, str | int] = {"device": device, "cpu": _processor(), "cpus": _cpus()}
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    return found | {"system": platform.platform()}


def versions() -> dict[str, str]:
    """Of everything that is compared, and the day."""
    return {
        "distclip": distclip.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def command_line() -> str:
    """What to type to measure it again."""
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
