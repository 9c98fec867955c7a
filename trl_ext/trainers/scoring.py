"""From a padded batch to token log-probabilities: which head, and whether completions share their prompt's row."""

import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate.logging import get_logger
from accelerate.utils import extract_model_from_parallel
from packaging.version import Version
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from trl.trainer.utils import FusedCausalLMOutput

from trl_ext.logprobs import Head, SharedPrefixLayout, pays, shared_prefix_layout, why_not_shared
from trl_ext.logprobs.shared_prefix import enable_block_masks
from trl_ext.trainers.trl_seam import fused_forward, head_in_place, map_rows, model_inputs


logger = get_logger(__name__)

LOGPROB_BACKENDS = ("auto", "liger", "torch", "trl")
SHARED_INPUTS = {"input_ids", "attention_mask"}
_LIGER = Version("0.8.2")  # before, `reduction="none"` gives wrong gradients of the head


@dataclass
class Scorer:
    """
    Token log-probabilities of a batch, in one call of the (wrapped) model.

    Attributes:
        head ([`Head`]):
            What projects hidden states.
        share_prefix (`bool`):
            Whether completions share the row of their prompt, where that costs less.
        always (`bool`):
            Whether they do so even where it costs more.
        hidden_size (`int`):
            Of the model.
    """

    head: Head
    share_prefix: bool
    always: bool
    hidden_size: int

    def layout(self, inputs: dict[str, torch.Tensor], groups: int) -> SharedPrefixLayout | None:
        """How the batch is laid out in shared rows, `None` for the plain rows; `groups` prompts, in turn."""
        if not self.share_prefix:
            return None
        extra = set(model_inputs(inputs)) - SHARED_INPUTS
        layout = None
        if not extra:
            layout = shared_prefix_layout(
                inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"], groups
            )
        if self.always:
            if layout is None:
                reason = f"the model is given {sorted(extra)} too" if extra else "it is not padded on the right"
                raise ValueError(f"`share_prefix=True`, but this batch cannot share prompts: {reason}.")
            return layout
        return layout if layout is not None and pays(layout, *inputs["input_ids"].shape, self.hidden_size) else None

    def __call__(
        self,
        model: Callable,
        inputs: dict[str, torch.Tensor],
        layout: SharedPrefixLayout | None,
        statistics: tuple[str, ...] | None = None,
        router_logits: bool = False,
    ) -> FusedCausalLMOutput:
        """
        Args:
            model (`Callable`):
                The model, wrapped for distributed training or not, with TRL's fused forward.
            inputs (`dict[str, torch.Tensor]`):
                A padded batch with `completion_mask`.
            layout ([`SharedPrefixLayout`] or `None`):
                From [`layout`].
            statistics (`tuple[str, ...]`, *optional*):
                Which of the statistics to compute; all that the model's head was asked for by default.
            router_logits (`bool`):
                Whether to ask a MoE model for its auxiliary loss.

        Returns:
            TRL's output, with fields of shape `(N, T - 1)` in either layout.
        """
        if layout is None:
            with head_in_place(self.head, statistics):
                return fused_forward(model, inputs, router_logits)
        ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:].bool()
        slots = layout.slots[mask]
        labels = torch.full_like(layout.tokens, -100)
        labels.view(-1)[slots] = ids[:, 1:][mask]
        with head_in_place(self.head, statistics), layout.masks():
            outputs = model(
                input_ids=ids.flatten()[layout.tokens],
                attention_mask=torch.ones_like(layout.tokens),
                position_ids=layout.positions,
                shift_labels=labels,
                use_cache=False,
                fused_lm_head=True,
            )
        plain = lambda field: field.new_zeros(mask.shape).masked_scatter(mask, field.flatten()[slots])  # noqa: E731
        return map_rows(outputs, plain)


