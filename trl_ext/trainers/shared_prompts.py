"""Whether a run shares prompts, and how its models attend to them."""

import torch
from accelerate.logging import get_logger
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments

from trl_ext.logprobs import Sharing, takes_masks, why_not_shared, why_not_unpadded
from trl_ext.logprobs.varlen import serve_sequences


logger = get_logger(__name__)


def build_sharing(
    model: PreTrainedModel | PeftModel,
    args: TrainingArguments,
    aux_loss: bool,
    reference: torch.nn.Module | None = None,
) -> Sharing | None:
    """
    How batches are laid out, which policy and reference both read; `None` for plain rows.

    Attention takes the rows of a batch as sequences of any length, without padding, on a CPU and where FlashAttention can on a GPU;
    else a dense mask keeps completions apart. Arguments as in [`build_scorer`].

    Raises:
        `ValueError`: If `share_prefix=True`, and it would not be exact.
    """
    share = getattr(args, "share_prefix", "auto")
    if share is False:
        return None
    models = {"": model}
    if reference is not None:
        models["of the reference model, "] = extract_model_from_parallel(reference)
    reason = _why_plain_run(model, args, aux_loss) or _first(models, why_not_shared)
    why_masks = None
    if reason is None:
        why_masks = _first(models, lambda each: why_not_unpadded(each, args.device, _dtype(each, args)))
        if why_masks is not None and not all(map(takes_masks, map(_base, models.values()))):
            reason = f"{why_masks}, and {'it' if len(models) == 1 else 'the other model'} takes no mask"
    if reason is not None:
        if share is True:
            raise ValueError(
                f"`share_prefix=True` would not be exact for this model: {reason}. Use `share_prefix='auto'` or `False`."
            )
        logger.warning(f"Completions do not share the row of their prompt: {reason}. This costs speed, nothing else.")
        return None
    on_cpu = args.device.type == "cpu"
    if why_masks is None:
        for each in models.values():
            serve_sequences(_base(each).config.get_text_config()._attn_implementation)
    elif not on_cpu:
        logger.warning(
            f"Completions share the row of their prompt by a dense mask, and only while it is no larger than those of plain rows: "
            f"{why_masks}. This costs speed, nothing else."
        )
    hidden_size = model.config.get_text_config().hidden_size
    return Sharing(hidden_size, always=share is True, unpadded=why_masks is None, bounded=not on_cpu)


def _base(model: torch.nn.Module) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _first(models, why) -> str | None:
    """The first model's reason, with whose it is."""
    reasons = ((whose, why(_base(each))) for whose, each in models.items())
    return next((whose + reason for whose, reason in reasons if reason is not None), None)


def _dtype(model: PreTrainedModel, args: TrainingArguments) -> torch.dtype:
    """What the model computes in."""
    if args.bf16 or args.fp16:  # autocast
        return torch.bfloat16 if args.bf16 else torch.float16
    return model.dtype


def _why_plain_run(model: PreTrainedModel | PeftModel, args: TrainingArguments, aux_loss: bool) -> str | None:
    """What of this run, whatever the model, speaks against shared prompts."""
    if isinstance(model, PeftModel) and any(config.is_prompt_learning for config in model.peft_config.values()):
        return "the adapter learns a prompt"
    if aux_loss:
        return "the auxiliary loss of a mixture of experts counts tokens"
    if args.torch_compile:
        return "the model is compiled"
    if args.n_gpu > 1:
        return "`DataParallel` splits batches by row"
    return None
