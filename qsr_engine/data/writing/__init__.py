"""Making and checking folders of shards; nothing here imports torch at the start.

Files in the order in which they import one another:

    folder         files that are there whole or not at all
    counted        what is passed over
    shard          one shard
    processes      jobs in several processes, and no process left behind
    scanning       reads one shard whole: what it holds, and what is wrong
    verifying      checks a finished folder
    stored         where one image lies
    imagenet       lists the images of ILSVRC's archives
    imagefolder    lists those of a folder, or of such archives in it
    resuming       the plan of the shards, written in several processes, and gone on with after a kill
    data_sets      what there is to write: a folder or archive of images, CIFAR-10, digits
    text           blocks of tokens, from files of text
    indexing       the index of shards that exist
    shuffling      shards that exist, written in a random order
"""

from qsr_engine.data.writing.data_sets import write_cifar10, write_digits, write_imagefolder
from qsr_engine.data.writing.indexing import index_shards
from qsr_engine.data.writing.shuffling import shuffle_shards
from qsr_engine.data.writing.text import write_text
from qsr_engine.data.writing.verifying import verify_shards

__all__ = [
    "index_shards",
    "shuffle_shards",
    "verify_shards",
    "write_cifar10",
    "write_digits",
    "write_imagefolder",
    "write_text",
]
