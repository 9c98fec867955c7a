"""
Every private TRL name that this package leans on, in one place.

`tests/test_trl_seam.py` runs each of them, so a TRL release that moves one fails a test that names it.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput


# Methods of `trl.DPOTrainer` that ours extends, and attributes that it reads
DPO_METHODS = (
    "_prepare_dataset",
    "_set_signature_columns_if_needed",
    "_precompute_ref_logps",
    "compute_ref_log_probs",
    "compute_loss",
    "create_model_card",
    "evaluate",
)
DPO_ATTRIBUTES = (
    "_metrics",
    "_total_train_tokens",
    "_tp_size",
    "_is_vision_dataset",
    "_tokenizer",
    "aux_loss_enabled",
    "ld_alpha",
    "loss_types",
    "loss_weights",
    "precompute_ref_logps",
)

# Keys of a batch that are not arguments of the model (`_non_model_keys` in `DPOTrainer._compute_loss`)
NON_MODEL_KEYS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")

# Fields of the fused head's output that have one row a sequence
ROW_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


def fused_forward(model: Callable, inputs: dict, router_logits: bool) -> FusedCausalLMOutput:
    """One call of the (wrapped) model that gives per-token log-probs, with the arguments that TRL would pass."""
    kwargs = {name: value for name, value in inputs.items() if name not in NON_MODEL_KEYS}
    if router_logits:
        kwargs["output_router_logits"] = True
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    return model(**kwargs, use_cache=False, labels=labels, fused_lm_head=True)


def select_rows(outputs: FusedCausalLMOutput, rows: torch.Tensor, padding: int) -> FusedCausalLMOutput:
    """The same output for some of its sequences, without the last `padding` positions; the auxiliary loss stays."""
    fields = {name: outputs[name] for name in ROW_FIELDS if outputs.get(name) is not None}
    fields = {name: value[rows, : value.size(1) - padding] for name, value in fields.items()}
    return FusedCausalLMOutput(loss=outputs.loss, aux_loss=outputs.aux_loss, **fields)


class Replay:
    """Stands in for the model in a call of TRL's: answers the fused forward with outputs that are already there."""

    def __init__(self, model: Callable, outputs: FusedCausalLMOutput):
        self.model = model
        self.outputs = outputs

    def __call__(self, *args, fused_lm_head: bool = False, **kwargs):
        return self.outputs if fused_lm_head else self.model(*args, **kwargs)


@contextlib.contextmanager
def reference_in_inputs(trainer: DPOTrainer) -> Iterator[None]:
    """While open, TRL's loss reads the reference log-probs from the batch, as it does when they are precomputed."""
    precomputed = trainer.precompute_ref_logps
    trainer.precompute_ref_logps = True
    try:
        yield
    finally:
        trainer.precompute_ref_logps = precomputed


def with_cache_key(dataset: Dataset, *parts: object) -> Dataset:
    """
    The same dataset with a fingerprint that `parts` go into.

    TRL caches reference log-probs by the dataset's fingerprint and the model's weights alone, though they depend on
    truncation, precision and `ld_alpha` too: a second run with another `max_length` would read stale values.
    """
    keyed = dataset.select(range(len(dataset)))  # a new object over the same table
    keyed._fingerprint = Hasher.hash((dataset._fingerprint, parts))
    return keyed
