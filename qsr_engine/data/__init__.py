"""Training data: WebDataset shards in one folder with an `index.json`, written, checked and read.

Files in the order in which they import one another:

    errors           what is wrong, in words for the user
    places           which places shards are read from: folders and URLs
    retrying         which reads are tried again, and when
    remote           files behind a URL
    index            the model of index.json
    checking         the files of shards beside what the index says of them
    images           Pillow: formats, limits, smaller copies; without torch
    rows             what the index keeps of every sample
    table            samples.npy, which holds these rows
    samples          what a sample must be: its image and its label
    tar              what is read of a tar file, and what is refused: headers, limits, keys and suffixes
    blocks           what a block of tokens must be, the sample of a text
    writing/         makes and checks folders of shards
    order            which samples a rank reads in an epoch, and in which order
    tar_shard        one local shard, its samples in any order
    cache            local copies of remote shards
    random_access    samples of local shards
    streaming        samples of shards as they come, without a copy
    sources          the one or the other of both, for a split
    views            which part of an image is shown
    randaugment      what training does to pictures beside the crop (_pixels.c: the same, compiled)
    decoding         from bytes to pixels (_batch.c, _jpeg.c, _resize.c: a batch in one call)
    batches          samples decoded into a batch, and what stands in for bad ones
    ring             loader processes, and memory that they share with the rank
    device           batches on the GPU, normalised and mixed there
    loader           the batches of a rank
    own_loader       a loader of the user's own in its place

`TrainLoader` and `EvalLoader` are imported from `qsr_engine.data.loader`: they import torch, which takes seconds, and
`qsr shards` does not need it.
"""

from qsr_engine.data.checking import check_shards
from qsr_engine.data.errors import DataError
from qsr_engine.data.index import Index, read_index
from qsr_engine.data.writing import (
    index_shards,
    shuffle_shards,
    verify_shards,
    write_cifar10,
    write_digits,
    write_imagefolder,
    write_text,
)

__all__ = [
    "DataError",
    "Index",
    "check_shards",
    "index_shards",
    "read_index",
    "shuffle_shards",
    "verify_shards",
    "write_cifar10",
    "write_digits",
    "write_imagefolder",
    "write_text",
]
