"""Sequence classifiers that score: which of them they are, how they are loaded, and which tokens they read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from trl_ext.data.cache import content_key, model_key
from trl_ext.data.checks import check_count
from trl_ext.data.paths import refuse_missing_path
from trl_ext.data.tokens import Text, padding_id, reward_ids, tokenizer_key


# Where an adapter's configuration lies: in the adapter's own folder it would make of it a whole model, whose weights are missing
ADAPTER_CONFIG = "preference_model"


def read_config(name: str) -> PreTrainedConfig | None:
    """The configuration of a model, or what a general preference model that is an adapter keeps in its place; `None` without one."""
    for folder in ("", ADAPTER_CONFIG):
        try:
            return AutoConfig.from_pretrained(name, subfolder=folder)
        except (OSError, ValueError):  # an adapter, or a model with code of its own
            continue
    return None


def preference_temperature(model: str | nn.Module) -> float | None:
    """
    The temperature that a general preference model was trained with, which its configuration keeps.

    Args:
        model (`str` or `nn.Module`):
            Hub name, folder or object.

    Returns:
        `float` or `None`: the temperature; `None` for any other model, and where no configuration can be read.
    """
    config = read_config(model) if isinstance(model, str) else getattr(model, "config", None)
    return getattr(config, "preference_temperature", None)


def refuse_preference_model(model: Any) -> None:
    """Raise a `ValueError` for a general preference model, by name or as an object, where rewards are asked for."""
    if isinstance(model, (str, nn.Module)) and preference_temperature(model) is not None:
        raise ValueError(
            f"{model if isinstance(model, str) else model.config.name_or_path!r} is a general preference model: it compares two "
            "completions, and its outputs are no rewards. Give it as `judge`: PreferenceModel(...)."
        )


@dataclass
class Classifier:
    """A sequence classifier over prompts and completions; the base of `RewardModel` and `PreferenceModel`."""

    what: ClassVar[str] = "reward model"
    wanted: ClassVar[str] = "Give a trained sequence classifier with one output."

    model: str | nn.Module
    processing_class: PreTrainedTokenizerBase | None = None
    max_length: int | None = None
    dtype: Any = "auto"

    def __post_init__(self):
        if self.max_length is not None:
            check_count("max_length", self.max_length)

    def outputs(self) -> int:
        """How many outputs the model has, or a `ValueError` for a model of another kind; not loaded yet, where it is a name."""
        raise NotImplementedError

    def load(self) -> None:
        """Load model and tokenizer where they are names, and settle how long texts may be."""
        refuse_missing_path(self.model, self.what)
        name = self.model if isinstance(self.model, str) else self.model.config.name_or_path
        if self.processing_class is None:
            self.processing_class = AutoTokenizer.from_pretrained(name)
        outputs = self.outputs()
        if isinstance(self.model, str):
            self.model, loading = AutoModelForSequenceClassification.from_pretrained(
                name, num_labels=outputs, dtype=self.dtype, output_loading_info=True
            )
            if loading["missing_keys"]:
                raise ValueError(
                    f"The {self.what} {name!r} has no weights for {sorted(loading['missing_keys'])}: its scores would be "
                    f"random. {self.wanted}"
                )
        if self.pad_id is None:
            raise ValueError(
                f"The tokenizer of the {self.what} {name!r} has neither a padding nor an end-of-sequence token: set "
                "`processing_class.pad_token`."
            )
        config = self.model.config.get_text_config()
        config.pad_token_id = self.pad_id
        if self.max_length is None:
            self.max_length = min(
                getattr(config, "max_position_embeddings", None) or 10**9, self.processing_class.model_max_length
            )

    @property
    def pad_id(self) -> int | None:
        """The token that fills rows up."""
        return padding_id(self.processing_class)

    def key(self) -> str:
        """What a score depends on beside the text."""
        self.load()
        return content_key(model_key(self.model), tokenizer_key(self.processing_class), self.pad_id, self.max_length)

    @torch.inference_mode()
    def logits(
        self, prompts: Sequence[Text], completions: Sequence[Text], templates: Sequence[dict] | None = None
    ) -> torch.Tensor:
        """Outputs for each completion, shape `(N, outputs)`; `templates` are arguments of the chat template, one dict each."""
        self.model.eval()
        templates = [{}] * len(prompts) if templates is None else templates
        ids = [
            reward_ids(prompt, completion, self.processing_class, max_length=self.max_length, **template)
            for prompt, completion, template in zip(prompts, completions, templates, strict=True)
        ]
        width, device = max(map(len, ids)), next(self.model.parameters()).device
        rows = torch.tensor([row + [self.pad_id] * (width - len(row)) for row in ids], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
        return self.model(input_ids=rows, attention_mask=mask).logits.float()
