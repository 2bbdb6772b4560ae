"""Find the ranks that share a parameter, from DeepSpeed's process groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ...extend import Layout, group_ranks, replica_group

if TYPE_CHECKING:
    from .foreign import Engine

__all__ = ["Topology"]


class Topology:
    """The axes along which the ranks of an engine have different parameters.

    There is an axis for each kind of experts, and one for tensor parallelism.

    Args:
        engine: the engine that `deepspeed.initialize` returned.
    """

    def __init__(self, engine: Engine) -> None:
        self.split_over: dict[str, dist.ProcessGroup] = {}
        """Process group of each axis, by name. See `split_over=` of `GradClipper`."""
        self._data_parallel = engine.seq_data_parallel_group
        for param in engine.module.parameters():
            if (name := _expert_group_name(param)) is not None:
                from deepspeed.utils import groups

                self.split_over.setdefault(f"expert {name}", groups._get_expert_parallel_group(name))
        tensor_parallel = _tensor_parallel_group(engine.mpu)
        if tensor_parallel is not None and dist.get_world_size(tensor_parallel) > 1:
            self.split_over["tp"] = tensor_parallel

    def replica_group(self, param: Any) -> dist.ProcessGroup:
        """Return the process group of the ranks that have the same parameter if nothing is partitioned."""
        if (name := _expert_group_name(param)) is None:
            return self._data_parallel
        from deepspeed.utils import groups

        group: dist.ProcessGroup = groups._get_expert_data_parallel_group(name)
        return group

    @property
    def tensor_parallel_ranks(self) -> tuple[int, ...]:
        """Global ranks of this rank's tensor-parallel group. Empty without tensor parallelism."""
        return group_ranks(self.split_over["tp"]) if "tp" in self.split_over else ()

    def is_replicated(self, param: Any) -> bool:
        """Return whether all tensor-parallel ranks hold the same parameter."""
        is_split = _is_tensor_parallel(param) or _expert_group_name(param) is not None
        return "tp" in self.split_over and not is_split

    def layout(
        self, param: Any, process_group: dist.ProcessGroup, *, sliced: bool, has_equal_slices: bool = True
    ) -> Layout:
        """Return the layout of a parameter.

        Args:
            param: a parameter of the engine's module, see `foreign.Parameter`.
            process_group: the ranks that have slices of the parameter, or replicas of all of it.
            sliced: True if the ranks have slices.
            has_equal_slices: False if tensor-parallel ranks may slice the parameter at different elements.
        """
        expert = _expert_group_name(param)
        tensor_parallel = _is_tensor_parallel(param)
        split = {f"expert {expert}": expert is not None, "tp": tensor_parallel}
        ranks = group_ranks(process_group)
        # DeepSpeed has averaged the gradients that are not sliced. A tensor-parallel rank computes the gradient of its
        # replica itself, so it may have other bits.
        replicas = () if sliced else replica_group(ranks)
        if self.is_replicated(param) and has_equal_slices:
            replicas += replica_group(self.tensor_parallel_ranks, is_exact=False)
        return Layout(
            groups=(ranks,),
            num_pieces=len(ranks) if sliced else 1,
            split=tuple(split.get(axis, False) for axis in self.split_over),
            cut=tuple(axis == "tp" and tensor_parallel for axis in self.split_over),
            counted=not getattr(param, "ds_pipe_replicated", False),
            replicas=replicas,
        )


def _is_tensor_parallel(param: Any) -> bool:
    return bool(getattr(param, "tensor_model_parallel", getattr(param, "model_parallel", False)))


def _expert_group_name(param: Any) -> str | None:
    """Return DeepSpeed's name of the expert group of a parameter, or None without one."""
    return None if getattr(param, "allreduce", True) else getattr(param, "group_name", None)


def _tensor_parallel_group(mpu: Any) -> dist.ProcessGroup | None:
    # Megatron has renamed the method.
    for name in ("get_tensor_model_parallel_group", "get_model_parallel_group"):
        if hasattr(mpu, name):
            group: dist.ProcessGroup = getattr(mpu, name)()
            return group
    return None