class ReferenceModel:
    """Stands in for the reference model in a call of TRL's: log-probabilities alone, in the layout of the batch."""

    def __init__(self, scorer: Scorer, model: Callable, inputs: dict[str, torch.Tensor], layout):
        self.scorer, self.model, self.inputs, self.layout = scorer, model, inputs, layout

    def __call__(self, **kwargs) -> FusedCausalLMOutput:
        return self.scorer(self.model, self.inputs, self.layout, statistics=())


def build_scorer(
    model: PreTrainedModel | PeftModel,
    args: TrainingArguments,
    aux_loss: bool,
    reference: torch.nn.Module | None = None,
) -> Scorer | None:
    """
    The scorer that a config asks for; `None` where TRL's own path is to run.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy.
        args ([`~transformers.TrainingArguments`]):
            Configuration of the trainer.
        aux_loss (`bool`):
            Whether the auxiliary loss of a mixture of experts is trained.
        reference (`torch.nn.Module`, *optional*):
            The reference model, where there is one of its own: it reads the same batches.

    Raises:
        `ValueError`: For a backend that cannot run here, or a shared prefix that would not be exact.
    """
    backend = resolve_backend(args)
    share = getattr(args, "share_prefix", "auto")
    if backend == "trl":
        return None
    reason = None if share is False else _why_plain(model, args, aux_loss)
    if share is not False and reason is None and reference is not None:
        reason = why_not_shared(extract_model_from_parallel(reference))
        reason = reason and f"of the reference model, {reason}"
    if share is True and reason is not None:
        raise ValueError(
            f"`share_prefix=True` would not be exact for this model: {reason}. Use `share_prefix='auto'` or `False`."
        )
    if share == "auto" and reason is not None:
        logger.warning(f"Completions do not share the row of their prompt: {reason}. This costs speed, nothing else.")
    shared = share is not False and reason is None
    if shared and args.device.type == "cuda":
        enable_block_masks()
    head = Head(backend, getattr(args, "logprob_memory_mb", None))
    return Scorer(head, shared, share is True, model.config.get_text_config().hidden_size)


def resolve_backend(args: TrainingArguments) -> str:
    """`"auto"` as what it stands for on this device; one that cannot run is a `ValueError`."""
    backend = getattr(args, "logprob_backend", "auto")
    device = args.device.type
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "auto":
        if getattr(args, "use_weighting", False):
            return "trl"  # its Triton kernel computes the weights of WPO on the way
        return "liger" if device in ("cuda", "xpu") and _why_no_liger() is None else "torch"
    if backend != "trl" and getattr(args, "use_weighting", False):
        raise ValueError(
            f"`use_weighting=True` (WPO) needs `logprob_backend='trl'` or 'auto'; got `logprob_backend={backend!r}`."
        )
    if backend == "liger":
        reason = _why_no_liger()
        if reason is None and device == "cpu" and not interpreted:
            reason = "its Triton kernels need a GPU, and this run is on a CPU"
        if reason is not None:
            raise ValueError(f"`logprob_backend='liger'` cannot run: {reason}. Use 'auto' or 'torch'.")
    return backend


def _why_no_liger() -> str | None:
    try:
        version = Version(importlib.metadata.version("liger-kernel"))
    except importlib.metadata.PackageNotFoundError:
        return "liger-kernel is not installed"
    return None if version >= _LIGER else f"liger-kernel {version} is older than {_LIGER} (wrong gradients)"


def _why_plain(model: PreTrainedModel | PeftModel, args: TrainingArguments, aux_loss: bool) -> str | None:
    """What speaks against a shared prefix in this run."""
    if isinstance(model, PeftModel):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            return "the adapter learns a prompt"
        model = model.get_base_model()
    if aux_loss:
        return "the auxiliary loss of a mixture of experts counts tokens"
    if args.torch_compile:
        return "the model is compiled"
    if args.n_gpu > 1:
        return "`DataParallel` splits batches by row"
    return why_not_shared(model)
