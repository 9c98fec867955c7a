"""Scores for the data of an offline run, from a reward or a judge that the trainer is given."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from trl_ext.data.columns import over_splits, takes_each_reward
from trl_ext.data.rewards import Ensemble, as_scorer
from trl_ext.data.scores import score_preferences


def with_scores(dataset: Any, reward_funcs: Any, judge: Any, losses: Mapping[str, Any]) -> Any:
    """The dataset, or each of several, with scores where a loss reads them and there are none."""
    as_scorer(reward_funcs, None, judge)  # refused even where the data has scores already
    read = {name for loss in losses.values() for name in (*loss.required_columns, *loss.optional_columns)}
    given = "reward_funcs" if judge is None else "judge"
    if isinstance(reward_funcs, (list, tuple)) and len(reward_funcs) > 1 and takes_each_reward(losses):
        reward_funcs = Ensemble(list(reward_funcs), "list")
    whole = any(not loss.takes_pairs for loss in losses.values())  # whose scores are no column of pairs
    if not whole and not read & {"score_chosen", "score_rejected", "preference_prob"}:
        raise ValueError(
            f"`{given}` would not be used: none of the losses {sorted(losses) or 'of TRL'} reads scores. Leave it out."
        )

    def scored(each: Dataset | IterableDataset, split: str) -> Dataset:
        if not isinstance(each, Dataset):
            raise ValueError(f"`{given}` scores map-style datasets; load the data without `streaming=True`.")
        there = {"score_chosen", "preference_prob", "scores"} & set(each.column_names)
        needy = [name for name, loss in losses.items() if "score_chosen" in loss.required_columns]
        if judge is not None and needy and not there and "completions" not in each.column_names:
            raise ValueError(
                f"The losses {needy} require scores, and a `judge` gives the pairs of the {split} dataset the column "
                "'preference_prob'. Give `reward_funcs`, groups of completions, or another loss."
            )
        return each if there else score_preferences(each, reward_funcs, judge=judge)

    return over_splits(dataset, scored)
