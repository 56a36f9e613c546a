"""Training data: WebDataset shards in one folder with an `index.json`, written, checked and read.

`index` is the model of index.json, `writing` makes shards, `order` says which samples a rank reads in an epoch,
`shards` and `decoding` turn tar members into tensors, and `loader` gives batches. `TrainLoader` and `EvalLoader` are
imported from `qsr_engine.data.loader`: they import torch, which takes seconds, and `qsr shards` does not need it.
"""

from qsr_engine.data.index import DataError, Index, check_shards, read_index, verify_checksums
from qsr_engine.data.writing import index_shards, write_digits, write_imagefolder

__all__ = [
    "DataError",
    "Index",
    "check_shards",
    "index_shards",
    "read_index",
    "verify_checksums",
    "write_digits",
    "write_imagefolder",
]
