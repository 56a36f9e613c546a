"""A worker of one rank has no one to reduce gradients with: leave out what DeepSpeed does for it.

DeepSpeed reduces over one rank as over many: it copies every gradient into a bucket, the bucket into a flat tensor,
divides by 1, and copies back. The bits stay the same, and a step takes a tenth longer.
"""

from __future__ import annotations

from typing import Any


def leave_out_reduction(engine: Any) -> bool:
    """Have DeepSpeed use the gradients where backward left them; the same bits as a reduction over one rank.

    Stage 0 has a switch for it. ZeRO-1 goes over the parameters at the end of a backward, reduces every gradient, and
    then takes the gradients from where it found them; only the reducing is left out.

    Where a reduction does more than reduce, it stays: ZeRO-2 partitions with it, gradient accumulation in another type
    than the model's fills its buffer with it, and `communication_data_type` rounds with it.

    Returns:
        Whether the reduction is left out.
    """
    if not engine.zero_optimization():
        engine.enable_backward_allreduce = False
        return True
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() != 1 or not hasattr(optimizer, "reduce_ready_partitions_and_remove_grads"):
        return False
    dtypes = {optimizer.dtype, optimizer.communication_data_type, optimizer.gradient_accumulation_dtype}
    if len(dtypes) > 1 or optimizer.cpu_offload or optimizer.overlap_comm:
        return False
    optimizer.reduce_ready_partitions_and_remove_grads = _leave_in_place
    return True


def _leave_in_place(parameter: Any, group: int) -> None:
    """The sum over one rank is the gradient that is there."""
