"""The recipes of plain training: each is read by the real parser, and each small one trains."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.conftest import preference_rows
from trl_ext import list_losses, run_dpo
from trl_ext.cli import main


# The command patches TRL in this process
pytestmark = pytest.mark.usefixtures("trl_as_it_was")

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "training"
RECIPES = sorted(FOLDER.glob("*.yaml"))
LOSSES = sorted(path.stem for path in RECIPES if not path.stem.endswith("-7b"))
CPU = ["--use_cpu", "--bf16", "false"]
STEPS = ["--max_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1",
         "--save_strategy", "no", "--output_dir", "out"]  # fmt: skip
# What a run of each logs, that says that its loss has read what it needs
SEEN = {
    "aligndistil": "divergence/per_token", "alpha_dpo": "gap/running_mean", "anchored": "target/mean", "asft": "log_odds/chosen",
    "beta_dpo": "kept/share", "bias_variance": "empty_trace/share", "cpo": "nll/mean", "dmpo": "turns/chosen",
    "drpo": "length_reward/mean", "eurus": "absolute/mean", "inpo": "margin/mean", "length_regularized": "length_margin/mean",
    "margin_adaptive": "weight/mean", "offset": "offset/mean", "reward_distillation": "reward_gap/wanted",
    "robust_em": "reliability/mean", "simpo": "per_token/margins", "sppo_soft": "target/chosen", "step_apo": "offset/mean",
    "trpa": "ranking/accuracies",
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def trained(monkeypatch):
    """What TRL's script would have been called with."""
    calls = []
    monkeypatch.setattr(run_dpo.dpo, "main", lambda *args: calls.append(args))
    return calls


def rows_of(name):
    """Rows with what the losses of a file read."""
    rows = preference_rows(4)
    if name in ("trpa", "drpo"):
        return [
            {
                "prompt": row["prompt"],
                "completions": [row["chosen"], row["rejected"], row["chosen_empty_trace"]],
                "scores": [1.0, 0.0, 0.0],
                "behaviour_logps": [-30.0, -20.0, -10.0],
            }
            for row in rows
        ]
    if name == "dmpo":

        def turns(first, second):
            return [{"role": role, "content": text} for role, text in (("assistant", first), ("user", "so"), ("assistant", second))]  # fmt: skip

        return [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": turns(row["chosen"], row["chosen_empty_trace"]),
                "rejected": turns(row["rejected"], row["rejected_empty_trace"]),
            }
            for row in rows
        ]
    return rows


def test_two_for_every_loss():
    assert sorted(list_losses()) == LOSSES == sorted(SEEN)
    assert {path.stem for path in RECIPES} == {f"{name}{size}" for name in LOSSES for size in ("", "-7b")}
    readme = (FOLDER / "README.md").read_text()
    assert sorted(re.findall(r"\[(\w+)\]\(\1\.yaml\)", readme)) == LOSSES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_setting_arrives(path, here, trained):
    """What the file says is what TRL's script is handed, under the same names."""
    said = yaml.safe_load(path.read_text())
    name = path.stem.removesuffix("-7b")
    if said["dataset_name"].endswith(".jsonl"):
        Path(said["dataset_name"]).write_text(json.dumps(preference_rows(1)[0]))
    elif said["dataset_name"].startswith("rounds/"):
        Path(said["dataset_name"]).mkdir(parents=True)
        (Path(said["dataset_name"]) / "dataset_info.json").write_text("{}")
    else:
        assert said["dataset_name"] == "trl-lib/ultrafeedback_binarized"
    assert main(["run", "dpo", "--config", str(path), *CPU]) == 0
    ((script, training, model, data),) = trained
    given = {**vars(model), **vars(training)}
    given["dataset_name"] = script.dataset_name or said["dataset_name"]
    if script.dataset_name is None:
        assert data.datasets[0].data_files.startswith(said["dataset_name"])
    else:
        assert not data.datasets
    wanted = {**said, "loss_type": [name], "report_to": []}
    assert {key: given[key] for key in wanted} == wanted
    assert said["output_dir"] == f"out/{path.stem}" and said["loss_type"] == name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_how_many_rows_a_step_has(path):
    """The comment beside the accumulation is the product."""
    text, said = path.read_text(), yaml.safe_load(path.read_text())
    rows, several = re.search(r"# (\d+) rows per step( on eight GPUs)?", text).groups()
    devices = 8 if several else 1
    assert bool(several) == path.stem.endswith("-7b")
    assert int(rows) == said["per_device_train_batch_size"] * said["gradient_accumulation_steps"] * devices


def commands():
    """Those of the README, with lines that go on joined."""
    text = (FOLDER / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S)).replace("\\\n", " ")
    return [line for line in blocks.splitlines() if "trl-ext run dpo" in line or "trl_ext run dpo" in line]


def test_the_commands_of_the_readme(here, trained):
    (here / "pairs.jsonl").write_text(json.dumps(preference_rows(1)[0]))
    lines = commands()
    assert len(lines) == 5
    for line in lines:
        words = shlex.split(line, comments=True)
        given = words[words.index("dpo") + 1 :]
        at = given.index("--config") + 1
        given[at] = str(FOLDER / Path(given[at]).relative_to("examples/training"))
        if "--report_to" in given:  # TensorBoard need not be installed
            given[given.index("--report_to") + 1] = "none"
        assert main(["run", "dpo", *given, *CPU]) == 0, line
    lora, rate = trained[3][2], trained[3][1].learning_rate
    assert lora.use_peft and (lora.lora_r, lora.lora_alpha, lora.lora_target_modules) == (16, 32, "all-linear")
    assert rate == pytest.approx(10 * yaml.safe_load((FOLDER / "simpo-7b.yaml").read_text())["learning_rate"])
    assert trained[1][1].learning_rate == 1e-6 and trained[4][1].run_name == "offset-seed1"


@pytest.mark.parametrize("name", LOSSES)
def test_each_trains(name, here, tiny_model_dir, capsys):
    (here / "data.jsonl").write_text("\n".join(map(json.dumps, rows_of(name))))
    model = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", "data.jsonl"]
    if name == "aligndistil":
        reverse = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        with torch.no_grad():
            reverse.lm_head.weight.mul_(0.5)
        reverse.save_pretrained(here / "reverse")
        model += ["--teacher_model_name_or_path", str(tiny_model_dir), "--reverse_model_name_or_path", "reverse"]
    assert main(["run", "dpo", "--config", str(FOLDER / f"{name}.yaml"), *model, *STEPS, *CPU]) == 0
    said = capsys.readouterr().out
    assert said.count("'loss'") == 2 and f"'{SEEN[name]}'" in said
    assert (here / "out" / ("adapter_config.json" if name == "margin_adaptive" else "model.safetensors")).exists()
