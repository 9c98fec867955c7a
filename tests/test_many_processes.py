"""Scoring, sampling and rounds in two processes give what they give in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file

from tests.conftest import preference_rows
from tests.test_rounds import TRAINING
from trl_ext.cli import main


ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_rounds_in_two_processes(tiny_model_dir, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": row["prompt"]}) for row in preference_rows(6)))
    results = []
    for count in (1, 2):
        config = {
            "model": str(tiny_model_dir), "prompts": str(prompts), "reward_funcs": "tests.test_rounds:length", "rounds": 1,
            "output_dir": str(tmp_path / f"run-{count}"), "sampling": {"max_new_tokens": 5, "batch_size": 2}, "num_generations": 2,
            "training": {**TRAINING, "per_device_train_batch_size": 4 // count, "max_steps": 1, "optim": "sgd",
                         "loss_type": "inpo", "loss_kwargs": {"eta": 0.5, "tau": 0.25}},
        }  # fmt: skip
        path = tmp_path / f"{count}.yaml"
        path.write_text(json.dumps(config))  # which YAML reads
        if count == 1:
            assert main(["iterate", str(path)]) == 0
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
            done = subprocess.run(
                [*command, "-m", "trl_ext", "iterate", str(path)], capture_output=True, text=True, cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
        folder = tmp_path / f"run-{count}"
        results.append(json.loads((folder / "metrics.json").read_text()))
        ledgers = list((folder / "round-1" / "scores").glob("*.jsonl"))
        assert len(ledgers) == count  # each process writes a file of its own
    assert results[0][0] == results[1][0]
    first = [load_from_disk(tmp_path / f"run-{count}" / "round-1" / "pairs") for count in (1, 2)]
    for name in ("initial_chosen_logps", "initial_rejected_logps"):  # each process has computed half of them
        assert list(first[1][name]) == pytest.approx(list(first[0][name]), abs=1e-3)
    one, two = (load_file(tmp_path / f"run-{n}" / "round-1" / "model" / "model.safetensors") for n in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
