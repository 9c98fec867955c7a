"""
Scores for preference data: from a reward model, a function, or a model of pairs.

Each text is scored once, whatever dataset it stands in and however often: results lie on disk by what they depend on (text,
weights, template, truncation), are written batch by batch, and a run that was killed goes on where it was.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets
from tqdm import tqdm

from trl_ext.data.cache import Ledger, content_key, default_folder, processes
from trl_ext.data.calibration import fit_temperature
from trl_ext.data.checks import check_count, require_columns
from trl_ext.data.paths import refuse_unwritable_folder
from trl_ext.data.preference_model import PreferenceModel, probabilities
from trl_ext.data.rewards import (
    JUDGES,
    Ensemble,
    JudgeFunction,
    RewardModel,
    as_scorer,
    read_columns,
    refuse_lists_of_groups,
    reward_models,
)
from trl_ext.data.texts import problem_of_text
from trl_ext.data.tokens import Text, require_chat_template, template_arguments


logger = get_logger(__name__)


def score_preferences(
    dataset: Dataset,
    reward_funcs: Any = None,
    reward_weights: Sequence[float] | None = None,
    judge: Callable[[list, list, list], Sequence[float]] | None = None,
    *,
    batch_size: int = 16,
    temperature: float | str = 1.0,
    cache_dir: str | Path | None = None,
) -> Dataset:
    """
    Add scores to preference data.

    Args:
        dataset ([`~datasets.Dataset`]):
            Pairs (`prompt`, `chosen`, `rejected`) or groups (`prompt`, `completions`), plain or conversational. `tools` and
            `chat_template_kwargs`, where they are there, reach a reward model's chat template.
        reward_funcs (*optional*):
            A sequence classifier by name, folder or object ([`RewardModel`] for its own tokenizer or length), a function
            ([`RewardFunction`]), or a list of them, whose rewards are added up as in online training ([`Ensemble`] for the mean,
            the smallest, or a list with each).
        reward_weights (`Sequence[float]`, *optional*):
            What each of `reward_funcs` is multiplied by before they are added up; 1 by default.
        judge (`Callable`, *optional*):
            A judge of two in place of `reward_funcs`: `judge(prompts, completions_a, completions_b)` gives for each the
            probability, in [0, 1], that the first is preferred ([`JudgeFunction`] for a version of its own); or a
            [`PreferenceModel`].
        batch_size (`int`, *optional*, defaults to `16`):
            Texts at a time.
        temperature (`float` or `str`, *optional*, defaults to `1.0`):
            What pointwise scores are divided by. `"fit"` takes the temperature at which they explain the labels of the pairs
            best under Bradley-Terry, so that differences are logits: the unit of `margin_adaptive` and `anchored`. Of lists of
            scores each reward has its own.
        cache_dir (`str` or `Path`, *optional*):
            Where results are kept; `$TRL_EXT_CACHE` or `~/.cache/trl_ext` by default. Those of a function are kept under its
            source (see [`RewardFunction`]).

    Returns:
        The dataset with `score_chosen` and `score_rejected` (`preference_prob` from a judge), or with `scores`. Those of an
        [`Ensemble`] with `combine="list"` are lists, one number per reward, of pairs only. Columns of these names that were there
        are replaced, with a warning.

    Raises:
        `ValueError`: For rows that cannot be scored, before the work starts, and for scores that are not finite. What was
            scored by then stays on disk. A sampled completion may be empty, and is scored like any other; in a pair an empty
            completion is an error.
    """
    if cache_dir is not None:
        refuse_unwritable_folder(cache_dir, "cache_dir")
    processes()  # the logger asks which process this is
    scorer = as_scorer(reward_funcs, reward_weights, judge)
    grouped = "completions" in dataset.column_names
    check_count("batch_size", batch_size)
    check_temperature(temperature, scorer, grouped)
    if isinstance(scorer, PreferenceModel) and scorer.scores != "win_rate" and not grouped:
        raise ValueError(
            f"`scores={scorer.scores!r}` is of groups of completions, and pairs get the column 'preference_prob'. Leave it out."
        )
    if grouped:
        refuse_lists_of_groups(scorer)
    check_texts(dataset, grouped)
    check_renderable(dataset, scorer)
    folder = Path(cache_dir) if cache_dir is not None else default_folder() / "scores"
    if isinstance(scorer, JUDGES):
        return _add_preferences(dataset, scorer, grouped, batch_size, folder)
    columns = read_columns(scorer)
    check_columns(dataset, columns)
    texts = [
        (row["prompt"], completion, template_arguments(row), {name: row[name] for name in columns})
        for row in dataset
        for completion in _completions(row)
    ]
    scores = iter(_scores(texts, scorer, batch_size, folder))
    if grouped:
        groups = [[next(scores) / temperature for _ in row] for row in dataset["completions"]]
        return _with_columns(dataset, {"scores": groups})
    # Of one reward (N, 2), of lists of them (N, 2, M)
    values = np.array([(next(scores), next(scores)) for _ in range(len(dataset))])
    if temperature == "fit":
        margins = values[:, 0] - values[:, 1]
        temperature = np.array([fit_temperature(column) for column in margins.reshape(len(margins), -1).T])
    chosen, rejected = (values / temperature).swapaxes(0, 1).tolist()
    return _with_columns(dataset, {"score_chosen": chosen, "score_rejected": rejected})


def check_temperature(temperature: float | str, scorer: Any, grouped: bool) -> None:
    """Raise a `ValueError` for a temperature that is none, or that has no meaning for what scores or for this data."""
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if temperature != "fit" and not (number and 0 < temperature < math.inf):
        raise ValueError(f'`temperature={temperature!r}` must be a positive number or "fit".')
    if isinstance(scorer, JUDGES) and temperature != 1.0:
        raise ValueError("`temperature` has no meaning for a judge of two, whose answers are probabilities.")
    if temperature == "fit" and grouped:
        raise ValueError(
            '`temperature="fit"` needs labelled pairs, and groups have none. Fit it on pairs, give the number.'
        )


def check_texts(dataset: Dataset, grouped: bool) -> None:
    """Raise a `ValueError` for the first row that has no prompt, or a completion that is missing, empty or of another kind."""
    wanted = ["prompt", "completions"] if grouped else ["prompt", "chosen", "rejected"]
    alone = "prompt" not in dataset.column_names and set(wanted[1:]) <= set(dataset.column_names)
    require_columns(dataset, wanted, " `trl.extract_prompt` splits it off." if alone else "")
    if not len(dataset):
        raise ValueError("The dataset is empty: it has no rows to score.")
    empty = 0
    for index, row in enumerate(dataset):
        prompt = row["prompt"]
        problem = "is [], which has no message" if prompt == [] else problem_of_text(prompt)
        if problem is not None:
            raise ValueError(f"Row {index}: the prompt {problem}.")
        completions = _completions(row)
        if not isinstance(completions, list) or not completions:
            raise ValueError(f"Row {index}: `completions` is {completions!r}; expected a list of at least one.")
        for completion in completions:
            empty += _check_completion(completion, prompt, index, grouped)
    if empty:
        logger.warning(
            f"{empty} completions of the dataset are empty: the policy ended at once. They are scored as they are."
        )


def _completions(row: dict) -> list[Text]:
    """Of a pair or a group."""
    return row["completions"] if "completions" in row else [row["chosen"], row["rejected"]]


def _check_completion(completion: Any, prompt: Text, index: int, grouped: bool) -> bool:
    """Whether a completion is empty, which a sampled one may be; one of a pair, and what is no completion, is an error."""
    where, way_out = f"Row {index}: the completion {completion!r} is", "Remove the row, or give text."
    if completion is None or completion == []:
        raise ValueError(f"{where} empty. {way_out}")
    if type(completion) is not type(prompt):
        raise ValueError(
            f"{where} of another kind than its prompt. Give text for a text prompt and messages for messages."
        )
    problem = problem_of_text(completion)
    if problem is not None:
        raise ValueError(f"Row {index}: the completion {problem}.")
    last = completion[-1] if isinstance(completion, list) else {"content": completion}
    empty = not str(last.get("content") or "").strip() and not last.get("tool_calls")
    if empty and not grouped:
        raise ValueError(f"{where} empty. {way_out}")
    return empty


def check_renderable(dataset: Dataset, scorer: Any) -> None:
    """Raise a `ValueError` for conversations that a reward model's tokenizer cannot render, before anything is scored."""
    if isinstance(dataset[0]["prompt"], list):
        for model in reward_models(scorer):
            model.load()
            require_chat_template(model.processing_class)


