"""The keys of a ds_config.json that DeepSpeed 0.19 knows, and those of them that do nothing in biokit.

Source: DeepSpeed's page "Configuration JSON" and the pydantic models of its release 0.19.8. A test compares this
table with the installed release.
"""

from __future__ import annotations

_OFFLOAD = "device nvme_path buffer_count pin_memory"
_MONITOR = "enabled output_path job_name"

# group (dotted) -> the keys inside it; the top level is "". A group that is not here is not looked into.
KNOWN_KEYS: dict[str, frozenset[str]] = {
    group: frozenset(keys.split())
    for group, keys in {
        "": """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps
            managed_gradient_accumulation gradient_clipping prescale_gradients gradient_predivide_factor
            gradient_allreduce_op communication_data_type seq_parallel_communication_data_type disable_allgather
            zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer fp16 bf16 bfloat16 data_types
            pipeline steps_per_print wall_clock_breakdown memory_breakdown dump_state disable_python_gc log_level timers
            flops_profiler comms_logger tensorboard wandb comet csv_monitor aio""",
        "zero_optimization": """stage contiguous_gradients reduce_scatter reduce_bucket_size
            use_multi_rank_bucket_allreduce allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm
            load_from_fp32_weights elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size
            cpu_offload cpu_offload_param cpu_offload_use_pin_memory stage3_prefetch_bucket_size
            stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters
            stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save stage3_module_granularity_threshold
            stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential stage3_gather_fp16_weights_on_model_save
            ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment zero_hpz_partition_size
            zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear
            pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks
            save_muon_momentum_buffer_in_memory leaf_module prefetch_bucket_size param_persistence_threshold
            model_persistence_threshold max_live_parameters max_reuse_distance gather_16bit_weights_on_model_save
            module_granularity_threshold use_all_reduce_for_fetch_params allgather_sequential""",
        "zero_optimization.offload_param": f"{_OFFLOAD} buffer_size max_in_cpu",
        "zero_optimization.offload_optimizer": f"""{_OFFLOAD} pipeline_read pipeline_write fast_init ratio super_offload
            cpuadam_cores_perc""",
        "zero_optimization.zenflow": """topk_ratio select_strategy select_interval update_interval overlap_step offload
            auto_ratio full_warm_up_rounds pt_reserved_cores_perc steps_per_epoch""",
        "zero_optimization.leaf_module": "classes names name_suffixes",
        "fp16": """enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
            min_loss_scale fp16_master_weights_and_grads""",
        "bf16": """enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads
            bf16_optimizer_states""",
        "data_types": "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules",
        "pipeline": """stages partition seed_layers activation_checkpoint_interval pipe_partitioned grad_partitioned
            use_reentrant""",
        "timers": "throughput",
        "timers.throughput": "enabled synchronized",
        "flops_profiler": """enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file""",
        "comms_logger": "enabled prof_all prof_ops verbose debug",
        "tensorboard": _MONITOR,
        "csv_monitor": _MONITOR,
        "wandb": "enabled group team project",
        "comet": """enabled samples_log_interval project workspace api_key experiment_name experiment_key online
            mode""",
        "aio": "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds",
    }.items()
}

_REMOVED = "DeepSpeed 0.19 has no such feature any more"
INERT_KEYS: dict[str, str] = {
    "optimizer": "biokit gives DeepSpeed its own AdamW; set train.lr, train.weight_decay, train.adam_beta1 and so on",
    "scheduler": "biokit sets the learning rate itself; set train.lr_schedule, train.lr_warmup_fraction",
    "amp": "apex is not used; set train.precision=fp16 or bf16",
    "torch_autocast": "biokit's layers choose their own precision; set train.precision",
    "activation_checkpointing": "biokit recomputes its own layers; set train.checkpoint_activations",
    "checkpoint": "checkpoints are biokit's own form, of the whole model; set train.save_interval",
    "datastates_ckpt": "checkpoints are biokit's own form, of the whole model; set train.async_save",
    "dataloader_drop_last": "biokit's loader makes the batches",
    "data_efficiency": "biokit's loader makes the batches; set data.length_buckets, data.max_tokens",
    "curriculum_learning": "biokit's loader makes the batches",
    "vocabulary_size": "the vocabulary is that of the token store",
    "tensor_parallel": "set strategy=ThreeD and parallel.tensor_model_parallel_size",
    "sequence_parallel_size": "set strategy=ThreeD and parallel.sequence_parallel",
    "data_parallel_size": "it follows from the number of processes and the other sizes",
    "expert_parallel": "no model here has experts",
    "use_data_before_expert_parallelism": "no model here has experts",
    "hybrid_engine": "it is for generation between the steps",
    "weight_quantization": "it is for inference",
    "compile": "biokit's models run as written",
    "autotuning": "only DeepSpeed's own launcher reads it",
    "nebula": _REMOVED,
    "compression_training": _REMOVED,
    "quantize_training": _REMOVED,
    "sparse_gradients": _REMOVED,
    "sparse_attention": _REMOVED,
    "eigenvalue": _REMOVED,
    "elasticity": _REMOVED,
    "graph_harvesting": _REMOVED,
    "progressive_layer_drop": _REMOVED,
    "zero_optimization.mics_shard_size": _REMOVED,
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED,
    "zero_optimization.zeropp_loco_param": _REMOVED,
    "zero_optimization.legacy_stage1": "there is one form of ZeRO-1 now",
    "zero_optimization.elastic_checkpoint": "checkpoints are biokit's own form, and fit any layout",
    "zero_optimization.load_from_fp32_weights": "checkpoints are biokit's own form, in fp32",
    "zero_optimization.cpu_offload_use_pin_memory": "set offload_optimizer.pin_memory, offload_param.pin_memory",
    "pipeline.partition": "biokit cuts the layers into stages itself, by their parameters",
}
