"""Read the attributes that Megatron sets on plain parameters, and apply them to the axes of `split_over=`.

| attribute | axes that it applies to | meaning |
|---|---|---|
| `tensor_model_parallel` | tensor axes: "tp", or a name with "tensor" | True: different shards, else replicas |
| `partition_dim` | axes that cut the parameter | dim along which its shards were cut |
| `allreduce` | expert axes: "ep", or a name with "expert" | False: different experts, else replicas |
| `main_grad` | none | fp32 gradient, instead of `.grad` |
| `shared` | none | True: a second replica, on another pipeline stage, that does not count in norms |

On an axis without a name every attribute in use applies. On any other axis, such as "pp", every parameter is split.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..comm.discovery import job_size
from ..comm.ranks import Axis, is_tensor_axis
from ..errors import ArgumentError, LayoutError
from .attributes import carry
from .dtensor import is_dtensor
from .layout import Layout
from .parameters import is_frozen
from .source import LayoutReader, Request, Source

__all__ = ["MegatronSource", "read_main_grad"]

_TENSOR, _EXPERT = "tensor_model_parallel", "allreduce"


@dataclass(frozen=True, slots=True)
class _Tags:
    """Attributes of one plain tensor.

    Args:
        tensor: True if ranks hold different shards along a tensor axis. None if the attribute is not set.
        expert: True if ranks hold different experts along an expert axis.
        shared: True for a replica that does not count.
        partition_dim: dim along which the shards were cut, or None.
    """

    tensor: bool | None
    expert: bool
    shared: bool
    partition_dim: int | None


def _tags_of(tensor: Tensor) -> _Tags:
    return _Tags(
        tensor=bool(getattr(tensor, _TENSOR)) if hasattr(tensor, _TENSOR) else None,
        expert=getattr(tensor, _EXPERT, True) is False,
        shared=bool(getattr(tensor, "shared", False)),
        partition_dim=getattr(tensor, "partition_dim", None),
    )


def read_main_grad(param: Tensor) -> Tensor | None:
    """Return Megatron's fp32 gradient of a parameter, or None without one."""
    main_grad: Tensor | None = getattr(param, "main_grad", None)
    return main_grad


class MegatronSource(Source):
    """Plain tensors without any other layout, split along `split_over=` by their attributes."""

    title = "attributes"
    attributes = carry(_TENSOR, _EXPERT, "shared", "partition_dim")

    def layout_reader(self, request: Request) -> LayoutReader | None:
        """Return a reader of the attributes, and add an error to the request if one applies to no axis."""
        plain = [(name, tensor) for name, tensor in request.tensors if not is_dtensor(tensor)]
        # An attribute that no parameter of the call has does not apply to any axis.
        tags = {id(tensor): _tags_of(tensor) for _, tensor in plain}
        used = _attributes_in_use(tags.values())
        with request.errors:
            training = [(name, tags[id(tensor)]) for name, tensor in plain if not is_frozen(tensor)]
            _check_axes(training, request.axes, used)

        def read(name: str, tensor: Tensor, known: Layout | None) -> Layout | None:
            # Any other source describes a tensor more precisely than attributes do.
            return _layout(tags[id(tensor)], request.axes, used) if known is None else known

        return read

    def dim0_coords(
        self, name: str, tensor: Tensor, layout: Layout, axes: tuple[Axis, ...], rank: int
    ) -> tuple[int, ...]:
        """Return the coordinates along the axes that cut dim 0, by `partition_dim`."""
        # The attributes are read again, because the layout of an annotated parameter does not come from them.
        dim, coords = _tags_of(tensor).partition_dim, list[int]()
        for axis, cut in zip(axes, layout.cut, strict=True):
            if cut and dim is None:
                raise LayoutError(
                    f"{name} is one of several shards along {axis}, cut along an unknown dim, so that its rows cannot "
                    "be numbered. Use distclip.annotate_(param, mesh, [Shard(dim)]), or set param.partition_dim."
                )
            if cut and dim == 0:
                coords.append(axis.ranks.index(rank))
        return tuple(coords)


def _layout(tags: _Tags, axes: tuple[Axis, ...], used: frozenset[str]) -> Layout:
    split = tuple(_is_split(axis, tags, used) for axis in axes)
    # Along a tensor axis the tensors are shards of one parameter. Along any other axis they are different parameters.
    cut = tuple(
        is_split and (is_tensor_axis(axis.name) or (bool(tags.tensor) and _TENSOR in _applicable(axis, used)))
        for axis, is_split in zip(axes, split, strict=True)
    )
    return Layout(split=split, cut=cut, counted=not tags.shared)


def _attributes_in_use(tags: Collection[_Tags]) -> frozenset[str]:
    """Return those of `tensor_model_parallel` and `allreduce=False` that any tensor has."""
    used = {_TENSOR} if any(tag.tensor is not None for tag in tags) else set[str]()
    return frozenset(used | {_EXPERT} if any(tag.expert for tag in tags) else used)


def _is_split(axis: Axis, tags: _Tags, used: frozenset[str]) -> bool:
    """Return whether the ranks along an axis hold different tensors under one name."""
    applicable = _applicable(axis, used)
    # Without attributes every parameter is split along every axis.
    if not applicable:
        return True
    return (_TENSOR in applicable and bool(tags.tensor)) or (_EXPERT in applicable and tags.expert)


def _applicable(axis: Axis, used: frozenset[str]) -> frozenset[str]:
    """Return which of the attributes in use apply to an axis."""
    if not axis.name:
        return used
    # "expert_tensor_parallel" is a tensor axis of experts, so the tensor axes are tested first.
    if is_tensor_axis(axis.name):
        return used & {_TENSOR}
    return used & {_EXPERT} if _is_expert_axis(axis.name) else frozenset()


def _is_expert_axis(name: str) -> bool:
    return name == "ep" or "expert" in name


def _check_axes(plain: Sequence[tuple[str, _Tags]], axes: tuple[Axis, ...], used: frozenset[str]) -> None:
    """Raise if an attribute applies to no axis, or ambiguously to several.

    Raises:
        ArgumentError: several axes without names, or one without a name for both attributes.
        LayoutError: a parameter is a shard by its attribute, and `split_over=` has no axis for it.
    """
    unnamed = [axis for axis in axes if axis.name is None]
    shards = [name for name, tags in plain if tags.tensor]
    experts = [name for name, tags in plain if tags.expert]
    if used and (len(unnamed) > 1 or (unnamed and shards and experts)):
        raise ArgumentError(
            f"split_over= has {len(unnamed)} axes without a name and the parameters carry {sorted(used)}, so that it "
            "is unclear which attribute applies to which axis. "
            'Use names: split_over={"pp": pp_group, "tp": tp_group, "ep": ep_group}.'
        )
    # A single process holds all parameters, whatever the attributes are.
    if job_size() == 1 or unnamed:
        return
    for names, attribute, short, word in (
        (shards, f"{_TENSOR}=True", "tp", "tensor"),
        (experts, f"{_EXPERT}=False", "ep", "expert"),
    ):
        if names and not any(axis.name is not None and (axis.name == short or word in axis.name) for axis in axes):
            raise LayoutError(
                f"{names[0]} carries {attribute}, so that other ranks hold other shards of it, and no axis of "
                f'split_over= contains these ranks. Pass split_over={{"{short}": {short}_group}} (a group of one rank '
                "if there is no such parallelism)."
            )
