"""What scores the completions of a round: rewards, a judge of two, or the policy itself."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_ext.data.paths import refuse_missing_path
from trl_ext.data.preference_model import PreferenceModel
from trl_ext.data.rewards import Ensemble, RewardFunction, as_scorer, reward_models
from trl_ext.rounds.checks import refuse_unknown


IMPLICIT = "implicit"
JUDGE_HINT = " What scores one completion at a time is `reward_funcs`; a general preference model is {preference_model: NAME OR FOLDER}."


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
        judge = _imported(judge, "judge", JUDGE_HINT)
    elif isinstance(judge, dict):
        judge = _preference_model(judge)
    scorer = as_scorer(_rewards(reward_funcs), reward_weights, judge)
    for what, name in model_names(scorer):
        if name == IMPLICIT:
            raise ValueError(f"`reward_funcs={reward_funcs!r}`: 'implicit' cannot be one of several. Give it alone.")
        refuse_missing_path(name, what)
    return scorer


def model_names(scorer: Any) -> list[tuple[str, str]]:
    """Kind and name of each model that what scores is going to load."""
    return [(each.what, each.model) for each in reward_models(scorer) if isinstance(each.model, str)]


def check_kinds(scorer: Any) -> None:
    """Raise a `ValueError` for a preference model among rewards, and for another model as one; reads configurations alone."""
    for each in reward_models(scorer):
        each.outputs()


def _preference_model(given: dict) -> PreferenceModel:
    """The judge of a config that is a preference model, with its settings."""
    settings = dict(given)
    refuse_unknown(settings, ["preference_model", "max_length", "scores"], "`judge`")
    name = settings.pop("preference_model", None)
    if not isinstance(name, str):
        raise ValueError(f"`judge={given!r}` names no model; expected {{preference_model: NAME OR FOLDER}}.")
    return PreferenceModel(name, **settings)


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
    if isinstance(given, str) and not given.strip():
        raise ValueError(
            f"`reward_funcs` has the name {given!r}; expected a model's name or folder, or 'module:function'."
        )
    if isinstance(given, str) and ":" in given and not Path(given).exists():
        return RewardFunction(_imported(given, "reward function"))
    return given


def _imported(name: str, what: str, hint: str = "") -> Any:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the module does
        raise ValueError(
            f"The {what} {name!r} cannot be imported ({str(error) or repr(error)}). Give 'module:function'; the working folder is on the path.{hint}"
        ) from error
    if not callable(found):
        raise ValueError(f"The {what} {name!r} is a {type(found).__name__}; expected a function.")
    return found
