"""Scores from models, functions and judges; what survives a kill; calibration."""

import io
import json
import logging
import math
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import rich.console
import torch
from accelerate import PartialState
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

import trl_ext
from tests.conftest import build_tokenizer, preference_rows
from tests.helpers import build, history
from trl_ext.data import (
    Ensemble,
    PairFunction,
    RewardModel,
    calibrate,
    fit_temperature,
    sample_completions,
    score_preferences,
)
from trl_ext.data.cache import Ledger, write_atomically


PAIRS = Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in preference_rows(6)])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def reward_dir(tiny_model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("rm")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(1)
    config = Qwen3Config.from_pretrained(tiny_model_dir, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    Qwen3ForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def length(prompts, completions):
    return [float(len(completion)) for completion in completions]


def test_a_function_on_pairs_and_groups():
    scored = score_preferences(PAIRS, length)
    assert scored["score_chosen"] == [float(len(text)) for text in PAIRS["chosen"]]
    groups = Dataset.from_list(
        [{"prompt": "p", "completions": ["a", "bbb"]}, {"prompt": "q", "completions": ["cc"] * 3}]
    )
    assert score_preferences(groups, length)["scores"] == [[1.0, 3.0], [2.0, 2.0, 2.0]]


def test_a_model_from_a_folder(reward_dir):
    scored = score_preferences(PAIRS, str(reward_dir), batch_size=4)
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    model = Qwen3ForSequenceClassification.from_pretrained(reward_dir)
    for row in scored:
        for side in ("chosen", "rejected"):
            with torch.no_grad():
                text = row["prompt"] + row[side] + tokenizer.eos_token
                expected = model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item()
            assert row[f"score_{side}"] == pytest.approx(expected, abs=1e-4)


def test_conversations_have_the_reward_models_template(reward_dir):
    rows = [
        {"prompt": [{"role": "user", "content": "what"}], "chosen": [{"role": "assistant", "content": a}],
         "rejected": [{"role": "assistant", "content": b}]}
        for a, b in (("good", "bad"), ("great", "dull"))
    ]  # fmt: skip
    scored = score_preferences(Dataset.from_list(rows), str(reward_dir))
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    model = Qwen3ForSequenceClassification.from_pretrained(reward_dir)
    for row in scored:
        text = f"<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n{row['rejected'][0]['content']}<|im_end|>\n"
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item()
        assert row["score_rejected"] == pytest.approx(expected, abs=1e-4)


def test_long_texts_keep_their_end(reward_dir):
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    model = Qwen3ForSequenceClassification.from_pretrained(reward_dir)
    reward = RewardModel(str(reward_dir), max_length=4)
    reward.load()
    ids = tokenizer("start of it the end<|eos|>", return_tensors="pt")["input_ids"]
    assert ids.size(1) > 8
    with torch.no_grad():
        expected = model(input_ids=ids[:, -4:]).logits[0, 0].item()
        others = [model(input_ids=each).logits[0, 0].item() for each in (ids, ids[:, :4], ids[:, -5:])]
    assert reward(["start of it"], [" the end"])[0] == pytest.approx(expected, abs=1e-5)
    assert all(abs(expected - other) > 1e-3 for other in others)


@pytest.mark.parametrize(("positions", "known", "expected"), [(64, 10**30, 64), (64, 32, 32), (0, 48, 48)])
def test_the_length_is_the_models_own_by_default(positions, known, expected):
    model = encoder()
    model.config.max_position_embeddings = positions
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = known
    reward = RewardModel(model, tokenizer)
    reward.load()
    assert reward.max_length == expected
    for value in (0, -1, True, 2.5):
        with pytest.raises(ValueError, match=f"`max_length={value}` must be a whole number of tokens"):
            RewardModel(model, tokenizer, max_length=value)


SIZES = {"num_labels": 1, "initializer_range": 0.5}


def encoder():
    """BERT: attends to all of a row, has absolute positions, and dropout."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=512, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=128, hidden_dropout_prob=0.3, **SIZES,
        )
    )  # fmt: skip


def decoder():
    """GPT-2: absolute positions, dropout, and a reward at the last token that is no padding."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=512, n_embd=16, n_layer=2, n_head=2, n_positions=128, resid_pdrop=0.3, bos_token_id=1, eos_token_id=1,
        **SIZES,
    )  # fmt: skip
    return GPT2ForSequenceClassification(config)


@pytest.mark.parametrize("pad", ["<|pad|>", None])
@pytest.mark.parametrize("make", [encoder, decoder])
def test_a_reward_does_not_depend_on_its_batch(make, pad):
    """Short and long texts together, the last batch of one, against each text alone without padding or dropout."""
    tokenizer, model = build_tokenizer(), make()
    tokenizer.pad_token = pad
    scored = score_preferences(PAIRS, RewardModel(model.train(), tokenizer), batch_size=11)
    assert tokenizer.pad_token == pad
    model.eval()
    for row in scored:
        for side in ("chosen", "rejected"):
            ids = tokenizer(row["prompt"] + row[side] + "<|eos|>", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                expected = model(input_ids=ids).logits[0, 0].item()
            assert row[f"score_{side}"] == pytest.approx(expected, abs=1e-5)
    assert len({*scored["score_chosen"], *scored["score_rejected"]}) == 12


def test_what_a_score_depends_on(reward_dir):
    """A change of anything that a score depends on gives other scores, not those that were kept."""
    model = Qwen3ForSequenceClassification.from_pretrained(reward_dir)
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    reward = RewardModel(model, tokenizer)
    seen = [score_preferences(PAIRS, reward)["score_chosen"]]

    def differs(reward):
        found = score_preferences(PAIRS, reward)["score_chosen"]
        fresh = all(found != other for other in seen)
        seen.append(found)
        return fresh

    assert not differs(RewardModel(model, tokenizer))
    assert differs(RewardModel(model, tokenizer, max_length=5))
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1.0
    assert differs(reward)
    model.config.rms_norm_eps = model.model.norm.variance_epsilon = 0.5
    assert differs(reward)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 2)]
    )
    assert differs(reward)
    tokenizer.eos_token = "<|im_end|>"
    assert differs(reward)


