"""What a run of rounds is, as Python or YAML."""

import dataclasses
import inspect
import math
import typing
from pathlib import Path
from typing import Any

from trl_ext.data.checks import check_count
from trl_ext.data.generators import Sampling, check_dtype
from trl_ext.data.pairing import PAIRINGS
from trl_ext.data.paths import refuse_missing_path, refuse_unwritable_folder
from trl_ext.data.rewards import refuse_lists_of_groups
from trl_ext.data.sampling import sample_completions
from trl_ext.data.scores import check_temperature, score_preferences
from trl_ext.rounds.checks import keyword_arguments
from trl_ext.rounds.rewards import IMPLICIT, build_scorer
from trl_ext.rounds.settings import PATHS, merged, refuse_unknown, refuse_wrong_types
from trl_ext.trainers.dpo_config import DPOConfig


REFERENCES = ("reset", "keep")
# Settings that the rounds choose themselves, by the dictionary in which they would stand
RESERVED = {"sampling": ("seed", "cache_dir"), "training": ("output_dir", "pairing", "resume_from_checkpoint")}


@dataclasses.dataclass
class RoundsConfig:
    """
    Settings of [`IterativeDPO`].

    Args:
        model (`str`):
            The policy before the first round: hub name or folder.
        prompts (`str`):
            Hub name, folder or file with a column `prompt`.
        output_dir (`str`):
            Where each round's data, scores, models and metrics go.
        reward_funcs (`str`, `list`, `dict` or what [`score_preferences`] takes, *optional*):
            A sequence classifier's name or folder; `"module:function"` for a reward function; a list of them, whose rewards are
            added up (an error for `reward_distillation`, which takes each: rounds keep one score per completion);
            `{"mean": [...]}` or `{"min": [...]}` for their mean or the smallest; `"implicit"` for the policy's own log-ratio to
            the policy of the round before (DICE), with `implicit_reference` in the first round.
        reward_weights (`list[float]`, *optional*):
            What each of a list of rewards is multiplied by before they are added up; 1 by default.
        judge (`str`, `dict` or `Callable`, *optional*):
            A judge of two in place of `reward_funcs`, as `"module:function"`: `function(prompts, completions_a, completions_b)`
            gives for each the probability, in [0, 1], that the first is preferred. Or a general preference model,
            `{"preference_model": NAME OR FOLDER}`, with `max_length` and `scores` of [`PreferenceModel`] beside it where wanted.
        rounds (`int`, *optional*, defaults to `3`):
            How many.
        prompts_per_round (`int`, *optional*):
            Prompts of each round, taken in turn and then anew from the start; all of them by default.
        num_generations (`int`, *optional*, defaults to `4`):
            Completions per prompt.
        sampling (`dict`, *optional*):
            Arguments of [`sample_completions`]: `temperature`, `top_p`, `max_new_tokens`, `batch_size`, `use_vllm`, `thinking`.
        scoring (`dict`, *optional*):
            Arguments of [`score_preferences`]: `batch_size`, `temperature`; for `"implicit"` rewards `batch_size` alone.
        pairing (`str`, *optional*, defaults to `"best_worst"`):
            `"best_worst"`, `"all"`, or `"group"` for losses that take groups.
        min_margin (`float`, *optional*, defaults to `0.0`):
            Pairs whose scores differ by less are left out (DNO keeps large margins).
        drop_truncated (`bool`, *optional*, defaults to `False`):
            Whether completions that did not end by themselves are left out.
        length_shaping (`str`, *optional*):
            `"balance"`: a penalty for length is searched that makes chosen and rejected completions equally long (DICE).
        replay (`str`, *optional*):
            Preference data that is mixed in: hub name, folder or file with `prompt`, `chosen` and `rejected`, and with the
            scores where a loss of the run reads those of the new pairs.
        replay_share (`float`, *optional*, defaults to `0.5`):
            Share of the pairs that `replay` makes up, in `[0, 1)`.
        reference (`str`, *optional*, defaults to `"reset"`):
            `"reset"`: each round's reference is the policy it began with; `"keep"`: the first policy throughout.
        implicit_reference (`str`, *optional*):
            What the first policy was trained from, for `reward_funcs="implicit"`.
        extrapolation (`float`, *optional*, defaults to `0.0`):
            `policy = trained + extrapolation * (trained - trained of the round before)` (Accelerated PO).
        training (`dict`, *optional*):
            Fields of [`DPOConfig`]: `loss_type`, `loss_kwargs`, `beta`, `learning_rate`, `max_steps`, ...
        seed (`int`, *optional*, defaults to `0`):
            Of sampling and training.

    Raises:
        `ValueError`: For settings that cannot be used.
    """

    model: str
    prompts: str
    output_dir: str
    reward_funcs: Any = None
    reward_weights: list[float] | None = None
    judge: Any = None
    rounds: int = 3
    prompts_per_round: int | None = None
    num_generations: int = 4
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    scoring: dict[str, Any] = dataclasses.field(default_factory=dict)
    pairing: str = "best_worst"
    min_margin: float = 0.0
    drop_truncated: bool = False
    length_shaping: str | None = None
    replay: str | None = None
    replay_share: float = 0.5
    reference: str = "reset"
    implicit_reference: str | None = None
    extrapolation: float = 0.0
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self):
        refuse_wrong_types(vars(self), typing.get_type_hints(RoundsConfig), "")
        for name in ("model", "prompts", "output_dir"):
            if not isinstance(getattr(self, name), (str, Path)) or not str(getattr(self, name)):
                raise ValueError(f"`{name}={getattr(self, name)!r}` must be a name or a path.")
            setattr(self, name, str(getattr(self, name)))
        for name in ("replay", "implicit_reference"):
            if not isinstance(getattr(self, name), (str, Path, type(None))):
                raise ValueError(f"`{name}={getattr(self, name)!r}` must be a name or a path.")
        for name, least in (("rounds", 1), ("num_generations", 2), ("prompts_per_round", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None:
                check_count(name, value, least)
        for name, allowed in (
            ("pairing", PAIRINGS),
            ("reference", REFERENCES),
            ("length_shaping", (None, "balance")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}={getattr(self, name)!r}` is unknown; choose one of {list(allowed)}.")
        if not 0 <= self.replay_share < 1:
            raise ValueError(f"`replay_share={self.replay_share!r}` must lie in [0, 1).")
        if not (0 <= self.min_margin < math.inf and math.isfinite(self.extrapolation)):
            raise ValueError(
                f"`min_margin={self.min_margin!r}` must be at least 0, and it and `extrapolation={self.extrapolation!r}` finite."
            )
        if self.pairing == "group" and (self.replay is not None or self.min_margin):
            raise ValueError('`replay` and `min_margin` are of pairs; they have no meaning with `pairing="group"`.')
        self._check_dictionaries()
        self._check_scorer()
        for name, what in PATHS:
            refuse_missing_path(getattr(self, name), what)
        refuse_unwritable_folder(self.output_dir, "output_dir")

    def _check_dictionaries(self) -> None:
        training = {
            name: hint
            for name, hint in typing.get_type_hints(DPOConfig).items()
            if name in {field.name for field in dataclasses.fields(DPOConfig) if field.init}
        }
        for name, known in (
            ("sampling", keyword_arguments(sample_completions)),
            ("scoring", {"batch_size": int} if self.scorer == IMPLICIT else keyword_arguments(score_preferences)),
            ("training", training),
        ):
            given = getattr(self, name)
            if not isinstance(given, dict):
                raise ValueError(f"`{name}={given!r}` must be a dictionary of settings.")
            taken = [each for each in RESERVED.get(name, ()) if each in given]
            if taken:
                raise ValueError(f"`{name}` may not set {taken}: the rounds do.")
            refuse_unknown(given, known, f"`{name}`")
            refuse_wrong_types(given, known, f"{name}.")
            if "batch_size" in given:
                check_count(f"{name}.batch_size", given["batch_size"])
        self._check_sampling()

    def _check_sampling(self) -> None:
        """What is first used when a round samples."""
        given = {each.name: each.default for each in inspect.signature(sample_completions).parameters.values()}
        given |= self.sampling
        numbers = (given[name] for name in ("temperature", "top_p", "max_new_tokens"))
        Sampling(self.num_generations, *numbers, seed=self.seed)
        check_dtype(given["dtype"])
        if given["processing_class"] is not None and not callable(given["processing_class"]):
            raise ValueError(
                f"`sampling.processing_class={given['processing_class']!r}` is no tokenizer. Leave it out: the policy has one."
            )
        if "cache_dir" in self.scoring:
            refuse_unwritable_folder(self.scoring["cache_dir"], "scoring.cache_dir")

    def _check_scorer(self) -> None:
        if (self.scorer == IMPLICIT) != (self.implicit_reference is not None):
            raise ValueError(
                '`reward_funcs="implicit"` scores by the log-ratio of the policy to the model it was trained from: give that one '
                f"as `implicit_reference`, and with no other rewards. Got `reward_funcs={self.reward_funcs!r}`, "
                f"`judge={self.judge!r}` and `implicit_reference={self.implicit_reference!r}`."
            )
        check_temperature(self.scoring.get("temperature", 1.0), self.scorer, grouped=True)
        refuse_lists_of_groups(self.scorer)

    @property
    def scorer(self) -> Any:
        """What scores, as one of the classes of [`trl_ext.data.rewards`]; `"implicit"` as it is."""
        return build_scorer(self.reward_funcs, self.reward_weights, self.judge)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> "RoundsConfig":
        """
        Read settings from a file; `overrides` replace them, with dots into `sampling`, `scoring` and `training`.
        """
        settings = merged(path, overrides or {}, [field.name for field in dataclasses.fields(cls)])
        return cls(**settings)
