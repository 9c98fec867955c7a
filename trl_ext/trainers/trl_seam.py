"""
Every private TRL name that this package leans on, in one place.

`tests/test_trl_seam.py` runs each of them, so a TRL release that moves one fails a test that names it.
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import DPOTrainer
from trl.trainer import utils
from trl.trainer.utils import FusedCausalLMOutput

from trl_ext.logprobs import Head, Transform


# Methods of `trl.DPOTrainer` that ours extends, and attributes that it reads
DPO_METHODS = (
    "_prepare_dataset",
    "_set_signature_columns_if_needed",
    "_load_from_checkpoint",
    "_precompute_ref_logps",
    "_save_checkpoint",
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

# What ours extends or reads of `trl.experimental.online_dpo.OnlineDPOTrainer`
ONLINE_METHODS = ("_generate", "_generate_vllm", "_save_checkpoint", "_load_from_checkpoint", "evaluate")
ONLINE_ATTRIBUTES = (
    "_beta",
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
)

# Keys of a batch that are not arguments of the model (`_non_model_keys` in `DPOTrainer._compute_loss`)
NON_MODEL_KEYS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")

# Fields of the fused head's output that have one row a sequence
ROW_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


def model_inputs(inputs: dict) -> dict:
    """What of a batch the model is called with."""
    return {name: value for name, value in inputs.items() if name not in NON_MODEL_KEYS}


def fused_forward(model: Callable, inputs: dict, router_logits: bool) -> FusedCausalLMOutput:
    """One call of the (wrapped) model that gives per-token log-probs, with the arguments that TRL would pass."""
    kwargs = model_inputs(inputs)
    if router_logits:
        kwargs["output_router_logits"] = True
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    return model(**kwargs, use_cache=False, labels=labels, fused_lm_head=True)


def map_rows(outputs: FusedCausalLMOutput, function: Callable[[torch.Tensor], torch.Tensor]) -> FusedCausalLMOutput:
    """The same output with `function` applied to each per-token field; the auxiliary loss stays, the loss goes."""
    fields = {name: function(outputs[name]) for name in ROW_FIELDS if outputs.get(name) is not None}
    return FusedCausalLMOutput(aux_loss=outputs.aux_loss, **fields)


@contextlib.contextmanager
def head_in_place(head: Head, statistics: tuple[str, ...] | None) -> Iterator[None]:
    """
    While open, TRL's fused forward projects hidden states through `head`, at scored positions only.

    All else in that forward stays TRL's: shifting, soft caps and scales of model families, sharded heads, the auxiliary
    loss of MoE models. Of the statistics that TRL wants, those not in `statistics` come back as zeros; `None` is all.
    """

    def apply(hidden, weight, bias, targets, temperature, _chunk_size, softcap, scale, outputs):
        wanted = tuple(name for name in outputs if name != "log_probs" and (statistics is None or name in statistics))
        result = head(
            hidden,
            weight,
            bias,
            targets,
            Transform(scale, softcap, temperature),
            wanted,
            gather=utils.maybe_gather_lm_head_ctx,
        )
        zeros = {name: torch.zeros_like(result.log_probs) for name in outputs if getattr(result, name) is None}
        if "is_top1" in zeros:
            zeros["is_top1"] = zeros["is_top1"].bool()
        return result._replace(**zeros)

    replaced = utils._ChunkedLogProbFunction, utils._use_triton
    utils._ChunkedLogProbFunction = types.SimpleNamespace(apply=apply)
    utils._use_triton = lambda device: True  # only the scored positions, on every device
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction, utils._use_triton = replaced


def base_model(model: nn.Module) -> nn.Module:
    """The model inside an adapter's wrapper: where TRL puts its fused forward."""
    return model.get_base_model() if is_peft_model(model) else model


_OWN_FORWARD = "_trl_ext_forward"  # marks our function; on a model, the forward that was there before


def bind_forward(model: nn.Module) -> None:
    """
    Have TRL's fused forward, just added to `model`, look up everything on the model that it is called on.

    TRL's keeps the bound forward of the model that it was made for: a deep copy would run the original's weights.
    """
    fused = vars(model)["forward"].__func__
    before = inspect.getclosurevars(fused).nonlocals["original_forward"]
    if getattr(before, "__func__", None) is not type(model).forward:
        vars(model)[_OWN_FORWARD] = before  # hooks of accelerate, copied with the model they belong to

    @functools.wraps(fused)
    def forward(self, *args, fused_lm_head=False, **kwargs):
        if fused_lm_head:
            return fused(self, *args, fused_lm_head=True, **kwargs)
        unfused = vars(self).get(_OWN_FORWARD)
        return unfused(*args, **kwargs) if unfused is not None else type(self).forward(self, *args, **kwargs)

    setattr(forward, _OWN_FORWARD, True)
    model.forward = types.MethodType(forward, model)


def unbind_forward(model: nn.Module) -> None:
    """Undo [`bind_forward`] and TRL's own fused forward, of the model itself or of the one it was copied from."""
    while (forward := vars(model).get("forward")) is not None:
        function = getattr(forward, "__func__", None)
        if getattr(function, _OWN_FORWARD, False):
            before = vars(model).pop(_OWN_FORWARD, None)
        elif getattr(getattr(function, "__code__", None), "co_name", "") == "_fused_forward":
            before = inspect.getclosurevars(function).nonlocals["original_forward"]
            if isinstance(before, types.MethodType):
                own = before.__func__ is type(model).forward
                before = None if own else types.MethodType(before.__func__, model)
        else:
            return
        del model.forward
        if before is not None:
            model.forward = before


class Replay:
    """Stands in for the model in a call of TRL's: answers the fused forward with outputs that are already there."""

    def __init__(self, model: Callable, outputs: FusedCausalLMOutput):
        self.model = model
        self.outputs = outputs

    def __call__(self, *args, fused_lm_head: bool = False, **kwargs):
        return self.outputs if fused_lm_head else self.model(*args, **kwargs)


# What TRL's loss logs from each per-token statistic
METRICS_OF = {
    "entropy": ("entropy",),
    "mean_logits": ("logits/chosen", "logits/rejected"),
    "is_top1": ("mean_token_accuracy",),
}


def forget_metrics(trainer: DPOTrainer, measured: tuple[str, ...]) -> None:
    """Take back what TRL's loss has just logged from statistics that were not measured in this batch."""
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    for statistic, names in METRICS_OF.items():
        for name in names if statistic not in measured else ():
            metrics[name].pop()
            if not metrics[name]:
                del metrics[name]  # TRL divides by the number of values


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


def tokenize_pairs(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments) -> Dataset:
    """Pairs as the token ids that TRL's trainer makes of them; no row is left out, however long its prompt."""
    whole = types.SimpleNamespace(dataset_num_proc=args.dataset_num_proc, max_length=None)
    return DPOTrainer._prepare_dataset(
        types.SimpleNamespace(_tokenizer=tokenizer), dataset, tokenizer, whole, "log-probs"
    )
