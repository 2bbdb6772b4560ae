"""Find the parameters that a Megatron optimizer steps on this rank, and their layouts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from ...extend import ArgumentError, Layout, group_ranks, is_dtensor, name_tensors, replica_group, set_layout

if TYPE_CHECKING:
    from .foreign import FsdpParameter, Optimizer

__all__ = ["Groups", "Piece", "flatten_chain", "layer_wise_in", "names_of", "pieces_of", "share_names"]

_DATA_PARALLEL = ("dp_cp", "expt_dp")
"""Groups of the data-parallel ranks, of dense parameters and of experts."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Piece of one parameter, on this rank.

    Args:
        name: the name of the parameter in the model.
        stepped: the tensor that the optimizer steps by its `grad`: the parameter, its float32 copy, or a slice of it.
        stand_in: a tensor with the layout of `stepped`, for a clipper. Its `main_grad` is the current gradient.
        is_original: for an embedding that other stages have too, True on the one that counts. None for any other.
        is_decoupled: True if the gradient is in `.decoupled_grad`, because its dtype is not that of `stepped`.
    """

    name: str
    stepped: Tensor
    stand_in: Tensor
    is_original: bool | None = None
    is_decoupled: bool = False

    @property
    def grad(self) -> Tensor | None:
        """Gradient that the optimizer reads, in the shape of the stand-in."""
        grad = getattr(self.stepped, "decoupled_grad", None) if self.is_decoupled else self.stepped.grad
        return None if grad is None else self._local(grad)

    def attach_grad(self, weights: bool) -> None:
        """Attach the current gradient to the stand-in.

        Args:
            weights: True if the policy reads parameters. The stand-in then shares the memory of `stepped`, which a
                reload may have moved.
        """
        self.stand_in.main_grad = self.grad  # type: ignore[attr-defined]
        if weights:
            self.stand_in.data = self._local(self.stepped.detach())

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local().view(self.stand_in.shape) if is_dtensor(tensor) else tensor

    def drop_grad(self) -> None:
        """Remove the gradient from the stand-in, so that Megatron can free it."""
        self.stand_in.main_grad = None  # type: ignore[attr-defined]


class Groups:
    """The process groups of a job, by Megatron's names.

    Args:
        collection: a ProcessGroupCollection. None for the groups of `megatron.core.parallel_state`.
        layer_wise: True if the data-parallel ranks step different parameters.
    """

    def __init__(self, collection: Any = None, layer_wise: bool = False) -> None:
        if collection is None:
            from megatron.core.process_groups_config import ProcessGroupCollection

            required = ["tp", "pp", "ep", "expt_tp", "dp_cp", "expt_dp", "embd"]
            collection = ProcessGroupCollection.use_mpu_process_groups(required)
        self._collection = collection
        names = ("tp", "pp", "ep", "expt_tp", *_DATA_PARALLEL * layer_wise)
        axes = {name: self._group(name) for name in names}
        self.split_over = {name: group for name, group in axes.items() if group is not None}

    def layout(
        self,
        param: Tensor,
        sliced_over: dist.ProcessGroup | None,
        layer_wise: bool = False,
        copied_over: dist.ProcessGroup | None = None,
    ) -> Layout:
        """Return the layout of a parameter, by the attributes that Megatron gives it.

        Args:
            param: a parameter of the model, see `foreign.Parameter`.
            sliced_over: the ranks that have slices of it. None if each rank has all of it.
            layer_wise: True if one data-parallel rank steps all of it, and the others none.
            copied_over: the ranks that have the same slice of it. None if no other rank has it.
        """
        is_expert = is_expert_param(param)
        tensor_parallel = bool(getattr(param, "tensor_model_parallel", False))
        # Experts have a separate tensor-parallel group. It often has one rank, and experts have the attribute even
        # then.
        cut = {"tp": tensor_parallel and not is_expert, "expt_tp": tensor_parallel and is_expert}
        data_parallel = _DATA_PARALLEL[is_expert]
        split = {
            **cut,
            "pp": True,
            "ep": is_expert,
            **{axis: layer_wise and axis == data_parallel for axis in _DATA_PARALLEL},
        }
        group = None if layer_wise else sliced_over or self._group(data_parallel)
        ranks = (dist.get_rank(),) if group is None else group_ranks(group)
        # Megatron has averaged the gradients that are not sliced. A tensor-parallel rank computes the gradient of its
        # replica itself, so it may have other bits.
        replicas = () if sliced_over else replica_group(ranks)
        groups: tuple[tuple[int, ...], ...] = (ranks,)
        if copied_over is not None:
            groups += (group_ranks(copied_over),)
            replicas += replica_group(groups[1])
        tied = getattr(param, "shared_embedding", False)
        if (embedding := self._group("embd")) and tied and not (sliced_over or layer_wise):
            # Megatron has also added up the gradients of embeddings that the first and the last stage share.
            replicas += replica_group(group_ranks(embedding))
        tensor_axis = "expt_tp" if is_expert else "tp"
        if tensor_axis in self.split_over and not tensor_parallel:
            replicas += replica_group(group_ranks(self.split_over[tensor_axis]), is_exact=False)
        return Layout(
            groups=groups,
            num_pieces=1 if sliced_over is None else len(ranks),
            split=tuple(split[axis] for axis in self.split_over),
            cut=tuple(cut.get(axis, False) for axis in self.split_over),
            counted=not getattr(param, "shared", False),
            replicas=replicas,
        )

    def _group(self, name: str) -> dist.ProcessGroup | None:
        return getattr(self._collection, name, None)


def layer_wise_in(optimizer: Any) -> list[Any]:
    """Return the layer-wise optimizers of a chain, or the one optimizer if it is one.

    With such an optimizer, each data-parallel rank steps different parameters, and each of them whole, as Muon needs.
    """
    if type(optimizer).__name__ == "LayerWiseDistributedOptimizer":
        return [optimizer]
    return [one for member in getattr(optimizer, "chained_optimizers", ()) for one in layer_wise_in(member)]


def flatten_chain(optimizer: Any) -> list[Optimizer]:
    """Return the optimizers of a chain, or the one optimizer.

    Raises:
        ArgumentError: it is not Megatron's, or distclip does not know where it keeps its gradients.
    """
    if hasattr(optimizer, "chained_optimizers"):
        return [leaf for member in optimizer.chained_optimizers for leaf in flatten_chain(member)]
    if not all(hasattr(optimizer, name) for name in ("is_stub_optimizer", "step_with_ready_grads", "config")):
        raise ArgumentError(
            f"optimizer={type(optimizer).__name__}: expected what megatron.core.optimizer.get_megatron_optimizer "
            "returns. For an optimizer of torch call distclip.GradClipper(model, policy).attach(optimizer)."
        )
    return [optimizer]


def is_expert_param(param: Tensor) -> bool:
    """Return whether a parameter is that of an expert."""
    return getattr(param, "allreduce", True) is False


def pieces_of(
    leaf: Optimizer, groups: Groups, names: dict[int, str], weights: bool, layer_wise: bool = False
) -> Iterator[Piece]:
    """Yield the pieces that one optimizer steps on this rank.

    Args:
        leaf: FP32Optimizer, Float16OptimizerWithFloat16Params or DistributedOptimizer.
        groups: the groups of the job.
        names: the names of the model's parameters by `id`. If empty, parameters are numbered.
        weights: True if the policy reads parameters.
        layer_wise: True for a member of a layer-wise optimizer.

    Raises:
        ArgumentError: a parameter is missing in `names`.
    """
    if leaf.is_stub_optimizer:
        return
    is_fsdp = _is_fsdp(leaf)
    sliced_over = leaf.data_parallel_group if hasattr(leaf, "gbuf_ranges") else None
    copied_over = None
    decoupled = _has_decoupled_grads(leaf) if is_fsdp else _is_precision_aware(leaf)
    for i, (param, stepped) in enumerate(_stepped_params(leaf)):
        # During a step, the modules of Megatron-FSDP may have either of the two tensors.
        name = names.get(id(param), names.get(id(stepped)))
        if names and name is None:
            raise ArgumentError(
                f"attach: the optimizer steps a parameter of shape {tuple(param.shape)} that model= does not have. "
                "Pass what get_megatron_optimizer was given: all model chunks of this rank."
            )
        piece, local = None, stepped.detach()
        if is_fsdp:
            fsdp_param: FsdpParameter = stepped  # type: ignore[assignment]
            local = local.to_local()  # type: ignore[attr-defined]
            if not local.numel():
                continue
            sliced_over, copied_over = _fsdp_groups(leaf, fsdp_param)
            if sliced_over is not None:
                piece, local = (tuple(param.shape), _fsdp_start(leaf, param)), local.view(-1)
        elif sliced_over is not None:
            piece = tuple(param.shape), int(leaf._get_model_param_range_map(param)["param"].start)
        # Without weights only the shape is used, so one element is expanded instead of allocating memory.
        stand_in = local if weights else local.new_empty(()).expand(local.shape)
        set_layout(stand_in, groups.layout(param, sliced_over, layer_wise, copied_over), piece)
        if hasattr(param, "partition_dim"):
            stand_in.partition_dim = param.partition_dim  # type: ignore[attr-defined]
        is_original = not getattr(param, "shared", False) if getattr(param, "shared_embedding", False) else None
        yield Piece(name or f"optimizer.parameters[{i}]", stepped, stand_in, is_original, decoupled)


def share_names(pieces: list[Piece], by_rank: Iterable[Iterable[tuple[str, bool]]]) -> list[Piece]:
    """Return the pieces with one name for an embedding that several stages have.

    Megatron ties the weight of the first stage's embedding to the weight of the last stage's output layer. A policy
    that clipped them under two names would let them diverge.

    Args:
        pieces: the pieces of this rank.
        by_rank: for every rank, (name, is_original) of its pieces with a tied embedding.

    Raises:
        ArgumentError: there are several originals, and the copies cannot be assigned to them.
    """
    tied = [entry for entries in by_rank for entry in entries]
    originals = {name for name, is_original in tied if is_original}
    if {name for name, _ in tied} == originals or not originals:
        return pieces
    if len(originals) > 1:
        raise ArgumentError(
            f"attach: {', '.join(sorted(originals))} are embeddings that other stages have copies of, and the copies "
            "cannot be assigned to them by name. Use the same name for an embedding and its copies, or a policy per "
            "model without model=."
        )
    (name,) = originals
    return [piece if piece.is_original is None else replace(piece, name=name) for piece in pieces]


def names_of(model: nn.Module | Iterable[nn.Module]) -> dict[int, str]:
    """Return the names of parameters by `id`, without the `module.` of wrappers.

    Names of several chunks begin with the index of the chunk.
    """
    chunks: Sequence[nn.Module] = [model] if isinstance(model, nn.Module) else list(model)
    return {
        id(param): ("" if len(chunks) == 1 else f"{i}.") + re.sub(r"^(module\.)+", "", name)
        for i, chunk in enumerate(chunks)
        for name, param in name_tensors(chunk)
    }


def _stepped_params(leaf: Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (parameter of the model, tensor that is stepped instead of it)."""
    if _is_fsdp(leaf):
        for param in (param for group in leaf.optimizer.param_groups for param in group["params"]):
            if not hasattr(param, "orig_param"):
                raise ArgumentError(
                    "attach: this version of Megatron-FSDP keeps its gradients where distclip cannot find them. "
                    "Replace get_grad_norm_fp32 and clip_grad_by_total_norm_fp32 instead: see "
                    "distclip.integrations.megatron."
                )
            yield param.orig_param, param
        return
    if hasattr(leaf, "gbuf_ranges") and _is_precision_aware(leaf):
        # TransformerEngine's FusedAdam keeps the float32 copies of these slices.
        half = (leaf.model_float16_groups, leaf.shard_float16_groups)
        single = (leaf.model_fp32_groups, leaf.shard_fp32_groups)
    elif hasattr(leaf, "gbuf_ranges"):
        half = (leaf.model_float16_groups, leaf.shard_fp32_from_float16_groups)
        single = (leaf.model_fp32_groups, leaf.shard_fp32_groups)
    elif hasattr(leaf, "float16_groups"):
        half = (leaf.float16_groups, leaf.fp32_from_float16_groups)
        single = (leaf.fp32_from_fp32_groups,) * 2
    else:
        half, single = ([], []), ([group["params"] for group in leaf.optimizer.param_groups],) * 2
    for model_groups, stepped_groups in (half, single):
        for model_group, stepped_group in zip(model_groups, stepped_groups, strict=True):
            yield from zip(model_group, stepped_group, strict=True)


