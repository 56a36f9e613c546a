from collections.abc import Sequence
from typing import Any

from qsr_engine.data.decoding import Pixels

def size(data: bytes, /) -> tuple[int, int, bool]: ...
def decode(data: bytes, x: int, y: int, width: int, height: int, eighths: int = 8, /) -> bytes: ...
def decode_batch(
    sources: Sequence[bytes | tuple[int, int, int]],
    plans: Any,  # doubles, as the next one
    operations: Any,
    out: Pixels,
    size: int,
    threads: int = 1,
    /,
) -> list[str | None]: ...
def operate(picture: Any, side: int, operations: Any, /) -> None: ...
def set_vectors(level: int, /) -> None: ...
