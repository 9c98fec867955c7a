"""Who scores the completions of a round."""

import importlib
from pathlib import Path
from typing import Any

from trl_ext.data.paths import refuse_missing_path
from trl_ext.data.scores import Ensemble, PairFunction, RewardFunction, RewardModel, as_reward


IMPLICIT = "implicit"


def build_judge(judge: Any) -> Any:
    """
    The judge of a config as [`score_preferences`] takes it; `"implicit"` as it is.

    Raises:
        `ValueError`: For a judge that is of no known form, cannot be imported or is not there.
    """
    if isinstance(judge, str) and judge == IMPLICIT:
        return judge
    built = _judge(judge)
    for each in _members(built):
        if isinstance(each, RewardModel):
            if isinstance(each.model, str) and each.model == IMPLICIT:
                raise ValueError(f"`judge={judge!r}`: 'implicit' cannot be one of several. Give it alone.")
            refuse_missing_path(each.model, "judge")
    return built


def gives_win_rates(judge: Any) -> bool:
    """Whether the scores of a built judge are win rates, in [0, 1]: those of a judge of two are."""
    return isinstance(judge, PairFunction)


def judging_models(judge: Any) -> list[str]:
    """Names of the reward models that a built judge is going to load."""
    return [each.model for each in _members(judge) if isinstance(each, RewardModel) and isinstance(each.model, str)]


def _judge(judge: Any) -> Any:
    if isinstance(judge, dict):
        if len(judge) != 1 or next(iter(judge)) not in ("pair", "mean", "min"):
            raise ValueError(f"`judge={judge!r}` is unknown; expected one of the keys 'pair', 'mean', 'min'.")
        kind, value = next(iter(judge.items()))
        if kind == "pair":
            return PairFunction(_imported(value))
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"`judge={judge!r}`: {kind!r} takes a list of judges.")
        return Ensemble([_judge(each) for each in value], combine=kind)
    if isinstance(judge, str) and ":" in judge and not Path(judge).exists():
        return RewardFunction(_imported(judge))
    return as_reward(judge)


def _members(judge: Any) -> list[Any]:
    if isinstance(judge, Ensemble):
        return [member for each in judge.rewards for member in _members(as_reward(each))]
    return [judge]


def _imported(name: Any) -> Any:
    if callable(name):
        return name
    module, _, attribute = str(name).partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"The judge {name!r} cannot be imported ({error}). Give 'module:function'; the working folder is on the path."
        ) from error
    if not callable(found):
        raise ValueError(f"The judge {name!r} is a {type(found).__name__}; expected a function.")
    return found
