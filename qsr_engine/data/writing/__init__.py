"""Making and checking folders of shards; nothing here imports torch at the start.

Files in the order in which they import one another:

    folder         files that are there whole or not at all
    shard          one shard
    processes      jobs in several processes, and no process left behind
    verifying      checks a finished folder
    stored         where one image lies
    imagenet       lists the images of ILSVRC's archives
    imagefolder    lists those of a folder, or of such archives in it
    resuming       the plan of the shards, written in several processes, and gone on with after a kill
    data_sets      what there is to write: a folder or archive of images, CIFAR-10, digits, shards that exist
"""

from qsr_engine.data.writing.data_sets import index_shards, write_cifar10, write_digits, write_imagefolder
from qsr_engine.data.writing.verifying import verify_shards

__all__ = ["index_shards", "verify_shards", "write_cifar10", "write_digits", "write_imagefolder"]
