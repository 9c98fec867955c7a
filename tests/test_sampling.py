"""Completions of prompts, in one sitting or several."""

import pytest
from datasets import Dataset

from tests.conftest import preference_rows
from trl_ext.data import pair_traces, sample_completions, score_preferences


PROMPTS = Dataset.from_list([{"prompt": row["prompt"], "topic": i} for i, row in enumerate(preference_rows(5))])


def draw(model_dir, folder, **kwargs):
    options = {"n": 3, "max_new_tokens": 6, "batch_size": 2, "cache_dir": folder, **kwargs}
    return sample_completions(PROMPTS, str(model_dir), **options)


def test_samples(tiny_model_dir, tmp_path):
    data = draw(tiny_model_dir, tmp_path)
    assert data["topic"] == list(range(5)) and all(len(row) == 3 for row in data["completions"])
    assert {reason for row in data["stop_reasons"] for reason in row} <= {"stop", "length"}
    assert data["completions"] == draw(tiny_model_dir, tmp_path / "elsewhere")["completions"]
    assert data["completions"] != draw(tiny_model_dir, tmp_path, seed=1)["completions"]


@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_killed_and_started_again(killed_at, tiny_model_dir, tmp_path, monkeypatch):
    import trl_ext.data.sampling as sampling

    whole = draw(tiny_model_dir, tmp_path / "whole")
    calls, real = [], sampling.sample

    def fails(*args):
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(sampling, "sample", fails)
    with pytest.raises(KeyboardInterrupt):
        draw(tiny_model_dir, tmp_path / "killed")
    again = []
    monkeypatch.setattr(sampling, "sample", lambda *args: again.append(1) or real(*args))
    assert draw(tiny_model_dir, tmp_path / "killed").to_list() == whole.to_list()
    assert len(again) == 3 - killed_at


def test_reasoning_switched_off(tiny_model_dir, tmp_path):
    from transformers import AutoTokenizer

    from trl_ext.data.sampling import _render

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    row = {"prompt": [{"role": "user", "content": "what"}]}
    assert _render(row, tokenizer, False).endswith("<think>\n\n</think>\n\n")
    assert _render(row, tokenizer, True).endswith("assistant\n")
    conversations = Dataset.from_list([row, row])
    data = sample_completions(
        conversations, str(tiny_model_dir), 2, max_new_tokens=4, thinking=False, cache_dir=tmp_path
    )
    assert data[0]["completions"][0][0]["role"] == "assistant"


def test_traced_and_empty_trace_pairs_from_prompts_alone(tiny_model_dir, tmp_path):
    groups = []
    for thinking in (None, False):
        sampled = draw(tiny_model_dir, tmp_path, thinking=thinking, n=4)
        groups.append(
            score_preferences(
                sampled.map(lambda row: {"completions": [text or " ." for text in row["completions"]]}),
                lambda prompts, completions: [float(len(text)) for text in completions],
                cache_dir=tmp_path,
            )
        )
    pairs = pair_traces(*groups)
    for row in pairs:
        assert row["chosen"] is None or len(row["chosen"]) > len(row["rejected"])
        assert row["chosen_empty_trace"] is None or len(row["chosen_empty_trace"]) > len(row["rejected_empty_trace"])
    with pytest.raises(ValueError, match="different prompts"):
        pair_traces(groups[0], groups[1].select([1, 0, 2, 3, 4]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n": 0}, "`n=0` must be a whole number"),
        ({"max_new_tokens": 0}, "`max_new_tokens=0`"),
        ({"temperature": -1.0}, "at least 0"),
        ({"backend": "llama"}, "choose 'transformers' or 'vllm'"),
    ],
)
def test_refused(kwargs, message, tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw(tiny_model_dir, tmp_path, **kwargs)
    with pytest.raises(ValueError, match="column 'prompt'"):
        sample_completions(Dataset.from_dict({"text": ["a"]}), str(tiny_model_dir))
