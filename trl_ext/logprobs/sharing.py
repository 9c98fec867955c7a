"""Whether completions share the row of their prompt: for a model at all, and in a batch."""

import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .shared_prefix import MASKED_ATTENTION, SharedPrefixLayout, shared_prefix_layout
from .varlen import FLASH_ATTENTION, HALF, LARGEST_HEAD, has_kernel


EXACT_LAYERS = {"attention", "full_attention", "sliding_attention"}
SHARED_INPUTS = {"input_ids", "attention_mask"}


@dataclass(frozen=True)
class Sharing:
    """
    Decides for each batch. It knows of the model what it must, so that a worker process of the data loader can do it.

    Attributes:
        hidden_size (`int`):
            Of the model.
        always (`bool`):
            Whether prompts are shared even where that costs more.
        unpadded (`bool`):
            Whether attention takes sequences of any length: all tokens are one row then, which costs less than plain rows even
            where nothing is shared.
        bounded (`bool`):
            Whether a batch keeps its plain rows where the dense mask of shared ones would be larger than theirs.
    """

    hidden_size: int
    always: bool = False
    unpadded: bool = False
    bounded: bool = False

    def layout(
        self, inputs: Mapping[str, torch.Tensor], completion_mask: torch.Tensor, prompt: torch.Tensor
    ) -> SharedPrefixLayout | None:
        """
        How a batch is laid out in shared rows, `None` for the plain rows.

        Args:
            inputs (`dict[str, torch.Tensor]`):
                What the model would be called with.
            completion_mask (`torch.Tensor` of shape `(N, T)`):
                1 at the tokens to score.
            prompt (`torch.Tensor` of shape `(N,)`):
                Which prompt each row continues.

        Raises:
            `ValueError`: If prompts are always to be shared, and cannot be in this batch.
        """
        extra = set(inputs) - SHARED_INPUTS
        layout = None
        if not extra:
            layout = shared_prefix_layout(
                inputs["input_ids"], inputs["attention_mask"], completion_mask, prompt, self.unpadded
            )
        if self.always:
            if layout is None:
                reason = f"the model is given {sorted(extra)} too" if extra else "it is not padded on the right"
                raise ValueError(f"`share_prefix=True`, but this batch cannot share prompts: {reason}.")
            return layout
        if layout is None or self.unpadded:
            return layout
        (rows, width), (shared_rows, length) = inputs["input_ids"].shape, layout.tokens.shape
        if self.bounded and shared_rows * length**2 > rows * width**2:
            return None
        return layout if pays(layout, rows, width, self.hidden_size) else None


def pays(layout: SharedPrefixLayout, rows: int, width: int, hidden_size: int) -> bool:
    """
    Whether the shared rows cost less than the plain ones.

    A token of a layer costs about `24 H^2` operations in products with weights and, under a dense mask, `4 H L` in
    attention: up to a factor, `6 H + L`.
    """
    shared_rows, length = layout.tokens.shape
    return shared_rows * length * (6 * hidden_size + length) < rows * width * (6 * hidden_size + width)


def why_not_shared(model: PreTrainedModel) -> str | None:
    """What makes a shared prompt inexact (or impossible) for a model; `None` if nothing does."""
    config = model.config.get_text_config()
    backbone = model.base_model
    arguments = inspect.signature(type(backbone).forward).parameters
    if config is not model.config:
        return "it is multimodal"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "it is spread over several devices, and masks would stay on the first"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    known = (*MASKED_ATTENTION, *FLASH_ATTENTION)
    if config._attn_implementation not in known:
        return f"`attn_implementation={config._attn_implementation!r}` is none of {known}"
    layers = set(getattr(config, "layer_types", None) or ()) | set(getattr(config, "layers_block_type", None) or ())
    if layers - EXACT_LAYERS:
        return f"it has layers of type {sorted(layers - EXACT_LAYERS)}"
    if getattr(model, "_is_stateful", False) or any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return "it has recurrent or convolutional layers"
    if getattr(config, "attention_chunk_size", None):
        return "it attends in chunks"
    if getattr(config, "use_bidirectional_attention", False):
        return "it attends in both directions"
    if "position_ids" not in arguments or getattr(config, "alibi", False):
        return "it takes no position ids"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "mrope_section" in rope:
        return "it has multimodal rotary positions"
    if not hasattr(sys.modules[type(backbone).__module__], "create_causal_mask"):
        return "it does not build its attention masks through transformers"
    if largest_dropout(model.modules()) > 0:
        return "dropout is on"
    return None


def largest_dropout(modules: Iterable[nn.Module]) -> float:
    """The largest share that any of the modules drops in training, of activations or of attention."""
    return max(
        (
            getattr(module, "p", 0.0) if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
            for module in modules
            if isinstance(module, nn.Dropout) or isinstance(getattr(module, "attention_dropout", None), float)
        ),
        default=0.0,
    )


def why_not_unpadded(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str | None:
    """
    What keeps a model's attention from taking sequences of any length; `None` if nothing does.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        device (`torch.device`):
            Where it runs.
        dtype (`torch.dtype`):
            What it computes in: the dtype of autocast, if that is on.
    """
    config = model.config.get_text_config()
    if device.type == "cpu" and config._attn_implementation == "sdpa":
        return None  # each sequence by itself, in torch: faster than under a mask for all of them
    if dtype not in HALF:
        return f"it computes in {dtype}, and FlashAttention in half precision only"
    if config._attn_implementation in FLASH_ATTENTION:
        return None
    if config._attn_implementation != "sdpa":
        return f"`attn_implementation={config._attn_implementation!r}` attends through masks"
    if device.type != "cuda" or torch.version.hip:
        return f"the attention of {device.type} devices takes no sequences of varying length"
    if not has_kernel():
        return f"torch {torch.__version__} has no attention over sequences of any length with windows (2.11 has)"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than what FlashAttention runs on"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size > LARGEST_HEAD or size % 8 or getattr(config, "v_head_dim", size) != size:
        return f"its attention heads of size {size} are not what FlashAttention takes"
    return None


def takes_masks(model: PreTrainedModel) -> bool:
    """Whether a model's attention takes a dense mask."""
    return model.config.get_text_config()._attn_implementation in MASKED_ATTENTION