def check_columns(dataset: Dataset, columns: Sequence[str]) -> None:
    """Raise a `ValueError` for a column that a reward reads and that is not there, or is empty in a row."""
    require_columns(dataset, list(columns), " A reward reads them.")
    for name in columns:
        for index, value in enumerate(dataset[name]):
            if value is None or value in ("", []):
                raise ValueError(
                    f"Row {index} has {value!r} in the column {name!r}, which a reward reads. Remove the row, or give a value."
                )


def _scores(texts: list[tuple[Text, Text, dict, dict]], reward: Any, batch_size: int, folder: Path) -> list:
    """Score, or list of scores, of each (prompt, completion, arguments of the chat template, columns that a reward reads)."""
    if isinstance(reward, Ensemble):
        members = [_scores(texts, each, batch_size, folder) for each in reward.reward_funcs]
        return [reward.combined(values) for values in zip(*members, strict=True)]
    name = reward.key()
    if isinstance(reward, RewardModel):
        reward.model.to(processes().device)
        texts = [text[:3] for text in texts]
    else:  # a function sees no template, and of the row what it reads
        own = [({name: row[name] for name in reward.columns},) if reward.columns else () for *_, row in texts]
        texts = [(*text[:2], *row) for text, row in zip(texts, own, strict=True)]
    keys = [content_key(*text) for text in texts]
    known = _computed(
        name,
        dict(zip(keys, texts, strict=True)),
        lambda batch: reward(*(list(column) for column in zip(*batch, strict=True))),
        batch_size=batch_size,
        folder=folder,
    )
    return [known[key] for key in keys]