def test_what_the_key_of_a_model_leaves_out(reward_dir):
    """Names, and what the last call has left in the tokenizer."""
    model = Qwen3ForSequenceClassification.from_pretrained(reward_dir)
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    before = RewardModel(model, tokenizer).key()
    model.config._name_or_path, model.config.use_cache = "elsewhere", False
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)
    assert RewardModel(model, tokenizer).key() == before == RewardModel(str(reward_dir)).key()
    tokenizer.chat_template += " "
    assert RewardModel(model, tokenizer).key() != before


def test_models_that_cannot_score(tiny_model_dir, reward_dir):
    with pytest.raises(ValueError, match=r"has no weights for \['score.weight'\]"):
        score_preferences(PAIRS, str(tiny_model_dir))
    with pytest.raises(ValueError, match="There is no reward model '/no/such'"):
        score_preferences(PAIRS, "/no/such")
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a padding nor an end-of-sequence token"):
        score_preferences(PAIRS, RewardModel(str(reward_dir), tokenizer))


def test_conversations_need_a_template_before_anything_is_scored(reward_dir):
    rows = [
        {
            "prompt": [{"role": "user", "content": "p"}],
            **{side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")},
        }
    ]
    tokenizer, calls = AutoTokenizer.from_pretrained(reward_dir), []
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        score_preferences(
            Dataset.from_list(rows), [lambda **kwargs: calls.append(1), [RewardModel(str(reward_dir), tokenizer)]]
        )
    assert not calls


def test_tools_reach_the_reward_models_template(reward_dir):
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    tokenizer.chat_template = "{%- for t in tools or [] %}{{- t.name }}{%- endfor %}{{- mood }}{%- for m in messages %}{{- m.content }}{%- endfor %}"
    message = lambda text: [{"role": "user", "content": text}]  # noqa: E731
    rows = [
        {"prompt": message("what"), "chosen": message(" good"), "rejected": message(" bad"), "tools": '[{"name": "clock"}]',
         "chat_template_kwargs": {"mood": mood}}
        for mood in ("fast", "slow")
    ]  # fmt: skip
    model = Qwen3ForSequenceClassification.from_pretrained(reward_dir)
    scored = score_preferences(Dataset.from_list(rows), RewardModel(model, tokenizer))
    for row, mood in zip(scored, ("fast", "slow"), strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(f"clock{mood}what good", return_tensors="pt")).logits[0, 0].item()
        assert row["score_chosen"] == pytest.approx(expected, abs=1e-5)


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


def test_a_torn_line_is_passed_over(tmp_path):
    ledger = Ledger(tmp_path, "x")
    ledger.append({"a": 1.0})
    with open(ledger.path, "a") as file:
        file.write('["b", 2.')
    assert Ledger(tmp_path, "x").read() == {"a": 1.0}
    Ledger(tmp_path, "x").append({"c": 3.0})
    assert Ledger(tmp_path, "x").read() == {"a": 1.0, "c": 3.0} and Ledger(tmp_path, "y").read() == {}


@pytest.mark.parametrize(
    "line", [b"1", b"null", b'"ab"', b'["b"]', b'["b", "2"]', b"[1, 2.0]", b'["b", 2.0, 3]', b"\xff\x00", b"{}"]
)
def test_what_is_no_result_is_passed_over(line, tmp_path):
    ledger = Ledger(tmp_path, "x")
    ledger.append({"a": 1.0})
    with open(ledger.path, "ab") as file:
        file.write(line + b"\n")
    ledger.append({"c": 3.0})
    assert Ledger(tmp_path, "x").read() == {"a": 1.0, "c": 3.0}


def test_two_runs_on_one_folder(tmp_path):
    """Both write at once: neither into the other's lines, and what one has done the other need not do."""
    first, second = Ledger(tmp_path, "x"), Ledger(tmp_path, "x")
    first.append({"a": 1.0})
    with open(first.path, "a") as file:  # in the middle of a line
        file.write('["b", ')
        file.flush()
        second.append({"c": 3.0})
        file.write("2.0]\n")
    assert first.read() == second.read() == {"a": 1.0, "b": 2.0, "c": 3.0}


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


def test_appending_does_not_read(tmp_path):
    ledger = Ledger(tmp_path, "x")
    ledger.append({str(n): 0.5 for n in range(200_000)})
    started = time.perf_counter()
    for n in range(20):
        ledger.append({f"new {n}": 0.5})
    assert time.perf_counter() - started < 0.5


def test_atomic_files(tmp_path):
    write_atomically(tmp_path / "a" / "b.json", "1")
    assert (tmp_path / "a" / "b.json").read_text() == "1" and len(list((tmp_path / "a").iterdir())) == 1


def test_ensembles():
    def minus(prompts, completions):
        return [-value for value in length(prompts, completions)]

    assert set(score_preferences(PAIRS, [length, minus])["score_chosen"]) == {0.0}
    lowest = score_preferences(PAIRS, Ensemble([length, minus], "min"))["score_chosen"]
    assert lowest == [-float(len(text)) for text in PAIRS["chosen"]]
    with pytest.raises(ValueError, match="'mean' or 'min'"):
        Ensemble([length], "max")
    with pytest.raises(ValueError, match="at least one reward"):
        Ensemble([])
    with pytest.raises(ValueError, match="a judge of two gives none"):
        score_preferences(PAIRS, [length, PairFunction(longer)])


def longer(prompts, first, second):
    return [1.0 if len(a) > len(b) else 0.0 if len(a) < len(b) else 0.5 for a, b in zip(first, second, strict=True)]


def test_a_judge_of_two():
    scored = score_preferences(PAIRS, PairFunction(longer))
    assert scored["preference_prob"] == longer(None, PAIRS["chosen"], PAIRS["rejected"])
    groups = Dataset.from_list([{"prompt": "p", "completions": ["a", "bbb", "cc"]}])
    assert score_preferences(groups, PairFunction(longer))["scores"] == [[0.0, 1.0, 0.5]]
    with pytest.raises(ValueError, match=r"expected probabilities in \[0, 1\]"):
        score_preferences(PAIRS, PairFunction(lambda p, a, b: [2.0] * len(p)))


def test_sampled_completions_may_be_empty(tmp_path, caplog):
    """A policy may end at once: that is a completion like any other. In a pair, or as no text at all, it is an error."""
    groups = [{"prompt": "p", "completions": ["", "bbb"]}, {"prompt": "q", "completions": ["cc", " "]}]
    with caplog.at_level(logging.WARNING):
        assert score_preferences(Dataset.from_list(groups), length)["scores"] == [[0.0, 3.0], [2.0, 1.0]]
    assert "2 completions of the dataset are empty" in caplog.text
    assert score_preferences(Dataset.from_list(groups), PairFunction(longer))["scores"] == [[0.0, 1.0], [1.0, 0.0]]
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


def test_an_empty_sample_is_scored_by_a_model(tiny_model_dir, reward_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model.generation_config.eos_token_id = list(range(len(tokenizer)))  # ends at once
    groups = sample_completions(PAIRS.select_columns(["prompt"]), model, 2, tokenizer=tokenizer, cache_dir=tmp_path)
    assert groups["completions"] == [["", ""]] * 6
    scored = score_preferences(groups, str(reward_dir))
    reward = Qwen3ForSequenceClassification.from_pretrained(reward_dir)
    with torch.no_grad():
        expected = reward(**tokenizer(PAIRS[0]["prompt"] + "<|eos|>", return_tensors="pt")).logits[0, 0].item()
    assert scored["scores"][0] == pytest.approx([expected] * 2, abs=1e-5)


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
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "Row 1: the prompt is None"),
    ],
)
def test_rows_that_cannot_be_scored(row, message):
    data = Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b"}, row])
    with pytest.raises(ValueError, match=message):
        score_preferences(data, length)


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
        score_preferences(PAIRS, PairFunction(lambda prompts, first, second: answer))


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
        score_preferences(PAIRS, PairFunction(reward), temperature=2.0)
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


