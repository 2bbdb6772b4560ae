"""Choose the device of this rank."""

import torch

from .processes import LOCAL_RANK, LOCAL_WORLD_SIZE


def choose_device(requested: str) -> torch.device:
    """Return the device of this rank, or exit with the reason why there is none.

    Args:
        requested: "auto" (a GPU where there is one), "cuda" or "cpu".
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if requested == "auto" else requested
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or not torch.cuda.is_available():
        raise SystemExit(f"device={requested}: not available on this machine. Use device=auto or device=cpu")
    num_gpus = torch.cuda.device_count()
    if num_gpus < LOCAL_WORLD_SIZE:
        raise SystemExit(
            f"device={requested}: {LOCAL_WORLD_SIZE} ranks on this node share {num_gpus} GPU(s). "
            f"Start {num_gpus} (NPROC={num_gpus}), or use device=cpu"
        )
    return torch.device("cuda", LOCAL_RANK)
