"""Connect torch.distributed to a simulated world by a store and a process group whose messages are requests.

Every rank is a thread with a separate torch.distributed. `RankState` holds the state that a process would hold, and is
swapped in while its rank runs.
"""

from __future__ import annotations

import copy
import functools
import math
import pickle
import random
import threading
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d
from torch._C._distributed_c10d import Store
from torch.distributed import distributed_c10d
from torch.futures import Future

from ..comm import discovery, process_group, waiting
from ..sharding import dtensor, replicas, split_over
from .network import Failure

__all__ = ["BACKEND", "Ask", "RankState", "SimulatedStore", "exception_of", "gather_objects", "start_rank"]

BACKEND = "distclip_simulated"
"""Name of the backend of torch.distributed."""

Ask: TypeAlias = Callable[..., Any]
"""Function of a rank that makes a request, and returns the reply or raises."""


def exception_of(failure: Failure) -> Exception:
    """Return the exception that torch.distributed raises for a failure."""
    return (dist.DistStoreError if failure.kind == "timeout" else RuntimeError)(failure.text)


class SimulatedStore(Store):
    """Key-value store whose operations are requests of one rank.

    Args:
        ask: makes the requests.
        timeout: seconds until a wait for a key fails.
        prefix: text before every key.
    """

    def __init__(self, ask: Ask, timeout: float, prefix: str = "") -> None:
        super().__init__()
        self._ask, self._seconds, self._prefix = ask, timeout, prefix
        self._prefixed: dict[str, SimulatedStore] = {}
        self.set_timeout(timedelta(seconds=timeout))

    def prefixed(self, prefix: str) -> SimulatedStore:
        """Return the same store with a prefix before every key, without a C++ object."""
        if prefix not in self._prefixed:
            self._prefixed[prefix] = SimulatedStore(self._ask, self._seconds, f"{self._prefix}{prefix}/")
        return self._prefixed[prefix]

    def set(self, key: str, value: str | bytes) -> None:
        """Set a key."""
        self._ask("set", self._prefix + key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        """Wait until a key has a value, and return it."""
        value: bytes = self._ask("get", (self._prefix + key,), self._seconds)
        return value

    def add(self, key: str, amount: int) -> int:
        """Add to the number of a key, and return the sum."""
        total: int = self._ask("add", self._prefix + key, amount)
        return total

    def check(self, keys: Sequence[str]) -> bool:
        """Return whether all keys have values."""
        return bool(self._ask("check", tuple([self._prefix + key for key in keys])))

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys have values."""
        seconds = self._seconds if timeout is None else timeout.total_seconds()
        self._ask("wait", tuple([self._prefix + key for key in keys]), seconds)

    def delete_key(self, key: str) -> bool:
        """Delete a key."""
        return bool(self._ask("delete", self._prefix + key))

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Set a key if it has the expected value."""
        both = [value.encode() if isinstance(value, str) else bytes(value) for value in (expected, desired)]
        value: bytes = self._ask("compare_set", self._prefix + key, *both)
        return value

    def append(self, key: str, value: str | bytes) -> None:
        """Append to the value of a key."""
        self._ask("append", self._prefix + key, value.encode() if isinstance(value, str) else bytes(value))

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """Return the values of several keys."""
        return [self.get(key) for key in keys]

    def multi_set(self, keys: Sequence[str], values: Sequence[bytes]) -> None:
        """Set several keys."""
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def has_extended_api(self) -> bool:
        """Return True: the store has `append`, `multi_get` and `multi_set`."""
        return True

    # Names under which C++ looks the methods up.
    deleteKey, compareSet, multiGet, multiSet, hasExtendedApi = (
        delete_key,
        compare_set,
        multi_get,
        multi_set,
        has_extended_api,
    )


# The methods have the names under which C++ looks them up, in several versions of torch.
_ProcessGroup: Any = dist.ProcessGroup


class _Group(_ProcessGroup):  # type: ignore[misc]
    """Process group of one rank. Every collective is one gather of bytes."""

    def __init__(self, ask: Ask, key: tuple[tuple[int, ...], str], rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._ask, self._key, self._index, self._size = ask, key, rank, size

    def size(self) -> int:
        return self._size

    @property
    def group_name(self) -> Any:
        return self._key[1]

    def getBackendName(self) -> str:
        return BACKEND

    def _meet(self, kind: str, content: bytes) -> tuple[bytes, ...]:
        contents: tuple[bytes, ...] = self._ask("meet", self._key, kind, content)
        return contents

    def _exchange(self, kind: str, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, which have the shape and dtype of this one."""
        return [_tensor_of(content, tensor) for content in self._exchange_bytes(kind, tensor)]

    def _exchange_bytes(self, kind: str, tensor: Tensor) -> tuple[bytes, ...]:
        return self._meet(f"{kind} of {tensor.numel()} {str(tensor.dtype)[6:]}", _bytes_of(tensor))

    def _exchange_reduced(self, kind: str, tensor: Tensor, op: Any) -> Tensor:
        """Return the reduction of the tensors of all ranks. Do not modify it."""
        return _reduced(self._exchange_bytes(kind, tensor), tensor, op)

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        for tensor in tensors:
            _write(tensor, self._exchange_reduced(f"all-reduce ({_op_name(op)})", tensor, op))
        return _done(tensors)

    allreduce_coalesced = allreduce

    def begin_all_reduce(self, tensor: Tensor, op: Any) -> _AllReduce:
        """Begin an all-reduce that the rank can wait for with a timeout."""
        return _AllReduce(self._ask, self._key, tensor, op)

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None) -> Any:
        for parts, tensor in zip(outputs, inputs, strict=True):
            for part, value in zip(parts, self._exchange("all-gather", tensor), strict=True):
                _write(part, value.view(part.shape))
        return _done(outputs)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        _write(output, torch.cat([part.reshape(-1) for part in self._exchange("all-gather", input)]).view(output.shape))
        return _done([output])

    def all_gather_single_coalesced(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> Any:
        for output, tensor in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, tensor)
        return _done(outputs)

    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> Any:
        for tensor in tensors:
            _write(tensor, self._exchange("broadcast", tensor)[opts.rootRank])
        return _done(tensors)

    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> Any:
        for tensor in tensors:
            total = self._exchange_reduced("reduce", tensor, opts.reduceOp)
            if self._index == opts.rootRank:
                _write(tensor, total)
        return _done(tensors)

    def reduce_scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = None) -> Any:
        for output, parts in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, torch.cat([part.reshape(-1) for part in parts]), opts)
        return _done(outputs)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        total = self._exchange_reduced("reduce-scatter", input, op).view(self._size, -1)
        _write(output, total[self._index].view(output.shape))
        return _done([output])

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Any:
        for output, tensor in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, tensor, opts)
        return _done(outputs)

    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> Any:
        sent = [_bytes_of(tensor) for tensor in inputs]
        for output, content in zip(outputs, self._all_to_all(sent), strict=True):
            _write(output, _tensor_of(content, output))
        return _done(outputs)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int], opts: Any = None
    ) -> Any:
        lengths = list(input_sizes or [len(input) // self._size] * self._size)
        received = self._all_to_all([_bytes_of(part) for part in torch.split(input, lengths)])
        _write(output, _tensor_of(b"".join(received), output))
        return _done([output])

    def _all_to_all(self, sent: Sequence[bytes]) -> list[bytes]:
        # The header has lengths, so that each rank finds its part in the contribution of every other rank.
        lengths = torch.tensor([len(part) for part in sent], dtype=torch.int64)
        own, width = [], 8 * self._size
        for content in self._meet("all-to-all", _bytes_of(lengths) + b"".join(sent)):
            sizes = _tensor_of(content[:width], lengths).tolist()
            start = width + sum(sizes[: self._index])
            own.append(content[start : start + sizes[self._index]])
        return own

    def scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> Any:
        content = b"".join(map(_bytes_of, inputs[0])) if self._index == opts.rootRank else b""
        size = outputs[0].numel() * outputs[0].element_size()
        whole = self._meet("scatter", content)[opts.rootRank]
        _write(outputs[0], _tensor_of(whole[self._index * size : (self._index + 1) * size], outputs[0]))
        return _done(outputs)

    def gather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> Any:
        values = self._exchange("gather", inputs[0])
        if self._index == opts.rootRank:
            for part, value in zip(outputs[0], values, strict=True):
                _write(part, value)
        return _done(outputs)

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the values of all ranks. Torch's own gather pads them with uninitialized memory."""
        return [pickle.loads(content) for content in self._meet("all-gather of objects", pickle.dumps(value))]

    def barrier(self, opts: Any = None) -> Any:
        self._meet("barrier", b"")
        return _done([])

    def send(self, tensors: Sequence[Tensor], peer: int, tag: int) -> Any:
        line = (self._key, self._index, peer, tag)
        self._ask("send", line, b"".join(map(_bytes_of, tensors)))
        return _done(tensors)

    def recv(self, tensors: Sequence[Tensor], peer: int, tag: int) -> Any:
        line = (self._key, peer, self._index, tag)
        _write(tensors[0], _tensor_of(self._ask("receive", line), tensors[0]))
        return _done(tensors)

    # Earlier versions of torch use these names.
    _allgather_base, allgather_into_tensor_coalesced = all_gather_single, all_gather_single_coalesced
    _reduce_scatter_base, reduce_scatter_tensor_coalesced = reduce_scatter_single, reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


class _AllReduce:
    """Work of an all-reduce. The rank enters the all-reduce when it first waits for it."""

    def __init__(self, ask: Ask, key: tuple[tuple[int, ...], str], tensor: Tensor, op: Any) -> None:
        self._ask, self._key, self._tensor, self._op = ask, key, tensor, op
        self._has_begun = self._is_completed = False

    def is_completed(self) -> bool:
        return self._is_completed

    def wait(self, timeout: timedelta | None = None) -> None:
        if self._is_completed:
            return
        seconds, tensor = math.inf if timeout is None else timeout.total_seconds(), self._tensor
        request: tuple[Any, ...] = ("await", self._key, seconds)
        if not self._has_begun:
            kind = f"all-reduce ({_op_name(self._op)}) of {tensor.numel()} {str(tensor.dtype)[6:]}"
            request, self._has_begun = ("meet", self._key, kind, _bytes_of(tensor), seconds), True
        try:
            contents = self._ask(*request)
        except dist.DistStoreError:
            raise
        except BaseException:
            self._is_completed = True
            raise
        self._is_completed = True
        _write(tensor, _reduced(contents, tensor, self._op))


def _bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _tensor_of(content: bytes, like: Tensor) -> Tensor:
    if not content:
        return torch.empty(like.shape, dtype=like.dtype)
    # This makes a copy, because the bytes belong to all ranks.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(like.dtype).view(like.shape)


def _write(target: Tensor, value: Tensor) -> None:
    # Autograd must not record the write of a message.
    with torch.no_grad():
        target.detach().copy_(value)


_REDUCTIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    dist.ReduceOp.SUM: lambda parts: parts.sum(0, dtype=parts.dtype),
    dist.ReduceOp.AVG: lambda parts: parts.sum(0, dtype=parts.dtype) / len(parts),
    dist.ReduceOp.MAX: lambda parts: parts.amax(0),
    dist.ReduceOp.MIN: lambda parts: parts.amin(0),
    dist.ReduceOp.PRODUCT: lambda parts: parts.prod(0, dtype=parts.dtype),
}


_OP_NAMES = {known: str(known).rsplit(".", 1)[-1].lower() for known in _REDUCTIONS}

_MAX_KEPT = 4096
"""Maximum size in bytes of a message whose reduction is cached."""


def _op_name(op: Any) -> str:
    return next((name for known, name in _OP_NAMES.items() if op == known), str(op))


def _reduced(contents: tuple[bytes, ...], like: Tensor, op: Any) -> Tensor:
    """Return the reduction of the contributions of all ranks, with the shape and dtype of one of them."""
    # A cache helps, because all ranks reduce the same contributions, and a rank that runs again reduces them again.
    reduce = _reduce_small if len(contents[0]) <= _MAX_KEPT else _reduce
    return reduce(contents, like.dtype, _op_name(op)).view(like.shape)


def _reduce(contents: tuple[bytes, ...], dtype: torch.dtype, op_name: str) -> Tensor:
    for known, name in _OP_NAMES.items():
        if op_name == name:
            parts = torch.frombuffer(bytearray(b"".join(contents)) or bytearray(1), dtype=torch.uint8)
            whole = parts[: sum(map(len, contents))].view(dtype)
            return _REDUCTIONS[known](whole.view(len(contents), -1 if contents[0] else 0))
    raise NotImplementedError(f"a simulated world has no reduction {op_name}")


_reduce_small = functools.lru_cache(maxsize=4096)(_reduce)


def _done(value: Any) -> Any:
    """Return a `Work` that is complete."""
    future: Any = Future()
    future.set_result(value)
    c10d: Any = _distributed_c10d
    return c10d._create_work_from_future(future)


_local = threading.local()
"""The function `ask` of the rank that runs in this thread."""


def _create_group(options: Any, _: Any = None) -> _Group:
    """Create a process group for torch.distributed. As with gloo, all members must create it together."""
    ask: Ask = _local.ask
    ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
    group = _Group(ask, (ranks, options.group_id), options.group_rank, options.group_size)
    ask("meet", (ranks, options.group_id), "creation of the group", b"")
    return group


def _ask_outside(*request: Any) -> Any:
    raise RuntimeError(f"{request[0]} within a simulated world, and no rank runs in this thread")


_STATE_OF_A_PROCESS = (
    (discovery, "_sessions"),
    (discovery, "_memory"),
    (discovery, "_numbers"),
    (waiting, "_meetings"),
    (waiting, "_by_group"),
    (waiting, "_called"),
    (process_group, "_derived"),
    # Equal meshes of two ranks are the same key.
    (dtensor, "_sums_of_mesh"),
    (replicas, "_replicas_of_mesh"),
    (split_over, "_ranks_of_mesh"),
    (split_over, "_ranks_of_axes"),
)
"""Variables of modules that depend on the rank, all of them containers."""


class _RankWorld(distributed_c10d._World):
    """Process groups of one rank. Torch keeps those of a process in module variables."""

    pg_map: Any = None
    pg_names: Any = None
    pg_group_ranks: Any = None
    pg_backend_config: Any = None
    tags_to_pg: Any = None
    pg_to_tag: Any = None
    group_count: Any = 0

    def __init__(self) -> None:
        super().__init__()
        self.pg_map, self.pg_names, self.pg_group_ranks = {}, {}, {}
        self.pg_backend_config, self.tags_to_pg, self.pg_to_tag = {}, {}, {}


def _copies(values: dict[str, Any]) -> dict[str, Any]:
    """Return the same values, with copies of the containers."""
    return {name: copy.copy(one) if isinstance(one, dict | list) else one for name, one in values.items()}


class RankState:
    """State of torch.distributed, of distclip and of random numbers in the process of one rank.

    Args:
        seed: seed of the random numbers of the rank.
        draws: whether the rank may draw numbers from the generators of torch and Python. If it may, swapping their
            states takes as long as ten messages.
    """

    def __init__(self, seed: str, *, draws: bool = True) -> None:
        self._seed, self._draws, self._groups = seed, draws, dict[str, Any]()
        self.random = random.Random(seed)
        self._world: Any = _RankWorld()
        self._kept: list[Any] = [type(vars(module)[name])() for module, name in _STATE_OF_A_PROCESS]
        self._torch_random = torch.Generator().manual_seed(self.random.getrandbits(60)).get_state()
        self._python_random = self.random.getstate()

    def keep(self) -> None:
        """Keep the rank's current process groups for `reset`."""
        world = self._swapped_world()
        self._groups = _copies(vars(world))

    def unregister_groups(self) -> None:
        """Remove the process groups since `keep` from C++, in the thread of the rank."""
        c10d: Any = _distributed_c10d
        for name in set(self._swapped_world().pg_names.values()).difference(self._groups["pg_names"].values()):
            c10d._unregister_process_group(name)

    def reset(self) -> None:
        """Restore the state of the rank at `keep`."""
        vars(self._world).update(_copies(self._groups))
        self._kept = [type(one)() for one in self._kept]
        self.random.seed(self._seed)

    def _swapped_world(self) -> Any:
        # While the rank runs, its state is that of the process.
        return distributed_c10d._world

    def swap(self) -> None:
        """Exchange the state of the process with that of the rank. Call it again to undo it."""
        distributed_c10d._world, self._world = self._world, distributed_c10d._world
        for i, (module, name) in enumerate(_STATE_OF_A_PROCESS):
            present = vars(module)
            present[name], self._kept[i] = self._kept[i], present[name]
        if not self._draws:
            return
        torch_random, python_random = torch.get_rng_state(), random.getstate()
        torch.set_rng_state(self._torch_random)
        random.setstate(self._python_random)
        self._torch_random, self._python_random = torch_random, python_random


def gather_objects(values: list[Any], value: Any, group: Any = None) -> None:
    """Gather values in a simulated group, instead of `all_gather_object`."""
    found: Any = dist.group.WORLD if group is None else group
    values[:] = found.gather_objects(value)


def present_store() -> SimulatedStore | None:
    """Return the store of the rank that runs in this thread, or None."""
    store: SimulatedStore | None = vars(_local).get("store")
    return store


def start_rank(ask: Ask, rank: int, size: int, timeout: float) -> None:
    """Initialize torch.distributed for the rank that runs in this thread.

    Args:
        ask: makes the requests of the rank.
        rank: rank in the world.
        size: size of the world.
        timeout: seconds until a wait for a key of the store fails.
    """
    _local.ask = ask
    # Otherwise a backward pass could run in a thread that belongs to no rank.
    torch.autograd.set_multithreading_enabled(False)
    # C++ keeps the store alive, but not the Python object with its methods.
    _local.store = store = SimulatedStore(ask, timeout)
    dist.init_process_group(BACKEND, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))


with warnings.catch_warnings():
    dist.Backend.register_backend(BACKEND, _create_group, extended_api=True, devices=["cpu"])
