"""Which ranks hold what, by DeepSpeed's process groups: the axes of a job, and where on them a parameter lies."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ...extend import Layout, group_ranks

__all__ = ["Ranks"]


class Ranks:
    """The axes along which the ranks of an engine hold different parameters: experts, tensor parallelism.

    Args:
        engine: what `deepspeed.initialize` returned.
    """

    def __init__(self, engine: Any) -> None:
        self.split_over: dict[str, dist.ProcessGroup] = {}
        self._copies = engine.seq_data_parallel_group
        for param in engine.module.parameters():
            if (name := _expert_group(param)) is not None:
                from deepspeed.utils import groups

                self.split_over.setdefault(f"expert {name}", groups._get_expert_parallel_group(name))
        if (tensor := _tensor_group(engine.mpu)) is not None and dist.get_world_size(tensor) > 1:
            self.split_over["tp"] = tensor

    def copies_of(self, param: Any) -> Any:
        """The process group of the ranks that hold the same parameter, where no partition is made."""
        if (name := _expert_group(param)) is None:
            return self._copies
        from deepspeed.utils import groups

        return groups._get_expert_data_parallel_group(name)

    def layout(self, param: Any, process_group: Any, *, cut: bool) -> Layout:
        """Where a parameter lies.

        Args:
            param: of the engine's module.
            process_group: the ranks that hold slices of it, or copies of the whole.
            cut: whether they hold slices.
        """
        expert = _expert_group(param)
        pieces_of_tensor = bool(getattr(param, "tensor_model_parallel", getattr(param, "model_parallel", False)))
        split = {f"expert {expert}": expert is not None, "tp": pieces_of_tensor}
        ranks = group_ranks(process_group)
        return Layout(
            groups=(ranks,),
            pieces=len(ranks) if cut else 1,
            split=tuple(split.get(axis, False) for axis in self.split_over),
            cut=tuple(axis == "tp" and pieces_of_tensor for axis in self.split_over),
            counted=not getattr(param, "ds_pipe_replicated", False),
        )


def _expert_group(param: Any) -> str | None:
    """DeepSpeed's name of the experts that a parameter belongs to, None for any other parameter."""
    return None if getattr(param, "allreduce", True) else getattr(param, "group_name", None)


def _tensor_group(mpu: Any) -> Any:
    for name in ("get_tensor_model_parallel_group", "get_model_parallel_group"):
        if hasattr(mpu, name):
            return getattr(mpu, name)()
    return None
