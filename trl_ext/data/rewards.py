"""What scores completions: reward models, reward functions, several of them as one, and judges of two."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from trl_ext.data.checks import is_finite_number
from trl_ext.data.classifier import Classifier, refuse_preference_model
from trl_ext.data.fingerprint import function_key
from trl_ext.data.preference_model import PreferenceModel
from trl_ext.data.tokens import Text


@dataclass
class RewardModel(Classifier):
    """
    A sequence classifier whose first logit is the reward.

    It reads the tokens that `RewardTrainer` trains on: plain text with the tokenizer's special tokens and an
    end-of-sequence token, conversations as the chat template renders them.

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

    Raises:
        `ValueError`: For a `max_length` that is not a positive whole number, and when it is loaded: for a path that is not
            there, a model without a trained reward head, a general preference model, or a tokenizer that cannot pad.
    """

    def outputs(self) -> int:
        refuse_preference_model(self.model)
        return 1

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], templates: Sequence[dict] | None = None
    ) -> list[float]:
        """
        The reward of each completion; `templates` are arguments of the chat template, one dict per completion. A `ValueError`
        if one is not finite.
        """
        rewards = self.logits(prompts, completions, templates)[:, 0].tolist()
        for reward, completion, prompt in zip(rewards, completions, prompts, strict=True):
            if not math.isfinite(reward):
                raise ValueError(
                    f"The reward model returned {reward} for the completion {completion!r} of the prompt {prompt!r}."
                )
        return rewards


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
        columns (`Sequence[str]`, *optional*):
            Columns of the dataset that the function is called with beside `prompts` and `completions`, by their names, as online
            training calls it with all of them. Those that the function names in an attribute `columns` by default, as
            [`TextOverlap`] does.
    """

    function: Callable[..., Sequence[float]]
    version: str | None = None
    columns: Sequence[str] | None = None

    def __post_init__(self):
        if self.columns is None:
            self.columns = read_columns(self.function)

    def key(self) -> str | None:
        """What a score depends on beside the text; `None` where nobody can say."""
        return function_key(self.function, self.version, "function")

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], rows: Sequence[dict] | None = None
    ) -> list[float]:
        """The reward of each completion; `rows` have the values of `columns`, one dict per completion."""
        columns = {name: [row[name] for row in rows] for name in self.columns} if self.columns else {}
        answer = self.function(prompts=list(prompts), completions=list(completions), **columns)
        return finite_numbers(answer, completions)


@dataclass
class JudgeFunction:
    """
    A judge of two completions: `function(prompts, completions_a, completions_b)` gives for each the probability, in
    [0, 1], that the first is preferred. Gives pairs the column `preference_prob`, and groups the mean probability of winning.

    Args:
        function (`Callable`):
            The judge, as online training takes it.
        version (`str`, *optional*):
            What its answers are kept under, as in [`RewardFunction`].
    """

    function: Callable[[list, list, list], Sequence[float]]
    version: str | None = None

    def key(self) -> str | None:
        """What an answer depends on beside the texts; `None` where nobody can say."""
        return function_key(self.function, self.version, "judge")

    def __call__(self, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]) -> list[float]:
        values = finite_numbers(self.function(list(prompts), list(first), list(second)), first)
        bad = [value for value in values if not 0 <= value <= 1]
        if bad:
            raise ValueError(f"The judge returned {bad[0]!r}; expected probabilities in [0, 1].")
        return values


JUDGES = (JudgeFunction, PreferenceModel)
COMBINATIONS = {"sum": sum, "mean": statistics.fmean, "min": min, "list": list}


@dataclass
class Ensemble:
    """
    Several pointwise rewards as one.

    Args:
        reward_funcs (`list`):
            What [`score_preferences`] takes as `reward_funcs`, each.
        combine (`str`, *optional*, defaults to `"sum"`):
            `"sum"`, as in online training; `"mean"`; `"min"`, the most cautious; or `"list"`, which combines nothing: pairs get
            a list in each row, one number per reward, for a loss that takes lists (`reward_distillation`).
        reward_weights (`list[float]`, *optional*):
            What each reward is multiplied by before they are combined; 1 by default.

    Raises:
        `ValueError`: For no reward at all, another combination, a judge of two or lists of another ensemble among the rewards, and
            weights that are not one finite number per reward.
    """

    reward_funcs: list[Any]
    combine: str = "sum"
    reward_weights: list[float] | None = None

    def __post_init__(self):
        if self.combine not in COMBINATIONS or not self.reward_funcs:
            raise ValueError(
                f"An ensemble combines at least one reward by one of {list(COMBINATIONS)}; got {self.reward_funcs!r} and "
                f"`combine={self.combine!r}`."
            )
        self.reward_funcs = [as_reward(each) for each in self.reward_funcs]
        if any(gives_lists(each) for each in self.reward_funcs):
            raise ValueError(
                f'An ensemble with `combine="list"` stands within an ensemble with `combine={self.combine!r}`, which combines numbers. '
                "Give all rewards in one list."
            )
        number = len(self.reward_funcs)
        weights = [1.0] * number if self.reward_weights is None else self.reward_weights
        if not isinstance(weights, (list, tuple)) or len(weights) != number or not all(map(is_finite_number, weights)):
            raise ValueError(
                f"`reward_weights={weights!r}` must be finite numbers, one for each of the {number} rewards."
            )
        self.reward_weights = list(weights)

    def combined(self, values: Sequence[float]) -> float | list[float]:
        """One reward from that of each member, or a list of them."""
        weights = zip(self.reward_weights, values, strict=True)
        return COMBINATIONS[self.combine]([weight * value for weight, value in weights])


