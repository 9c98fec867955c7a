"""What a run of rounds is, as Python or YAML."""

import dataclasses
import importlib
import inspect
import math
from pathlib import Path
from typing import Any

import yaml

from trl_ext.data.pairing import PAIRINGS
from trl_ext.data.sampling import sample_completions
from trl_ext.data.scores import Ensemble, PairFunction, RewardFunction, RewardModel, score_preferences
from trl_ext.rounds.log_probs import completion_log_probs


REFERENCES = ("reset", "keep")
# Fields of the training config that the rounds set themselves
RESERVED = ("output_dir", "pairing")


@dataclasses.dataclass
class RoundsConfig:
    """
    Settings of [`IterativeDPO`].

    Args:
        model (`str`):
            The policy before the first round: hub name or folder.
        prompts (`str`):
            Hub name, folder or file with a column `prompt`.
        judge (`str`, `dict` or a reward of [`score_preferences`]):
            A sequence classifier's name or folder; `"module:function"` for a reward function; `{"pair": "module:function"}` for
            a judge of two; `{"mean": [...]}` or `{"min": [...]}` for several; `"implicit"` for the policy's own log-ratio to
            the policy of the round before (DICE), with `implicit_reference` in the first round.
        output_dir (`str`):
            Where each round's data, scores, models and metrics go.
        rounds (`int`, *optional*, defaults to `3`):
            How many.
        prompts_per_round (`int`, *optional*):
            Prompts of each round, taken in turn and then anew from the start; all of them by default.
        n (`int`, *optional*, defaults to `4`):
            Completions a prompt.
        sampling (`dict`, *optional*):
            Arguments of [`sample_completions`]: `temperature`, `top_p`, `max_new_tokens`, `batch_size`, `backend`, `thinking`.
        scoring (`dict`, *optional*):
            Arguments of [`score_preferences`]: `batch_size`, `temperature`.
        pairing (`str`, *optional*, defaults to `"best_worst"`):
            `"best_worst"`, `"all"`, or `"group"` for losses that take groups.
        min_margin (`float`, *optional*, defaults to `0.0`):
            Pairs whose scores differ by less are left out (DNO keeps large margins).
        drop_truncated (`bool`, *optional*, defaults to `False`):
            Whether completions that did not end by themselves are left out.
        length_shaping (`str`, *optional*):
            `"balance"`: a penalty for length is searched that makes chosen and rejected completions equally long (DICE).
        replay (`str`, *optional*):
            Preference data that is mixed in: hub name, folder or file with `prompt`, `chosen` and `rejected`.
        replay_share (`float`, *optional*, defaults to `0.5`):
            Share of the pairs that `replay` makes up, in `[0, 1)`.
        reference (`str`, *optional*, defaults to `"reset"`):
            `"reset"`: each round's reference is the policy it began with; `"keep"`: the first policy throughout.
        implicit_reference (`str`, *optional*):
            What the first policy was trained from, for `judge="implicit"`.
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
    judge: Any
    output_dir: str
    rounds: int = 3
    prompts_per_round: int | None = None
    n: int = 4
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
        for name, least in (("rounds", 1), ("n", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}={value!r}` must be a whole number, at least {least}.")
        if self.prompts_per_round is not None and not self.prompts_per_round >= 1:
            raise ValueError(f"`prompts_per_round={self.prompts_per_round!r}` must be at least 1, or None for all.")
        for name, allowed in (
            ("pairing", PAIRINGS),
            ("reference", REFERENCES),
            ("length_shaping", (None, "balance")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}={getattr(self, name)!r}` is unknown; choose one of {list(allowed)}.")
        if not 0 <= self.replay_share < 1:
            raise ValueError(f"`replay_share={self.replay_share!r}` must lie in [0, 1).")
        if not (self.min_margin >= 0 and math.isfinite(self.extrapolation)):
            raise ValueError("`min_margin` must be at least 0 and `extrapolation` finite.")
        if self.judge == "implicit" and self.implicit_reference is None:
            raise ValueError(
                '`judge="implicit"` scores by the log-ratio of the policy to the model it was trained from: give that one as '
                "`implicit_reference`."
            )
        scoring = completion_log_probs if self.judge == "implicit" else score_preferences
        for name, function in (("sampling", sample_completions), ("scoring", scoring)):
            allowed = [
                key for key, each in inspect.signature(function).parameters.items() if each.kind is each.KEYWORD_ONLY
            ]
            unknown = sorted(set(getattr(self, name)) - set(allowed))
            if unknown:
                raise ValueError(f"`{name}` has unknown settings {unknown}; it takes {allowed}.")
        taken = [name for name in RESERVED if name in self.training]
        if taken:
            raise ValueError(f"`training` may not set {taken}: the rounds do.")
        self.build_judge()

    def build_judge(self) -> Any:
        """The judge as [`score_preferences`] takes it; `"implicit"` as it is."""
        return self.judge if self.judge == "implicit" else _judge(self.judge)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> "RoundsConfig":
        """
        Read settings from a file; `overrides` replace them, with dots into `sampling`, `scoring` and `training`.
        """
        text = Path(path).read_text()
        settings = yaml.safe_load(text)
        if not isinstance(settings, dict):
            raise ValueError(f"{path} holds no settings; expected YAML with model, prompts, judge and output_dir.")
        for key, value in (overrides or {}).items():
            *outer, inner = key.split(".")
            where = settings
            for name in outer:
                where = where.setdefault(name, {})
            where[inner] = value
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"{path}: unknown settings {unknown}. Known: {sorted(known)}.")
        required = [name for name in ("model", "prompts", "judge", "output_dir") if settings.get(name) is None]
        if required:
            raise ValueError(f"{path}: {required} missing. Add them, or give them as --{required[0]} VALUE.")
        return cls(**settings)


def _judge(judge: Any) -> Any:
    if isinstance(judge, dict):
        if len(judge) != 1 or next(iter(judge)) not in ("pair", "mean", "min"):
            raise ValueError(f"`judge={judge!r}` is unknown; expected one of the keys 'pair', 'mean', 'min'.")
        kind, value = next(iter(judge.items()))
        if kind == "pair":
            return PairFunction(_imported(value))
        return Ensemble([_judge(each) for each in value], combine=kind)
    if isinstance(judge, str) and ":" in judge and not Path(judge).exists():
        return RewardFunction(_imported(judge))
    return RewardModel(judge) if isinstance(judge, str) else judge


def _imported(name: Any) -> Any:
    if callable(name):
        return name
    module, _, attribute = str(name).partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"The judge {name!r} cannot be imported ({error}). Give 'module:function'; the working folder is on the path."
        ) from error