# Calibration


def test_temperature_recovers_the_unit():
    torch.manual_seed(0)
    logits = torch.randn(20_000, dtype=torch.float64) * 2
    labels = torch.rand(20_000, dtype=torch.float64) < torch.sigmoid(logits)
    margins = torch.where(labels, logits, -logits) * 3.0
    assert fit_temperature(margins.tolist()) == pytest.approx(3.0, rel=0.05)
    report = calibrate(margins.tolist())
    assert report.nll_fitted < report.nll and report.accuracy == pytest.approx((margins > 0).double().mean().item())


def test_temperature_is_the_minimum():
    # sigmoid(1 / T) = 3 / 4
    assert fit_temperature([1.0, 1.0, 1.0, -1.0]) == pytest.approx(1 / math.log(3), rel=1e-9)
    assert fit_temperature([50.0, 50.0, 50.0, -50.0]) == pytest.approx(50 / math.log(3), rel=1e-9)
    margins = [2.0, 1.0, -0.5, 3.0]
    fitted = fit_temperature(margins)
    nll = lambda t: sum(math.log1p(math.exp(-m / t)) for m in margins)  # noqa: E731
    assert nll(fitted) < min(nll(fitted * 1.01), nll(fitted / 1.01))


def test_calibration():
    report = calibrate([2.0, 0.0, -1.0, 0.0, 1.0])
    assert (report.pairs, report.accuracy, report.contradicted, report.ties) == (5, pytest.approx(0.6), 0.2, 0.4)
    assert report.margin_mean == pytest.approx(0.4) and report.margin_std == pytest.approx(math.sqrt(6 / 5 - 0.16))
    expected = [math.log1p(math.exp(-m)) for m in (2.0, 0.0, -1.0, 0.0, 1.0)]
    assert report.nll == pytest.approx(sum(expected) / 5) and report.margins == [2.0, 0.0, -1.0, 0.0, 1.0]
    report = calibrate([1.0, 1.0, 1.0, -1.0])
    assert report.nll_fitted == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert report.remark == "" and "margins=" not in repr(report) and len(repr(calibrate([1.0, -2.0] * 999))) < 500
    scored = Dataset.from_list(
        [{"score_chosen": 3.0, "score_rejected": 1.0}, {"score_chosen": 0.0, "score_rejected": 1.0}]
    )
    assert calibrate(scored).margins == [2.0, -1.0]
    with pytest.raises(ValueError, match=r"lacks \['score_rejected'\]"):
        calibrate(scored.remove_columns("score_rejected"))
    for bad in ([], [1.0, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="at least one pair, and finite scores"):
            calibrate(bad)


def test_the_table_of_a_calibration():
    console = rich.console.Console(record=True, width=100, file=io.StringIO())
    console.print(calibrate([1.0, 1.0, 1.0, -1.0]).table())
    console.print(calibrate([1.0, 2.0]).table())
    lines = [re.sub(r"[│ ]+", " ", line).strip() for line in console.export_text().split("\n")]
    for line in (
        "pairs 4", "chosen scores more 75.0%", "labels contradicted 25.0%", "equal scores 0.0%", "margin 0.500 ± 0.866",
        "temperature of best fit 0.9102", "nats per pair, as they are 0.5633", "nats per pair, fitted 0.5623",
        "nats per pair, a coin 0.6931", "temperature of best fit -", "nats per pair, fitted -",
    ):  # fmt: skip
        assert line in lines, line
    assert any("No temperature fits" in line for line in lines)


def test_where_no_temperature_fits(tmp_path):
    for margins, message in (([1.0, 2.0], "no label is contradicted"), ([-1.0, 0.5], "no better than a coin")):
        with pytest.raises(ValueError, match=message):
            fit_temperature(margins)
        report = calibrate(margins)
        assert report.temperature is report.nll_fitted is None and message in report.remark
    report.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


def test_fitted_scores_are_in_logits():
    def noisy(prompts, completions):
        return [float(len(completion) % 7) for completion in completions]

    raw = score_preferences(PAIRS, noisy)
    fitted = fit_temperature([a - b for a, b in zip(raw["score_chosen"], raw["score_rejected"], strict=True)])
    scaled = score_preferences(PAIRS, noisy, temperature="fit")
    assert scaled["score_chosen"] == pytest.approx([value / fitted for value in raw["score_chosen"]])


# Through the trainer


def test_the_trainer_scores_what_has_no_scores(tiny_model_dir, tmp_path, reward_dir):
    trainer = build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=PAIRS, loss_type="margin_adaptive",
        trainer_kwargs={"reward_model": str(reward_dir)},
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    assert "weight/mean" in history(trainer)[0]


def test_a_reward_model_that_nothing_reads_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="would not be used"):
        build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=PAIRS,
              trainer_kwargs={"reward_model": length})  # fmt: skip


