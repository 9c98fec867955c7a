"""The command as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from tests import children
from tests.conftest import preference_rows
from trl_ext import list_losses
from trl_ext.cli import main


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import sys
import helper_beside_the_script
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer, TrlParser

args, rest = TrlParser([DPOConfig]).parse_args_and_config(return_remaining_strings=True)
dataset = load_dataset("json", data_files=rest[1], split="train")
trainer = DPOTrainer(model=rest[0], args=args, train_dataset=dataset)
trainer.train()
print("CLASS", type(trainer).__module__, sys.argv[0], __name__, __file__)
print("LOGGED", sorted(trainer.state.log_history[0]))
"""
CPU = ["--use_cpu", "--bf16", "false", "--report_to", "none", "--max_steps", "2", "--logging_steps", "1",
       "--per_device_train_batch_size", "2"]  # fmt: skip


def run(*args, env=None, cwd=None, launcher=("-m", "trl_ext")):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_DATASETS_CACHE": str(cwd or ROOT / ".cache"),
        **(env or {}),
    }
    command = [sys.executable, *launcher, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, stdin=subprocess.DEVNULL)


def forked(monkeypatch, folder, *args):
    """The same in a fork of this process, which has imported everything; what it prints, errors among it, is `stdout`."""
    log = folder / "log"
    monkeypatch.chdir(folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
    status = children.run(lambda: sys.exit(main([*map(str, args)])), log)
    return subprocess.CompletedProcess(args, status, log.read_text())


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "pairs" / "train.jsonl"
    path.parent.mkdir()
    Dataset.from_list(preference_rows(8)).to_json(path)
    return path


@pytest.fixture
def script(tmp_path) -> Path:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "helper_beside_the_script.py").write_text("")
    path = folder / "train.py"
    path.write_text(SCRIPT)
    return path


