"""What is changed of DeepSpeed's insides, and the check that they are there. Each change is undone, or says why not.

DeepSpeed asks these groups       deepspeed_uses: it keeps them in one global variable
no barrier at the end of a save   without_barriers: the others would wait for a rank that failed
stage 3's check of all ranks      is made inside the worker; for good, and without workers it is DeepSpeed's own
reductions over one rank          leave_out_reduction
autocast of another engine        autocast_of_this_engine, own_autocast: it keeps that in global variables too
a collective for CPUs             leave_out_shared_memory_collective
TensorBoard's events after a load leave_out_later_events; for good
its learning rate                 show_base_rate: that of the first group, whatever its lr_scale; for good
deepspeed.initialize, zero.Init   replace_in_deepspeed
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import deepspeed.comm
import deepspeed.ops
import torch.distributed as dist
from deepspeed.runtime import torch_autocast
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups as deepspeed_groups

from qsr_engine.engines.deepspeed.groups import WorkerGroups
from qsr_engine.engines.deepspeed.version import check_internals, check_version
from qsr_engine.engines.events import go_on
from qsr_engine.engines.learning_rate import base_rate

_NEEDED: dict[Any, tuple[str, ...]] = {
    DeepSpeedEngine: ("forward", "step", "allreduce_gradients", "save_checkpoint", "load_checkpoint", "destroy"),
    partitioned_param_coordinator: ("assert_ints_same_as_other_ranks",),
    deepspeed_groups: ("mpu",),
    torch_autocast: ("TORCH_AUTOCAST_INITIALIZED", "TORCH_AUTOCAST_DTYPE", "get_comm_dtype"),
    DeepSpeedZeroOptimizer: (
        "update_lp_params",
        "get_param_id",
        "_wait_for_offload_copies",
        "reduce_ready_partitions_and_remove_grads",
    ),
    DeepSpeedZeroOptimizer_Stage3: (
        "_partition_all_parameters",
        "_get_param_partition_rank",
        "_reassign_or_swap_out_partitioned_parameters",
        "_finalize_offload_gradient_accumulation",
        "invalidate_secondary_tensor",
    ),
}
check_version(deepspeed.__version__)
check_internals(
    {f"{owner.__name__}.{name}": hasattr(owner, name) for owner, names in _NEEDED.items() for name in names},
    deepspeed.__version__,
)

deepspeed_initialize = deepspeed.initialize  # themselves, also while replace_in_deepspeed() has others there
deepspeed_zero_init = deepspeed.zero.Init


@contextlib.contextmanager
def deepspeed_uses(workers: WorkerGroups | None) -> Iterator[None]:
    """Let DeepSpeed ask these groups, None for all ranks.

    DeepSpeed keeps them in one global variable and reads it at every step, so that a second engine in the process
    would silently reduce over the groups of the first.
    """
    before = deepspeed_groups.mpu
    deepspeed_groups.mpu = workers
    try:
        yield
    finally:
        deepspeed_groups.mpu = before


@contextlib.contextmanager
def without_barriers() -> Iterator[None]:
    """DeepSpeed's save_checkpoint() ends in a barrier, where the other ranks would wait for one that failed.

    What it waits for is done otherwise: the folders exist before it, and checkpoint.write meets all ranks after it.
    """
    before = deepspeed.comm.barrier
    deepspeed.comm.barrier = lambda *args, **kwargs: None
    try:
        yield
    finally:
        deepspeed.comm.barrier = before


def _compare_inside_the_worker(ints: list[int]) -> None:
    """Stage 3 checks in its first forwards that all ranks run the same modules in the same order.

    DeepSpeed broadcasts from rank 0 to all ranks for it, also across workers. Here the ranks of a worker compare
    theirs; without workers it is DeepSpeed's own check.
    """
    workers = deepspeed_groups.mpu
    if not isinstance(workers, WorkerGroups):
        _compare_with_all_ranks(ints)
        return
    found: list[list[int]] = [[] for _ in range(workers.get_data_parallel_world_size())]
    if len(found) > 1:
        dist.all_gather_object(found, ints, group=workers.worker)
        if any(other != ints for other in found):
            raise RuntimeError(
                f"the ranks {dist.get_process_group_ranks(workers.worker)} of a worker run different modules or "
                "parameters under ZeRO stage 3, so their collectives would not match; a worker's ranks must take the "
                f"same path through the model. Numbers of modules or parameters found: {[len(o) for o in found]}"
            )


_compare_with_all_ranks = partitioned_param_coordinator.assert_ints_same_as_other_ranks
partitioned_param_coordinator.assert_ints_same_as_other_ranks = _compare_inside_the_worker


def keep_checks_inside_the_worker(engine: DeepSpeedEngine, groups: WorkerGroups) -> None:
    """Also where the model is called without the engine (`engine.module(...)`), as evaluations do."""
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    reset_step = coordinator.reset_step

    def reset_step_inside_the_worker() -> None:
        with deepspeed_uses(groups):
            reset_step()

    coordinator.reset_step = reset_step_inside_the_worker


@contextlib.contextmanager
def autocast_of_this_engine() -> Iterator[None]:
    """What DeepSpeed makes inside has `torch_autocast` if its own configuration says so, and not if another's did."""
    before = torch_autocast.TORCH_AUTOCAST_INITIALIZED, torch_autocast.TORCH_AUTOCAST_DTYPE
    torch_autocast.TORCH_AUTOCAST_INITIALIZED, torch_autocast.TORCH_AUTOCAST_DTYPE = False, None
    try:
        yield
    finally:
        torch_autocast.TORCH_AUTOCAST_INITIALIZED, torch_autocast.TORCH_AUTOCAST_DTYPE = before


