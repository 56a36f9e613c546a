"""Write the samples of a folder of shards again, in a random order."""

from __future__ import annotations

import random
from pathlib import Path

from qsr_engine.data.errors import DataError
from qsr_engine.data.images import image_suffix
from qsr_engine.data.index import TABLE_NAME, TOKENS, Index, read_index
from qsr_engine.data.places import is_url
from qsr_engine.data.writing.folder import refuse_data_set
from qsr_engine.data.writing.resuming import ShardPlan, ShardSize, write_planned
from qsr_engine.data.writing.stored import StoredImage


def shuffle_shards(
    folder: str | Path, out: str | Path, *, shard_bytes: int, seed: int = 0, processes: int = 1
) -> Index:
    """Write every split of indexed shards into new ones, its samples shuffled by the seed; images keep their bytes.

    When this was killed, call it again: finished shards are kept where they still have their checksums.

    Args:
        shard_bytes: a shard has at most so many, unless it holds one image alone.
        processes: number of processes that write.
    Raises:
        DataError: there is no index, or one without samples.npy; the shards are behind a URL; out holds another data
            set; a file cannot be read or written.
    """
    folder, out = Path(folder), Path(out)
    refuse_data_set(out)
    index = read_index(folder)
    if index.table is None:
        raise DataError(f"{folder}: its index has no {TABLE_NAME}; `qsr shards index {folder} --again` makes it")
    if index.place is not None and is_url(index.place):
        raise DataError(f"{folder}: its shards are at {index.place}, and folders are shuffled; copy them here first")
    from qsr_engine.data.table import open_table  # numpy, which not every command needs

    table, places = open_table(folder / TABLE_NAME, index), Path(index.place or folder)
    splits: dict[str, list[StoredImage]] = {}
    for name, split in index.splits.items():
        splits[name] = [
            StoredImage(str(places / shard.name), label, length, offset, f"sample {number}")
            for shard in split.shards
            for number, (offset, length, label) in enumerate(
                table.part(shard.name, shard.samples)[["offset", "length", "label"]].tolist()
            )
        ]
        random.Random(seed).shuffle(splits[name])
    plan = ShardPlan(
        index.classes,
        splits,
        {name: [image.size for image in images] for name, images in splits.items()},
        _load if index.text is None else _load_block,
        ShardSize(shard_bytes, None),
        {"images": str(index.digest()), "seed": seed, "shard_bytes": shard_bytes},
        index.text,
    )
    return write_planned(out, plan, processes)


def _load_block(source: StoredImage) -> tuple[str, bytes, None]:
    return TOKENS, source.read(), None


def _load(source: StoredImage) -> tuple[str, bytes, int]:
    data = source.read()
    return image_suffix(data, source.where), data, source.label
