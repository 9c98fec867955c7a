"""What `trl-ext inspect` says of a dataset."""

import json

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from tests.conftest import preference_rows
from trl_ext import list_losses
from trl_ext.cli import main
from trl_ext.data import inspect_preferences


def pairs(**columns):
    rows = [
        {"prompt": "p", "chosen": "a b c", "rejected": "a b", **columns},
        {"prompt": "p", "chosen": "a b", "rejected": "a b c", **columns},
        {"prompt": "q", "chosen": "a b c d", "rejected": "a", **columns},
        {"prompt": "q", "chosen": "a b c d", "rejected": "a", **columns},
    ]
    return Dataset.from_list(rows)


def test_facts():
    facts = inspect_preferences(pairs()).facts
    assert facts["the longer answer wins"] == "3 of 4 (75.0%)"
    assert facts["duplicate pairs"] == "1 of 4 (25.0%)"
    assert facts["pairs there in both orders"] == "2 of 4 (50.0%)"
    assert facts["prompts, each once"] == "2"


def test_losses_and_why_not():
    report = inspect_preferences(pairs())
    assert report.losses["length_regularized"] == "" and report.losses["anchored"] == ""
    assert "needs the column 'score_chosen'" in report.losses["offset"]
    assert set(report.losses) == {*list_losses(), "sigmoid and TRL's others"}
    scored = inspect_preferences(pairs(score_chosen=1.0, score_rejected=2.0))
    assert "4 of 4 pairs" in scored.losses["offset"] and scored.losses["margin_adaptive"] == ""
    assert scored.facts["scores contradict the label"] == "4 of 4 (100.0%)"


def test_truncation_is_counted_in_tokens(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    data = Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in preference_rows(6)])
    longest = max(
        len(tokenizer(row["prompt"])["input_ids"])
        + max(len(tokenizer(row[s])["input_ids"]) for s in ("chosen", "rejected"))
        for row in data
    )
    none = inspect_preferences(data, tokenizer=tokenizer, max_length=longest)
    one = inspect_preferences(data, tokenizer=tokenizer, max_length=longest - 1)
    assert none.facts[f"longer than max_length={longest}"].startswith("0 of")
    assert not one.facts[f"longer than max_length={longest - 1}"].startswith("0 of")


def test_groups_and_conversations(tiny_model_dir):
    data = Dataset.from_list([{"prompt": "p", "completions": ["a", "b b", "c"], "scores": [1.0, 2.0, 3.0]}] * 2)
    assert inspect_preferences(data).facts["pairs"] == "2, best against worst"
    message = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    rows = [
        {"prompt": message("user", "p"), "chosen": message("assistant", "a b"), "rejected": message("assistant", "c")}
    ]
    report = inspect_preferences(Dataset.from_list(rows), tokenizer=AutoTokenizer.from_pretrained(tiny_model_dir))
    assert report.facts["form"] == "conversational" and report.unit == "tokens"
    with pytest.raises(ValueError, match="holds no pairs"):
        inspect_preferences(Dataset.from_dict({"text": ["a"]}))


def test_command(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in pairs(score_chosen=2.0, score_rejected=1.0)))
    assert main(["inspect", str(path), "--plot", str(tmp_path / "plot.png")]) == 0
    shown = capsys.readouterr().out
    assert "the longer answer wins" in shown and "offset" in shown
    assert (tmp_path / "plot.png").exists()
    assert main(["inspect", str(tmp_path / "none.txt")]) != 0
