"""Sums, quotients and squares of large tensors, on a CPU in chunks that stay in a core's cache."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from qsr_engine.averaging.buckets import Piece

CHUNK = 1 << 16  # elements that stay in a core's cache; torch gives a thread half as many at least
EXACT = 1 << 20  # elements up to which squares are added up in fp64, which takes up to 2 ms

_ACCURATE = (torch.float32, torch.float64)  # values of other types are added up in fp32


def add_up(sources: Sequence[Tensor], targets: Sequence[Tensor], divisor: int = 1) -> Iterator[Tensor]:
    """Write the sum of the sources over the divisor into the targets, chunk by chunk. For use in torch.no_grad().

    Args:
        sources: 1-d tensors of the same size and type on a CPU; the first is used up where its type is accurate.
        targets: of the same size; sources may be among them.
    Yields:
        The chunks that were written, before they were rounded to the type of the targets.
    """
    for (first, *others), written in zip(_chunks(sources), _chunks(targets), strict=True):
        total = first if first.dtype in _ACCURATE or not others else first.float()
        for other in others:
            total.add_(other)
        if divisor & (divisor - 1):
            total.div_(divisor)
        elif divisor > 1:
            total.mul_(1 / divisor)  # the same bits, and sooner
        for chunk in written:
            if chunk.data_ptr() != total.data_ptr():
                chunk.copy_(total)
        yield total


def _chunks(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(tensor, _chunk()) for tensor in tensors), strict=True)


class _ThisThread(threading.local):
    beside_compute = False


_this_thread = _ThisThread()


@contextlib.contextmanager
def beside_compute() -> Iterator[None]:
    """Inside, this thread works alone, since all others of the rank compute: chunks are too small to be shared.

    torch.set_num_threads() would not do: it also sets how many threads later ones, and MKL's calls anywhere, have.
    """
    _this_thread.beside_compute = True
    try:
        yield
    finally:
        _this_thread.beside_compute = False


def _chunk() -> int:
    """Elements of a chunk, on which all threads of this rank work together, or this one alone."""
    return CHUNK // 2 if _this_thread.beside_compute else CHUNK // 2 * max(2, torch.get_num_threads())


@torch.no_grad()
def divide(flat: Tensor, into: Tensor, divisor: int) -> Tensor | None:
    """Write a 1-d tensor over the divisor into another of its size, which may be the same.

    Returns:
        On a CPU the sum of squares of what was written, as sum_of_squares() finds it, in the same pass over memory; on
        a GPU None.
    """
    if flat.is_cuda:
        torch.div(flat, divisor, out=into)
        return None
    squares = squares_of_chunks(add_up([flat], [into], divisor), flat.numel())
    return squares if squares.isfinite() else sum_of_squares(into)


def squares_of_chunks(chunks: Iterable[Tensor], numel: int) -> Tensor:
    """Sum of squares of 1-d chunks on a CPU, in their order, as an fp64 scalar.

    Args:
        numel: elements of the whole that the chunks are a part of; beyond EXACT each is added up in its own type (in
            fp32 below it), and only their sums in fp64.
    """
    return torch.stack([_squares_of_chunk(chunk, numel <= EXACT) for chunk in chunks]).double().sum()


def _squares_of_chunk(chunk: Tensor, exact: bool) -> Tensor:
    """By itself, so that at most one chunk at a time is there in another type."""
    if exact:
        chunk = chunk.double()
    elif chunk.dtype not in _ACCURATE:
        chunk = chunk.float()
    return torch.dot(chunk, chunk)


@torch.no_grad()
def sum_of_squares(flat: Tensor) -> Tensor:
    """Sum of squares of a 1-d tensor, as an fp64 scalar on its device; not finite if and only if an element is not.

    On a CPU, beyond EXACT elements: 2e-7 relative in fp32, and a tenth of the time of vector_norm in fp64.
    """
    if flat.is_cuda:
        return squares_by_norms(flat)
    chunks = torch.split(flat, _chunk())
    total = squares_of_chunks(chunks, flat.numel())
    if not total.isfinite():  # or squares beyond fp32
        total = torch.stack([chunk.double().square().sum() for chunk in chunks]).sum()
    return total


def squares_by_norms(flat: Tensor) -> Tensor:
    """sum_of_squares() where launches cost more than passes over memory. torch (2.14) makes an fp64 copy of what it
    takes the norm of, so that is a part of 8 MB at a time."""
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in torch.split(flat, EXACT)]
    return torch.stack(norms).square().sum()


def squares_of_piece(piece: Piece) -> Tensor:
    """Sum of squares of a piece, as sum_of_squares() of a tensor."""
    return torch.stack([sum_of_squares(tensor.view(-1)) for tensor in piece.tensors]).sum()
