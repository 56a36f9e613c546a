"""Buckets: every element once, whatever sizes, strides, types and sharing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qsr_engine.averaging import ring_bytes
from qsr_engine.averaging.buckets import (
    ALIGNMENT,
    Piece,
    flat_buckets,
    joined,
    packed_pieces,
    parts_within,
    pieces_in_place,
    plan_buckets,
    small_first,
)


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 40), st.integers(1, 16))
def test_every_segment_is_placed_once(sizes: list[int], capacity: int, alignment: int) -> None:
    buckets = plan_buckets(sizes, capacity, alignment)
    placed = [index for bucket in buckets for index, _ in bucket.slots]
    assert placed == [index for index, size in enumerate(sizes) if size]
    for bucket in buckets:
        end = 0
        for index, offset in bucket.slots:
            assert offset >= end, "segments overlap"
            assert offset % alignment == 0
            end = offset + sizes[index]
        assert end == bucket.numel
        assert bucket.numel <= capacity or len(bucket.slots) == 1


SHAPES = [(3,), (), (0,), (5, 7), (2, 3, 4, 4), (1000,)]


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[Tensor]:
    """Tensors of several types, some channels-last or transposed, some sharing memory, some given twice."""
    tensors: list[Tensor] = []
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["new", "channels_last", "transposed", "slice", "twice", "tied"]))
        shape = draw(st.sampled_from(SHAPES))
        dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
        fresh = torch.randn(shape, dtype=dtype)
        if kind == "channels_last" and fresh.ndim == 4:
            fresh = fresh.to(memory_format=torch.channels_last)
        elif kind == "transposed" and fresh.ndim == 2:
            fresh = fresh.t()
        elif kind == "slice":
            fresh = torch.randn(40, dtype=dtype)[3:37:4]
        elif kind == "twice" and tensors:
            fresh = draw(st.sampled_from(tensors))
        elif kind == "tied" and tensors:
            fresh = draw(st.sampled_from(tensors)).detach().reshape(-1)[1:]
        tensors.append(fresh)
    return tensors


@given(tensor_lists(), st.sampled_from([64, 1000, 1_000_000]))
def test_tensors_keep_values_shapes_and_strides_and_live_in_the_buckets(tensors: list[Tensor], size: int) -> None:
    before = [tensor.clone() for tensor in tensors]
    layout = [(tensor.shape, tensor.stride()) for tensor in tensors]
    buckets = flat_buckets(tensors, bucket_bytes=size)
    for tensor, value in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value)
    assert [(tensor.shape, tensor.stride()) for tensor in tensors] == layout
    for bucket in buckets:
        assert bucket.is_contiguous()
        bucket.fill_(7)  # what happens to the buckets happens to every element of every tensor
    assert all(bool((tensor == 7).all()) for tensor in tensors)


@given(tensor_lists())
def test_buckets_hold_nothing_twice(tensors: list[Tensor]) -> None:
    """Memory: the buckets are as large as the storage that the tensors cover, and alignment."""
    distinct = {
        (tensor.untyped_storage().data_ptr(), offset, tensor.dtype) for tensor in tensors for offset in _offsets(tensor)
    }
    covered = sum(dtype.itemsize for *_, dtype in distinct)
    size = sum(bucket.numel() * bucket.element_size() for bucket in flat_buckets(tensors, 1000))
    gaps = 4 * 40 * 8  # of strided slices
    assert covered <= size <= covered + len(tensors) * (ALIGNMENT + gaps)


KINDS = [torch.float32, torch.float64, torch.bfloat16]


@given(
    st.lists(st.tuples(st.integers(0, 400_000), st.sampled_from(KINDS)), max_size=12),
    st.sampled_from([64, 300, 5_000, 1_000_000, 100_000_000]),
    st.booleans(),
)
def test_every_element_is_in_exactly_one_piece(
    sizes: list[tuple[int, torch.dtype]], capacity: int, in_place: bool
) -> None:
    """Whole tensors or parts of them; found once by a bug that averaged buckets of 300 bytes twice."""
    sizes = [(size if capacity > 300 else size % 1000, dtype) for size, dtype in sizes]
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in sizes]
    pieces: list[Piece] = (pieces_in_place if in_place else packed_pieces)(tensors, capacity)
    for piece in pieces:
        assert piece.nbytes <= max(capacity, ALIGNMENT) or len(piece.tensors) == 1
        assert {tensor.dtype for tensor in piece.tensors} == {piece.dtype}
        assert piece.in_place <= (len(piece.tensors) == 1)
        for tensor in piece.tensors:
            tensor += 1
    assert all(bool((tensor == 1).all()) for tensor in tensors)


def test_small_buckets_travel_together() -> None:
    tensors = [torch.zeros(100), torch.zeros(1_000_000), torch.zeros(50), torch.zeros(7, dtype=torch.float64)]
    pieces = pieces_in_place(tensors, 64_000_000)
    assert [[tensor.numel() for tensor in piece.tensors] for piece in pieces] == [[1_000_000], [7], [100, 50]]


def test_the_first_pieces_are_small() -> None:
    """A forward waited for 32 MB before its first layer: a third of an averaging of ViT-S stood still."""
    buckets = [torch.zeros(4_000_000), torch.zeros(3_999_999), torch.zeros(70), torch.zeros(12_000_000)]
    pieces = pieces_in_place(small_first(buckets, 16_000_000), 16_000_000)
    megabytes = [round(piece.nbytes / 1e6) for piece in pieces]
    assert megabytes == [1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 4, 4, 3, 0, 4, 8, 8, 8, 8, 10]
    for piece in pieces:
        piece.tensors[0].add_(1)
    assert all(bool((bucket == 1).all()) for bucket in buckets)
    assert all(piece.tensors[0].data_ptr() % ALIGNMENT == 0 for piece in pieces)


def test_buckets_without_a_gap_are_joined() -> None:
    tensors = [torch.full((size,), float(size)) for size in (32, 16, 17, 64)] + [torch.zeros(16, dtype=torch.float64)]
    buckets = [bucket for bucket in flat_buckets(tensors, 64) if bucket.numel()]
    assert [bucket.numel() for bucket in buckets] == [32, 16, 17, 64, 16]
    whole = joined(buckets)
    assert [flat.numel() for flat in whole] == [65, 64, 16], "after 17 elements there is a gap"
    assert [part.tolist() for part in parts_within(whole[0][20:], buckets)] == [[32.0] * 12, [16.0] * 16, [17.0] * 17]
    for flat in whole:
        flat.add_(1)
    assert [tensor[0].item() for tensor in tensors] == [33, 17, 18, 65, 1]
    apart = [torch.zeros(16), torch.zeros(16)]
    assert [a is b for a, b in zip(joined(apart), apart, strict=True)] == [True, True]


def test_small_buckets_are_not_cut() -> None:
    buckets = [torch.zeros(400_000), torch.zeros(10), torch.zeros(0)]
    assert [part.numel() for part in small_first(buckets, 16_000_000)] == [400_000, 10, 0]
    large = [torch.zeros(4_000_000)]
    assert [part.numel() for part in small_first(large, 1_000_000)] == [4_000_000], "pieces are as small already"


def test_a_tensor_that_is_not_contiguous_is_packed_whole() -> None:
    tensor = torch.zeros(10, 30).t()
    assert [piece.tensors for piece in packed_pieces([tensor], 64)] == [(tensor,)]


def _offsets(tensor: Tensor) -> list[int]:
    places = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
    return torch.as_strided(places, tensor.shape, tensor.stride(), tensor.storage_offset()).reshape(-1).tolist()


def test_shared_weights_stay_shared() -> None:
    encoder, decoder = nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False)
    decoder.weight = nn.Parameter(encoder.weight.detach().t())  # another Parameter on the same memory
    tied = nn.Linear(4, 3, bias=False)
    tied.weight = encoder.weight
    buckets = flat_buckets([encoder.weight, decoder.weight, tied.weight], 1000)
    assert sum(bucket.numel() for bucket in buckets) == 12
    with torch.no_grad():
        encoder.weight[1, 2] = 5.0
    assert decoder.weight[2, 1] == 5.0
    assert tied.weight is encoder.weight


def test_optimizer_and_state_dict_go_on_working() -> None:
    torch.manual_seed(0)
    model, twin = nn.Linear(5, 3), nn.Linear(5, 3)
    twin.load_state_dict(model.state_dict())
    optimizer, twins = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, twin))
    flat_buckets(model.parameters(), 1000)
    for step in range(3):
        for m, o in ((model, optimizer), (twin, twins)):
            o.zero_grad()
            m(torch.full((2, 5), float(step))).square().sum().backward()
            o.step()
    assert torch.equal(model.weight, twin.weight)
    model.load_state_dict(twin.state_dict())


def test_what_cannot_be_averaged_is_refused() -> None:
    with pytest.raises(TypeError, match=r"dtype torch.int64.*shape \(3,\)"):
        flat_buckets([torch.arange(3)], 1000)
    with pytest.raises(TypeError, match="sparse"):
        flat_buckets([torch.eye(3).to_sparse()], 1000)


def test_ring_bytes() -> None:
    assert ring_bytes(1000, 1) == 0
    assert ring_bytes(1000, 2) == 1000
    assert ring_bytes(1000, 4) == 1500
