"""An adapter learns by the chain rule: its gradients follow from those of the merged model, and a trained head's are the same."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.conftest import preference_rows
from tests.helpers import first_batch, loss_and_gradients, options
from trl_ext import SFTConfig, SFTTrainer
from trl_ext.trainers.reward import RewardConfig, RewardTrainer


RANK, SCALE = 4, 2.0  # alpha = 8
ROWS = preference_rows(6)
PAIRS = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in ROWS]
WEIGHTED = [{"prompt": row["prompt"], "completion": row["chosen"], "weight": 0.1 * i} for i, row in enumerate(ROWS)]
RUNS = {
    "SFTTrainer": (SFTTrainer, SFTConfig, AutoModelForCausalLM, {}, WEIGHTED, {}, "CAUSAL_LM", []),
    "SFTTrainer, trained head": (SFTTrainer, SFTConfig, AutoModelForCausalLM, {}, WEIGHTED, {}, "CAUSAL_LM", ["lm_head"]),
    "RewardTrainer, trained head": (
        RewardTrainer, RewardConfig, AutoModelForSequenceClassification, {"num_labels": 1}, PAIRS, {"absolute_weight": 0.5}, "SEQ_CLS",
        ["score"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_gradients_follow_from_those_of_the_merged_model(name, tiny_model_dir, tmp_path):
    trainer_class, config, auto, given, rows, more, task, heads = RUNS[name]

    def trainer(model, peft_config=None):
        return trainer_class(
            model=model,
            args=config(**options(tmp_path, per_device_train_batch_size=6, gradient_checkpointing=False, **more)),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
            peft_config=peft_config,
        )

    torch.manual_seed(0)
    lora = LoraConfig(
        r=RANK, lora_alpha=SCALE * RANK, target_modules="all-linear", task_type=task, modules_to_save=[*heads], init_lora_weights=False,
    )  # fmt: skip
    adapted = trainer(auto.from_pretrained(tiny_model_dir, dtype=torch.float32, **given), lora)
    merged = trainer(copy.deepcopy(adapted.model).merge_and_unload().requires_grad_())
    batch = first_batch(adapted)
    loss, of_adapter = loss_and_gradients(adapted, dict(batch))
    expected, of_merged = loss_and_gradients(merged, dict(batch))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert loss > 0

    weights = dict(adapted.model.named_parameters())
    seen = []
    for name, gradient in of_adapter.items():
        layer, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
        if kind:
            whole = of_merged[f"{layer}.weight"]
            a, b = (weights[f"base_model.model.{layer}.lora_{each}.default.weight"] for each in "AB")
            wanted = SCALE * (b.T @ whole if kind.startswith("A") else whole @ a.T)
        else:
            wanted = of_merged[layer.replace("modules_to_save.default.", "")]
            seen.append(layer)
        scale = wanted.abs().max()
        torch.testing.assert_close(
            gradient / scale, wanted / scale, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert len(of_adapter) > 20 and [each.partition(".")[0] for each in seen] == heads
