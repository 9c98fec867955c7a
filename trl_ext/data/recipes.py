"""
Recipes that are made of data: small functions on a dataset, for any loss.

Each says its paper and how sure it is. Curricula need a trainer that keeps the order: `DPOConfig(train_sampling_strategy=
"sequential")`, or one run per stage.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl.data_utils import common_prefix_length

from trl_ext.data.checks import require_columns
from trl_ext.data.groups import check_group


def curriculum(groups: Dataset, seed: int = 0) -> list[Dataset]:
    """
    Curry-DPO: several pairs per prompt, easy ones first (https://huggingface.co/papers/2403.07230; recalled).

    The best completion of each group against the worst, then against the next, up to the second best: stage `k` has the pair
    with the `k`-th largest gap. Shuffled within a stage, never across.

    Args:
        groups ([`~datasets.Dataset`]):
            `prompt`, `completions`, `scores`.
        seed (`int`, *optional*, defaults to `0`):
            Of the shuffling.

    Returns:
        `list[Dataset]`: the stages, each with `prompt`, `chosen`, `rejected` and both scores. Train them in turn, each with
        a trainer of its own that is given the model object which the stage before has trained. With `ref_model` left out,
        the reference of a stage is a frozen copy of that object as it is when the trainer is built: the model of the stage
        before, not the one that all stages began with.
    """
    stages: list[list[dict]] = []
    for index, row in enumerate(groups):
        check_group(row, index, "grouped")
        order = sorted(range(len(row["scores"])), key=lambda k: row["scores"][k])
        best = order.pop()
        # Ties with the best are no preference
        rest = [k for k in order if row["scores"][k] < row["scores"][best]]
        for stage, k in enumerate(rest):
            while len(stages) <= stage:
                stages.append([])
            stages[stage].append(
                {
                    "prompt": row["prompt"],
                    "chosen": row["completions"][best],
                    "rejected": row["completions"][k],
                    "score_chosen": float(row["scores"][best]),
                    "score_rejected": float(row["scores"][k]),
                }
            )
    if not stages:
        raise ValueError("No group has two different scores: there is nothing to prefer.")
    return [Dataset.from_list(stage).shuffle(seed=seed + number) for number, stage in enumerate(stages)]


def step_pairs(dataset: Dataset, steps: str = "initial_reason_steps") -> Dataset:
    """
    Step-DPO: contrast one step after a correct beginning (https://huggingface.co/papers/2406.18629; the paper and its code).

    The column `steps` moves from the completions to the prompt. No end-of-sequence token follows a step; TRL adds one to plain
    text, so the rows are given as token ids by [`without_eos`].

    Args:
        dataset ([`~datasets.Dataset`]):
            `prompt`, `chosen`, `rejected` (each the one step) and the correct steps before, all text.
        steps (`str`, *optional*, defaults to `"initial_reason_steps"`):
            Column of those steps.
    """
    require_columns(dataset, ["prompt", "chosen", "rejected", steps])
    return dataset.map(lambda row: {"prompt": row["prompt"] + row[steps]}, remove_columns=[steps])


def without_eos(dataset: Dataset, processing_class: Any) -> Dataset:
    """
    Plain-text pairs as token ids, without the end-of-sequence token that TRL would add: for steps that do not end an answer.

    [`trl_ext.DPOTrainer`] takes a dataset with `prompt_ids`, `chosen_ids` and `rejected_ids` as it is.
    """
    require_columns(dataset, ["prompt", "chosen", "rejected"])

    def encode(row: dict) -> dict:
        prompt = processing_class(row["prompt"])["input_ids"]
        whole = {side: processing_class(row["prompt"] + row[side])["input_ids"] for side in ("chosen", "rejected")}
        start = min(common_prefix_length(prompt, ids) for ids in whole.values())
        return {"prompt_ids": prompt[:start], **{f"{side}_ids": ids[start:] for side, ids in whole.items()}}

    return dataset.map(encode)


def step_controlled_pairs(dataset: Dataset, prefix: str = "prefix", seed: int = 0) -> Dataset:
    """
    Step-Controlled DPO: whole solutions, and pairs that share a correct beginning and part at a step
    (https://huggingface.co/papers/2407.00782; the paper, Eqs. 2 to 5, and its code).

    Args:
        dataset ([`~datasets.Dataset`]):
            `prompt`, `chosen`, `rejected` as text. Rows whose `prefix` is not empty are of the second kind: it moves to the
            prompt.
        prefix (`str`, *optional*, defaults to `"prefix"`):
            Column of the shared beginning; empty or `None` for whole solutions.
        seed (`int`, *optional*, defaults to `0`):
            Both kinds are mixed at random, with equal weight.
    """
    require_columns(dataset, ["prompt", "chosen", "rejected", prefix])

    def move(row: dict) -> dict:
        return {"prompt": row["prompt"] + (row[prefix] or "")}

    return dataset.map(move, remove_columns=[prefix]).shuffle(seed=seed)


FEW_SHOT = "Here are preferences of the same person.\n\n{examples}\n\nAnswer as this person would prefer.\n\n{prompt}"
EXAMPLE = "Question: {prompt}\nPreferred answer: {chosen}\nOther answer: {rejected}"


def few_shot_prompts(dataset: Dataset, shots: int = 4, user: str = "user_id", seed: int = 0) -> Dataset:
    """
    FSPO: labelled preferences of the same user stand in the prompt (https://huggingface.co/papers/2502.19312; the authors'
    code trains IPO on summed log-probs with `beta` 0.01: `OnlineIPOLoss`' form, not TRL's offline `ipo`).

    Args:
        dataset ([`~datasets.Dataset`]):
            `prompt`, `chosen`, `rejected` as text, and the user.
        shots (`int`, *optional*, defaults to `4`):
            Preferences in a prompt; a user needs one more.
        user (`str`, *optional*, defaults to `"user_id"`):
            Column that says who preferred.
        seed (`int`, *optional*, defaults to `0`):
            Of the choice. The row itself, and any other with its prompt, never stands in its own prompt.
    """
    require_columns(dataset, ["prompt", "chosen", "rejected", user])
    if shots < 1:
        raise ValueError(f"`shots={shots!r}` must be at least 1.")
    of_user: dict[Any, list[int]] = {}
    for index, name in enumerate(dataset[user]):
        of_user.setdefault(name, []).append(index)
    rows = list(dataset)
    rng = random.Random(seed)
    out = []
    for row in rows:
        pool = [index for index in of_user[row[user]] if rows[index]["prompt"] != row["prompt"]]
        if len(pool) < shots:
            continue
        examples = "\n\n".join(
            EXAMPLE.format(**{name: rows[index][name] for name in ("prompt", "chosen", "rejected")})
            for index in rng.sample(pool, shots)
        )
        out.append({**row, "prompt": FEW_SHOT.format(examples=examples, prompt=row["prompt"])})
    if not out:
        raise ValueError(f"No user has {shots + 1} different prompts; lower `shots`.")
    return Dataset.from_list(out)


REFINE = "{prompt}\n\nAn answer was:\n{answer}\n\nWrite a better answer."


def refinement_rows(dataset: Dataset, template: str = REFINE) -> Dataset:
    """
    EVOLVE's idea as data: the model learns to refine (https://huggingface.co/papers/2502.05605; the abstract. Its objective, how
    direct answers, refinements and a likelihood term are mixed, is not known to us).

    To each pair a second one is added, whose prompt holds the worse answer and asks for a better one.

    Args:
        dataset ([`~datasets.Dataset`]):
            `prompt`, `chosen`, `rejected` as text.
        template (`str`, *optional*):
            With the places `{prompt}` and `{answer}`.

    Returns:
        Twice the rows: each pair, then its refinement.
    """
    require_columns(dataset, ["prompt", "chosen", "rejected"])
    if "{prompt}" not in template or "{answer}" not in template:
        raise ValueError("The template needs the places {prompt} and {answer}.")
    rows = []
    for row in dataset:
        rows += [row, {**row, "prompt": template.format(prompt=row["prompt"], answer=row["rejected"])}]
    return Dataset.from_list(rows)


WEIGHTS = "[weights: {weights}] "
_SHOWN = re.compile(r"^\[weights: ([^\]]*)\] ")


def weighted_prompts(prompts: Dataset, objectives: Sequence[str], alpha: float = 1.0, seed: int = 0) -> Dataset:
    """
    MO-ODPO: the weights of several objectives stand in the prompt (https://huggingface.co/papers/2503.00295; recalled).

    Args:
        prompts ([`~datasets.Dataset`]):
            With a text column `prompt`.
        objectives (`Sequence[str]`):
            Names, as the prompt shows them.
        alpha (`float`, *optional*, defaults to `1.0`):
            Of the Dirichlet distribution that weights are drawn from; small values give one objective at a time.
        seed (`int`, *optional*, defaults to `0`):
            Of the draw.

    Returns:
        The dataset with the weights in each prompt and in the column `objective_weights`, for [`weighted_reward`].
    """
    require_columns(prompts, ["prompt"])
    if not objectives or not alpha > 0:
        raise ValueError("Give at least one objective, and a positive `alpha`.")
    rng = random.Random(seed)

    def draw(row: dict) -> dict:
        values = [rng.gammavariate(alpha, 1.0) for _ in objectives]
        # Rounded first: the text and the reward must have the same weights
        weights = [round(value / sum(values), 2) for value in values]
        shown = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(objectives, weights, strict=True))
        return {"prompt": WEIGHTS.format(weights=shown) + row["prompt"], "objective_weights": weights}

    return prompts.map(draw, load_from_cache_file=False)


def weighted_reward(reward_funcs: Sequence[Callable[..., Sequence[float]]]) -> Callable[..., list[float]]:
    """
    One reward function for `OnlineDPOTrainer` from several: each completion's are added with the weights of its own prompt.

    Args:
        reward_funcs (`Sequence[Callable]`):
            One per objective, in the order of [`weighted_prompts`], on comparable scales. They see prompts without the weights.
    """

    def reward(prompts, completions, objective_weights, **kwargs):
        if any(len(weights) != len(reward_funcs) for weights in objective_weights):
            raise ValueError(f"Prompts have {len(objective_weights[0])} weights for {len(reward_funcs)} rewards.")
        plain = [_SHOWN.sub("", prompt) for prompt in prompts]
        columns = [function(prompts=plain, completions=completions, **kwargs) for function in reward_funcs]
        return [
            sum(weight * value for weight, value in zip(weights, values, strict=True))
            for weights, values in zip(objective_weights, zip(*columns, strict=True), strict=True)
        ]

    return reward


@dataclass
class DualVariable:
    """
    Constrained DPO's price of the cost, and its update `lambda <- max(0, lambda + learning_rate * (mean cost - budget))`
    (https://huggingface.co/papers/2403.02475; recalled, the loop confirmed by the abstract).

    Args:
        budget (`float`):
            Mean cost that is allowed.
        learning_rate (`float`):
            Step of the update, positive.
        value (`float`, *optional*, defaults to `0.0`):
            lambda, at least 0.
    """

    budget: float
    learning_rate: float
    value: float = 0.0

    def __post_init__(self):
        if not (self.learning_rate > 0 and self.value >= 0):
            raise ValueError(
                f"`learning_rate={self.learning_rate!r}` must be positive and `value={self.value!r}` at least 0."
            )

    def update(self, costs: Sequence[float]) -> float:
        """After a round in which the policy's completions cost `costs`; returns the new value."""
        self.value = max(0.0, self.value + self.learning_rate * (sum(costs) / len(costs) - self.budget))
        return self.value


def relabel_by_cost(dataset: Dataset, price: float) -> Dataset:
    """
    Constrained DPO: pairs in the order of `reward - price * cost`. Pairs may swap; those that tie are left out.

    Args:
        dataset ([`~datasets.Dataset`]):
            `chosen`, `rejected`, `reward_chosen`, `reward_rejected`, `cost_chosen`, `cost_rejected`.
        price (`float`):
            lambda, at least 0: what a unit of cost takes off the reward.

    Returns:
        The dataset with `score_chosen` and `score_rejected`, chosen and rejected (and their columns) swapped where the price
        turns the order.
    """
    names = ["reward", "cost"]
    require_columns(
        dataset, ["chosen", "rejected", *(f"{name}_{side}" for name in names for side in ("chosen", "rejected"))]
    )
    if not price >= 0:
        raise ValueError(f"`price={price!r}` must be at least 0.")
    sided = [name for name in dataset.column_names if name == "chosen" or name.endswith("_chosen")]
    sided = [name for name in sided if name.replace("chosen", "rejected") in dataset.column_names]

    def relabel(row: dict) -> dict:
        score = {side: row[f"reward_{side}"] - price * row[f"cost_{side}"] for side in ("chosen", "rejected")}
        if score["chosen"] < score["rejected"]:
            row = dict(row)
            for name in sided:
                other = name.replace("chosen", "rejected")
                row[name], row[other] = row[other], row[name]
            score = {"chosen": score["rejected"], "rejected": score["chosen"]}
        return {**row, "score_chosen": float(score["chosen"]), "score_rejected": float(score["rejected"])}

    relabelled = dataset.map(relabel).filter(lambda row: row["score_chosen"] > row["score_rejected"])
    if not len(relabelled):
        raise ValueError("All pairs tie at this price: there is nothing to prefer.")
    return relabelled
