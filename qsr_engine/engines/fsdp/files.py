"""Parameters and optimizer state of one worker, written and read by torch.distributed.checkpoint.

    worker-00000/fsdp/.metadata          which tensors there are, and where each part of them is
    worker-00000/fsdp/__0_0.distcp       what rank 0 of the worker holds; one file a rank

One folder a worker: in a common one torch would take the workers' tensors for copies of one another and keep those of
one worker. The collectives stay inside the worker, and what fails on one rank is raised on all ranks of it. A worker of
another size reads its own parts out of the same files.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from qsr_engine.checkpoint.manifest import CheckpointError
from qsr_engine.checkpoint.model_file import named_state, read_model
from qsr_engine.engines.replica import Replica

FOLDER = "fsdp"


class Counted(Protocol):
    """What is saved of the engine, and what it does before its parameters are read or changed."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    global_steps: int
    global_samples: int
    micro_steps: int

    def hold_masters(self) -> None: ...


class FSDPFiles:
    """The FSDP engine's files of one worker; see checkpoint.checkpointer.WorkerFiles.

    Args:
        named: the parameters by their names.
        group: the ranks that write one worker's folder together.
    """

    folder = FOLDER
    may_differ = frozenset({"workers", "worker_size", "precision"})

    def __init__(
        self, engine: Counted, named: Mapping[str, nn.Parameter], replica: Replica, group: dist.ProcessGroup
    ) -> None:
        self._engine, self._named, self._replica, self._group = engine, named, replica, group
        self._optimizer = engine.optimizer

    def write(self, folder: Path, *, without_frozen: bool) -> None:
        self._engine.hold_masters()
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            if parameter.requires_grad or not without_frozen:
                tensors[f"parameters/{name}"] = parameter.detach()
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"state/{name}/{key}"] = value
        write(folder / FOLDER, tensors, self._group)

    def state_dict(self) -> dict[str, Any]:
        """What of the optimizer is no tensor, and the engine's counters."""
        plain = {
            name: {k: v for k, v in self._optimizer.state.get(parameter, {}).items() if not isinstance(v, Tensor)}
            for name, parameter in self._named.items()
        }
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        engine = self._engine
        return {
            "counts": [engine.global_steps, engine.global_samples, engine.micro_steps],
            "plain": {name: values for name, values in plain.items() if values},
            "groups": groups,
        }

    def check(self, folder: Path) -> None:
        names(folder / FOLDER)

    @torch.no_grad()
    def load(self, folder: Path, own: Mapping[str, Any], **options: Any) -> None:
        """In place: the parameters stay where they are, and so does optimizer state that is there already."""
        strange = sorted(set(options) - {"load_module_strict", "load_optimizer_states", "load_lr_scheduler_states"})
        if strange:
            raise CheckpointError(f"load_checkpoint({strange[0]}=...) means nothing to the FSDP engine; leave it out")
        self._engine.hold_masters()
        into: dict[str, Tensor] = {}
        loaded: dict[str, dict[str, Any]] = {}
        for key, entry in names(folder / FOLDER).items():
            kind, _, rest = key.partition("/")
            name, _, what = rest.rpartition("/") if kind == "state" else (rest, "", "")
            if name not in self._named:
                raise CheckpointError(f"{folder}: it has a parameter {name!r}, which this model has not")
            parameter = self._named[name]
            if kind == "parameters":
                into[key] = parameter.detach()
                continue
            value = self._optimizer.state.get(parameter, {}).get(what)
            if not isinstance(value, Tensor) or value.shape != entry.size or value.dtype != entry.properties.dtype:
                value = self._empty_state(parameter, what, entry)
            into[key] = value
            loaded.setdefault(name, {})[what] = value
        read(folder / FOLDER, into, self._group)
        self._take_over(loaded, own)

    def _empty_state(self, parameter: Tensor, what: str, entry: Any) -> Tensor:
        if entry.size == parameter.shape:
            return torch.zeros_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
        group: dict[str, Any] = next(
            (g for g in self._optimizer.param_groups if any(p is parameter for p in g["params"])), {}
        )
        on_host = what == "step" and not (group.get("capturable") or group.get("fused"))  # as torch's own load does
        return torch.zeros(entry.size, dtype=entry.properties.dtype, device="cpu" if on_host else self._engine.device)

    def _take_over(self, loaded: Mapping[str, dict[str, Any]], own: Mapping[str, Any]) -> None:
        self._optimizer.zero_grad()
        for name, parameter in self._named.items():
            values = {**loaded.get(name, {}), **own["plain"].get(name, {})}
            self._optimizer.state.pop(parameter, None)
            if values:
                self._optimizer.state[parameter] = values
        for group, saved in zip(self._optimizer.param_groups, own["groups"], strict=True):
            group.update(saved)
        engine = self._engine
        engine.global_steps, engine.global_samples, engine.micro_steps = own["counts"]

    def read_model(self, folder: Path) -> None:
        self._engine.hold_masters()
        read_model(folder, self._engine.module, self._replica.put)

    def model(self, *, keep: bool, frozen: bool) -> dict[str, Tensor]:
        self._engine.hold_masters()
        return named_state(self._engine.module, self._replica.whole, keep=keep, frozen=frozen)


def write(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Write tensors, sharded over the group or whole, under their names. Collective in the group.

    Raises:
        CheckpointError: a rank of the group could not write.
    """
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=False)
    try:
        save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise CheckpointError(f"{folder}: {_reasons(error)}") from error


def names(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Names of the tensors that write() wrote, with their sizes (`size`) and types (`properties.dtype`).

    Raises:
        CheckpointError: there are none, or the file that lists them is not torch's.
    """
    found = _Reader(folder).read_metadata().state_dict_metadata
    return {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def read(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Read into tensors, in place, each rank its part. Collective in the group.

    Raises:
        CheckpointError: a tensor is missing, or of another size, or the files cannot be read.
    """
    try:
        load(dict(tensors), storage_reader=_Reader(folder), planner=_TensorsOnly(), process_group=group)
    except CheckpointException as error:
        raise CheckpointError(f"{folder}: {_reasons(error)}") from error


def _reasons(error: CheckpointException) -> str:
    return "; ".join(dict.fromkeys(f"{type(e).__name__}: {e}" for e, _ in error.failures.values()))


class _Reader(FileSystemReader):
    """torch's reader, which takes .metadata for a pickle that may run anything; this one makes its classes only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
        except Exception as error:  # a pickle of any bytes raises anything
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path}: holds a {type(metadata).__name__}, and not what torch writes there")
        _check_places(path, metadata)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _check_places(path: Path, metadata: Metadata) -> None:
    """Raises CheckpointError where a part is to be read from elsewhere than a file of this folder."""
    try:
        names = {place.relative_path for place in metadata.storage_data.values()}
        strange = [name for name in names if not (isinstance(name, str) and re.fullmatch(r"\w+\.distcp", name))]
        listed = isinstance(metadata.state_dict_metadata, dict)
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: is not what torch writes there: {error}") from error
    if strange or not listed:
        raise CheckpointError(f"{path}: {strange[:1]!r:.200} is no file of this folder, so nothing of it is read")


class _TensorsOnly(DefaultLoadPlanner):
    """torch's plan of what is read; of what is no tensor it would make any object, and write() writes none."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn}: it is no tensor, and nothing else is read")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        plain = {
            ("builtins", "set"),
            ("builtins", "slice"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),
        }
        if (module, name) in plain or (module, name) in _TORCHS_OWN or (module == "torch" and name in _DTYPES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which torch does not write there")


_TORCHS_OWN = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}
_DTYPES = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}
