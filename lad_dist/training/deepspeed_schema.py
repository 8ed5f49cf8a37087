"""Check the keys of a config's [deepspeed] without deepspeed, which takes seconds to import.

check_keys(config)   raises UserError for a key that DeepSpeed lacks, one that lad_dist sets, or a value of another type

DeepSpeed silently ignores a misspelt key of its top level. It reports those in its blocks only after the weights have
been read. A test compares KEYS of the blocks with the installed DeepSpeed's; DeepSpeed itself checks the values.
"""

from typing import Any

from lad_dist.config.errors import UserError
from lad_dist.utils.suggest import did_you_mean

MANAGED_KEYS = {  # keys that other keys of the config set
    "train_batch_size": "data.micro_batches_per_step and data.micro_batch_tokens or micro_batch_size",
    "train_micro_batch_size_per_gpu": "data.micro_batch_tokens or micro_batch_size",
    "gradient_accumulation_steps": "data.micro_batches_per_step",
    "optimizer": "[optim]",
    "scheduler": "optim.schedule",
    "torch_autocast": "deepspeed.bf16 or fp16",
}
# The keys of tables, by the table's path; "" is the top level.
KEYS = {
    path: frozenset(keys.split())
    for path, keys in {
        "": """
            activation_checkpointing aio bf16 bfloat16 checkpoint comet comms_logger communication_data_type compile
            csv_monitor data_types disable_allgather dump_state flops_profiler fp16 gradient_allreduce_op
            gradient_clipping gradient_predivide_factor log_level memory_breakdown prescale_gradients steps_per_print
            tensorboard timers torch_autocast wall_clock_breakdown wandb zero_allow_untested_optimizer
            zero_force_ds_cpu_optimizer zero_optimization
        """,
        "bf16": """
            bf16_master_weights_and_grads bf16_optimizer_states check_grad_overflow enabled immediate_grad_update
        """,
        "fp16": """
            auto_cast consecutive_hysteresis enabled fp16_master_weights_and_grads hysteresis initial_scale_power
            loss_scale loss_scale_window min_loss_scale
        """,
        "zero_optimization": """
            allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm contiguous_gradients
            cpu_offload cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks
            gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module legacy_stage1
            load_from_fp32_weights log_trace_cache_warnings max_live_parameters max_reuse_distance
            memory_efficient_linear model_persistence_threshold module_granularity_threshold offload_optimizer
            offload_param overlap_comm override_module_apply param_persistence_threshold parameter_alignment
            pipeline_loading_checkpoint prefetch_bucket_size reduce_bucket_size reduce_scatter round_robin_gradients
            save_muon_momentum_buffer_in_memory stage stage3_allgather_sequential
            stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
            stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold
            stage3_module_granularity_threshold stage3_param_persistence_threshold stage3_prefetch_bucket_size
            stage3_use_all_reduce_for_fetch_params sub_group_size use_all_reduce_for_fetch_params
            use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size zero_quantized_gradients
            zero_quantized_nontrainable_weights zero_quantized_weights
        """,
        "zero_optimization.leaf_module": "classes name_suffixes names",
        "zero_optimization.offload_optimizer": """
            buffer_count cpuadam_cores_perc device fast_init nvme_path pin_memory pipeline_read pipeline_write ratio
            super_offload
        """,
        "zero_optimization.offload_param": "buffer_count buffer_size device max_in_cpu nvme_path pin_memory",
        "zero_optimization.zenflow": """
            auto_ratio full_warm_up_rounds offload overlap_step pt_reserved_cores_perc select_interval select_strategy
            steps_per_epoch topk_ratio update_interval
        """,
    }.items()
}
# Types that DeepSpeed does not check, and fails on much later.
VALUE_TYPES: dict[str, tuple[Any, str]] = {
    **dict.fromkeys((*filter(None, KEYS), "comms_logger", "flops_profiler"), (dict, "table")),
    **dict.fromkeys(("gradient_clipping", "gradient_predivide_factor"), (int | float, "number")),
}


def check_keys(config: dict[str, Any]) -> None:
    """Raise UserError for the first mistake."""
    for key in config.keys() & MANAGED_KEYS.keys():
        raise UserError(f"deepspeed.{key}: {MANAGED_KEYS[key]} sets this; remove the key")
    _check_table(config, "")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"deepspeed.zero_optimization.stage: must be 0, 1, 2 or 3, not {stage!r}")
    if config.get("bf16", {}).get("enabled") and stage == 0:
        raise UserError(
            "deepspeed.bf16: needs deepspeed.zero_optimization.stage = 1 or more, whose weights keep an fp32 copy"
        )
    if config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device") == "nvme":
        raise UserError(
            'deepspeed.zero_optimization.offload_optimizer.device: no checkpoint holds what is on "nvme"; use "cpu"'
        )
    for name, key in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if not config.get(name, {}).get(key, True):
            raise UserError(
                f"deepspeed.{name}.{key}: remove the key: without it, gradients that are not finite are used"
            )


def _check_table(table: dict[str, Any], path: str) -> None:
    for key, value in table.items():
        inner = f"{path}.{key}" if path else key
        if key not in KEYS[path]:
            hint = did_you_mean(key, KEYS[path] | (set() if path else MANAGED_KEYS.keys()))
            raise UserError(f"deepspeed.{inner}: DeepSpeed has no such key; {hint}")
        kind, name = VALUE_TYPES.get(inner, (object, ""))
        if not isinstance(value, kind) or (name == "number" and isinstance(value, bool)):
            raise UserError(f"deepspeed.{inner}: must be a {name}, not {value!r}")
        if inner in KEYS:
            _check_table(value, inner)
