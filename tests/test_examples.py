"""Each example runs as it stands, on a local model and real preference data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import children
from trl_ext import list_losses


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
METRIC = {
    "offset": "offset/mean",
    "anchored": "target/mean",
    "margin_adaptive": "weight/mean",
    "bias_variance": "empty_trace/share",
    "length_regularized": "length_gap/mean",
    "aligndistil": "divergence/per_token",
    "alpha_dpo": "gap/running_mean",
    "beta_dpo": "beta/adapted",
    "reward_distillation": "reward_gap/wanted",
    "robust_em": "Reliability of each annotator",
    "madpo": "weight/mean",
    "online_dpo": "completions/mean_length",
    "c_rlft": "mean_token_accuracy",
    "dmpo": "turns/chosen",
    "simpo": "per_token/margins",
    "step_apo": "offset/mean",
    "preference_model": "eval_accuracy",
    "trpa": "ranking/pairs",
}


def test_one_for_every_loss():
    in_rounds = {"inpo", "sppo_soft"}  # examples/rounds
    # Flags of an example that needs no less than they do
    by_flag = {
        "asft": "simpo",
        "cpo": "simpo",
        "eurus": "simpo",
        "drpo": "trpa",
    }
    assert set(EXAMPLES) == set(METRIC) >= set(list_losses()) - in_rounds - set(by_flag)
    for name, example in by_flag.items():
        text = (ROOT / "examples" / f"{example}.py").read_text()
        assert f"python examples/{example}.py --loss_type {name} " in text
    readme = (ROOT / "examples" / "README.md").read_text()
    assert all(f"[{name}.py]({name}.py)" in readme for name in EXAMPLES)


def in_turns(row):
    def messages(text):
        first, _, rest = text.partition(". ")
        said = [("assistant", first), ("user", "Go on."), ("assistant", rest or "That is all.")]
        return [{"role": role, "content": content} for role, content in said]

    return {"prompt": [{"role": "user", "content": row["prompt"]}]} | {
        side: messages(row[side]) for side in ("chosen", "rejected")
    }


@pytest.mark.parametrize("name", [*EXAMPLES, "online_dpo with reference answers"])
def test_example(name, tiny_model_dir, shared_data, tmp_path, monkeypatch):
    rows = (shared_data / "imdb_sentiment" / "pairs_train.jsonl").read_text().splitlines()[:24]
    if name == "bias_variance":  # reviews have no traces: one is made up
        rows = [json.loads(row) for row in rows]
        for row in rows:
            row.update({side: f"<think>\nhm\n</think>\n\n{row[side]}" for side in ("chosen", "rejected")})
        rows = [json.dumps(row) for row in rows]
    if name == "step_apo":  # scores stand for the values of a search
        rows = [
            row.replace('"score_chosen"', '"q_chosen"').replace('"score_rejected"', '"q_rejected"') for row in rows
        ]
    name, _, with_references = name.partition(" ")
    if with_references:
        rows = [row.replace('"chosen"', '"reference"') for row in rows]
    if name == "trpa":
        rows = [json.dumps({"prompt": f"{k} and {k} is", "answer": str(2 * k)}) for k in range(8)]
    if name == "dmpo":  # the first sentence is a turn, and the rest another
        rows = [json.dumps(in_turns(json.loads(row))) for row in rows]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(rows))
    flags = ["--model_name_or_path", tiny_model_dir, "--dataset_name", data, "--output_dir", tmp_path / "out", "--max_steps", "2",
             "--logging_steps", "1", "--use_cpu", "--bf16", "false", "--per_device_train_batch_size", "2", "--report_to", "none"]  # fmt: skip
    if name == "madpo":
        flags += ["--reward_max_steps", "2", "--held_out", "0.25"]
    if name == "aligndistil":
        flags += ["--teacher_max_steps", "1"]
    if name == "online_dpo":
        flags += ["--max_new_tokens", "8", *(["--overlap", "bleu"] if with_references else [])]
    if name == "trpa":
        flags += ["--max_new_tokens", "8"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "scores"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    script, log = ROOT / "examples" / f"{name}.py", tmp_path / "log"
    assert children.script(script, flags, log) == 0, log.read_text()
    shown = log.read_text()
    assert METRIC[name] in shown
    assert ("rewards/bleu/mean" in shown) == bool(with_references)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "huggingface.co/papers" in (tmp_path / "out" / "README.md").read_text()
    if (
        name == "aligndistil"
    ):  # teachers of an earlier run, perhaps of other pairs, are used where they are named alone
        teacher, reverse = tmp_path / "out" / "teacher", tmp_path / "out" / "reverse"
        assert children.script(script, flags, log) == 2
        again = f"{teacher} is there already. Use it with `--teacher_model_name_or_path {teacher}`"
        assert again in log.read_text()
        flags += ["--teacher_model_name_or_path", teacher, "--reverse_model_name_or_path", reverse]
        before = (teacher / "model.safetensors").stat().st_mtime_ns
        assert children.script(script, flags, log) == 0, log.read_text()
        assert (teacher / "model.safetensors").stat().st_mtime_ns == before


def test_an_example_in_a_python_of_its_own():
    """The others run in forks of this process, which has imported everything: here nothing has been imported before."""
    command = [sys.executable, str(ROOT / "examples" / "offset.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "--loss_kwargs" in done.stdout
