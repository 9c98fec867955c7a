"""Rows and columns that nobody can train on, in every form that trainers and functions take data."""

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from tests.conftest import preference_rows
from tests.helpers import options
from tests.hostile.refusal import refused
from trl_ext import DPOConfig, OnlineDPOConfig, get_loss
from trl_ext.data import score_preferences
from trl_ext.data.columns import over_splits
from trl_ext.data.sampling import check_prompts
from trl_ext.trainers.online.prompts import PromptData
from trl_ext.trainers.prepare import PreferenceData


NAN, INF = float("nan"), float("inf")


def says(text: Any, role: Any = "assistant") -> list[dict]:
    return [{"role": role, "content": text}]


TEXT = {"prompt": "what", "chosen": "good", "rejected": "bad"}
CHAT = {"prompt": says("what", "user"), "chosen": says("good"), "rejected": says("bad")}
IDS = {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}
GROUP = {"prompt": "what", "completions": ["a", "b", "c"], "scores": [1.0, 0.5, 0.0]}
SCORED = preference_rows(1)[0]


def second(row: dict, **values: Any) -> list[dict]:
    """Three rows, of which the second has other values."""
    return [row, {**row, **values}, row]


def every(row: dict, **values: Any) -> list[dict]:
    """Rows of which each has other values: columns of another type."""
    return [{**row, **values}] * 2


def without(row: dict, name: str) -> list[dict]:
    return [{key: value for key, value in row.items() if key != name}] * 2


