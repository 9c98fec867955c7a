"""
The private names of TRL and transformers that this package leans on, in one place.

Public names of TRL (`trl.data_utils`, `trl.trainer.utils`, its trainers and configs) are imported where they are used, in
`data/`, `rounds/` and `trainers/`. What begins with an underscore, or replaces a piece of a method, is listed or wrapped here:
`tests/test_trl_seam.py` runs each of them, so a release that moves one fails a test that names it, and refuses a private name
that is used anywhere in the package and does not stand here.
"""

import contextlib
import functools
import inspect
import os
import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import nn
from torch.distributed.tensor import Partial
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils
from trl.trainer.utils import FusedCausalLMOutput

from trl_ext.logprobs import Head, Transform
from trl_ext.logprobs.substitute import Substitute


# Methods of `trl.DPOTrainer` that ours extends, and attributes that it reads
DPO_METHODS = (
    "_prepare_dataset",
    "_set_signature_columns_if_needed",
    "_get_output_dir",
    "_load_from_checkpoint",
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
    "_load_from_checkpoint",
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

# Keys of a batch that are not arguments of the model (`_non_model_keys` in `DPOTrainer._compute_loss`)
NON_MODEL_KEYS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")

# Fields of the fused head's output that have one row per sequence
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
        _average_gradients(weight, bias)
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

    with _HEAD.acting(apply):
        yield


def _install_head(current: ContextVar) -> Callable[[], None]:
    """Have TRL's fused forward ask the thread that runs it for its head."""
    function, use_triton = utils._ChunkedLogProbFunction, utils._use_triton

    def apply(*arguments):
        own = current.get()
        return function.apply(*arguments) if own is None else own(*arguments)

    utils._ChunkedLogProbFunction = types.SimpleNamespace(apply=apply, forward=function.forward)
    # Only the scored positions, on every device
    utils._use_triton = lambda device: current.get() is not None or use_triton(device)

    def remove() -> None:
        utils._ChunkedLogProbFunction, utils._use_triton = function, use_triton

    return remove


_HEAD = Substitute(_install_head)


def _average_gradients(*parameters: torch.Tensor | None) -> None:
    """
    Have the gradients of a sharded head averaged over processes.

    A head that is an FSDP2 unit of its own (an adapter's `modules_to_save`) comes from TRL made whole with `full_tensor()`,
    whose backward would give each process's shard the gradient of that process alone.
    """
    for parameter in parameters:
        made_whole = getattr(parameter, "grad_fn", None)
        if hasattr(made_whole, "dtensor_spec"):
            made_whole.grad_placements = [Partial("avg")] * made_whole.dtensor_spec.mesh.ndim


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


# What TRL's loss logs of pairs, each the mean over the rows of the batch, in the order of its own code
PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def forget_metrics(trainer: DPOTrainer, names: Iterable[str]) -> None:
    """Take back the last value that TRL's loss has logged under each of the names."""
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    for name in names:
        metrics[name].pop()
        if not metrics[name]:
            del metrics[name]  # TRL divides by the number of values


def forget_statistics(trainer: DPOTrainer, measured: tuple[str, ...]) -> None:
    """Take back what TRL's loss has just logged from statistics that were not measured in this batch."""
    for statistic, names in METRICS_OF.items():
        if statistic not in measured:
            forget_metrics(trainer, names)


@contextlib.contextmanager
def only_term(trainer: DPOTrainer, name: str, record: bool) -> Iterator[None]:
    """
    While open, TRL's loss has one loss type, with weight 1.

    Unless `record` is set, it has no auxiliary loss either, and what it logs and counts is forgotten.
    """
    names = ("loss_types", "loss_weights")
    if not record:
        names += ("aux_loss_enabled", "_metrics", "_total_train_tokens")
    before = {attribute: getattr(trainer, attribute) for attribute in names}
    trainer.loss_types, trainer.loss_weights = [name], [1.0]
    if not record:
        trainer.aux_loss_enabled = False
        trainer._metrics = {mode: defaultdict(list) for mode in before["_metrics"]}
    try:
        yield
    finally:
        for attribute, value in before.items():
            setattr(trainer, attribute, value)


@contextlib.contextmanager
def reference_in_inputs(trainer: DPOTrainer) -> Iterator[None]:
    """While open, TRL's loss reads the reference log-probs from the batch, as it does when they are precomputed."""
    precomputed = trainer.precompute_ref_logps
    trainer.precompute_ref_logps = True
    try:
        yield
    finally:
        trainer.precompute_ref_logps = precomputed


@contextlib.contextmanager
def no_reference(args: DPOConfig) -> Iterator[None]:
    """
    While open, `trl.DPOTrainer.__init__` loads no reference model, as where reference log-probs are precomputed.

    What it would compute is for the trainer's own `_precompute_ref_logps` to leave out.
    """
    args.precompute_ref_log_probs = True
    try:
        yield
    finally:
        args.precompute_ref_log_probs = False


def with_cache_key(dataset: Dataset, *parts: object) -> Dataset:
    """
    The same dataset with a fingerprint that `parts` go into.

    TRL caches reference log-probs by the dataset's fingerprint and the model's weights alone, though they depend on
    truncation, precision and `ld_alpha` too: a second run with another `max_length` would read stale values.
    """
    keyed = dataset.select(range(len(dataset)))  # a new object over the same table
    keyed._fingerprint = Hasher.hash((dataset._fingerprint, parts))
    if PartialState().num_processes > 1:
        keyed._get_cache_file_path = types.MethodType(_shared_cache_path, keyed)
    return keyed


def _shared_cache_path(dataset: Dataset, fingerprint: str) -> str:
    """
    One file for all processes, called in each: data in memory (or with caching disabled) has a folder in each process, where
    TRL's first process would write what the others never find.
    """
    path = broadcast_object_list([Dataset._get_cache_file_path(dataset, fingerprint)])[0]
    if not all(gather_object([os.path.isdir(os.path.dirname(path))])):
        raise ValueError(
            f"`precompute_ref_log_probs=True` keeps the reference log-probs in {os.path.dirname(path)}, which not every process "
            "can read. Save the dataset with `save_to_disk` where all machines see it and load it from there, or set "
            "`precompute_ref_log_probs=False`."
        )
    return path
