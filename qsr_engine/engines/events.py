"""TensorBoard's event files of an engine, whose x axis is samples over all workers."""

from __future__ import annotations

from typing import Any


def go_on(writer: Any, samples: int) -> Any:
    """torch's SummaryWriter of the same folder for a run that was loaded after so many samples.

    TensorBoard leaves out what earlier files hold of later ones: those steps are taken again.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer.close()
    return SummaryWriter(writer.log_dir, purge_step=samples + 1 if samples else None)
