"""What a worker keeps of its own parameters at an averaging: share x own + (1 - share) x averaged.

Source: Streaming DiLoCo (Douillard et al., arXiv 2501.18512), which mixes so what arrives steps later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qsr_engine.averaging.buckets import Piece
from qsr_engine.averaging.chunks import squares_of_piece

Averaged = Iterator[tuple[int, Tensor | None]]


def mixed(averaged: Averaged, pieces: Sequence[Piece], order: Sequence[int], share: float) -> Averaged:
    """What Reducer.run() gives of the pieces in `order`, of which each then holds the mixture.

    The squares stay those of the average. Meanwhile it takes a copy of these pieces.

    Args:
        averaged: not begun yet: it overwrites the workers' own values, also of a piece that it has not given.
        share: 0 gives the average and 1 the worker's own, bit for bit.
    """
    if share == 0:
        yield from averaged
        return
    own = {index: [tensor.clone() for tensor in pieces[index].tensors] for index in order}
    for index, squares in averaged:
        of_average = squares_of_piece(pieces[index]) if squares is None else squares
        with torch.no_grad():
            torch._foreach_lerp_(list(pieces[index].tensors), own.pop(index), share)
        yield index, of_average