# What is given to which loss, and what the error has to say
PAIRS: dict[str, tuple[str, list[dict], str]] = {
    "prompt null": ("sigmoid", second(TEXT, prompt=None), "Row 1 of the train dataset: 'prompt' has no value"),
    "chosen null": ("sigmoid", second(TEXT, chosen=None), "Row 1 of the train dataset: 'chosen' has no value"),
    "rejected null": ("sigmoid", second(TEXT, rejected=None), "Row 1 of the train dataset: 'rejected' has no value"),
    "column null": ("sigmoid", every(TEXT, chosen=None), "Row 0 of the train dataset: 'chosen' has no value"),
    "prompt number": ("sigmoid", every(TEXT, prompt=3), "'prompt' is 3"),
    "chosen number": ("sigmoid", every(TEXT, chosen=0.5), "'chosen' is 0.5"),
    "chosen boolean": ("sigmoid", every(TEXT, chosen=True), "'chosen' is True"),
    "chosen bytes": ("sigmoid", every(TEXT, chosen=b"ab"), "'chosen' is b'ab'"),
    "chosen dict": ("sigmoid", every(TEXT, chosen={"a": "b"}), "'chosen' is {'a': 'b'}"),
    "chosen list of text": ("sigmoid", every(TEXT, chosen=["a", "b"]), "'chosen' has the message 'a'"),
    "chosen list of numbers": ("sigmoid", every(TEXT, chosen=[1, 2]), "'chosen' has the message 1"),
    "no rejected": ("sigmoid", without(TEXT, "rejected"), "lacks ['rejected']; its columns are ['chosen', 'prompt']"),
    "no chosen": ("sigmoid", without(TEXT, "chosen"), "lacks ['chosen']"),
    "no pair": ("sigmoid", [{"text": "a"}], "lacks ['chosen', 'rejected']; its columns are ['text']"),
    "text and messages": ("sigmoid", every(TEXT, chosen=says("a"), rejected=says("b")), "'prompt' is text, 'chosen' is"),
    "messages and text": ("sigmoid", every(TEXT, prompt=says("a")), "'prompt' is messages, 'chosen' is text"),
    "one side messages": ("sigmoid", every(TEXT, chosen=says("a")), "'chosen' is messages, 'rejected' is text"),
    "no message before": ("sigmoid", second(CHAT, prompt=[]), "'prompt' is a list without a message"),
    "no message": ("sigmoid", second(CHAT, chosen=[]), "'chosen' is a list without a message"),
    "message without content": ("sigmoid", every(CHAT, chosen=[{"role": "assistant"}]), "whose 'content' is None"),
    "message without role": ("sigmoid", every(CHAT, chosen=[{"content": "a"}]), "has the message {'content': 'a'}"),
    "content null": ("sigmoid", second(CHAT, chosen=says(None)), "Row 1 of the train dataset: 'chosen' has the message"),
    "role null": ("sigmoid", second(CHAT, chosen=says("a", None)), "'role': None"),
    "role number": ("sigmoid", every(CHAT, chosen=says("a", 3)), "'role': 3"),
    "content number": ("sigmoid", every(CHAT, chosen=says(3)), "whose 'content' is 3"),
    "another convention": ("sigmoid", every(CHAT, chosen=[{"from": "gpt", "value": "a"}]), "{'from': 'gpt'"),
    "nested too deep": ("sigmoid", every(CHAT, chosen=[says("a")]), "expected a dict with 'role' and 'content'"),
    "tools no JSON": ("sigmoid", every(CHAT, tools="{"), "'tools' is no JSON"),
    "tools twice": ("sigmoid", every(CHAT, tools='[{"a": 1, "a": 2}]'), "has the name 'a' twice"),
    "tools number": ("sigmoid", every(CHAT, tools=3), "'tools' is 3"),
    "template options text": ("sigmoid", every(CHAT, chat_template_kwargs="x"), "'chat_template_kwargs' is 'x'"),
    "template options taken": ("sigmoid", every(CHAT, chat_template_kwargs={"tokenize": False}), "['tokenize']"),
    "reference alone": ("sigmoid", every(TEXT, ref_chosen_logps=-1.0), "'ref_chosen_logps' alone"),
    "reference NaN": ("sigmoid", every(TEXT, ref_chosen_logps=NAN, ref_rejected_logps=-1.0), "is not finite in row 0"),
    "reference null": ("sigmoid", second({**TEXT, "ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0}, ref_chosen_logps=None), "has no value in row 1"),
    "reference probability": ("sigmoid", every(TEXT, ref_chosen_logps=0.5, ref_rejected_logps=-1.0), "is above 0"),
    "initial probability": ("inpo", every(SCORED, initial_chosen_logps=0.5), "'initial_chosen_logps' of the train dataset is above 0"),
    "score date": ("offset", every(SCORED, score_chosen=__import__("datetime").date(2020, 1, 1)), "holds a date"),
    "score dict": ("offset", every(SCORED, score_chosen={"a": 1}), "holds a dict"),
    "score bytes": ("offset", every(SCORED, score_chosen=b"1"), "holds a bytes"),
    "score too large": ("offset", second(SCORED, score_chosen=1e300), "is larger than float32 can hold"),
    "weight too large": ("offset", second({**SCORED, "weight": 1.0}, weight=1e308), "is larger than float32 can hold"),
    "scores nested": ("reward_distillation", every(SCORED, score_chosen=[[1.0]], score_rejected=[[1.0]]), "[1.0] at place 0"),
    "scores empty": ("reward_distillation", every(SCORED, score_chosen=[], score_rejected=[]), "holds an empty list"),
    "scores too large": ("reward_distillation", every(SCORED, score_chosen=[1e300], score_rejected=[0.0]), "1e+300 at place 0"),
    "annotator a fraction": ("robust_em", every(SCORED, annotator_id=0.5), "annotator_id=0.5"),
    "annotator huge": ("robust_em", every(SCORED, annotator_id=2**62), "annotator_id=4611686018427387904"),
    "ids text": ("sigmoid", every(IDS, chosen_ids="ab"), "has 'ab' in 'chosen_ids'"),
    "ids null": ("sigmoid", second(IDS, prompt_ids=None), "Row 1 of the train dataset has no token in 'prompt_ids'"),
    "id null": ("sigmoid", second(IDS, chosen_ids=[1, None]), "has None among 'chosen_ids'"),
    "id negative": ("sigmoid", second(IDS, chosen_ids=[-1]), "Row 1 of the train dataset has -1 among 'chosen_ids'"),
    "id a fraction": ("sigmoid", every(IDS, chosen_ids=[1.5]), "has 1.5 among 'chosen_ids'"),
    "ids nested": ("sigmoid", every(IDS, chosen_ids=[[1]]), "has [1] among 'chosen_ids'"),
    "ids of one side": ("sigmoid", without(IDS, "rejected_ids"), "lacks ['chosen', 'rejected']"),
    "group completion null": ("anchored", second(GROUP, completions=["a", None, "b"]), "Row 1 of the train dataset has a completion that has no value"),
    "group completion null unread": ("sigmoid", second(GROUP, completions=["a", None, "b"]), "a completion that has no value"),
    "group completions numbers": ("anchored", every(GROUP, completions=[1, 2, 3]), "a completion that is 1"),
    "group completions nested": ("anchored", every(GROUP, completions=[["a"], ["b"], ["c"]]), "has the message 'a'"),
    "group completions text": ("anchored", every(GROUP, completions="abc"), "`completions` and `scores` must be lists"),
    "group of none": ("anchored", second(GROUP, completions=[], scores=[]), "Row 1 of the train dataset has 0 completions"),
    "group of one": ("anchored", second(GROUP, completions=["a"], scores=[1.0]), "has 1 completions; a group needs at least 2"),
    "group scores short": ("anchored", second(GROUP, scores=[1.0]), "has 3 completions and 1 scores"),
    "group scores boolean": ("anchored", every(GROUP, scores=[True, False, True]), "has the score True"),
    "group scores infinite": ("anchored", second(GROUP, scores=[INF, 0.0, 1.0]), "has the score inf"),
    "group message without content": ("anchored", every(GROUP, prompt=says("a", "user"), completions=[[{"role": "assistant"}]] * 3), "whose 'content' is None"),
    "group behaviour probability": ("drpo", every(GROUP, behaviour_logps=[0.5, -1.0, -1.0]), "a log-probability is at most 0"),
    "group behaviour text": ("drpo", every(GROUP, behaviour_logps=["a", "b", "c"]), "has the behaviour_logps 'a'"),
}  # fmt: skip


def prepared(loss: str, data: Any, tmp_path: Any) -> Any:
    """What a trainer does with its data before it loads a model; rows of token ids have no more to wait for."""
    losses = {} if loss == "sigmoid" else {loss: get_loss(loss)}
    reader = PreferenceData(
        [loss], losses, DPOConfig(loss_type=loss, output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False)
    )
    data = reader.training(data)
    if "prompt_ids" in (data.column_names or ()):
        reader.tokenized(data, None, None, reader.args, "train", None)
    return data


@pytest.mark.parametrize("name", PAIRS)
def test_rows_of_pairs_and_groups(name, tmp_path):
    loss, rows, said = PAIRS[name]
    refused(lambda: prepared(loss, Dataset.from_list(rows), tmp_path), said, tmp_path)


@pytest.mark.parametrize("name", ["prompt null", "content number", "tools no JSON", "reference NaN", "no rejected"])
def test_the_same_rows_of_a_stream(name, tmp_path):
    loss, rows, said = PAIRS[name]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    refused(lambda: list(prepared(loss, stream, tmp_path)), said, tmp_path)


FORMS: dict[str, tuple[Any, str]] = {
    "a list": ([TEXT], "The eval dataset is a list"),
    "text": ("data.jsonl", "The eval dataset is a str"),
    "a dict of text": ({"a": "b"}, "The a dataset is a str"),
    "rows that are none": (
        IterableDataset.from_generator(lambda: iter([1, 2])),
        "The first row of the eval dataset is 1",
    ),
    "no rows": (Dataset.from_dict({}), "The eval dataset is empty"),
}


@pytest.mark.parametrize("name", FORMS)
def test_what_is_no_dataset(name, tmp_path):
    data, said = FORMS[name]
    reader = PreferenceData(["sigmoid"], {}, None)
    refused(lambda: reader.evaluation(data), said, tmp_path)


def test_no_dataset_stays_none():
    assert over_splits(None, lambda data, split: 1 / 0) is None


PROMPTS: dict[str, tuple[list[dict], str]] = {
    "null": ([{"prompt": "a"}, {"prompt": None}], "1"),
    "empty": ([{"prompt": "a"}, {"prompt": ""}], "1"),
    "number": ([{"prompt": 3}], "3"),
    "dict": ([{"prompt": {"a": 1}}], "{'a': 1}"),
    "text in a list": ([{"prompt": ["a"]}], "'a'"),
    "no role": ([{"prompt": [{"content": "a"}]}], "{'content': 'a'}"),
    "no content": ([{"prompt": [{"role": "user"}]}], "'content' is None"),
    "no messages": ([{"prompt": []}], "[]"),
}


def online(rows: Dataset, tmp_path: Any) -> None:
    args = OnlineDPOConfig(**options(tmp_path / "out"))
    PromptData({}, False, None, args).training(rows)


def scored(rows: Dataset, tmp_path: Any) -> None:
    pairs = rows.map(lambda row: {"chosen": "good", "rejected": "bad"})
    score_preferences(pairs, lambda prompts, completions: [1.0] * len(prompts), cache_dir=tmp_path / "cache")


READERS: dict[str, Callable] = {"sampling": lambda rows, _: check_prompts(rows), "online": online, "scoring": scored}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name, reader, tmp_path):
    rows, said = PROMPTS[name]
    if (name, reader) == ("empty", "scoring"):
        pytest.skip("what is scored may answer nothing: text without a prompt")
    refused(lambda: READERS[reader](Dataset.from_list(rows), tmp_path), said, tmp_path)
