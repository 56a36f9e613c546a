"""Buckets of s3, gs and hf without a cloud: fsspec's file system in memory, registered under their protocol."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


@contextmanager
def bucket(folder: Path, protocol: str) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """The URL of a bucket with the files of a folder, and what was opened there: its name, and where reading began.

    A stand-in: what s3fs, gcsfs and huggingface_hub do beneath fsspec's interface is not in it.
    """
    opened: list[tuple[str, int]] = []

    class StandIn(MemoryFileSystem):
        store: dict[str, object] = {}
        pseudo_dirs = [""]
        cachable = False

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.rpartition("://")[2].strip("/")

        def open(self, path: str, *args: object, **options: object) -> object:
            stream = super().open(path, *args, **options)
            name, seek = Path(path).name, stream.seek
            opened.append((name, 0))

            def seek_and_tell(place: int, *rest: int) -> int:
                opened[-1] = (name, place)
                return int(seek(place, *rest))

            stream.seek = seek_and_tell
            return stream

    StandIn.protocol = protocol
    fsspec.register_implementation(protocol, StandIn, clobber=True)
    try:
        for path in folder.iterdir():
            StandIn().pipe(f"/bucket/set/{path.name}", path.read_bytes())
        opened.clear()
        yield f"{protocol}://bucket/set", opened
    finally:
        import_module("fsspec.registry")._registry.pop(protocol)