def test_losses_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["losses"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    words = {word for line in lines for word in line.split()}
    # Each on a line of its own, and whole
    assert {*list_losses()} <= words
    assert {
        "odpo",
        "length_temperature=0.1",
        "gamma_beta_ratio=0.6",
        "initial_rejected_logps",
        "(preference_prob)",
        "2403.19159",
    } <= words


@pytest.mark.parametrize("name", ["offset", "odpo", *list_losses()])
def test_one_loss(name, capsys):
    assert main(["losses", name]) == 0
    shown = capsys.readouterr().out
    assert "L " in shown
    assert "Hyper-parameters:" in shown
    assert "https://huggingface.co/papers/" in shown


def test_unknown_loss(capsys):
    assert main(["losses", "ofset"]) == 2
    error = capsys.readouterr().err
    assert "Did you mean 'offset'?" in error
    assert "Traceback" not in error


def test_run_an_unmodified_script(script, data, tiny_model_dir, tmp_path):
    done = run("run", script, "--loss_type", "offset", "--loss_kwargs", '{"alpha": 0.5}', "--output_dir", "out", *CPU,
               tiny_model_dir, data, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"CLASS trl_ext.trainers.dpo {script} __main__ {script}" in done.stdout
    assert "'offset/mean'" in done.stdout


def test_run_trls_own_command(data, tiny_model_dir, tmp_path):
    (tmp_path / "config.yaml").write_text("loss_type: [offset, sigmoid]\nloss_kwargs: {alpha: 0.5}\nbeta: 0.2\n")
    done = run("run", "dpo", "--model_name_or_path", tiny_model_dir, "--dataset_name", data.parent, "--output_dir", "out",
               "--dtype", "float32", "--config", "config.yaml", *CPU, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "offset/mean" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_mistakes_end_without_a_traceback(data, tiny_model_dir, tmp_path, monkeypatch):
    done = forked(monkeypatch, tmp_path, "run", "dpo", "--model_name_or_path", tiny_model_dir, "--dataset_name", data, "--output_dir", "out", *CPU,
                  "--loss_type", "offset", "--loss_kwargs", '{"alpha": -1}')  # fmt: skip
    assert done.returncode == 2
    assert "must be at least 0" in done.stdout and "Traceback" not in done.stdout


def test_run_under_accelerate(script, data, tiny_model_dir, tmp_path):
    done = run("--num_processes", "1", "--num_machines", "1", "--cpu", "--mixed_precision", "no", "--dynamo_backend", "no",
               "-m", "trl_ext", "run", script, "--loss_type", "anchored", "--output_dir", "out", *CPU, tiny_model_dir, data,
               cwd=tmp_path, launcher=("-m", "accelerate.commands.launch"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "'target/mean'" in done.stdout


def test_bad_data_end_without_a_traceback(script, data, tiny_model_dir, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[3]["score_chosen"] = -1.0
    data.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["run", script, "--loss_type", "offset", "--output_dir", "out", *CPU, tiny_model_dir, data]
    done = forked(monkeypatch, tmp_path, *arguments)
    assert done.returncode == 2
    assert "the first in row 3" in done.stdout
    assert "Traceback" not in done.stdout
    monkeypatch.setenv("TRL_EXT_TRACEBACK", "1")
    assert "Traceback" in forked(monkeypatch, tmp_path, *arguments).stdout


@pytest.mark.parametrize("folder", ["scripts", "trl/scripts", "trl_ext"])
def test_errors_of_the_script_keep_their_traceback(folder, tmp_path, monkeypatch):
    """Wherever the script lies, also in folders that are called as ours and TRL's are."""
    monkeypatch.setattr("trl_ext.trainers.patch.patch_trl", lambda: None)  # the other tests need TRL as it is
    script = tmp_path / folder / "train.py"
    script.parent.mkdir(parents=True)
    script.write_text("raise ValueError('mine')")
    with pytest.raises(ValueError, match="mine"):
        main(["run", str(script)])


def test_no_such_script(capsys):
    assert main(["run", "nowhere.py"]) == 2
    assert "no script 'nowhere.py'" in capsys.readouterr().err


def test_help_of_the_script_is_the_scripts(script, tmp_path, monkeypatch):
    done = forked(monkeypatch, tmp_path, "run", script, "--help")
    assert done.returncode == 0
    assert "--loss_kwargs" in done.stdout


def test_importing_patches_nothing_and_patch_trl_does():
    code = (
        "import trl, trl_ext; from trl_ext import DPOTrainer; from trl.trainer.dpo_trainer import DPOTrainer as theirs;"
        "assert trl.DPOTrainer is theirs is not DPOTrainer;"
        "trl_ext.patch_trl(); trl_ext.patch_trl();"
        "from trl import DPOTrainer as a, DPOConfig as c; from trl.trainer import DPOTrainer as b;"
        "import trl.trainer.dpo_trainer as m;"
        "assert a is b is m.DPOTrainer is DPOTrainer and c is trl_ext.DPOConfig is m.DPOConfig"
    )
    done = run(launcher=("-c", code))
    assert done.returncode == 0, done.stderr


ONLINE = """
import sys
from dataclasses import dataclass

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer


def reward(prompts, completions, **kwargs):
    return [float(len(completion)) for completion in completions]


if __name__ == "__main__":
    (args, rest) = TrlParser(OnlineDPOConfig).parse_args_and_config(return_remaining_strings=True)
    model, data = rest[-2:]
    trainer = OnlineDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        reward_funcs=reward,
        args=args,
        train_dataset=load_dataset("json", data_files=data, split="train").select_columns(["prompt"]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    print("CLASS", type(trainer).__module__)
    trainer.train()
"""


def test_run_an_unmodified_online_script(data, tiny_model_dir, tmp_path, monkeypatch):
    path = tmp_path / "online.py"
    path.write_text(ONLINE)
    done = forked(monkeypatch, tmp_path, "run", path, "--loss_type", "anchored", "--num_generations", "3", "--pairing", "group",
                  "--max_new_tokens", "6", "--output_dir", "out", *CPU, tiny_model_dir, data)  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "CLASS trl_ext.trainers.online.trainer" in done.stdout
    assert "'pairs/dropped_prompts'" in done.stdout
