"""What a rank offers to the others of its host, and what of it is left when it is gone."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from qsr_engine.averaging.buckets import Piece, flat_buckets, pieces_in_place
from qsr_engine.averaging.shared_memory import map_offered, offer

SHM = Path("/dev/shm")


def pieces() -> list[Piece]:
    """Of buckets of two types, some of them cut."""
    types = [torch.float32] * 20 + [torch.float64] * 5
    buckets = flat_buckets([torch.full((1000 + n,), float(n), dtype=dtype) for n, dtype in enumerate(types)], 20_000)
    assert len(buckets) > 5
    return [piece for bucket in buckets for piece in pieces_in_place([bucket], 10_000)]


def test_a_rank_offers_one_file_that_another_maps_once() -> None:
    """It was a file a bucket, and a mapping a piece and rank: a large model ran out of file descriptors."""
    mine = pieces()
    offered = offer(mine)
    assert len(offered.files) == 1
    mapped = map_offered(offered, mine)
    assert len({flat.untyped_storage().data_ptr() for flat in mapped}) == 1
    for piece, flat in zip(mine, mapped, strict=True):
        assert torch.equal(piece.tensors[0], flat)
        flat.fill_(-1)  # seen here too
        assert bool((piece.tensors[0] == -1).all())


@pytest.mark.parametrize("strategy", ["file_descriptor", "file_system"])
def test_nothing_is_left_of_a_rank_that_is_killed(strategy: str) -> None:
    """With file_system, which a user may have set for a data loader, torch's share_memory_() leaves a named file."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            torch.multiprocessing.set_sharing_strategy(strategy)  # type: ignore[no-untyped-call]
            mine = pieces()
            offered = offer(mine)
            os.write(tell, str(offered.files[0][0]).encode())
            signal.pause()
        finally:
            os._exit(1)
    try:
        descriptor = int(os.read(told, 100))
        assert os.readlink(f"/proc/{child}/fd/{descriptor}").endswith(" (deleted)")
        assert not left_by(child)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
        os.close(tell)
    assert not left_by(child)


def left_by(process: int) -> list[str]:
    return [path.name for path in SHM.iterdir() if f"_{process}_" in path.name]