def test_eurus_terms(tiny_model_dir, tmp_path):
    from trl_ext.trainers.reward import RewardConfig, RewardTrainer

    losses = []
    for coefficient in (0.0, 0.5):
        torch.manual_seed(0)
        args = RewardConfig(output_dir=str(tmp_path), absolute_coefficient=coefficient, use_cpu=True, bf16=False,
                            report_to="none", max_steps=1, seed=3)  # fmt: skip
        trainer = RewardTrainer(model=str(tiny_model_dir), args=args, train_dataset=PAIRS)
        inputs = next(iter(trainer.get_train_dataloader()))
        loss, outputs = trainer.compute_loss(trainer.model, dict(inputs), return_outputs=True)
        losses.append(loss)
    chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
    absolute = -(torch.nn.functional.logsigmoid(chosen) + torch.nn.functional.logsigmoid(-rejected)).mean()
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * absolute)
    for value in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="must be finite and at least 0"):
            RewardConfig(output_dir=str(tmp_path), absolute_coefficient=value, use_cpu=True, bf16=False)


def test_scores_survive_json(tmp_path):
    scored = score_preferences(PAIRS, length)
    path = tmp_path / "scored.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in scored))
    assert trl_ext.data.load_preferences(str(path))["score_chosen"] == scored["score_chosen"]
