"""Carry layouts that tensors have as attributes over to the Parameters with which torch replaces them.

torch drops the attributes of a Parameter where it makes a new one: in `copy.deepcopy`, `load_state_dict(assign=True)`,
`to_empty`, `fully_shard`. So a module that has a parameter with a layout is remembered, with the parameter's name in
it. Whenever the module has another parameter under this name, that parameter gets the layout too. If its shape shows
that the layout no longer fits, the next call raises. A new module is never compared with an old one, even if their
names are equal.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from functools import lru_cache, wraps
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..errors import LayoutError

__all__ = ["carry", "check_carried", "has_carried", "remember", "remember_all"]

_CARRIED: set[str] = set()
"""Names of the attributes that are carried over."""

_FLATTENED = "_fsdp_flattened"
"""Attribute of a slice that FSDP1 made from a parameter. It has another shape and the same layout along other axes."""

_MAX_SCANS = 16
"""Maximum number of searches for modules that no hook has reported, each of which takes some 50 ms."""


class _Layouts(dict[str, tuple[dict[str, Any], tuple[int, ...]]]):
    """Attributes and shapes of the parameters of one module, by their names in it."""


_layouts: weakref.WeakKeyDictionary[nn.Module, _Layouts] = weakref.WeakKeyDictionary()

_modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules with parameters: those of the last search, and those that have registered a parameter since."""

_owners: dict[int, list[tuple[weakref.ref[nn.Module], str]]] = {}
"""Modules of each parameter, with its name in each, by `id`. Entries of deleted parameters are not removed."""

_num_scans = 0


def carry(*names: str) -> frozenset[str]:
    """Carry attributes of these names over to new Parameters."""
    _CARRIED.update(names)
    return frozenset(names)


def remember(param: Tensor) -> None:
    """Remember the attributes of a parameter, by the modules that have it.

    Args:
        param: parameter of any module, or of none.
    """
    for module, name in _owners_of(param):
        _remember_in(module, name, param)
    _carry_in_copies()


def remember_all(tensors: Iterable[Tensor], module: nn.Module | None) -> None:
    """Remember the attributes of all parameters of a call.

    Args:
        tensors: the parameters.
        module: module that they belong to, if the caller passed one.
    """
    if module is None:
        for tensor in filter(has_carried, tensors):
            remember(tensor)
        return
    for one in module.modules():
        for name, param in one._parameters.items():
            if param is not None and has_carried(param):
                _add_owner(param, one, name)
                remember(param)


def has_carried(tensor: Tensor) -> bool:
    """Return whether a tensor has attributes to carry."""
    return not _CARRIED.isdisjoint(vars(tensor))


def check_carried(tensors: Iterable[Tensor]) -> LayoutError | None:
    """Set the layouts of parameters that have replaced others since the last call.

    Args:
        tensors: parameters of a call.

    Returns:
        The error to raise if a layout is lost: a parameter of `tensors` has replaced one of another shape.
    """
    if not _layouts:
        return None
    # Only a parameter of this call can cause an error. Other parameters still get their layouts.
    ids, error = set(map(id, tensors)), None
    for module, layouts in list(_layouts.items()):
        for name, (attributes, shape) in list(layouts.items()):
            current = module._parameters.get(name)
            # Parameters that have replaced it. torch.nn.utils.parametrize and weight_norm can make several from one.
            lost: list[tuple[str, Tensor]] = []
            if current is None:
                made = {f"{name}_g", f"{name}_v", f"{name}_orig"}
                lost = [
                    (full, param)
                    for full, param in module.named_parameters()
                    if (full in made or full.startswith(f"parametrizations.{name}.")) and not has_carried(param)
                ]
            elif own := _attributes_of(current):
                layouts[name] = own, tuple(current.shape)
            elif not nn.parameter.is_lazy(current) and not _give(current, attributes, shape):
                lost = [(name, current)]
            lost = [(n, p) for n, p in lost if id(p) in ids]
            if lost and error is None:
                error = LayoutError(
                    f"{type(module).__name__}.{lost[0][0]} of shape {tuple(lost[0][1].shape)} replaces {name} of shape "
                    f"{shape}, whose layout was declared ({', '.join(sorted(attributes))}) and does not fit. Call "
                    "distclip.annotate_(param, mesh, placements) for the new parameter: Shard(dim) for a shard, "
                    "Replicate() for a replica."
                )
    return error


