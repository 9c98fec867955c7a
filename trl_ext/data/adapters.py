"""
The field's common preference data in the columns that training reads.

Each function takes a dataset with the columns that its authors have published, checks that they are there, and gives `prompt`,
`chosen` and `rejected` as messages, with scores and weights where the data has them. Other columns are left behind. Nothing is
downloaded: load the dataset first, with `datasets.load_dataset` or [`load_preferences`].
"""

import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, Features, Value

from trl_ext.data.checks import require_columns
from trl_ext.data.columns import SCORES, WEIGHT
from trl_ext.data.texts import problem_of_text
from trl_ext.losses import get_loss, list_losses


logger = logging.getLogger(__name__)

STRENGTHS = ("weight", "scores")
# Columns that are read of any preference data, beside those that losses name
READ = ("prompt", "chosen", "rejected", "completions", "scores", "behaviour_logps", WEIGHT, "tools", "images")

Messages = list[dict[str, str]]

_MESSAGES = [{"role": Value("string"), "content": Value("string")}]
_TEXTS = ("prompt", "chosen", "rejected")
_KINDS = {
    **dict.fromkeys(_TEXTS, _MESSAGES),
    **dict.fromkeys((*SCORES, WEIGHT), Value("float64")),
    "completions": [_MESSAGES],
    "scores": [Value("float64")],
}


def rename(dataset: Dataset, columns: Mapping[str, str]) -> Dataset:
    """
    Give columns the names that are read here.

    Args:
        dataset ([`~datasets.Dataset`]):
            Any.
        columns (`Mapping[str, str]`):
            For a name that is read here, what the data calls it: `{"score_chosen": "my_column"}`.

    Raises:
        `ValueError`: For a column that the data does not have, a name that nothing reads, and a name that another column has.
    """
    require_columns(dataset, list(columns.values()))
    known = sorted({*READ, *(column for name in list_losses() for column in _columns_of(name))})
    unread = [name for name in columns if name not in known]
    if unread:
        raise ValueError(f"Nothing reads columns called {unread}. Names that are read: {known}.")
    taken = [name for name in columns if name in dataset.column_names and name not in columns.values()]
    if taken:
        raise ValueError(
            f"The dataset already has columns called {taken}. Rename them too, or leave them out. Its columns are "
            f"{sorted(dataset.column_names)}."
        )
    return dataset.rename_columns({column: name for name, column in columns.items() if name != column})


def ultrafeedback_binarized(dataset: Dataset) -> Dataset:
    """
    `HuggingFaceH4/ultrafeedback_binarized` (splits `train_prefs`, `test_prefs`) and `trl-lib/ultrafeedback_binarized`.

    Published columns (dataset card): `chosen` and `rejected`, messages that begin with the prompt's; `score_chosen` and
    `score_rejected`, GPT-4's ratings from 1 to 10; the former also has `prompt`, `prompt_id` and `messages`, which are not needed. Scores may
    tie: such rows are kept.

    Returns:
        [`~datasets.Dataset`]: `prompt`, `chosen`, `rejected`, `score_chosen`, `score_rejected`.
    """
    return _rated_pair(dataset, *SCORES)


def helpsteer2_preference(dataset: Dataset, strength: str = "weight") -> Dataset:
    """
    The preferences of `nvidia/HelpSteer2` (`load_dataset("nvidia/HelpSteer2", data_dir="preference")`).

    Published columns (dataset card; arXiv 2410.01257): `prompt`, `response_1`, `response_2` and `preference_strength`, a whole number from
    -3 (the first is much better) over 0 (about the same) to 3 (the second is much better). Rows with 0 prefer nothing and are left out, with
    a warning that counts them. Turns in a prompt are parted by `<extra_id_1>User` and `<extra_id_1>Assistant`.

    Args:
        dataset ([`~datasets.Dataset`]):
            As published.
        strength (`str`, *optional*, defaults to `"weight"`):
            What the strength of a preference becomes: `"weight"`, the factor of the pair's loss, as in the paper's scaled Bradley-Terry
            loss; or `"scores"`, the score of the chosen completion beside 0 for the rejected one, for losses that read margins.

    Returns:
        [`~datasets.Dataset`]: `prompt`, `chosen`, `rejected`, and `weight`, or `score_chosen` and `score_rejected`.
    """
    if strength not in STRENGTHS:
        raise ValueError(f"`strength={strength!r}` is unknown; choose one of {list(STRENGTHS)}.")

    def convert(row: dict[str, Any]) -> dict[str, Any] | None:
        value = row["preference_strength"]
        if isinstance(value, bool) or not isinstance(value, int) or not -3 <= value <= 3:
            raise ValueError(f"`preference_strength` is {value!r}; expected a whole number from -3 to 3.")
        if value == 0:
            return None
        chosen, rejected = ("response_2", "response_1") if value > 0 else ("response_1", "response_2")
        size = float(abs(value))
        known = {WEIGHT: size} if strength == "weight" else {SCORES[0]: size, SCORES[1]: 0.0}
        prompt = _turns("<extra_id_1>User\n" + row["prompt"], r"\n?<extra_id_1>(User|Assistant)\n")
        return {"prompt": prompt, "chosen": _answer(row[chosen]), "rejected": _answer(row[rejected])} | known

    gives = (*_TEXTS, *((WEIGHT,) if strength == "weight" else SCORES))
    return _adapted(dataset, ["prompt", "response_1", "response_2", "preference_strength"], gives, convert)


