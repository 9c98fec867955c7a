"""Scores from functions and judges of pairs and groups; what survives a kill."""

import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import build
from trl_ext.data import Ensemble, JudgeFunction, RewardFunction, RewardModel, fit_temperature, score_preferences


PAIRS = Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in preference_rows(6)])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "cache"))


def length(prompts, completions):
    return [float(len(completion)) for completion in completions]


def test_a_function_on_pairs_and_groups():
    scored = score_preferences(PAIRS, length)
    assert scored["score_chosen"] == [float(len(text)) for text in PAIRS["chosen"]]
    groups = Dataset.from_list(
        [{"prompt": "p", "completions": ["a", "bbb"]}, {"prompt": "q", "completions": ["cc"] * 3}]
    )
    assert score_preferences(groups, length)["scores"] == [[1.0, 3.0], [2.0, 2.0, 2.0]]


@pytest.mark.parametrize("texts", [1, 2, 3, 4, 5])
def test_whatever_is_left_for_the_last_batch(texts):
    sizes = []

    def noted(prompts, completions):
        sizes.append(len(completions))
        return length(prompts, completions)

    groups = Dataset.from_list([{"prompt": "p", "completions": ["a" * (k + 1) for k in range(texts)]}])
    assert score_preferences(groups, noted, batch_size=2)["scores"] == [[float(k + 1) for k in range(texts)]]
    assert sizes == [2] * (texts // 2) + [1] * (texts % 2)


def test_nothing_is_scored_twice(monkeypatch):
    calls = []

    def counted(prompts, completions):
        calls.extend(completions)
        return length(prompts, completions)

    monkeypatch.setattr("trl_ext.data.rewards.RewardFunction.key", lambda self: "fixed")
    first = score_preferences(PAIRS, counted)
    assert len(calls) == 12
    assert score_preferences(PAIRS, counted).to_list() == first.to_list() and len(calls) == 12
    score_preferences(Dataset.from_list([*PAIRS, {"prompt": "new", "chosen": "a", "rejected": "bb"}]), counted)
    assert len(calls) == 14


@pytest.mark.parametrize("survivors", [1, 3, 5])
def test_killed_and_started_again(survivors, monkeypatch):
    monkeypatch.setattr("trl_ext.data.rewards.RewardFunction.key", lambda self: "fixed")
    calls = []

    def fails(prompts, completions):
        if len(calls) == survivors:
            raise KeyboardInterrupt
        calls.append(completions)
        return length(prompts, completions)

    with pytest.raises(KeyboardInterrupt):
        score_preferences(PAIRS, fails, batch_size=2)
    rest = []

    def works(prompts, completions):
        rest.append(completions)
        return length(prompts, completions)

    assert score_preferences(PAIRS, works, batch_size=2).to_list() == score_preferences(PAIRS, length).to_list()
    assert len(rest) == 6 - survivors


def test_another_run_finishes_in_between(monkeypatch):
    """Two processes see different states of the folder, and share the work out alike all the same."""
    monkeypatch.setattr("trl_ext.data.rewards.RewardFunction.key", lambda self: "fixed")
    parts, real = [], PartialState()
    for index in range(2):
        state = SimpleNamespace(process_index=index, num_processes=2, is_main_process=index == 0, device=real.device)
        monkeypatch.setattr("trl_ext.data.scores.processes", lambda state=state: state)
        monkeypatch.setattr("trl_ext.data.scores.gather_object", lambda part: parts.extend(part) or part)
        with pytest.raises(KeyError):  # alone, a process has half of the scores
            score_preferences(PAIRS, length)
    assert len(parts) == 2 and not set(parts[0]) & set(parts[1]) and len({**parts[0], **parts[1]}) == 12


def test_ensembles():
    def minus(prompts, completions):
        return [-value for value in length(prompts, completions)]

    assert set(score_preferences(PAIRS, [length, minus])["score_chosen"]) == {0.0}
    lowest = score_preferences(PAIRS, Ensemble([length, minus], "min"))["score_chosen"]
    assert lowest == [-float(len(text)) for text in PAIRS["chosen"]]
    with pytest.raises(ValueError, match=r"one of \['sum', 'mean', 'min', 'list'\]; got .*`combine='max'`"):
        Ensemble([length], "max")
    with pytest.raises(ValueError, match="at least one reward"):
        Ensemble([])
    with pytest.raises(
        ValueError, match="is a judge of two and scores no single completion: give it alone, as `judge`"
    ):
        score_preferences(PAIRS, [length, JudgeFunction(longer)])


def test_a_list_of_rewards_is_added_up_with_weights():
    """As `reward_funcs` and `reward_weights` of online training."""
    ones = lambda prompts, completions: [1.0] * len(completions)  # noqa: E731
    data = Dataset.from_list([{"prompt": "p", "chosen": "aaa", "rejected": "a"}])
    for given, weights, expected in (
        ([length, ones], None, [4.0, 2.0]),
        ([length, ones], [2.0, -0.5], [5.5, 1.5]),
        (length, [2], [6.0, 2.0]),
        (Ensemble([length, ones], "mean"), None, [2.0, 1.0]),
        (Ensemble([length, ones], "mean", [2.0, 4.0]), None, [5.0, 3.0]),
        (Ensemble([length, ones], "min", [1.0, 2.0]), None, [2.0, 1.0]),
    ):
        scored = score_preferences(data, reward_funcs=given, reward_weights=weights)
        assert [scored["score_chosen"][0], scored["score_rejected"][0]] == expected, (given, weights)
    for wrong in ([1.0], [1.0, math.nan], [1.0, "2"], [1.0, True], 2.0):
        with pytest.raises(ValueError, match="must be finite numbers, one for each of the 2 rewards"):
            score_preferences(data, [length, ones], wrong)


def test_rewards_or_a_judge():
    for given, message in (
        ({}, "got neither"),
        ({"reward_funcs": length, "judge": longer}, "got both"),
        ({"judge": longer, "reward_weights": [1.0]}, "`reward_weights` are of `reward_funcs`"),
        ({"judge": "path/to/model"}, "no judge of two.*What scores one completion at a time is `reward_funcs`"),
        ({"judge": torch.nn.Linear(1, 1)}, "is no judge of two"),
        ({"judge": RewardFunction(length)}, "is no judge of two"),
        ({"reward_funcs": JudgeFunction(longer)}, "give it alone, as `judge`"),
    ):
        with pytest.raises(ValueError, match=message):
            score_preferences(PAIRS, **given)


def longer(prompts, first, second):
    return [1.0 if len(a) > len(b) else 0.0 if len(a) < len(b) else 0.5 for a, b in zip(first, second, strict=True)]


def test_a_judge_of_two():
    for judge in (longer, JudgeFunction(longer)):
        scored = score_preferences(PAIRS, judge=judge)
        assert scored["preference_prob"] == longer(None, PAIRS["chosen"], PAIRS["rejected"])
    groups = Dataset.from_list([{"prompt": "p", "completions": ["a", "bbb", "cc"]}])
    assert score_preferences(groups, judge=longer)["scores"] == [[0.0, 1.0, 0.5]]
    with pytest.raises(ValueError, match=r"expected probabilities in \[0, 1\]"):
        score_preferences(PAIRS, judge=lambda p, a, b: [2.0] * len(p))


def test_sampled_completions_may_be_empty(tmp_path, caplog, monkeypatch):
    """A policy may end at once: that is a completion like any other. In a pair, or as no text at all, it is an error."""
    groups = [{"prompt": "p", "completions": ["", "bbb"]}, {"prompt": "q", "completions": ["cc", " "]}]
    monkeypatch.setattr(PartialState, "_shared_state", {})  # as in a fresh process, where nothing may be logged yet
    with caplog.at_level(logging.WARNING):
        assert score_preferences(Dataset.from_list(groups), length)["scores"] == [[0.0, 3.0], [2.0, 1.0]]
    assert "2 completions of the dataset are empty" in caplog.text
    assert score_preferences(Dataset.from_list(groups), judge=longer)["scores"] == [[0.0, 1.0], [1.0, 0.0]]
    message = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    talk = [{"prompt": message("p"), "completions": [message(""), message("b")]}]
    assert score_preferences(
        Dataset.from_list(talk), lambda prompts, completions: [len(c[0]["content"]) for c in completions]
    )["scores"] == [[0.0, 1.0]]
    for bad in (None, []):
        with pytest.raises(ValueError, match=r"Row 0: the completion .* is empty"):
            score_preferences(
                Dataset.from_list([{"prompt": message("p"), "completions": [message("b"), bad]}]), length
            )


def test_replaced_columns_are_named(caplog):
    first = score_preferences(PAIRS, length)
    assert "replaced" not in caplog.text
    with caplog.at_level(logging.WARNING):
        again = score_preferences(first, lambda prompts, completions: [0.5 for _ in completions])
    assert "has ['score_chosen', 'score_rejected'] already; these columns are replaced" in caplog.text
    assert set(again["score_chosen"]) == {0.5} and again.column_names == first.column_names


@pytest.mark.parametrize("kind", ["tensor", "array", "numbers", "tuple"])
def test_what_a_function_may_return(kind):
    make = {
        "tensor": torch.tensor, "array": np.array, "numbers": lambda x: [np.float32(v) for v in x], "tuple": tuple,
    }[kind]  # fmt: skip
    scored = score_preferences(PAIRS, lambda prompts, completions: make(length(prompts, completions)))
    assert scored["score_chosen"] == [float(len(text)) for text in PAIRS["chosen"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": ""}, "Row 1: the completion '' is empty"),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, "Row 1: the completion None is empty"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "Row 1: the prompt has no value"),
    ],
)
def test_rows_that_cannot_be_scored(row, message):
    data = Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b"}, row])
    with pytest.raises(ValueError, match=message):
        score_preferences(data, length)


def test_a_call_of_a_tool_is_no_empty_completion():
    message = lambda **rest: [{"role": "assistant", **rest}]  # noqa: E731
    call = [{"type": "function", "function": {"name": "clock"}}]
    row = {"prompt": message(content="p"), "chosen": message(content=None, tool_calls=call)}
    data = Dataset.from_list([{**row, "rejected": message(content="a", tool_calls=None)}])
    assert score_preferences(data, lambda prompts, completions: [1.0, 2.0])["score_chosen"] == [1.0]
    with pytest.raises(ValueError, match=r"Row 0: the completion has the message .* whose 'content' is None"):
        score_preferences(
            Dataset.from_list([{**row, "rejected": message(content=None, tool_calls=None)}]),
            lambda **texts: [1.0, 2.0],
        )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, r"lacks \['prompt'\]; its columns are .* `trl\.extract_prompt` splits it off\.$"),
        ({"prompt": "p", "chosen": "a"}, r"lacks \['rejected'\]; its columns are \['chosen', 'prompt'\]\.$"),
        ({"prompt": "p", "completions": []}, r"Row 0: `completions` is \[\]; expected a list of at least one"),
        ({"prompt": [], "chosen": [{"role": "user"}], "rejected": []}, r"Row 0: the prompt is \[\], which has no message"),
        ({"prompt": "p", "chosen": "a", "rejected": ["b"]}, "Row 0: the completion .* is of another kind than its prompt"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_scored(row, message):
    with pytest.raises(ValueError, match=message):
        score_preferences(Dataset.from_list([row]), length)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([math.nan] * 12, "returned nan for"),
        ([math.inf] * 12, "returned inf for"),
        ([None] * 12, "returned None for"),
        ([True] * 12, "returned True for"),
        (["1"] * 12, "returned '1' for"),
        ([1.0], "returned 1 scores for 12 texts"),
        ([1.0] * 13, "returned 13 scores for 12 texts"),
        (None, "returned None for 12 texts"),
        (1.0, "returned 1.0 for 12 texts"),
    ],
    ids=str,
)
def test_refused_scores(answer, message):
    with pytest.raises(ValueError, match=message):
        score_preferences(PAIRS, lambda prompts, completions: answer)