@lru_cache
def _carry_in_copies() -> None:
    """Make `copy.deepcopy` of a Parameter carry attributes, as torch does for other tensors."""
    # The method of the class is replaced. A method on the tensor would need a weak reference to the tensor, and
    # torch.utils.swap_tensors refuses a tensor that has weak references.
    copy_parameter = nn.Parameter.__deepcopy__

    @wraps(copy_parameter)
    def copy_with_attributes(param: Any, memo: dict[int, Any]) -> Any:
        new = copy_parameter(param, memo)  # type: ignore[no-untyped-call]
        if type(param) is nn.Parameter and _layouts and not has_carried(param):
            # torch.utils.swap_tensors has exchanged the attributes with the contents.
            for module, name in _known_owners(param):
                if name in (known := _layouts.get(module, _Layouts())):
                    _give(param, *known[name])
        if type(param) is nn.Parameter and has_carried(param):
            vars(new).update(_attributes_of(param))
            # The copy of the module already exists, but gets its parameters later.
            for module, name in _owners_of(param):
                copied = memo.get(id(module))
                if isinstance(copied, nn.Module):
                    _remember_in(copied, name, new)
                    _add_owner(new, copied, name)
        return new

    nn.Parameter.__deepcopy__ = copy_with_attributes  # type: ignore[method-assign]


def _attributes_of(tensor: Tensor) -> dict[str, Any]:
    """Return the attributes of a tensor that are carried over."""
    own = vars(tensor)
    return {name: own[name] for name in _CARRIED.intersection(own)} if own else {}


def _remember_in(module: nn.Module, name: str, param: Tensor) -> None:
    _layouts.setdefault(module, _Layouts())[name] = _attributes_of(param), tuple(param.shape)


def _give(param: Tensor, attributes: dict[str, Any], shape: tuple[int, ...]) -> bool:
    """Set the attributes of a parameter that replaces one of that shape, and return whether they fit."""
    if tuple(param.shape) != shape and _FLATTENED not in vars(param):
        return False
    vars(param).update(attributes)
    return True


def _owners_of(param: Tensor) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules that have a parameter, with its name in each."""
    found = list(_known_owners(param))
    # Only a Parameter can belong to a module. An integration's stand-in tensors, for instance, do not.
    if not found and isinstance(param, nn.Parameter):
        # `to_empty`, `fully_shard` and others replace parameters without registering the new ones.
        _index(list(_modules))
        found = list(_known_owners(param))
        if not found and _num_scans < _MAX_SCANS:
            _scan()
            found = list(_known_owners(param))
    yield from found


def _known_owners(param: Tensor) -> Iterator[tuple[nn.Module, str]]:
    for ref, name in _owners.get(id(param), ()):
        module = ref()
        # An old entry can have the id of a parameter that no longer exists.
        if module is not None and module._parameters.get(name) is param:
            yield module, name


def _add_owner(param: Tensor, module: nn.Module, name: str) -> None:
    """Note that a module has a parameter, or is about to have it."""
    # An old entry can have the id of a parameter that no longer exists.
    own = [
        (ref, old) for ref, old in _owners.get(id(param), ()) if ref() is not None and (ref(), old) != (module, name)
    ]
    _owners[id(param)] = [*own, (weakref.ref(module), name)]


def _scan() -> None:
    """Find the modules of all existing parameters, and from now on of every parameter that is registered."""
    global _num_scans
    _num_scans += 1
    if _num_scans == 1:
        register_module_parameter_registration_hook(_on_registration)
    # isinstance is avoided, because it reads `__class__` of proxies.
    _index(one for one in gc.get_objects() if issubclass(type(one), nn.Module))


def _index(modules: Iterable[nn.Module]) -> None:
    """Record the modules of all parameters of some modules, and forget all that were recorded before."""
    _owners.clear()
    for module in modules:
        parameters = module.__dict__.get("_parameters", {})
        if any(param is not None for param in parameters.values()):
            _modules.add(module)
        for name, param in parameters.items():
            if param is not None:
                _owners.setdefault(id(param), []).append((weakref.ref(module), name))


def _on_registration(module: nn.Module, name: str, param: Any) -> None:
    """Carry attributes over to a parameter with which a module replaces another."""
    if not isinstance(param, Tensor):
        return
    _modules.add(module)
    _add_owner(param, module, name)
    if _attributes_of(param):
        _remember_in(module, name, param)
        return
    old = module._parameters.get(name)
    if old is not None and (attributes := _attributes_of(old)):
        _remember_in(module, name, old)
        if not nn.parameter.is_lazy(param):
            _give(param, attributes, tuple(old.shape))