def nectar(dataset: Dataset, groups: bool = False) -> Dataset:
    """
    `berkeley-nest/Nectar`.

    Published columns (dataset card): `prompt`, a dialogue in the form `"\\n\\nHuman: ... \\n\\nAssistant: "`, and `answers`, a list of `answer`,
    `model` and `rank`, 1 for the best of seven. A score is the rank with its sign changed.

    Args:
        dataset ([`~datasets.Dataset`]):
            As published.
        groups (`bool`, *optional*, defaults to `False`):
            Whether a row keeps all of its answers, for losses that learn from groups, in place of the best and the worst.

    Returns:
        [`~datasets.Dataset`]: `prompt`, `chosen`, `rejected`, `score_chosen`, `score_rejected`; or `prompt`, `completions`, `scores`.
    """

    def convert(row: dict[str, Any]) -> dict[str, Any] | None:
        ranked = sorted(row["answers"], key=lambda each: each["rank"])
        if not ranked or ranked[0]["rank"] == ranked[-1]["rank"]:
            return None
        prompt = _dialogue(row["prompt"])
        if prompt[-1] == {"role": "assistant", "content": ""}:  # the line that the answers continue
            prompt.pop()
        scores = [-_score(each["rank"]) for each in ranked]
        if groups:
            return {"prompt": prompt, "completions": [_answer(each["answer"]) for each in ranked], "scores": scores}
        pair = {"chosen": _answer(ranked[0]["answer"]), "rejected": _answer(ranked[-1]["answer"])}
        return {"prompt": prompt, **pair, SCORES[0]: scores[0], SCORES[1]: scores[-1]}

    gives = ("prompt", "completions", "scores") if groups else (*_TEXTS, *SCORES)
    return _adapted(dataset, ["prompt", "answers"], gives, convert)


def hh_rlhf(dataset: Dataset) -> Dataset:
    """
    `Anthropic/hh-rlhf`, its preferences about helpfulness and harmlessness.

    Published columns (dataset card; arXiv 2204.05862): `chosen` and `rejected`, whole dialogues in the form
    `"\\n\\nHuman: ... \\n\\nAssistant: ..."`. The turns that both share are the prompt. Rows that are no two dialogues with an answer of the assistant
    at the end of each are left out, with a warning that counts them, as the published files have some.

    Returns:
        [`~datasets.Dataset`]: `prompt`, `chosen`, `rejected`. There are no scores.
    """

    def convert(row: dict[str, Any]) -> dict[str, Any] | None:
        sides = [_dialogue(row[side]) for side in ("chosen", "rejected")]
        if any(not side or side[-1]["role"] != "assistant" or not side[-1]["content"] for side in sides):
            return None
        pair = _pair(*sides)
        return pair if pair["prompt"] else None

    return _adapted(dataset, ["chosen", "rejected"], _TEXTS, convert)


def argilla_ultrafeedback(dataset: Dataset) -> Dataset:
    """
    `argilla/ultrafeedback-binarized-preferences-cleaned` and `argilla/ultrafeedback-binarized-preferences`.

    Published columns (dataset cards): the former has `chosen` and `rejected` as messages with the prompt's, `chosen-rating` and
    `rejected-rating`; the latter `instruction`, `chosen_response` and `rejected_response` as text, `chosen_avg_rating` and
    `rejected_avg_rating`. Ratings are means over four aspects, from 1 to 5.

    Returns:
        [`~datasets.Dataset`]: `prompt`, `chosen`, `rejected`, `score_chosen`, `score_rejected`.
    """
    if "instruction" not in dataset.column_names:
        return _rated_pair(dataset, "chosen-rating", "rejected-rating")
    ratings = ("chosen_avg_rating", "rejected_avg_rating")

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        pair = {"chosen": _answer(row["chosen_response"]), "rejected": _answer(row["rejected_response"])}
        return {"prompt": _asked(row["instruction"]), **pair} | _scores(row, *ratings)

    published = ["instruction", "chosen_response", "rejected_response", *ratings]
    return _adapted(dataset, published, (*_TEXTS, *SCORES), convert)


