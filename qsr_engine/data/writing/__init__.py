"""Making and checking folders of shards; nothing here imports torch at the start.

data_sets      what there is to write: a folder or archive of images, CIFAR-10, digits, shards that exist
imagefolder    lists the images (imagenet: those of ILSVRC's archives; sources: where one of them lies)
resuming       the plan of the shards, written in several processes (processes), and gone on with after a kill
tar            one shard
verifying      checks a finished folder
"""

from qsr_engine.data.writing.data_sets import index_shards, write_cifar10, write_digits, write_imagefolder
from qsr_engine.data.writing.verifying import verify_shards

__all__ = ["index_shards", "verify_shards", "write_cifar10", "write_digits", "write_imagefolder"]
