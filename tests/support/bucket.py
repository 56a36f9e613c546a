"""Buckets of s3, gs and hf without a cloud: fsspec's file system in memory, registered under their protocol."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


@contextmanager
def bucket(folder: Path, protocol: str) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """The URL of a bucket with the files of a folder, and what was opened there: its name, and where reading began.

    A stand-in: what s3fs, gcsfs and huggingface_hub do beneath fsspec's interface is not in it.
    """
    opened: list[tuple[str, int]] = []

    class Opened(io.BytesIO):
        def seek(self, place: int, whence: int = 0, /) -> int:
            opened[-1] = (opened[-1][0], place)
            return super().seek(place, whence)

    class StandIn(MemoryFileSystem):  # type: ignore[misc]
        store: dict[str, Any] = {}
        pseudo_dirs = [""]
        cachable = False

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.rpartition("://")[2].strip("/")

        def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
            if mode != "rb":
                return super()._open(path, mode, **options)
            content = self.cat_file(path)
            opened.append((Path(path).name, 0))
            return Opened(content)

        def cat_file(self, path: str, *_: Any) -> bytes:
            found = self.store.get(self._strip_protocol(path))
            if found is None:
                raise FileNotFoundError(path)
            return bytes(found.getvalue())

    StandIn.protocol = protocol
    fsspec.register_implementation(protocol, StandIn, clobber=True)
    try:
        for path in folder.iterdir():
            StandIn().pipe(f"/bucket/set/{path.name}", path.read_bytes())
        opened.clear()
        yield f"{protocol}://bucket/set", opened
    finally:
        import_module("fsspec.registry")._registry.pop(protocol)
