"""
A general preference model (GPM, Zhang et al., https://huggingface.co/papers/2410.02197): preferences that may go in circles.

Each completion of a prompt has an embedding v of 2k numbers, and

    s(i, j) = <R v_i, v_j> = sum over blocks of  v_i[0] v_j[1] - v_i[1] v_j[0],    R block-diagonal with [[0, -1], [1, 0]]
    P(i is preferred to j) = sigmoid(s(i, j) / tau)

s(i, j) = -s(j, i) and s(i, i) = 0, exactly; one block already holds a circle such as rock, paper, scissors, which no reward can:
differences of rewards have an order. With v = (r, 1) it is Bradley-Terry with the reward r.

How sure this is: embeddings, R, the loss -log sigmoid(s / tau) and tau = 0.1 are the authors' code. It normalises embeddings in
one place (how its released models are used) and not in another (the model that it trains); here they are as the model gives
them. Weights of the blocks that depend on the prompt, which the authors have as an option, and their regression losses and
learnt tau are not here, so their released models cannot be loaded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from trl_ext.data.cache import content_key
from trl_ext.data.checks import is_finite_number
from trl_ext.data.classifier import Classifier, preference_temperature, read_config
from trl_ext.data.tokens import Text


GROUP_SCORES = ("win_rate", "score")


def preference_score(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """
    How far the first completion is preferred to the second, before the temperature.

    Args:
        first (`torch.Tensor` of shape `(..., 2k)`):
            Embeddings.
        second (`torch.Tensor` of shape `(..., 2k)`):
            Embeddings of completions of the same prompts.

    Returns:
        `torch.Tensor` of shape `(...)`: the scores. Exchanged arguments give the same numbers with the other sign, to the bit.
    """
    left = first[..., 0::2] * second[..., 1::2]
    right = first[..., 1::2] * second[..., 0::2]
    return (left - right).sum(dim=-1)


@dataclass
class PreferenceModel(Classifier):
    """
    A general preference model as a judge of two: `judge(prompts, completions_a, completions_b)` gives for each the probability that
    the first is preferred. Taken as `judge` by `score_preferences`, `DPOTrainer`, `OnlineDPOTrainer` and `trl-ext iterate`.

    It is a sequence classifier with an even number of outputs that [`~trl_ext.trainers.reward.RewardTrainer`] trained with
    `preference_dim`, and reads the same tokens as [`RewardModel`].

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Hub name, folder or object.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its own tokenizer, whose chat template renders conversations; loaded from the model's name by default.
        max_length (`int`, *optional*):
            Tokens that are kept. A longer text loses its beginning, so that the end of the completion stays. The model's own
            limit by default.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Of the weights, for a model that is loaded here.
        scores (`str`, *optional*, defaults to `"win_rate"`):
            What completions of a group get as their scores: `"win_rate"`, the mean probability of winning against the others, as
            from any judge; or `"score"`, the target of GPO, `sppo_soft` with `target="score"`: the mean of
            `(s(i, j) - s(j, i)) / tau` over all completions of the prompt, itself included.

    Raises:
        `ValueError`: For a `max_length` that is not a positive whole number, for unknown `scores`, and when it is loaded: for a
            path that is not there, a model that is no general preference model or has no trained head, or a tokenizer that
            cannot pad.
    """

    what: ClassVar[str] = "preference model"
    wanted: ClassVar[str] = "Give a model that `RewardTrainer` trained with `preference_dim`."

    scores: str = "win_rate"

    def __post_init__(self):
        super().__post_init__()
        if self.scores not in GROUP_SCORES:
            raise ValueError(f"`scores={self.scores!r}` is unknown; choose one of {list(GROUP_SCORES)}.")

    def outputs(self) -> int:
        name = self.model if isinstance(self.model, str) else self.model.config.name_or_path
        self.temperature = preference_temperature(self.model)
        if self.temperature is None:
            raise ValueError(
                f"{name!r} is no general preference model: its configuration has no `preference_temperature`. {self.wanted} An "
                "ordinary reward model is given as `reward_funcs`."
            )
        config = read_config(name) if isinstance(self.model, str) else self.model.config
        if not is_finite_number(self.temperature) or self.temperature <= 0 or config.num_labels % 2:
            raise ValueError(
                f"The preference model {name!r} has {config.num_labels} outputs and `preference_temperature={self.temperature!r}`; "
                f"expected an even number of outputs and a temperature above 0. {self.wanted}"
            )
        return config.num_labels

    def load(self) -> None:
        super().load()
        # Of an adapter: its base model knows nothing of it
        self.model.config.preference_temperature = self.temperature

    def compare(
        self,
        prompts: Sequence[Text],
        first: Sequence[Text],
        second: Sequence[Text],
        templates: Sequence[dict] | None = None,
    ) -> list[float]:
        """
        s / tau of each comparison: the logit of the probability that the first completion is preferred.

        Args:
            prompts (`Sequence`):
                `N` prompts, as text or messages.
            first (`Sequence`):
                A completion of each.
            second (`Sequence`):
                Another completion of each. A completion that stands in several comparisons is embedded once.
            templates (`Sequence[dict]`, *optional*):
                Arguments of the chat template, for each comparison.

        Raises:
            `ValueError`: If a score is NaN or infinite.
        """
        self.load()
        templates = [{}] * len(prompts) if templates is None else templates
        rows = {}
        sides = []
        for completions in (first, second):
            texts = list(zip(prompts, completions, templates, strict=True))
            keys = [content_key(*text) for text in texts]
            rows |= dict(zip(keys, texts, strict=True))
            sides.append(keys)
        embeddings = self.logits(*zip(*rows.values(), strict=True)).cpu().double()
        places = {key: row for row, key in enumerate(rows)}
        left, right = (embeddings[[places[key] for key in keys]] for keys in sides)
        values = (preference_score(left, right) / self.temperature).tolist()
        for value, prompt, a, b in zip(values, prompts, first, second, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"The preference model returned {value} for the completions {a!r} and {b!r} of the prompt {prompt!r}."
                )
        return values

    def __call__(
        self,
        prompts: Sequence[Text],
        first: Sequence[Text],
        second: Sequence[Text],
        templates: Sequence[dict] | None = None,
    ) -> list[float]:
        """The probability that each first completion is preferred; arguments as for [`PreferenceModel.compare`]."""
        return probabilities(self.compare(prompts, first, second, templates))


def probabilities(logits: Sequence[float]) -> list[float]:
    """Probabilities of logits."""
    return torch.tensor(logits, dtype=torch.float64).sigmoid().tolist()