def argilla_dpo_mix(dataset: Dataset) -> Dataset:
    """
    `argilla/dpo-mix-7k`.

    Published columns (dataset card): `dataset`, `chosen` and `rejected` as messages with the prompt's, `chosen_rating` and
    `rejected_rating`, whose range depends on where a row comes from: 1 to 5, or 1 to 10.

    Returns:
        [`~datasets.Dataset`]: `prompt`, `chosen`, `rejected`, `score_chosen`, `score_rejected`.
    """
    return _rated_pair(dataset, "chosen_rating", "rejected_rating")


ADAPTERS: dict[str, Callable[[Dataset], Dataset]] = {
    "HuggingFaceH4/ultrafeedback_binarized": ultrafeedback_binarized,
    "trl-lib/ultrafeedback_binarized": ultrafeedback_binarized,
    "nvidia/HelpSteer2": helpsteer2_preference,
    "berkeley-nest/Nectar": nectar,
    "Anthropic/hh-rlhf": hh_rlhf,
    "argilla/ultrafeedback-binarized-preferences-cleaned": argilla_ultrafeedback,
    "argilla/ultrafeedback-binarized-preferences": argilla_ultrafeedback,
    "argilla/dpo-mix-7k": argilla_dpo_mix,
}


def _adapted(
    dataset: Dataset,
    columns: list[str],
    gives: tuple[str, ...],
    convert: Callable[[dict[str, Any]], dict[str, Any] | None],
) -> Dataset:
    """Rows that `convert` makes of the published columns, with the columns `gives`; those of which it makes none are counted."""
    require_columns(dataset, columns, f" The published form has {columns}.")

    def convert_batch(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        made = []
        for i, row in enumerate(rows):
            try:
                made.append(convert({name: batch[name][i] for name in columns}))
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
                raise ValueError(f"Row {row} is not of the published form: {error!r}") from error
        return {name: [row[name] for row in made if row is not None] for name in gives}

    found = dataset.map(
        convert_batch,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=Features({name: _KINDS[name] for name in gives}),
        desc="Adapting",
    )
    if not len(found):
        raise ValueError(f"None of the {len(dataset)} rows holds a preference.")
    if len(found) < len(dataset):
        logger.warning(f"{len(dataset) - len(found)} of {len(dataset)} rows hold no preference, and are left out.")
    return found


def _rated_pair(dataset: Dataset, chosen: str, rejected: str) -> Dataset:
    """Of `chosen` and `rejected` as messages with the prompt's, with their ratings in two columns."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return _pair(row["chosen"], row["rejected"]) | _scores(row, chosen, rejected)

    return _adapted(dataset, ["chosen", "rejected", chosen, rejected], (*_TEXTS, *SCORES), convert)


def _pair(chosen: Messages, rejected: Messages) -> dict[str, Messages]:
    """Prompt and completions of two conversations: the prompt is what both share, but never the last message of one."""
    for side in (chosen, rejected):
        problem = "has no message" if not side else problem_of_text(side)
        if problem is not None or isinstance(side, str):
            raise ValueError(f"a conversation {problem or f'is text, {side!r:.60}; expected messages'}.")
    sides = [[{"role": each["role"], "content": each["content"]} for each in side] for side in (chosen, rejected)]
    shared = min(
        len(os.path.commonprefix([[(m["role"], m["content"]) for m in side] for side in sides])),
        *(len(s) - 1 for s in sides),
    )
    return {"prompt": sides[0][:shared], "chosen": sides[0][shared:], "rejected": sides[1][shared:]}


def _scores(row: Mapping[str, Any], chosen: str, rejected: str) -> dict[str, float]:
    return {SCORES[0]: _score(row[chosen]), SCORES[1]: _score(row[rejected])}


def _score(value: Any) -> float:
    """A rating as a finite number; NaN, also as text, is none."""
    if not math.isfinite(float(value)):
        raise ValueError(f"a score is {value!r}; expected a finite number.")
    return float(value)


def _asked(text: str) -> Messages:
    return _said("user", text)


def _answer(text: str) -> Messages:
    return _said("assistant", text)


def _said(role: str, text: str) -> Messages:
    if not isinstance(text, str):
        raise TypeError(f"what the {role} said is {text!r:.60}; expected text.")
    return [{"role": role, "content": text}]


def _dialogue(text: str) -> Messages:
    """Messages of a dialogue as Anthropic writes it."""
    return _turns(text, r"(?:^|\n\n)(Human|Assistant):[ ]?")


def _turns(text: str, mark: str) -> Messages:
    """Messages of a text in which `mark`, with the speaker in its group, stands before each."""
    first, *parts = re.split(mark, text)
    if first.strip() or not parts:
        raise ValueError(f"{text[:60]!r} begins with no speaker.")
    roles = {"Human": "user", "User": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _columns_of(name: str) -> tuple[str, ...]:
    """Columns that a loss reads; none where it cannot be built without hyper-parameters, or at all."""
    try:
        loss = get_loss(name)
    except ValueError:
        return ()
    return (*loss.required_columns, *loss.optional_columns)
