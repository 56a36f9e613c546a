"""Fragments: parts of the buckets that are averaged at steps of their own.

They are views of the buckets, 1-d and contiguous; every element of a bucket is in exactly one of them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from qsr_engine.averaging.buckets import ALIGNMENT, Piece, place_in
from qsr_engine.config.strict import ConfigError


def check_fragments(fragments: int, trained: int) -> None:
    """Raises ConfigError where there are fewer trained parameters than fragments."""
    if fragments > trained:
        raise ConfigError(
            f"qsr.averaging.fragments is {fragments}, and {trained} parameters are trained, of which a fragment has at "
            f"least one; write {trained} or fewer"
        )


def balanced(sizes: Sequence[int], fragments: int) -> list[int]:
    """The fragment of each of the tensors of so many bytes, which stay in their order.

    Each fragment has at least one, and is about as large as the others: it ends with the tensor whose end is nearest to
    its share of all bytes.

    Args:
        fragments: at most as many as there are tensors.
    """
    ends = list(accumulate(sizes))
    numbers, begin = list[int](), 0
    for fragment in range(fragments - 1):
        share = (fragment + 1) * ends[-1] / fragments
        at = bisect_left(ends, share, lo=begin, hi=len(ends) - (fragments - fragment))
        if at > begin and share - ends[at - 1] <= ends[at] - share:
            at -= 1
        numbers += [fragment] * (at + 1 - begin)
        begin = at + 1
    return numbers + [fragments - 1] * (len(sizes) - begin)


def cut(buckets: Iterable[Tensor], fragments: int) -> list[list[Tensor]]:
    """Every bucket in equal parts, on cache lines; a short one gives nothing to the last fragments."""
    found: list[list[Tensor]] = [[] for _ in range(fragments)]
    for bucket in buckets:
        line = max(1, ALIGNMENT // bucket.element_size())
        size = max(1, -(-bucket.numel() // (fragments * line)) * line)
        for fragment, part in zip(found, torch.split(bucket, size), strict=False):
            fragment.append(part)
    return found


def by_tensor(
    buckets: Sequence[Tensor], tensors: Sequence[Tensor], numbers: Sequence[int], fragments: int
) -> list[list[Tensor]]:
    """The fragments, where it is known of each tensor in the buckets to which of them it belongs.

    What lies between two tensors goes with the first, and so does a tensor that begins inside another one.
    """
    begins: list[list[tuple[int, int]]] = [[] for _ in buckets]  # of each, (first element, fragment) of its parts
    ends = [0] * len(buckets)
    places = [(*place_in(t, buckets), number) for t, number in zip(tensors, numbers, strict=True) if t.numel()]
    for bucket, start, stop, number in sorted(places):
        if not begins[bucket]:
            begins[bucket].append((0, number))
        elif start >= ends[bucket] and number != begins[bucket][-1][1]:
            begins[bucket].append((start, number))
        ends[bucket] = max(ends[bucket], stop)
    found: list[list[Tensor]] = [[] for _ in range(fragments)]
    for flat, parts in zip(buckets, begins, strict=True):
        for (start, number), (stop, _) in zip(parts, [*parts[1:], (flat.numel(), 0)], strict=True):
            found[number].append(flat[start:stop])
    return found


def numbers_of(pieces: Sequence[Piece], fragments: Sequence[Sequence[Tensor]]) -> list[int]:
    """The fragment of each piece."""
    begins = sorted((part.data_ptr(), number) for number, parts in enumerate(fragments) for part in parts)
    addresses = [address for address, _ in begins]
    return [begins[bisect_right(addresses, piece.tensors[0].data_ptr()) - 1][1] for piece in pieces]
