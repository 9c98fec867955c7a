"""
The private names of TRL and other libraries that this package uses, by what has them; public ones of a trainer that ours reads
or extends stand here too.

What a class or a module has is looked up when a trainer is loaded (`check.py`). What only an object has is looked up by the
tests alone: `DPO_ATTRIBUTES`, `ONLINE_ATTRIBUTES`, `REWARD_ATTRIBUTES`, `SFT_ATTRIBUTES`, `VLLM_ATTRIBUTES` and `OBJECT_NAMES`.
"""

# Methods of `trl.DPOTrainer` that ours extends, and attributes that it reads
DPO_METHODS = (
    "_prepare_dataset",
    "_set_signature_columns_if_needed",
    "_get_output_dir",
    "_load_optimizer_and_scheduler",
    "_maybe_log_save_evaluate",
    "_precompute_ref_logps",
    "_prepare_inputs",
    "_save_checkpoint",
    "compute_ref_log_probs",
    "compute_loss",
    "create_model_card",
    "evaluate",
    "evaluation_loop",
    "log",
    "train",
)
DPO_ATTRIBUTES = (
    "_metrics",
    "_name",
    "_paper",
    "_signature_columns",
    "_tag_names",
    "_total_train_tokens",
    "_tokenizer",
    "aux_loss_enabled",
    "beta",
    "is_deepspeed_enabled",
    "is_fsdp_enabled",
    "ld_alpha",
    "loss_types",
    "loss_weights",
    "precompute_ref_logps",
    "router_aux_loss_coef",
)

# What ours extends or reads of `trl.experimental.online_dpo.OnlineDPOTrainer`
ONLINE_METHODS = (
    "_generate",
    "_get_train_sampler",
    "_generate_vllm",
    "_get_output_dir",
    "_load_optimizer_and_scheduler",
    "_maybe_log_save_evaluate",
    "_prepare_inputs",
    "_save_checkpoint",
    "compute_loss",
    "compute_loss_context_manager",
    "create_accelerator_and_postprocess",
    "create_model_card",
    "evaluate",
    "evaluation_loop",
    "get_batch_samples",
    "log",
    "prediction_step",
    "train",
    "training_step",
)
ONLINE_ATTRIBUTES = (
    "_beta",
    "_name",
    "_paper",
    "_tokenizer",
    "_train_batch_size",
    "eos_token_ids",
    "generation_config",
    "generation_kwargs",
    "is_fsdp_enabled",
    "max_length",
    "model_wrapped",
    "ref_model",
    "reward_func_names",
    "reward_funcs",
    "reward_processing_classes",
    "reward_weights",
    "use_vllm",
    "vllm_mode",
)

# What ours extends or reads of `trl.RewardTrainer`
REWARD_METHODS = ("_get_output_dir", "_save_checkpoint", "compute_loss", "save_model", "train")
REWARD_ATTRIBUTES = ("_metrics", "_name", "_paper", "_tag_names")
# What ours extends or reads of `trl.SFTTrainer`
SFT_METHODS = (
    "_get_output_dir",
    "_prepare_dataset",
    "_save_checkpoint",
    "_set_signature_columns_if_needed",
    "compute_loss",
    "evaluate",
    "get_batch_samples",
    "train",
)
SFT_ATTRIBUTES = ("_name", "_paper", "_signature_columns", "chat_template")

# Set by TRL where vLLM generates, and nowhere else
VLLM_ATTRIBUTES = ("_last_loaded_step",)

# Of `trl.trainer.utils`: what its fused forward looks up
FORWARD_NAMES = ("_ChunkedLogProbFunction", "_use_triton", "maybe_gather_lm_head_ctx")
# Of `trl.trainer.dpo_trainer`: what loads policy and reference
LOADER_NAMES = ("create_model_from_path",)

# Of transformers and datasets: a colon stands before what is looked up in a module
LIBRARY_NAMES = {
    # transformers' own decoding loop, which the CPU's draw runs in, and the steps that ours has of it
    "transformers:GenerationMixin": (
        "_has_unfinished_sequences",
        "_optimize_model_for_decode",
        "_prefill",
        "_sample",
        "_update_model_kwargs_for_generation",
    ),
    "transformers:PreTrainedConfig": ("_attn_implementation",),
    "transformers:PreTrainedModel": ("_is_stateful",),
    "transformers:Trainer": ("_maybe_log_save_evaluate", "log"),  # called past TRL's own
    "transformers:TrainingArguments": ("_VALID_DICT_FIELDS",),
    "transformers.masking_utils:ALL_MASK_ATTENTION_FUNCTIONS": ("_local_mapping",),
    "datasets:Dataset": ("_get_cache_file_path",),
}
# Of objects of other libraries
OBJECT_NAMES = {
    "transformers.PreTrainedConfig": ("_name_or_path",),
    "datasets.Dataset": ("_fingerprint",),
    "torch.compile": ("_orig_mod",),
    "torch.Tensor": ("_version",),
}

# Looked up when any trainer is loaded, and when those of rewards, of online training and of supervised fine-tuning are
ALL_TRAINERS = {
    "trl:DPOTrainer": DPO_METHODS,
    "trl.trainer.utils": FORWARD_NAMES,
    "trl.trainer.dpo_trainer": LOADER_NAMES,
    **LIBRARY_NAMES,
}
REWARD_TRAINER = {"trl:RewardTrainer": REWARD_METHODS}
ONLINE_TRAINER = {"trl.experimental.online_dpo:OnlineDPOTrainer": ONLINE_METHODS}
SFT_TRAINER = {"trl:SFTTrainer": SFT_METHODS}

PRIVATE_NAMES = frozenset(
    name
    for names in (
        DPO_METHODS,
        DPO_ATTRIBUTES,
        ONLINE_METHODS,
        ONLINE_ATTRIBUTES,
        REWARD_METHODS,
        REWARD_ATTRIBUTES,
        SFT_METHODS,
        SFT_ATTRIBUTES,
        VLLM_ATTRIBUTES,
        FORWARD_NAMES,
        *LIBRARY_NAMES.values(),
        *OBJECT_NAMES.values(),
    )
    for name in names
    if name.startswith("_")
)
