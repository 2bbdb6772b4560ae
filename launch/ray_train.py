"""Train under Ray Train: `python launch/ray_train.py [Hydra overrides]`, on the cluster of RAY_ADDRESS, or else here.

NPROC is the number of ranks, two without it; each takes a GPU where the cluster has them. Needs distclip[train] and
`ray[train]` in one environment on all nodes, and this repository in the same place. Where one rank fails, Ray ends all.
"""

import os
import runpy
import sys
from pathlib import Path

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

TRAIN = Path(__file__).resolve().with_name("train.py")


def rank(told: dict[str, list[str] | str]) -> None:
    """One rank: Ray has started its torch.distributed, and the training job takes part in it."""
    os.chdir(str(told["folder"]))
    sys.argv = [str(TRAIN), *told["overrides"]]
    runpy.run_path(str(TRAIN), run_name="__main__")


def main(overrides: list[str]) -> None:
    ray.init()
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    TorchTrainer(
        rank,
        train_loop_config={"folder": os.getcwd(), "overrides": overrides},
        scaling_config=ScalingConfig(num_workers=int(os.environ.get("NPROC", "2")), use_gpu=gpus),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
    ).fit()


if __name__ == "__main__":
    main(sys.argv[1:])
