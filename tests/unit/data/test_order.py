"""Which samples a rank reads in an epoch, and in which order: every sample exactly once."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from qsr_engine.data.index import Shard, Split
from qsr_engine.data.order import epoch_of, plan_epoch, plan_evaluation, samples_before

SHA = "0" * 64


def split_of(sizes: list[int]) -> Split:
    shards = [Shard(name=f"s-{n}.tar", samples=size, bytes=1, sha256=SHA) for n, size in enumerate(sizes)]
    return Split(samples=sum(sizes), shards=shards)


def positions(slices: list[Any]) -> list[tuple[str, int]]:
    return [(piece.name, position) for piece in slices for position in range(piece.start, piece.stop)]


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    ranks=st.integers(1, 9),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 40),
)
def test_the_ranks_of_an_epoch_read_every_sample_exactly_once(
    sizes: list[int], ranks: int, seed: int, epoch: int
) -> None:
    split = split_of(sizes)
    plans = [plan_epoch(split, seed, epoch, rank, ranks) for rank in range(ranks)]
    read = [position for plan in plans for position in positions(plan)]
    assert sorted(read) == sorted((shard.name, n) for shard in split.shards for n in range(shard.samples))
    lengths = [len(positions(plan)) for plan in plans]
    assert max(lengths) - min(lengths) <= 1
    for rank, length in enumerate(lengths):
        before, after = (samples_before(e, split.samples, rank, ranks) for e in (epoch, epoch + 1))
        assert after - before == length
    streams = [samples_before(epoch, split.samples, rank, ranks) for rank in range(ranks)]
    assert max(streams) - min(streams) <= 1, "streams never drift apart"


@given(samples=st.integers(1, 50), ranks=st.integers(1, 9), data=st.data())
def test_a_position_is_found_in_its_epoch(samples: int, ranks: int, data: st.DataObject) -> None:
    rank, position = data.draw(st.integers(0, ranks - 1)), data.draw(st.integers(0, 500))
    epoch, before = epoch_of(position, samples, rank, ranks)
    start, stop = (samples_before(e, samples, rank, ranks) for e in (epoch, epoch + 1))
    assert start <= position < stop
    assert before == position - start


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8), ranks=st.integers(1, 9))
def test_evaluation_parts_cover_every_sample_once_and_in_order(sizes: list[int], ranks: int) -> None:
    split = split_of(sizes)
    parts = [positions(plan_evaluation(split, rank, ranks)) for rank in range(ranks)]
    everything = [(shard.name, n) for shard in split.shards for n in range(shard.samples)]
    assert [position for part in parts for position in part] == everything
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
