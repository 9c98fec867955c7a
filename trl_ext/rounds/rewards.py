"""What scores the completions of a round: rewards, a judge of two, or the policy itself."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_ext.data.paths import refuse_missing_path
from trl_ext.data.rewards import Ensemble, RewardFunction, as_scorer, reward_models


IMPLICIT = "implicit"


def build_scorer(reward_funcs: Any, reward_weights: Sequence[float] | None, judge: Any) -> Any:
    """
    What scores in a config, as one of the classes of [`trl_ext.data.rewards`]; `"implicit"` as it is.

    Raises:
        `ValueError`: For what is of no known form, cannot be imported or is not there, and where rewards and a judge are both
            given, or neither.
    """
    if isinstance(reward_funcs, str) and reward_funcs == IMPLICIT and judge is None and reward_weights is None:
        return reward_funcs
    if isinstance(judge, str):
        judge = _imported(judge, "judge", " What scores one completion at a time is `reward_funcs`.")
    scorer = as_scorer(_rewards(reward_funcs), reward_weights, judge)
    for name in reward_model_names(scorer):
        if name == IMPLICIT:
            raise ValueError(f"`reward_funcs={reward_funcs!r}`: 'implicit' cannot be one of several. Give it alone.")
        refuse_missing_path(name, "reward model")
    return scorer


def reward_model_names(scorer: Any) -> list[str]:
    """Names of the reward models that what scores is going to load."""
    return [each.model for each in reward_models(scorer) if isinstance(each.model, str)]


def _rewards(given: Any) -> Any:
    """Rewards of a config as [`score_preferences`] takes them."""
    if isinstance(given, dict):
        if len(given) != 1 or next(iter(given)) not in ("mean", "min"):
            raise ValueError(f"`reward_funcs={given!r}` is unknown; expected one of the keys 'mean', 'min'.")
        combine, members = next(iter(given.items()))
        if not isinstance(members, (list, tuple)):
            raise ValueError(f"`reward_funcs={given!r}`: {combine!r} takes a list of rewards.")
        return Ensemble(_rewards(members), combine)
    if isinstance(given, (list, tuple)):
        return [_rewards(each) for each in given]
    if isinstance(given, str) and ":" in given and not Path(given).exists():
        return RewardFunction(_imported(given, "reward function"))
    return given


def _imported(name: str, what: str, hint: str = "") -> Any:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"The {what} {name!r} cannot be imported ({error}). Give 'module:function'; the working folder is on the path.{hint}"
        ) from error
    if not callable(found):
        raise ValueError(f"The {what} {name!r} is a {type(found).__name__}; expected a function.")
    return found
