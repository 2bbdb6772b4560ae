"""Read the files of a run without executing anything that they name.

A run directory may come from elsewhere. A pickle in it can name any function, and a config any `_target_`. See
docs/security.md.
"""

import io
import json
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from yaml import YAMLError

from distclip.errors import printable

_SIZES = "sizes.json"

_CONF = Path(__file__).parents[2] / "conf"

# These are the types that torch.distributed.checkpoint writes into its file .metadata. None of them runs code when it
# is created.
_METADATA = "torch.distributed.checkpoint.metadata"
_METADATA_TYPES = {
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
_METADATA_TYPES |= {("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class DamagedError(Exception):
    """A checkpoint is incomplete, or its bytes have changed."""


class UnsafeError(Exception):
    """A checkpoint names a type or file that is not known to be safe to load."""


class _Unpickler(pickle.Unpickler):
    """Reads only the types of a checkpoint's metadata."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_TYPES:
            return super().find_class(module, name)
        # The module is not imported here. A name that no module has is more likely damage than an attack.
        kind = UnsafeError if module.partition(".")[0] in {*sys.modules, *sys.stdlib_module_names} else DamagedError
        raise kind(f"its .metadata names {printable(f'{module}.{name}')}, which is no type of a checkpoint")


class Reader(FileSystemReader):
    """Reads a checkpoint of torch.distributed.checkpoint, whose metadata is a pickle."""

    # Unlike torch's signature, this one has no `rank`, so torch does not look for a pickle of each rank.
    def read_metadata(self) -> Metadata:
        """Return the metadata.

        Raises:
            DamagedError: the file cannot be read. UnsafeError: it names other types.
        """
        try:
            metadata = _Unpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        except (DamagedError, UnsafeError):
            raise
        except Exception as error:
            # A damaged pickle can raise any error.
            raise DamagedError(f"its .metadata cannot be read ({type(error).__name__})") from None
        if type(metadata) is not Metadata or not isinstance(metadata.storage_data, dict):
            raise DamagedError("its .metadata is not that of a checkpoint")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        """Return the bytes of one tensor or value, after a check of its checksum."""
        data = io.BytesIO(super()._slice_file(file, sinfo).read(-1))
        _check_sum(data)
        return data


class Planner(DefaultLoadPlanner):
    """Loads values that are not tensors as numbers, text, lists and dictionaries."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load one value."""
        safe = io.BytesIO()
        # torch's planner unpickles the bytes that it gets, so it gets bytes that have been read safely.
        torch.save(load_weights(value), safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)


def load_weights(file: Any) -> Any:
    """Load a file of `torch.save` that holds tensors, numbers, text, lists and dictionaries.

    Raises:
        UnsafeError: it holds other types. DamagedError: it cannot be read.
    """
    _check_sum(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"(?:[Uu]nsupported (?:global|GLOBAL|class)|unrecognized function).*", str(error)):
            raise UnsafeError(f"{printable(found[0])[:200]}") from None
        raise DamagedError("a value cannot be read (UnpicklingError)") from None
    except Exception as error:
        raise DamagedError(f"a value cannot be read ({type(error).__name__})") from None


def _check_sum(file: Any) -> None:
    """Raise unless the contents of a file of `torch.save` match its checksums."""
    # torch writes checksums, but does not check them.
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise DamagedError(f"a value cannot be read ({type(error).__name__})") from None
    if isinstance(file, io.BytesIO):
        file.seek(0)
    if damaged is not None:
        raise DamagedError("the checksum of a value is wrong")


def check_checkpoint(path: Path) -> None:
    """Check the metadata and the size of every file, without reading the tensors.

    Raises:
        DamagedError: the checkpoint is not whole. UnsafeError: loading it could run code, or read other files.
    """
    if not (path / ".metadata").is_file():
        # DeepSpeed's checkpoints have another format.
        if not (path / "engine").is_dir():
            raise DamagedError("it has no .metadata")
        for name, size in _read_sizes(path).items():
            _check_size(path, name, size)
        return
    for info in Reader(path).read_metadata().storage_data.values():
        if not isinstance(info.relative_path, str) or os.path.basename(info.relative_path) != info.relative_path:
            name = printable(info.relative_path)
            raise UnsafeError(f"its .metadata refers to the file {name} outside of the checkpoint")
        _check_size(path, info.relative_path, info.offset + info.length)


def write_sizes(path: Path) -> None:
    """Write the list of a checkpoint's files, if its format has no such list."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    (path / _SIZES).write_text(json.dumps({str(file.relative_to(path)): file.stat().st_size for file in files}))


def _read_sizes(path: Path) -> dict[str, int]:
    try:
        sizes = json.loads((path / _SIZES).read_text(encoding="utf-8"))
        return {str(name): int(size) for name, size in sizes.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DamagedError(f"its {_SIZES} cannot be read ({type(error).__name__})") from None


def _check_size(path: Path, name: str, size: int) -> None:
    file = path / name
    if not file.is_file() or file.stat().st_size < size:
        raise DamagedError(f"{printable(name)} is missing or too short")


@contextmanager
def weights_only(types: Sequence[Any]) -> Iterator[None]:
    """Make every `torch.load` in the block safe, even if a library asks for the opposite.

    Args:
        types: types of the library that hold nothing but data.
    """
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ[names[0]] = "1"
    try:
        with torch.serialization.safe_globals(list(types)):
            yield
    finally:
        del os.environ[names[0]]
        os.environ.update(before)


def read_config(run: Path, cfg: DictConfig) -> DictConfig:
    """Return the config of a run, or exit if it cannot be read or names unknown targets.

    Args:
        run: its directory.
        cfg: config of this job, which is trusted, like its command line.
    """
    path = run / "config.yaml"
    try:
        saved = OmegaConf.load(path)
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        reason = type(error).__name__
        raise SystemExit(f"resume={run}: its config.yaml cannot be read ({reason}). Use another run") from None
    if not isinstance(saved, DictConfig):
        raise SystemExit(f"resume={run}: its config.yaml is not a config. Use another run")
    # A job saves its config without interpolations. An interpolation could build a `_target_` when it is read.
    if "${" in path.read_text(encoding="utf-8"):
        raise SystemExit(f"resume={run}: its config.yaml has interpolations, which no job writes. Use another run")
    unknown = {*_targets(saved)} - {*_own_targets(), *_targets(cfg)}
    if unknown:
        raise SystemExit(
            f"resume={run}: its config.yaml names {', '.join(sorted(map(printable, unknown)))}, and no group of conf/ "
            "does. It is not called, because a config from elsewhere can name any function. Pass it on the command "
            "line if you trust it, for example clip._target_=NAME"
        )
    return saved


def _targets(node: Any) -> Iterator[str]:
    """Yield every `_target_` in a config."""
    plain = OmegaConf.to_container(node) if isinstance(node, DictConfig | ListConfig) else node
    if isinstance(plain, dict):
        if "_target_" in plain:
            yield str(plain["_target_"])
        yield from (target for value in plain.values() for target in _targets(value))
    elif isinstance(plain, list):
        yield from (target for value in plain for target in _targets(value))


@cache
def _own_targets() -> frozenset[str]:
    texts = [path.read_text(encoding="utf-8") for path in _CONF.glob("**/*.yaml")]
    return frozenset(target for text in texts for target in re.findall(r"_target_: *([\w.]+)", text))