def gives_lists(scorer: Any) -> bool:
    """Whether what scores gives each completion a list of numbers."""
    return isinstance(scorer, Ensemble) and scorer.combine == "list"


def as_reward(reward_funcs: Any) -> RewardModel | RewardFunction | Ensemble:
    """A path, a model, a function or a list of them as one of the classes of this module."""
    if isinstance(reward_funcs, JUDGES):
        raise ValueError(
            f"{reward_funcs!r} is a judge of two and scores no single completion: give it alone, as `judge`."
        )
    if isinstance(reward_funcs, (RewardModel, RewardFunction, Ensemble)):
        return reward_funcs
    if isinstance(reward_funcs, (list, tuple)):
        return Ensemble(list(reward_funcs))
    if isinstance(reward_funcs, (str, nn.Module)):
        return RewardModel(reward_funcs)
    if callable(reward_funcs):
        return RewardFunction(reward_funcs)
    raise ValueError(
        f"`reward_funcs={reward_funcs!r}` is none of: a model's name, folder or object, a function, an Ensemble, a list of these."
    )


def as_scorer(
    reward_funcs: Any, reward_weights: Sequence[float] | None, judge: Any
) -> RewardModel | RewardFunction | Ensemble | JudgeFunction | PreferenceModel:
    """
    What scores: rewards or a judge of two, as one of the classes of this module.

    Raises:
        `ValueError`: Where neither or both are given, and for what can be neither.
    """
    if (reward_funcs is None) == (judge is None):
        given = "neither" if judge is None else "both"
        raise ValueError(f"What scores is `reward_funcs` or a `judge`; got {given}. Give one of the two.")
    if judge is None and reward_weights is None:
        return as_reward(reward_funcs)
    if judge is None:
        several = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        return Ensemble(several, reward_weights=reward_weights)
    if reward_weights is not None:
        raise ValueError("`reward_weights` are of `reward_funcs`; they have no meaning with a `judge`.")
    if not callable(judge) or isinstance(judge, (RewardModel, RewardFunction, Ensemble, nn.Module)):
        raise ValueError(
            f"`judge={judge!r}` is no judge of two; expected a function judge(prompts, completions_a, completions_b) or a "
            "PreferenceModel. What scores one completion at a time is `reward_funcs`."
        )
    return judge if isinstance(judge, JUDGES) else JudgeFunction(judge)


def refuse_lists_of_groups(scorer: Any) -> None:
    """Raise a `ValueError` for lists of scores where groups are scored: one number decides which completion is preferred."""
    if gives_lists(scorer):
        raise ValueError(
            "Several rewards as a list are scores of pairs. In a group the score says which completion is preferred, which takes one "
            'number: give `Ensemble([...], "mean")` as `reward_funcs`, or make pairs of the groups first and score those.'
        )


def reward_models(reward: Any) -> list[Classifier]:
    """The sequence classifiers of what scores."""
    if isinstance(reward, Ensemble):
        return [model for each in reward.reward_funcs for model in reward_models(each)]
    return [reward] if isinstance(reward, Classifier) else []


def read_columns(reward: Any) -> tuple[str, ...]:
    """Columns of the dataset that a reward, or one of several, says that it reads."""
    if isinstance(reward, Ensemble):
        return tuple(dict.fromkeys(name for each in reward.reward_funcs for name in read_columns(each)))
    columns = getattr(reward, "columns", None)
    return tuple(columns) if isinstance(columns, (list, tuple)) else ()


def finite_numbers(answer: Any, texts: Sequence[Text]) -> list[float]:
    """The answer of a function as floats, one per text; a `ValueError` if it is anything else."""
    values = answer.tolist() if hasattr(answer, "tolist") else answer
    if not isinstance(values, (list, tuple)) or len(values) != len(texts):
        given = f"{len(values)} scores" if isinstance(values, (list, tuple)) else repr(answer)
        raise ValueError(
            f"The reward returned {given} for {len(texts)} texts; expected a list with one number per text."
        )
    for value, text in zip(values, texts, strict=True):
        if not is_finite_number(value):
            raise ValueError(f"The reward returned {value!r} for {text!r}; expected a finite number.")
    return [float(value) for value in values]
