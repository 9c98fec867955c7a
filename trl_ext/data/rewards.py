"""What scores completions: reward models, functions, judges of two, and several of them as one."""

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from trl_ext.data.cache import content_key, model_key
from trl_ext.data.fingerprint import function_key
from trl_ext.data.paths import refuse_missing_path
from trl_ext.data.tokens import Text, reward_ids, tokenizer_key


@dataclass
class RewardModel:
    """
    A sequence classifier whose first logit is the reward.

    It reads the tokens that `RewardTrainer` trains on: plain text with the tokenizer's special tokens and an
    end-of-sequence token, conversations as the chat template renders them.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Hub name, folder or object.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its own tokenizer, whose chat template renders conversations; loaded from the model's name by default.
        max_length (`int`, *optional*):
            Tokens that are kept. A longer text loses its beginning, so that the end of the completion stays. The model's own
            limit by default.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Of the weights, for a model that is loaded here.

    Raises:
        `ValueError`: For a `max_length` that is not a positive whole number, and when it is loaded: for a path that is not
            there, a model without a trained reward head, or a tokenizer that cannot pad.
    """

    model: str | nn.Module
    tokenizer: PreTrainedTokenizerBase | None = None
    max_length: int | None = None
    dtype: Any = "auto"

    def __post_init__(self):
        length = self.max_length
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise ValueError(f"`max_length={length!r}` must be a whole number of tokens, at least 1, or None.")

    def load(self) -> None:
        """Load model and tokenizer where they are names, and settle how long texts may be."""
        refuse_missing_path(self.model, "reward model")
        name = self.model if isinstance(self.model, str) else self.model.config._name_or_path
        if self.tokenizer is None:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        if isinstance(self.model, str):
            self.model, loading = AutoModelForSequenceClassification.from_pretrained(
                name, num_labels=1, dtype=self.dtype, output_loading_info=True
            )
            if loading["missing_keys"]:
                raise ValueError(
                    f"The reward model {name!r} has no weights for {sorted(loading['missing_keys'])}: its scores would be "
                    "random. Give a trained sequence classifier with one output."
                )
        if self.pad_id is None:
            raise ValueError(
                f"The tokenizer of the reward model {name!r} has neither a padding nor an end-of-sequence token: set "
                "`tokenizer.pad_token`."
            )
        config = self.model.config.get_text_config()
        config.pad_token_id = self.pad_id
        if self.max_length is None:
            self.max_length = min(
                getattr(config, "max_position_embeddings", None) or 10**9, self.tokenizer.model_max_length
            )

    @property
    def pad_id(self) -> int | None:
        """The token that fills rows up: the tokenizer's padding token, else its end-of-sequence token, as in TRL."""
        pad_id = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad_id is None else pad_id

    def key(self) -> str:
        """What a score depends on beside the text."""
        self.load()
        return content_key(model_key(self.model), tokenizer_key(self.tokenizer), self.pad_id, self.max_length)

    @torch.inference_mode()
    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], templates: Sequence[dict] | None = None
    ) -> list[float]:
        """The reward of each completion; `templates` are arguments of the chat template, one dict per completion."""
        self.model.eval()
        templates = [{}] * len(prompts) if templates is None else templates
        ids = [
            reward_ids(prompt, completion, self.tokenizer, max_length=self.max_length, **template)
            for prompt, completion, template in zip(prompts, completions, templates, strict=True)
        ]
        width, device = max(map(len, ids)), next(self.model.parameters()).device
        rows = torch.tensor([row + [self.pad_id] * (width - len(row)) for row in ids], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
        return self.model(input_ids=rows, attention_mask=mask).logits[:, 0].float().tolist()


@dataclass
class RewardFunction:
    """
    A function of completions, as the reward functions of online training: `function(prompts=, completions=)` gives one number
    per completion.

    Args:
        function (`Callable`):
            The function.
        version (`str`, *optional*):
            What scores are kept under. By default the source of the function and of the modules it uses is, so that scores are
            computed anew when it is edited. Where the source cannot be had (a notebook, `python -`), scores are not kept
            unless a version is given; then change it with the function.
    """

    function: Callable[..., Sequence[float]]
    version: str | None = None

    def key(self) -> str | None:
        """What a score depends on beside the text; `None` where nobody can say."""
        return function_key(self.function, self.version, "function")

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        return finite_numbers(self.function(prompts=list(prompts), completions=list(completions)), completions)


@dataclass
class PairFunction:
    """
    A judge of two completions: `function(prompts, completions_a, completions_b)` gives for each the probability, in
    [0, 1], that the first is preferred. Gives pairs the column `preference_prob`, and groups the mean probability of winning.

    Args:
        function (`Callable`):
            The judge.
        version (`str`, *optional*):
            What its answers are kept under, as in [`RewardFunction`].
    """

    function: Callable[[list, list, list], Sequence[float]]
    version: str | None = None

    def key(self) -> str | None:
        """What an answer depends on beside the texts; `None` where nobody can say."""
        return function_key(self.function, self.version, "pair")

    def __call__(self, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]) -> list[float]:
        values = finite_numbers(self.function(list(prompts), list(first), list(second)), first)
        bad = [value for value in values if not 0 <= value <= 1]
        if bad:
            raise ValueError(f"The judge returned {bad[0]!r}; expected probabilities in [0, 1].")
        return values


@dataclass
class Ensemble:
    """
    Several rewards as one.

    Args:
        rewards (`list`):
            What [`score_preferences`] takes as `reward`, each.
        combine (`str`, *optional*, defaults to `"mean"`):
            `"mean"`, or `"min"`: the most cautious.
    """

    rewards: list[Any]
    combine: str = "mean"

    def __post_init__(self):
        if self.combine not in ("mean", "min") or not self.rewards:
            raise ValueError(f"An ensemble combines at least one reward by 'mean' or 'min'; got {self!r}.")


def as_reward(reward: Any) -> Any:
    """A path, a model or a function as one of the classes of this module."""
    if isinstance(reward, (RewardModel, RewardFunction, PairFunction, Ensemble)):
        return reward
    if isinstance(reward, (list, tuple)):
        return Ensemble(list(reward))
    if isinstance(reward, (str, nn.Module)):
        return RewardModel(reward)
    if callable(reward):
        return RewardFunction(reward)
    raise ValueError(
        f"`reward={reward!r}` is none of: a model's name, folder or object, a function, a PairFunction, an Ensemble."
    )


def finite_numbers(answer: Any, texts: Sequence[Text]) -> list[float]:
    """The answer of a function as floats, one per text; a `ValueError` if it is anything else."""
    values = answer.tolist() if hasattr(answer, "tolist") else answer
    if not isinstance(values, (list, tuple)) or len(values) != len(texts):
        given = f"{len(values)} scores" if isinstance(values, (list, tuple)) else repr(answer)
        raise ValueError(
            f"The reward returned {given} for {len(texts)} texts; expected a list with one number per text."
        )
    for value, text in zip(values, texts, strict=True):
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"The reward returned {value!r} for {text!r}; expected a finite number.")
    return [float(value) for value in values]
