"""Each example runs as it stands, on a local model and real preference data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
def test_example(name, tiny_model_dir, shared_data, tmp_path):
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
    command = [sys.executable, ROOT / "examples" / f"{name}.py", "--model_name_or_path", tiny_model_dir, "--dataset_name", data,
               "--output_dir", tmp_path / "out", "--max_steps", "2", "--logging_steps", "1", "--use_cpu", "--bf16", "false",
               "--per_device_train_batch_size", "2", "--report_to", "none"]  # fmt: skip
    if name == "madpo":
        command += ["--reward_max_steps", "2", "--held_out", "0.25"]
    if name == "aligndistil":
        command += ["--teacher_max_steps", "1"]
    if name == "online_dpo":
        command += ["--max_new_tokens", "8", *(["--overlap", "bleu"] if with_references else [])]
    if name == "trpa":
        command += ["--max_new_tokens", "8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache"),
                   "TRL_EXT_CACHE": str(tmp_path / "scores")}  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert METRIC[name] in done.stdout
    assert ("rewards/bleu/mean" in done.stdout) == bool(with_references)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "huggingface.co/papers" in (tmp_path / "out" / "README.md").read_text()
    if (
        name == "aligndistil"
    ):  # teachers of an earlier run, perhaps of other pairs, are used where they are named alone
        again = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, cwd=tmp_path)
        teacher, reverse = tmp_path / "out" / "teacher", tmp_path / "out" / "reverse"
        assert again.returncode == 2
        assert f"{teacher} is there already. Use it with `--teacher_model_name_or_path {teacher}`" in again.stderr
        command += ["--teacher_model_name_or_path", teacher, "--reverse_model_name_or_path", reverse]
        before = (teacher / "model.safetensors").stat().st_mtime_ns
        again = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        assert (teacher / "model.safetensors").stat().st_mtime_ns == before
