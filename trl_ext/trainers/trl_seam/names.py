"""
The private names of TRL and other libraries that this package uses, by what has them; public ones of a trainer that ours reads
or extends stand here too.
"""

# Methods of `trl.DPOTrainer` that ours extends, and attributes that it reads
DPO_METHODS = (
    "_prepare_dataset",
    "_set_signature_columns_if_needed",
    "_get_output_dir",
    "_load_optimizer_and_scheduler",
    "_precompute_ref_logps",
    "_prepare_inputs",
    "_save_checkpoint",
    "compute_ref_log_probs",
    "compute_loss",
    "create_model_card",
    "evaluate",
)
DPO_ATTRIBUTES = (
    "_metrics",
    "_name",
    "_paper",
    "_signature_columns",
    "_tag_names",
    "_total_train_tokens",
    "_tp_size",
    "_is_vision_dataset",
    "_tokenizer",
    "aux_loss_enabled",
    "ld_alpha",
    "loss_types",
    "loss_weights",
    "precompute_ref_logps",
    "router_aux_loss_coef",
)

# What ours extends or reads of `trl.experimental.online_dpo.OnlineDPOTrainer`
ONLINE_METHODS = (
    "_generate",
    "_generate_vllm",
    "_get_output_dir",
    "_load_optimizer_and_scheduler",
    "_maybe_log_save_evaluate",
    "_prepare_inputs",
    "_save_checkpoint",
    "create_accelerator_and_postprocess",
    "create_model_card",
    "evaluate",
)
ONLINE_ATTRIBUTES = (
    "_beta",
    "_name",
    "_paper",
    "_tokenizer",
    "eos_token_ids",
    "generation_config",
    "generation_kwargs",
    "max_length",
    "ref_model",
    "reward_func_names",
    "reward_funcs",
    "reward_processing_classes",
    "reward_weights",
    "use_vllm",
    "vllm_mode",
)

# Set by TRL where vLLM generates, and nowhere else
VLLM_ATTRIBUTES = ("_last_loaded_step",)

# Of transformers, datasets and torch, by what has them
LIBRARY_NAMES = {
    "transformers.GenerationMixin": ("_sample",),  # transformers' own decoding loop, which the CPU's draw runs in
    "transformers.PreTrainedConfig": ("_attn_implementation", "_commit_hash", "_name_or_path"),
    "transformers.PreTrainedModel": ("_is_stateful",),
    "transformers.TrainingArguments": ("_VALID_DICT_FIELDS",),
    "transformers.masking_utils.AttentionMaskInterface": ("_local_mapping",),
    "datasets.Dataset": ("_fingerprint", "_get_cache_file_path"),
    "torch.compile": ("_orig_mod",),
}
# Of `trl.trainer.utils`: what its fused forward looks up
FORWARD_NAMES = ("_ChunkedLogProbFunction", "_use_triton")

PRIVATE_NAMES = frozenset(
    name
    for names in (
        DPO_METHODS,
        DPO_ATTRIBUTES,
        ONLINE_METHODS,
        ONLINE_ATTRIBUTES,
        VLLM_ATTRIBUTES,
        FORWARD_NAMES,
        *LIBRARY_NAMES.values(),
    )
    for name in names
    if name.startswith("_")
)
