"""Kept samples and scores that are half written, not theirs, or of another version: computed anew, never trained on."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.hostile.refusal import contents, refused
from trl_ext.data import JudgeFunction, RewardFunction, sample_completions, score_preferences


class Payload:
    """What a pickle would run."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple:
        return Path.touch, (self.folder / "pwned",)


PROMPTS = Dataset.from_list([{"prompt": "what is"}, {"prompt": "the"}])
RIGHT = [[["a", "stop"], ["b", "length"]], [["c", "stop"], ["d", "stop"]]]
SAMPLES: dict[str, Any] = {
    "empty": b"",
    "half written": json.dumps(RIGHT)[:-9].encode(),
    "null": None,
    "an object": {"a": 1},
    "no prompts": [],
    "a prompt too few": RIGHT[:1],
    "a prompt too many": RIGHT * 2,
    "a completion too few": [group[:1] for group in RIGHT],
    "a completion too many": [group * 2 for group in RIGHT],
    "completions of numbers": [[[3, "stop"]] * 2] * 2,
    "completions of null": [[[None, "stop"]] * 2] * 2,
    "no reasons": [[["a"]] * 2] * 2,
    "other reasons": [[["a", "because"]] * 2] * 2,
    "tokens of another version": [[["a", "stop", 3]] * 2] * 2,
    "not nested": [["a", "stop"]] * 2,
    "NaN": b"[NaN, NaN]",
    "too deep": b"[" * 100_000,
    "binary": bytes(range(256)),
    "latin-1": "[é]".encode("latin-1"),
    "pickle": "pickle",
}  # fmt: skip


def on_disk(content: Any, folder: Path) -> bytes:
    if content == "pickle":
        return pickle.dumps(Payload(folder))
    return content if isinstance(content, bytes) else json.dumps(content).encode()


@pytest.fixture(scope="module")
def samples(tiny_model_dir, tmp_path_factory):
    """The tiny model and what it samples, with the one chunk of it that lies in the cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)

    def draw(folder: Path) -> Dataset:
        return sample_completions(PROMPTS, model, 2, processing_class=tokenizer, max_new_tokens=2, cache_dir=folder)

    folder = tmp_path_factory.mktemp("samples")
    drawn = draw(folder)
    (chunk,) = folder.rglob("*.json")
    return draw, drawn, chunk.relative_to(folder), chunk.read_bytes()


@pytest.mark.parametrize("name", SAMPLES)
def test_samples(name, samples, tmp_path):
    draw, right, chunk, content = samples
    (tmp_path / chunk).parent.mkdir()
    (tmp_path / chunk).write_bytes(on_disk(SAMPLES[name], tmp_path))
    assert draw(tmp_path).to_list() == right.to_list()
    assert contents(tmp_path)[str(chunk)] == content and not (tmp_path / "pwned").exists()


def test_samples_that_are_right_are_taken(samples, tmp_path):
    draw, _, chunk, _ = samples
    (tmp_path / chunk).parent.mkdir()
    (tmp_path / chunk).write_text(json.dumps(RIGHT))
    assert draw(tmp_path)["completions"] == [["a", "b"], ["c", "d"]]


PAIRS = Dataset.from_list([{"prompt": "what", "chosen": "long", "rejected": "s"}])
REWARD = RewardFunction(lambda prompts, completions: [float(len(each)) for each in completions], version="1")
JUDGE = JudgeFunction(lambda prompts, first, second: [0.75] * len(first), version="1")
# Of a line of kept scores, with its key
SCORES: dict[str, Any] = {
    "empty": b"",
    "half written": b'["KEY", 99',
    "NaN": b'["KEY", NaN]',
    "infinite": b'["KEY", Infinity]',
    "too large": b'["KEY", 1e999]',
    "a whole number of another version": b'["KEY", 99]',
    "text": b'["KEY", "99.0"]',
    "a boolean": b'["KEY", true]',
    "null": b'["KEY", null]',
    "a list": b'["KEY", [99.0]]',
    "more of another version": b'["KEY", 99.0, 1.0]',
    "an object": b'{"KEY": 99.0}',
    "another's": b'["0123456789abcdef01234567", 99.0]',
    "too deep": b"[" * 100_000,
    "binary": bytes(range(256)),
    "pickle": "pickle",
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_scores(name, tmp_path):
    right = score_preferences(PAIRS, REWARD, cache_dir=tmp_path).to_list()
    assert (right[0]["score_chosen"], right[0]["score_rejected"]) == (4.0, 1.0)
    (kept,) = tmp_path.glob("*.jsonl")
    key = json.loads(kept.read_text().splitlines()[0])[0]
    kept.write_bytes(on_disk(SCORES[name], tmp_path).replace(b"KEY", key.encode()))
    assert score_preferences(PAIRS, REWARD, cache_dir=tmp_path).to_list() == right
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("value", [-0.1, 1.1, 99.0])
def test_answers_of_a_judge_that_are_no_probabilities(value, tmp_path):
    right = score_preferences(PAIRS, judge=JUDGE, cache_dir=tmp_path).to_list()
    (kept,) = tmp_path.glob("*.jsonl")
    key = json.loads(kept.read_text())[0]
    kept.write_text(json.dumps([key, value]) + "\n")
    assert score_preferences(PAIRS, judge=JUDGE, cache_dir=tmp_path).to_list() == right
    assert right[0]["preference_prob"] == 0.75


@pytest.mark.parametrize("given", [3, "", ["a"], "a\0b", __file__])
def test_folders_that_are_none(given, samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = repr(given)
    refused(lambda: score_preferences(PAIRS, REWARD, cache_dir=given), said, tmp_path)
    refused(lambda: samples[0](given), said, tmp_path)