def _computed(
    name: str | None,
    work: dict[str, tuple],
    function: Callable,
    batch_size: int,
    folder: Path,
    least: float = -math.inf,
    most: float = math.inf,
) -> dict[str, float]:
    """
    `function` of each item, shared among processes, longest first; what is on disk already, from `least` to `most`, is taken from
    there.
    """
    state = processes()
    ledger = None if name is None else Ledger(folder, name)
    if ledger is None:
        logger.warning(
            "The source of the function cannot be had, so its scores are not kept: a later run computes them anew. Put the "
            "function into a file, or name what it computes: RewardFunction(function, version=...) or JudgeFunction(...)."
        )
    # Shared out before looking what is done: another run may write to the same folder meanwhile
    order = sorted(work, key=lambda key: -len(str(work[key])))
    mine = order[state.process_index :: state.num_processes]
    known = {} if ledger is None else ledger.read()
    known = {key: value for key, value in known.items() if least <= value <= most}
    done = {key: known[key] for key in mine if key in known}
    todo = [key for key in mine if key not in known]
    with tqdm(total=len(todo), desc="scoring", unit="text", disable=not state.is_main_process or not todo) as bar:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            texts = [work[key] for key in batch]
            fresh = dict(zip(batch, function(texts), strict=True))
            if ledger is not None:
                ledger.append(fresh)
            done |= fresh
            bar.update(len(batch))
    for part in gather_object([done]):
        done |= part
    return done


def _add_preferences(
    dataset: Dataset, judge: JudgeFunction | PreferenceModel, grouped: bool, batch_size: int, folder: Path
) -> Dataset:
    """Each two completions of a row compared once."""
    work = [
        (row["prompt"], *two, template_arguments(row))
        for row in dataset
        for two in itertools.combinations(_completions(row), 2)
    ]
    name, function = judge.key(), judge
    if isinstance(judge, PreferenceModel):
        judge.model.to(processes().device)
        function = judge.compare
    else:
        work = [comparison[:3] for comparison in work]  # a function sees no template
    keys = [content_key(*comparison) for comparison in work]

    known = _computed(
        name,
        dict(zip(keys, work, strict=True)),
        lambda batch: function(*zip(*batch, strict=True)),
        batch_size,
        folder,
        *((0, 1) if isinstance(judge, JudgeFunction) else ()),
    )
    values = [known[key] for key in keys]
    as_logits = isinstance(judge, PreferenceModel) and judge.scores == "score" and grouped
    if isinstance(judge, PreferenceModel) and not as_logits:
        values = probabilities(values)
    if not grouped:
        return _with_columns(dataset, {"preference_prob": values})
    answers, of_group = iter(values), _mean_scores if as_logits else _win_rates
    return _with_columns(dataset, {"scores": [of_group(len(row), answers) for row in dataset["completions"]]})


def _win_rates(count: int, answers: Iterator[float]) -> list[float]:
    """The mean probability of winning against the others, of each of `count` completions."""
    wins = [0.0] * count
    for i, j in itertools.combinations(range(count), 2):
        p = next(answers)
        wins[i] += p
        wins[j] += 1 - p
    return [value / max(count - 1, 1) for value in wins]


def _mean_scores(count: int, answers: Iterator[float]) -> list[float]:
    """The mean of s(i, j) - s(j, i) over all completions j, i itself included, of each of `count` completions i."""
    totals = [0.0] * count
    for i, j in itertools.combinations(range(count), 2):
        difference = 2 * next(answers)
        totals[i] += difference
        totals[j] -= difference
    return [value / count for value in totals]


def _with_columns(dataset: Dataset, columns: dict[str, list]) -> Dataset:
    there = [name for name in columns if name in dataset.column_names]
    if there:
        logger.warning(f"The dataset has {there} already; these columns are replaced by the new scores.")
    return concatenate_datasets([dataset.remove_columns(there), Dataset.from_dict(columns)], axis=1)