def own_autocast(engine: DeepSpeedEngine) -> None:
    """Have a ZeRO optimizer reduce gradients in the types of its own engine, and scale the loss as under fp16.

    For `torch_autocast` in fp16 DeepSpeed 0.19.8 gives ZeRO a scaler of torch's, and never lowers its scale when
    gradients overflow, so that no step is taken any more; and it clips the gradients while they are scaled. Its own
    scaler for fp16 does both right. This one has the figures of torch's.
    """
    optimizer = engine.optimizer
    if not engine.zero_optimization():
        return
    own = torch_autocast.get_comm_dtype if engine.torch_autocast_enabled() else None
    optimizer.get_param_comm_dtype = own or (lambda parameter: optimizer.communication_data_type)
    if optimizer.torch_autocast_gradscaler is not None:
        optimizer.torch_autocast_gradscaler = None
        optimizer.loss_scaler = DynamicLossScaler(
            init_scale=2.0**16,
            scale_window=2000,
            min_scale=2.0**-14,
            delayed_shift=1,
            consecutive_hysteresis=False,
            raise_error_at_min_scale=False,
        )
        optimizer.dynamic_loss_scale = optimizer.check_grad_overflow = True


def leave_out_reduction(engine: DeepSpeedEngine) -> bool:
    """Have DeepSpeed use the gradients of a worker of one rank where backward left them.

    DeepSpeed reduces over one rank as over many: it copies every gradient into a bucket, the bucket into a flat tensor,
    divides by 1, and copies back. The bits stay the same, and a step takes a tenth longer.

    Stage 0 has a switch for it. ZeRO-1 goes over the parameters at the end of a backward, reduces every gradient, and
    then takes the gradients from where it found them; only the reducing is left out.

    Where a reduction does more than reduce, it stays: ZeRO-2 partitions with it, gradient accumulation in another type
    than the model's fills its buffer with it, and `communication_data_type` and `torch_autocast` round with it.

    Returns:
        Whether the reduction is left out.
    """
    if not engine.zero_optimization():
        engine.enable_backward_allreduce = False
        return True
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() != 1 or not hasattr(optimizer, "reduce_ready_partitions_and_remove_grads"):
        return False
    if engine.torch_autocast_enabled():
        return False
    dtypes = {optimizer.dtype, optimizer.communication_data_type, optimizer.gradient_accumulation_dtype}
    if len(dtypes) > 1 or optimizer.cpu_offload or optimizer.overlap_comm:
        return False
    optimizer.reduce_ready_partitions_and_remove_grads = _leave_in_place
    return True


def _leave_in_place(parameter: Any, group: int) -> None:
    """The sum over one rank is the gradient that is there."""


def leave_out_later_events(engine: DeepSpeedEngine) -> None:
    """After a load, have DeepSpeed's TensorBoard monitor begin a file that takes the place of later events.

    Its other monitors know no such thing: a CSV file gets the steps that are taken again once more.
    """
    monitor: Any = getattr(engine.monitor, "tb_monitor", None)
    writer = getattr(monitor, "summary_writer", None)
    if writer is not None:
        monitor.summary_writer = go_on(writer, engine.global_samples)


def show_base_rate(engine: DeepSpeedEngine) -> None:
    """Its monitor gets the learning rate without the factor of the first parameter group."""
    write = engine.monitor.write_events

    def write_base_rate(events: list[tuple[str, Any, int]], *args: Any, **kwargs: Any) -> None:
        rate = base_rate(engine.optimizer.param_groups)
        write([(tag, rate if tag == "Train/Samples/lr" else v, x) for tag, v, x in events], *args, **kwargs)

    engine.monitor.write_events = write_base_rate


def leave_out_shared_memory_collective() -> None:
    """Before the process group starts: DeepSpeed would compile a collective for CPUs that only its inference calls.

    Compiling takes a minute and a C++ compiler.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def replace_in_deepspeed(
    initialize: Callable[..., tuple[Any, Any, Any, Any]],
    zero_init: Callable[..., contextlib.AbstractContextManager[Any]],
) -> Iterator[None]:
    """Until the block ends, `deepspeed.initialize` and `deepspeed.zero.Init` are these for all who call them so."""
    leave_out_shared_memory_collective()
    before = deepspeed.initialize, deepspeed.zero.Init
    deepspeed.initialize, deepspeed.zero.Init = initialize, zero_init
    try:
        yield
    finally:
        deepspeed.initialize, deepspeed.zero.Init = before
