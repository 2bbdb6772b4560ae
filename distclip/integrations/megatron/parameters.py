"""Which parameters a Megatron optimizer steps on this rank, and where among the ranks each of them lies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ...extend import ArgumentError, Layout, group_ranks, named, set_layout

__all__ = ["Groups", "Part", "by_one_name", "leaves", "names_of", "parts_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """This rank's piece of one parameter.

    Args:
        name: of the parameter in the model.
        own: what the optimizer steps, and whose `.grad` it takes: the parameter, its float32 copy, or a slice of that.
        stand_in: stands for `own` in a clipper; its gradient of the moment is laid beside it as `main_grad`.
        original: of an embedding that other stages have too, whether this is the copy that counts; otherwise None.
    """

    name: str
    own: Tensor
    stand_in: Tensor
    original: bool | None = None

    def look(self, weights: bool) -> None:
        """Lay the gradient of the moment beside the stand-in, which shares the memory of the weights if asked."""
        self.stand_in.main_grad = self.own.grad  # type: ignore[attr-defined]
        if weights:
            self.stand_in.data = self.own.detach()

    def let_go(self) -> None:
        """Keep no gradient alive."""
        self.stand_in.main_grad = None  # type: ignore[attr-defined]


class Groups:
    """The process groups of a job by Megatron's names, and where they put a parameter.

    Args:
        collection: a ProcessGroupCollection; None for the groups of `megatron.core.parallel_state`.
    """

    def __init__(self, collection: Any = None) -> None:
        if collection is None:
            from megatron.core.process_groups_config import ProcessGroupCollection

            needed = ["tp", "pp", "ep", "expt_tp", "dp_cp", "expt_dp"]
            collection = ProcessGroupCollection.use_mpu_process_groups(needed)
        self._collection = collection
        axes = {name: self._group(name) for name in ("tp", "pp", "ep", "expt_tp")}
        self.split_over = {name: group for name, group in axes.items() if group is not None}

    def layout(self, param: Tensor, sliced_over: dist.ProcessGroup | None) -> Layout:
        """Where a parameter lies, by the attributes that Megatron gives it.

        Args:
            param: of the model.
            sliced_over: the ranks that hold slices of it; None if each has the whole.
        """
        expert = getattr(param, "allreduce", True) is False
        cut = bool(getattr(param, "tensor_model_parallel", False))
        # Experts have a tensor-parallel group of their own, often of one rank, and carry the tag all the same.
        pieces = {"tp": cut and not expert, "expt_tp": cut and expert}
        split = {**pieces, "pp": True, "ep": expert}
        alike = sliced_over or self._group("expt_dp" if expert else "dp_cp")
        ranks = (dist.get_rank(),) if alike is None else group_ranks(alike)
        return Layout(
            groups=(ranks,),
            pieces=1 if sliced_over is None else len(ranks),
            split=tuple(split[axis] for axis in self.split_over),
            cut=tuple(pieces.get(axis, False) for axis in self.split_over),
            counted=not getattr(param, "shared", False),
        )

    def _group(self, name: str) -> dist.ProcessGroup | None:
        return getattr(self._collection, name, None)


def leaves(optimizer: Any) -> list[Any]:
    """The optimizers of a chain, or the one.

    Raises:
        ArgumentError: none of Megatron's, or one whose gradients lie where distclip does not know them.
    """
    if type(optimizer).__name__ == "LayerWiseDistributedOptimizer":
        raise _unknown("a LayerWiseDistributedOptimizer")
    if hasattr(optimizer, "chained_optimizers"):
        return [leaf for one in optimizer.chained_optimizers for leaf in leaves(one)]
    if not all(hasattr(optimizer, needed) for needed in ("is_stub_optimizer", "step_with_ready_grads", "config")):
        raise ArgumentError(
            f"optimizer={type(optimizer).__name__}: expected what megatron.core.optimizer.get_megatron_optimizer "
            "returns. With an optimizer of torch write distclip.GradClipper(model, policy).attach(optimizer)."
        )
    if getattr(getattr(optimizer, "ddp_config", None), "use_megatron_fsdp", False):
        raise _unknown("Megatron-FSDP")
    if getattr(optimizer.config, "use_precision_aware_optimizer_no_fp8_or_ds_fp8", False):
        raise _unknown("a precision-aware optimizer")
    return [optimizer]


def parts_of(leaf: Any, groups: Groups, names: dict[int, str], weights: bool) -> Iterator[Part]:
    """What one optimizer steps on this rank.

    Args:
        leaf: FP32Optimizer, Float16OptimizerWithFloat16Params or DistributedOptimizer.
        groups: of the job.
        names: of parameters of the model, by `id`; empty if nobody asks for them, then they are numbered.
        weights: whether the policy looks at the parameters too.

    Raises:
        ArgumentError: a parameter that `names` does not have.
    """
    if leaf.is_stub_optimizer:
        return
    sliced_over = leaf.data_parallel_group if hasattr(leaf, "gbuf_ranges") else None
    for i, (param, own) in enumerate(_pairs(leaf)):
        if names and id(param) not in names:
            raise ArgumentError(
                f"attach: the optimizer steps a parameter of shape {tuple(param.shape)} that model= does not have. "
                "Pass what get_megatron_optimizer was given: all model chunks of this rank."
            )
        # Memory of its own would be wasted on who only counts elements.
        stand_in = own.detach() if weights else own.detach().new_empty(()).expand(own.shape)
        piece = None
        if sliced_over is not None:
            piece = tuple(param.shape), int(leaf._get_model_param_range_map(param)["param"].start)
        set_layout(stand_in, groups.layout(param, sliced_over), piece)
        if hasattr(param, "partition_dim"):
            stand_in.partition_dim = param.partition_dim  # type: ignore[attr-defined]
        original = not getattr(param, "shared", False) if getattr(param, "shared_embedding", False) else None
        yield Part(names.get(id(param), f"optimizer.parameters[{i}]"), own, stand_in, original)


def by_one_name(parts: list[Part], told: Iterable[Iterable[tuple[str, bool]]]) -> list[Part]:
    """The same parts, where an embedding that stages have in common has one name on all of them.

    To Megatron the weight of the first stage's embedding and that of the last one's output layer are one parameter: a
    policy that clipped them by their names would let them grow apart.

    Args:
        parts: of this rank.
        told: by every rank, (name, original) of its parts that are copies.

    Raises:
        ArgumentError: several names that could be meant.
    """
    said = [copy for rank in told for copy in rank]
    originals = {name for name, original in said if original}
    if {name for name, _ in said} == originals or not originals:
        return parts
    if len(originals) > 1:
        raise ArgumentError(
            f"attach: {', '.join(sorted(originals))} are embeddings that other stages have copies of: which are whose? "
            "Give each and its copies one name; a policy per model does without names, and without model=."
        )
    (name,) = originals
    return [part if part.original is None else replace(part, name=name) for part in parts]


def names_of(model: nn.Module | Iterable[nn.Module]) -> dict[int, str]:
    """The names of parameters by `id`, without the wrappers' `module.`; of several chunks with their numbers."""
    chunks: Sequence[nn.Module] = [model] if isinstance(model, nn.Module) else list(model)
    return {
        id(param): ("" if len(chunks) == 1 else f"{i}.") + re.sub(r"^(module\.)+", "", name)
        for i, chunk in enumerate(chunks)
        for name, param in named(chunk)
    }


def _pairs(leaf: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(parameter of the model, what is stepped in its place)."""
    if hasattr(leaf, "gbuf_ranges"):
        halves = (leaf.model_float16_groups, leaf.shard_fp32_from_float16_groups)
        wholes = (leaf.model_fp32_groups, leaf.shard_fp32_groups)
    elif hasattr(leaf, "float16_groups"):
        halves = (leaf.float16_groups, leaf.fp32_from_float16_groups)
        wholes = (leaf.fp32_from_fp32_groups,) * 2
    else:
        halves, wholes = ([], []), ([group["params"] for group in leaf.optimizer.param_groups],) * 2
    for models, owns in (halves, wholes):
        for model_group, own_group in zip(models, owns, strict=True):
            yield from zip(model_group, own_group, strict=True)


def _unknown(what: str) -> ArgumentError:
    return ArgumentError(
        f"attach: {what} keeps its gradients where distclip does not look for them. Replace get_grad_norm_fp32 and "
        "clip_grad_by_total_norm_fp32 instead: see distclip.integrations.megatron."
    )
