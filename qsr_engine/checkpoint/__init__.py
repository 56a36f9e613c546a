"""Checkpoints that are whole or are not there.

manifest        what a checkpoint says of itself
together        an error of one rank is an error of all
find            which checkpoints are whole, and which is the newest
write           under a temporary name, then renamed
rank_file       what one rank keeps
buffers         a module's buffers by name, also those that it makes later
model_file      the averaged model
other_layout    a checkpoint of another number of workers
"""

from qsr_engine.checkpoint.manifest import CheckpointError

__all__ = ["CheckpointError"]