def _is_precision_aware(leaf: Optimizer) -> bool:
    return bool(getattr(leaf.config, "use_precision_aware_optimizer_no_fp8_or_ds_fp8", False))


def _is_fsdp(leaf: Optimizer) -> bool:
    return bool(getattr(getattr(leaf, "ddp_config", None), "use_megatron_fsdp", False))


def _has_decoupled_grads(leaf: Optimizer) -> bool:
    """Return whether Megatron-FSDP leaves gradients in `.decoupled_grad`. Since 0.17, its config decides."""
    buffers = [chunk.param_and_grad_buffer for chunk in leaf.model_chunks]
    by_buffer = any(getattr(buffer, "use_precision_aware_optimizer", False) for buffer in buffers)
    return by_buffer or bool(getattr(leaf.ddp_config, "megatron_fsdp_use_decoupled_grad", False))


def _fsdp_groups(leaf: Optimizer, param: FsdpParameter) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Return the ranks that have slices of a parameter, and the ranks that have the same slice."""
    if leaf.ddp_config.data_parallel_sharding_strategy == "no_shard":
        return None, None
    index, is_expert = param.megatron_fsdp_dist_index, is_expert_param(param.orig_param)
    if index.hsdp_outer_dp_shard:
        return index.get_dp_group(is_expert), None
    # Before 0.17, the groups of experts have no outer dimension.
    outer = getattr(index, "expt_outer_fsdp_group", None) if is_expert else index.get_outer_fsdp_group()
    return index.get_fsdp_group(is_expert), outer


def _fsdp_start(leaf: Optimizer, param: Tensor) -> int:
    """Return the index of the first element of this rank's slice in the flattened parameter."""
    for buffer in (chunk.param_and_grad_buffer for chunk in leaf.model_chunks):
        if param in buffer.param_to_param_group:
            group = buffer.parameter_groups[buffer.param_to_param_group[param]]
            weights = group.main_weight_buffer or group.model_weight_buffer
            return int(weights._get_item_slice_in_shard(weights.param_idx[param])[0])
    raise ArgumentError(
        f"attach: the optimizer steps a parameter of shape {tuple(param.shape)} that no model chunk of it has in its "
        "buffers. Build the optimizer with get_megatron_optimizer from the wrapped chunks."
    )
