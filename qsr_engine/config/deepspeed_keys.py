"""What becomes of every key of DeepSpeed 0.19.8's configuration under local steps.

Each of them works, is translated, is refused for some of its values, or is refused. A unit test asks the installed
DeepSpeed for its keys, and fails where this table does not know one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from qsr_engine.config.strict import ConfigError

WORKS = "works"  # as in DeepSpeed, where "all ranks" are those of a worker
TRANSLATED = "translated"  # DeepSpeed gets another value: resolve_deepspeed_config()
CHECKED = "checked"  # some values are refused: check_supported() says which
REFUSED = "refused"


def _keys(block: str, verdict: str, names: str) -> dict[str, str]:
    return {f"{block}.{name}" if block else name: verdict for name in names.split()}


_OFF = (None, False)  # and {}, and a block that says that it is not enabled

# The path of a refused key -> the values that are not refused; why, and what to write.
REFUSED_KEYS: dict[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(
        ("sequence_parallel_size", "data_parallel_size", "expert_parallel", "tensor_parallel", "pipeline"),
        ((None, False, 1), "which local steps do not support yet; leave it out"),
    ),
    "hybrid_engine": (_OFF, "which local steps do not support yet; leave it out"),
    "data_efficiency": (_OFF, "which local steps do not support yet; leave it out"),
    "autotuning": (_OFF, "which starts runs of its own and ends them after some steps; tune without local steps"),
    "checkpoint.load_universal": (_OFF, "and DeepSpeed then runs code that it finds in files; leave it out"),
    "checkpoint.writer": (_OFF, "which may still write when a checkpoint is said to be whole; leave it out"),
    "datastates_ckpt": (_OFF, "which still writes when a checkpoint is said to be whole; leave it out"),
    "managed_gradient_accumulation": ((None, True), "which local steps do not support yet; leave it out"),
    "weight_quantization": (_OFF, "and averages need parameters that are not quantized; leave it out"),
    "compile.deepcompile": (
        _OFF,
        "and compiled graphs then reduce gradients by themselves, which local steps do not support; leave it out "
        "(engine.compile() works)",
    ),
    **dict.fromkeys(
        ("bf16.bf16_optimizer_states", "bfloat16.bf16_optimizer_states"),
        (
            _OFF,
            "and DeepSpeed keeps them so beside masters in bf16 only, whose averages lose small steps; leave it out",
        ),
    ),
    "zero_optimization.zenflow": (_OFF, "and it delays a part of the update; leave it out"),
    **{
        f"zero_optimization.{name}": (
            _OFF,
            "and it needs CUDA kernels that were never tried with local steps; leave it out",
        )
        for name in ("zero_quantized_gradients", "zero_quantized_weights", "zero_quantized_nontrainable_weights")
    },
    "zero_optimization.round_robin_gradients": (
        _OFF,
        "and DeepSpeed 0.19.8 reads wrong masters under it, which checkpoints need; leave it out",
    ),
    "zero_optimization.enable_sanity_checks": (_OFF, "and its checks are collectives over all workers; leave it out"),
    "zero_optimization.elastic_checkpoint": (
        _OFF,
        "and its files are for other numbers of ranks, which local steps change by themselves; leave it out",
    ),
    "zero_optimization.load_from_fp32_weights": (
        (None, True),
        "and a run that is resumed would lose what its fp32 masters hold; leave it out",
    ),
    "zero_optimization.legacy_stage1": (_OFF, "and DeepSpeed has no such stage any more; leave it out"),
    "zero_optimization.cpu_offload": (
        _OFF,
        'and DeepSpeed has replaced it; write offload_optimizer: {"device": "cpu"}',
    ),
    "zero_optimization.cpu_offload_param": (
        _OFF,
        'and DeepSpeed has replaced it; write offload_param: {"device": "cpu"}',
    ),
    "zero_optimization.cpu_offload_use_pin_memory": (
        _OFF,
        "and DeepSpeed has replaced it; write pin_memory into offload_optimizer and offload_param",
    ),
    "zero_optimization.offload_optimizer.super_offload": (
        _OFF,
        "and it was never tried with local steps; leave it out",
    ),
    "zero_optimization.offload_optimizer.ratio": (
        (None, 1),
        "and masters that lie in two places were never tried with local steps; leave it out",
    ),
}
# That DeepSpeed 0.19.8 ends for, whatever they hold.
REMOVED_KEYS = frozenset(
    _keys("", REFUSED, "amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula")
    | _keys("", REFUSED, "progressive_layer_drop quantize_training sparse_attention sparse_gradients")
    | _keys("zero_optimization", REFUSED, "mics_shard_size mics_hierarchical_params_gather zeropp_loco_param")
)

KEYS: dict[str, str] = {
    **_keys("", TRANSLATED, "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps"),
    **_keys("", TRANSLATED, "gradient_clipping"),
    **_keys("", CHECKED, "optimizer scheduler zero_optimization bf16 bfloat16 fp16 torch_autocast"),
    **_keys("", CHECKED, "gradient_allreduce_op"),
    **_keys("", WORKS, "communication_data_type seq_parallel_communication_data_type prescale_gradients"),
    **_keys("", WORKS, "gradient_predivide_factor zero_allow_untested_optimizer zero_force_ds_cpu_optimizer"),
    **_keys("", WORKS, "steps_per_print dump_state disable_python_gc disable_allgather dataloader_drop_last log_level"),
    **_keys("", WORKS, "vocabulary_size wall_clock_breakdown memory_breakdown use_data_before_expert_parallelism"),
    **_keys("", WORKS, "activation_checkpointing aio timers tensorboard wandb csv_monitor comet comms_logger"),
    **_keys("", WORKS, "flops_profiler checkpoint compile data_types"),
    **_keys("activation_checkpointing", WORKS, "partition_activations contiguous_memory_optimization profile"),
    **_keys("activation_checkpointing", WORKS, "cpu_checkpointing number_checkpoints synchronize_checkpoint_boundary"),
    **_keys("flops_profiler", WORKS, "enabled recompute_fwd_factor profile_step module_depth top_modules detailed"),
    **_keys("flops_profiler", WORKS, "output_file"),
    **_keys("optimizer", CHECKED, "type"),
    **_keys("optimizer", WORKS, "params legacy_fusion"),
    **_keys("scheduler", WORKS, "type params"),
    **_keys("torch_autocast", CHECKED, "enabled dtype"),
    **_keys("torch_autocast", WORKS, "lower_precision_safe_modules"),
    **_keys("checkpoint", WORKS, "tag_validation use_node_local_storage parallel_write checkpoint_serialization"),
    **_keys("checkpoint.parallel_write", WORKS, "pipeline_stage"),
    **_keys("data_types", CHECKED, "grad_accum_dtype"),
    **_keys("data_types", WORKS, "param_dtype buffer_dtype keep_in_fp32_modules"),
    **_keys("fp16", CHECKED, "enabled fp16_master_weights_and_grads"),
    **_keys("fp16", WORKS, "auto_cast loss_scale initial_scale_power loss_scale_window hysteresis min_loss_scale"),
    **_keys("fp16", WORKS, "consecutive_hysteresis"),
    **_keys("compile", WORKS, "autoep_non_moe free_activation free_activation_threshold offload_activation"),
    **_keys("compile", WORKS, "offload_activation_pin_memory offload_opt_states double_buffer symmetric_memory"),
    **_keys("compile", WORKS, "debug_log offload_parameters sync_before_reduce sync_after_reduce passes"),
    **_keys("compile", WORKS, "sync_before_allgather sync_after_allgather keep_int_input_tensors"),
    **_keys("compile", WORKS, "keep_all_input_tensors"),
    **_keys("zero_optimization", CHECKED, "stage offload_optimizer offload_param zero_hpz_partition_size"),
    **_keys("zero_optimization", WORKS, "contiguous_gradients reduce_scatter reduce_bucket_size overlap_comm"),
    **_keys("zero_optimization", WORKS, "use_multi_rank_bucket_allreduce allgather_partitions allgather_bucket_size"),
    **_keys("zero_optimization", WORKS, "compute_grad_norm sub_group_size ignore_unused_parameters leaf_module"),
    **_keys("zero_optimization", WORKS, "parameter_alignment memory_efficient_linear pipeline_loading_checkpoint"),
    **_keys("zero_optimization", WORKS, "override_module_apply log_trace_cache_warnings"),
    **_keys("zero_optimization", WORKS, "stage3_gather_fp16_weights_on_model_save"),
    **_keys("zero_optimization", WORKS, "save_muon_momentum_buffer_in_memory"),
    **_keys("zero_optimization.offload_optimizer", CHECKED, "device"),
    **_keys("zero_optimization.offload_optimizer", WORKS, "nvme_path buffer_count pin_memory pipeline_read"),
    **_keys("zero_optimization.offload_optimizer", WORKS, "pipeline_write fast_init cpuadam_cores_perc"),
    **_keys("zero_optimization.offload_param", CHECKED, "device"),
    **_keys("zero_optimization.offload_param", WORKS, "nvme_path buffer_count buffer_size max_in_cpu pin_memory"),
    **{
        key: WORKS
        for name in (
            *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold"),
            *("max_live_parameters", "max_reuse_distance", "gather_16bit_weights_on_model_save"),
            *("module_granularity_threshold", "use_all_reduce_for_fetch_params", "allgather_sequential"),
        )
        for key in (f"zero_optimization.{name}", f"zero_optimization.stage3_{name}")
    },
    **{
        key: verdict
        for block in ("bf16", "bfloat16")
        for key, verdict in (
            _keys(block, CHECKED, "enabled bf16_master_weights_and_grads")
            | _keys(block, WORKS, "immediate_grad_update check_grad_overflow")
        ).items()
    },
    **dict.fromkeys(REFUSED_KEYS, REFUSED),
    **dict.fromkeys(REMOVED_KEYS, REFUSED),
}
_BLOCKS = frozenset(path.rpartition(".")[0] for path in KEYS)


def check_keys(config: Mapping[str, Any], block: str = "") -> None:
    """Refuse by name the keys that DeepSpeed does not know, and those that local steps do not support.

    A key that begins with `_`, outside the blocks, is a note of the user's.

    Raises:
        ConfigError: with the key's path, and the nearest name or what to write instead.
    """
    for key, value in config.items():
        path = f"{block}.{key}" if block else str(key)
        if path not in KEYS and not path.startswith("_"):
            names = [known.rpartition(".")[2] for known in KEYS if known.rpartition(".")[0] == block]
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise ConfigError(f"{path}: DeepSpeed 0.19.8 has no such key; {hint}")
        if path in REMOVED_KEYS:
            raise ConfigError(f"{path} is there, and DeepSpeed 0.19.8 has removed it; leave it out")
        harmless, why = REFUSED_KEYS.get(path, ((value,), ""))
        if value not in harmless and not _is_off(value):
            raise ConfigError(f"{path} is set, {why}")
        if path in _BLOCKS and isinstance(value, Mapping):
            check_keys(value, path)


def _is_off(value: Any) -> bool:
    """Whether it is a block that is empty, or says that it is not enabled."""
    return isinstance(value, Mapping) and (not value or value.get("enabled") is False)
