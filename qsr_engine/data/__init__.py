"""Training data: WebDataset shards in one folder with an `index.json`, written, checked and read.

    index            the model of index.json
    images           Pillow: formats, limits, smaller copies; without torch
    writing/         makes and checks folders of shards
    order            which samples a rank reads in an epoch, and in which order
    retrying         which reads are tried again, and when
    tar_members      what is read of a tar file, and what is refused
    random_access    one sample of a local tar file
    shards           samples from local files, or from streams (remote: URLs and their cache)
    views            which part of an image is shown
    decoding         from bytes to pixels (_jpeg.c: one region of a JPEG; gpu_decoding: the whole of it, by nvJPEG)
    ring             loader processes, and memory that they share with the rank
    loader           batches
    device           batches on the GPU, normalised and mixed there

`TrainLoader` and `EvalLoader` are imported from `qsr_engine.data.loader`: they import torch, which takes seconds, and
`qsr shards` does not need it.
"""

from qsr_engine.data.index import DataError, Index, check_shards, read_index
from qsr_engine.data.writing import index_shards, verify_shards, write_cifar10, write_digits, write_imagefolder

__all__ = [
    "DataError",
    "Index",
    "check_shards",
    "index_shards",
    "read_index",
    "verify_shards",
    "write_cifar10",
    "write_digits",
    "write_imagefolder",
]