@pytest.mark.parametrize(
    ("answer", "message"),
    [([2.0] * 6, r"2.0; expected probabilities in \[0, 1\]"), ([-0.1] * 6, "returned -0.1"), ([0.5] * 5, "5 scores for 6"),
     ([math.nan] * 6, "returned nan")],
    ids=str,
)  # fmt: skip
def test_refused_probabilities(answer, message):
    with pytest.raises(ValueError, match=message):
        score_preferences(PAIRS, judge=lambda prompts, first, second: answer)


def test_refused_before_the_work():
    calls = []
    reward = lambda **kwargs: calls.append(1)  # noqa: E731
    groups = Dataset.from_list([{"prompt": "p", "completions": ["a", "bbb"]}])
    for value in (0, -1.0, math.nan, math.inf, "best", True, None):
        with pytest.raises(ValueError, match="must be a positive number"):
            score_preferences(PAIRS, reward, temperature=value)
    for value in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match=f"`batch_size={value}` must be a whole number, at least 1"):
            score_preferences(PAIRS, reward, batch_size=value)
    with pytest.raises(ValueError, match="has no rows to score"):
        score_preferences(PAIRS.select([]), reward)
    with pytest.raises(ValueError, match="groups have none"):
        score_preferences(groups, reward, temperature="fit")
    with pytest.raises(ValueError, match="no meaning for a judge of two"):
        score_preferences(PAIRS, judge=reward, temperature=2.0)
    assert not calls
    assert score_preferences(PAIRS, length, temperature=2)["score_chosen"] == [
        len(text) / 2 for text in PAIRS["chosen"]
    ]


