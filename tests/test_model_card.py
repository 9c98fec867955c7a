"""What a model card says of the losses and of the model that was trained."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import trl
from datasets import Dataset, DatasetInfo, IterableDataset
from peft import LoraConfig

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import build
from trl_ext.cli import main
from trl_ext.trainers.dpo import DPOTrainer
from trl_ext.trainers.model_card import (
    DATASET_NAME,
    complete_model_card,
    describe_evaluation,
    describe_losses,
    describe_training,
)


def test_a_card_names_the_first_paper_and_the_losses(tiny_model_dir, tmp_path):
    trainer = build(
        DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, loss_type=["sigmoid", "offset", "length_regularized"]
    )
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert "trained with sigmoid + offset + length_regularized, a method introduced in [Direct Preference" in card
    assert "Optimization with an Offset](https://huggingface.co/papers/2402.10571)." in card
    assert "\n- trl-ext\n" in card and "\n- offset\n" in card and "\n- length_regularized\n" in card
    assert "\n- trl\n" in card and "\n- sigmoid\n" not in card


def test_the_table_of_losses():
    @dataclass(frozen=True)
    class Two:
        paper: ClassVar[str] = "2401.00001, 2402.00002"
        where: Path = Path("a/b")
        alpha: float = 0.5

    first, second = (f"[{each}](https://huggingface.co/papers/{each})" for each in ("2401.00001", "2402.00002"))
    assert describe_losses({"sigmoid": 1.0, "two": 0.25}, {"two": Two()}, 0.3) == (
        "### Loss\n\n| loss | weight | hyper-parameters | paper |\n| --- | --- | --- | --- |\n| `sigmoid` | 1.0 |  |  |\n"
        f'| `two` | 0.25 | `{{"where": "a/b", "alpha": 0.5}}` | {first}, {second} |\n\n'
        "With [trl_ext](https://pypi.org/project/trl-ext/), `beta=0.3`."
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/data/models/mine", "the local model `mine`"),
        ("", "a model that has no name"),
        (None, "a model that has no name"),
    ],
)
def test_the_name_of_the_base_model(name, said, tmp_path):
    unnamed = "of [None](https://huggingface.co/None)"
    text = (
        f"---\ntags: []\n---\n\nA version {unnamed}. {unnamed}\n\n### Framework versions\n\n### Framework versions\n"
    )
    config = SimpleNamespace() if name is None else SimpleNamespace(_name_or_path=name)
    for sections, added in (([], ""), (["TABLE"], "TABLE\n\n"), (["ONE", "TWO"], "ONE\n\nTWO\n\n")):
        (tmp_path / "README.md").write_text(text)
        complete_model_card(str(tmp_path), SimpleNamespace(config=config), sections)
        body = (tmp_path / "README.md").read_text().split("---\n")[2]
        assert body == (
            f"\nA version of {said}. {unnamed}\n\n{added}### Framework versions\n\n### Framework versions\n"
        )


def test_model_card(tiny_model_dir, tmp_path):
    trainer = build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, loss_type=["sigmoid", "offset", "bias_variance"],
        loss_weights=[1.0, 0.5, 0.25], loss_kwargs={"offset": {"alpha": 0.5}},
    )  # fmt: skip
    trainer.train()
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert "https://huggingface.co/papers/2402.10571" in card
    assert "https://huggingface.co/papers/2510.05095" in card
    assert '| `offset` | 0.5 | `{"alpha": 0.5, "scaling": "log", "margin_floor": null}` |' in card
    assert '| `bias_variance` | 0.25 | `{"alpha": 0.5, "base": "sigmoid", "base_kwargs": {}}` |' in card
    assert "amini2024direct" in card

    plain = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path / "plain")
    plain.create_model_card(model_name="mine")
    theirs = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path / "trl")
    theirs.create_model_card(model_name="mine")
    # TRL calls a model from a folder "None", and links to it
    name = f"the local model `{tiny_model_dir.name}`"
    ours = _body(tmp_path / "plain" / "README.md")
    assert f"fine-tuned version of {name}." in ours
    unnamed = _body(tmp_path / "trl" / "README.md").replace("[None](https://huggingface.co/None)", name)
    added = ours.index("### Data and settings"), ours.index("### Framework versions")
    assert ours[: added[0]] + ours[added[1] :] == unnamed


def _body(path):
    return path.read_text().split("# Model Card")[1]


def _settings(text):
    """The table of settings, as a dictionary."""
    lines = [
        line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and "---" not in line
    ]
    return {line[0]: line[1] for line in lines if len(line) == 2}


def test_what_a_model_was_trained_on_and_how(tiny_model_dir, tmp_path, monkeypatch):
    trainer = build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, rows=12, max_steps=4, gradient_accumulation_steps=2,
        per_device_train_batch_size=3, warmup_steps=0.5, lr_scheduler_type="cosine", learning_rate=2e-3, max_length=64, seed=7,
        optim="adamw_torch", weight_decay=0.25, max_grad_norm=0.5, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    before = _settings(describe_training(trainer))
    assert before["steps"] == "0 of 0, 0 epochs" and describe_evaluation(trainer.state.log_history).endswith("None was made while training.")  # fmt: skip
    trainer.train()
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert _settings(card.split("### Data and settings")[1].split("### Evaluation")[0]) == {
        "data": "12 rows without a name",
        "steps": "4 of 4, 2 epochs",  # 12 rows, 6 per step
        "rows per step": "6: 3 x 2 accumulated x 1 process",
        "learning rate": "0.002, cosine, 2 steps of warm-up",
        "optimizer": "adamw_torch, weight decay 0.25, gradients clipped at 0.5",
        "precision": "that of the weights",
        "longest sequence": "64 tokens",
        "seed": "7",
    }
    with monkeypatch.context() as several:
        several.setattr(trl_ext.DPOConfig, "world_size", 4)
        assert _settings(describe_training(trainer))["rows per step"] == "24: 3 x 2 accumulated x 4 processes"
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert last["step"] == 4 and f"| `loss` | {last['eval_loss']:.4g} | 4 |" in card
    assert "| `rewards/margins` |" in card and "runtime" not in card and "per_second" not in card


def test_the_last_value_of_each_metric():
    history = [
        {"eval_a_loss": 0.5, "eval_a_runtime": 3.0, "step": 5},
        {"eval_b_loss": 0.75, "eval_note": "text", "step": 5},
        {"loss": 0.1, "step": 10},
        {"eval_a_loss": 0.123456, "eval_a_steps_per_second": 3.0, "step": 10},
    ]
    assert describe_evaluation(history) == (
        "### Evaluation\n\n| metric | value | step |\n| --- | --- | --- |\n| `a_loss` | 0.1235 | 10 |\n| `b_loss` | 0.75 | 5 |"
    )


def test_an_adapter_and_half_precision(tiny_model_dir, tmp_path):
    peft = {"peft_config": LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"])}
    trainer = build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, trainer_kwargs=peft, max_length=None
    )
    said = _settings(describe_training(trainer, "owner/data"))
    assert said["adapter"] == "LORA, r 4, lora_alpha 8, on q_proj, v_proj" and said["longest sequence"] == "not cut"
    assert said["data"] == "`owner/data`, 12 rows"
    trainer.args.bf16 = True
    assert _settings(describe_training(trainer))["precision"] == "bfloat16, mixed"


@pytest.mark.parametrize(("known", "said"), [("reviews", "`reviews`, 3 rows"), ("json", "3 rows without a name")])
def test_data_that_know_their_name(known, said, tiny_model_dir, tmp_path):
    data = Dataset.from_list(preference_rows(3), info=DatasetInfo(dataset_name=known))
    trainer = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=data)
    assert _settings(describe_training(trainer))["data"] == said


def test_a_stream_has_no_size(tiny_model_dir, tmp_path):
    data = IterableDataset.from_generator(lambda: iter(preference_rows(3)))
    trainer = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=data)
    assert _settings(describe_training(trainer))["data"] == "a stream without a name"


@pytest.mark.usefixtures("trl_as_it_was")
def test_the_command_knows_the_file(tiny_model_dir, tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "pairs.jsonl").write_text("\n".join(map(json.dumps, preference_rows(2))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    given = ["--dataset_name", str(tmp_path / "deep" / "pairs.jsonl"), "--output_dir", "out", "--max_steps", "1"]
    cpu = ["--use_cpu", "--bf16", "false", "--report_to", "none"]
    assert main(["run", "dpo", "--model_name_or_path", str(tiny_model_dir), *given, *cpu]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| data | `pairs.jsonl`, 2 rows |" in card and str(tmp_path) not in card
    assert DATASET_NAME.get() is None  # the next run of this process has its own
