"""Fragments are views of the buckets that have every element once; they are cut by layers, and are about equal."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qsr_engine.averaging.buckets import flat_buckets, pieces_in_place
from qsr_engine.averaging.fragments import balanced, by_tensor, cut, numbers_of
from qsr_engine.engines.replica import numbers_by_layer


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 60))
def test_fragments_are_balanced_and_none_is_empty(sizes: list[int], wanted: int) -> None:
    fragments = min(wanted, len(sizes))
    numbers = balanced(sizes, fragments)
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(fragments))
    if max(sizes) * fragments <= sum(sizes):  # else the end of one may be pushed on by those before it
        of_each = [sum(size for size, n in zip(sizes, numbers, strict=True) if n == p) for p in range(fragments)]
        # Each of its two ends is off its share by half of a tensor at most.
        assert all(abs(found - sum(sizes) / fragments) <= max(sizes) for found in of_each)


def test_fragments_by_hand() -> None:
    assert balanced([204 + 17, 34, 54], 2) == [0, 1, 1]
    assert balanced([1, 1, 1, 9], 2) == [0, 0, 0, 1]
    assert balanced([9, 1, 1, 1], 3) == [0, 1, 2, 2]
    assert balanced([5], 1) == [0]


def assert_every_element_once(buckets: list[Tensor], fragments: list[list[Tensor]]) -> None:
    for parts in fragments:
        for part in parts:
            assert part.is_contiguous()
            part += 1
    assert all((bucket == 1).all() for bucket in buckets)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), st.integers(1, 7))
def test_a_flat_bucket_is_cut_into_equal_parts(sizes: list[int], fragments: int) -> None:
    buckets = [torch.zeros(size) for size in sizes]
    found = cut(buckets, fragments)
    assert len(found) == fragments
    assert_every_element_once(buckets, found)
    for bucket in buckets:
        at = [part.data_ptr() - bucket.data_ptr() for parts in found for part in parts]
        assert all(start % 64 == 0 for start in at if 0 <= start < bucket.nbytes), "on cache lines"
    assert all(part.numel() <= -(-max(sizes) // fragments) + 15 for parts in found for part in parts)


@given(st.lists(st.integers(1, 60), min_size=2, max_size=12), st.integers(1, 5), st.integers(40, 300), st.data())
def test_tensors_are_in_the_fragment_that_is_named(
    sizes: list[int], fragments: int, capacity: int, data: st.DataObject
) -> None:
    numbers = data.draw(st.lists(st.integers(0, fragments - 1), min_size=len(sizes), max_size=len(sizes)))
    tensors = [torch.zeros(size) for size in sizes]
    buckets = flat_buckets(tensors, capacity)
    found = by_tensor(buckets, tensors, numbers, fragments)
    for number, parts in enumerate(found):
        for part in parts:
            part.fill_(number)
    for tensor, number in zip(tensors, numbers, strict=True):
        assert (tensor == number).all()
    pieces = [piece for parts in found for piece in pieces_in_place(parts, 64)]
    for piece, number in zip(pieces, numbers_of(pieces, found), strict=True):
        assert all((part == number).all() for part in piece.tensors), "no piece has elements of two"
    for bucket in buckets:
        bucket.zero_()
    assert_every_element_once(buckets, found)


def test_tensors_that_overlap_are_in_one_fragment() -> None:
    shared = torch.zeros(100)
    tensors = [shared, shared[20:60], torch.zeros(30)]
    buckets = flat_buckets(tensors, 10**6)
    found = by_tensor(buckets, tensors, [0, 1, 1], 2)
    assert_every_element_once(buckets, found)
    assert [sum(part.numel() for part in parts) for parts in found] == [112, 30], "64 bytes are 16 elements"


class Blocks(nn.Module):
    """Its optimizer has the biases in a group of their own, as for weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)


def test_layers_stay_together_in_the_order_of_the_module() -> None:
    model = Blocks()
    weights = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim == 1]
    # Layers of 40, 72 and 36 elements: 40 is nearer to half of 148 than 112 is.
    assert numbers_by_layer(model, weights + biases, 2) == [0, 1, 1, 0, 1, 1]
    assert numbers_by_layer(model, weights + biases, 3) == [0, 1, 2, 0, 1, 2]
    # More fragments than layers: parameters of 32, 8, 64, 8, 32 and 4 elements.
    assert numbers_by_layer(model, weights + biases, 6) == [0, 2, 4, 1, 3, 5]
    assert numbers_by_layer(model, [*weights, nn.Parameter(torch.zeros(200))], 2) == [0, 0, 0, 1], "not the module's"