def test_refused_rewards():
    with pytest.raises(ValueError, match="is none of"):
        score_preferences(PAIRS, 3)
    with pytest.raises(ValueError, match=r"lacks \['prompt'\]"):
        score_preferences(PAIRS.remove_columns("prompt"), length)
    with pytest.raises(ValueError, match="must be a positive number"):
        score_preferences(PAIRS, length, temperature=0.0)


def test_fitted_scores_are_in_logits():
    def noisy(prompts, completions):
        return [float(len(completion) % 7) for completion in completions]

    raw = score_preferences(PAIRS, noisy)
    fitted = fit_temperature([a - b for a, b in zip(raw["score_chosen"], raw["score_rejected"], strict=True)])
    scaled = score_preferences(PAIRS, noisy, temperature="fit")
    assert scaled["score_chosen"] == pytest.approx([value / fitted for value in raw["score_chosen"]])


def test_a_reward_model_that_nothing_reads_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="would not be used"):
        build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=PAIRS,
              trainer_kwargs={"reward_funcs": length})  # fmt: skip


def test_scores_survive_json(tmp_path):
    scored = score_preferences(PAIRS, length)
    path = tmp_path / "scored.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in scored))
    assert trl_ext.data.load_preferences(str(path))["score_chosen"] == scored["score_chosen"]


