"""Train with Ray Train on the cluster at RAY_ADDRESS, or on this machine: `python launch/ray_train.py [overrides]`.

NPROC is the number of ranks, two by default. Each rank gets a GPU if the cluster has any. All nodes need an
environment with distclip[train] and `ray[train]`, and this repository at the same path. If one rank fails, Ray ends
all of them.
"""

import os
import runpy
import sys
from pathlib import Path

try:
    import ray
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
except ModuleNotFoundError as error:
    raise SystemExit(
        f"ray_train.py: {error.name} is not installed. Use {sys.executable} -m pip install 'ray[train]'"
    ) from None

from job.overrides import check

TRAIN = Path(__file__).resolve().with_name("train.py")


def run_rank(config: dict[str, list[str] | str]) -> None:
    """Run train.py on one rank. Ray has started torch.distributed already."""
    os.chdir(str(config["folder"]))
    # runpy does not add the folder of a script to the path, as Python does.
    sys.path.insert(0, str(TRAIN.parent))
    sys.argv = [str(TRAIN), *config["overrides"]]
    runpy.run_path(str(TRAIN), run_name="__main__")


def main(overrides: list[str]) -> None:
    """Start the ranks and wait for them."""
    check(overrides)
    ray.init()
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    TorchTrainer(
        run_rank,
        train_loop_config={"folder": os.getcwd(), "overrides": overrides},
        scaling_config=ScalingConfig(num_workers=int(os.environ.get("NPROC", "2")), use_gpu=gpus),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
    ).fit()


if __name__ == "__main__":
    main(sys.argv[1:])