def test_the_longest_come_first_each_once_and_are_kept(tmp_path):
    """Memory runs out at once or never; equal texts are asked for once."""
    batches = []

    def counted(prompts, completions):
        batches.append(completions)
        return length(prompts, completions)

    rows = [
        {"prompt": "p", "completions": ["a", "aaaaa", "aa"]},
        {"prompt": "p", "completions": ["aaaa", "aa", "aaa"]},
    ]
    scored = score_preferences(Dataset.from_list(rows), counted, batch_size=2, temperature=2.0)
    assert batches == [["aaaaa", "aaaa"], ["aaa", "aa"], ["a"]]
    assert scored["scores"] == [[0.5, 2.5, 1.0], [2.0, 1.0, 1.5]]
    assert len(list((tmp_path / "cache" / "scores").glob("function-*.jsonl"))) == 1
    assert scored.column_names == ["prompt", "completions", "scores"]


def test_win_rates_by_hand(tmp_path):
    """Each two completions of a row are compared once, and a win of one is a loss of the other."""
    asked = []

    def judge(prompts, first, second):
        asked.extend(zip(prompts, first, second, strict=True))
        return [{"ab": 0.75, "ac": 1.0, "bc": 0.25, "de": 0.125}[a + b] for a, b in zip(first, second, strict=True)]

    rows = [{"prompt": "p", "completions": ["a", "b", "c"]}, {"prompt": "q", "completions": ["d", "e"]}]
    scored = score_preferences(Dataset.from_list([*rows, {"prompt": "r", "completions": ["f"]}]), judge=judge)
    assert scored["scores"] == [[0.875, 0.25, 0.375], [0.125, 0.875], [0.0]]
    assert sorted(asked) == [("p", "a", "b"), ("p", "a", "c"), ("p", "b", "c"), ("q", "d", "e")]
    assert len(list((tmp_path / "cache" / "scores").glob("judge-*.jsonl"))) == 1


def test_ensembles_of_ensembles():
    by = lambda factor: lambda prompts, completions: [factor * len(text) for text in completions]  # noqa: E731
    reward = [by(1), Ensemble([by(4), by(2), by(3)], "min"), Ensemble([by(6), by(0)], "mean"), [by(1), by(-3)]]
    scored = score_preferences(Dataset.from_list([{"prompt": "p", "chosen": "aaa", "rejected": "a"}]), reward)
    assert (scored["score_chosen"], scored["score_rejected"]) == ([12.0], [4.0])  # 1 + 2 + 3 - 2 times the length


def test_a_reward_model_that_gives_no_number(tiny_model_dir, tmp_path, monkeypatch):
    """Its answers are looked at as those of functions are, and none is kept."""
    monkeypatch.setattr(RewardModel, "logits", lambda self, prompts, *rest: torch.full((len(prompts), 1), torch.nan))
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    with pytest.raises(ValueError, match="returned nan for"):
        score_preferences(PAIRS, RewardModel(model, AutoTokenizer.from_pretrained(tiny_model_dir)), cache_dir=tmp_path)
    assert not list(tmp_path.rglob("*.jsonl"))
