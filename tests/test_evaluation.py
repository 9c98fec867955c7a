"""`evaluate` of whatever dataset a user has at hand, before, between and after training."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import assert_same_parameters, build, options, parameters
from tests.test_groups import groups


def trainer(model_dir, tmp_path, dataset=None, **kwargs):
    return build(trl_ext.DPOTrainer, trl_ext.DPOConfig, model_dir, tmp_path, dataset=dataset, **kwargs)


@pytest.mark.parametrize("precompute", [False, True])
def test_a_new_grouped_dataset_leaves_the_trainer_alive(precompute, tiny_model_dir, tmp_path):
    kwargs = {"loss_type": "anchored", "precompute_ref_log_probs": precompute}
    tried = trainer(tiny_model_dir, tmp_path / "a", groups(), **kwargs)
    plain = trainer(tiny_model_dir, tmp_path / "b", groups(), **kwargs)
    expected = plain.evaluate()
    new = tried.evaluate(groups())
    assert new["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    for each in (tried, plain):
        each.train()
    assert_same_parameters(parameters(tried), parameters(plain))


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("loss_type", ["anchored", "bias_variance", "offset", "sigmoid"])
def test_the_trainers_own_dataset_handed_back(loss_type, precompute, tiny_model_dir, tmp_path):
    data = groups() if loss_type == "anchored" else None
    tried = trainer(tiny_model_dir, tmp_path, data, loss_type=loss_type, precompute_ref_log_probs=precompute)
    expected = tried.evaluate()
    again = tried.evaluate(tried.eval_dataset)
    assert again["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert again.keys() == expected.keys()


def test_training_on_pairs_and_evaluating_on_groups(tiny_model_dir, tmp_path):
    pairs = Dataset.from_list(preference_rows(8)).select_columns(
        ["prompt", "chosen", "rejected", "score_chosen", "score_rejected"]
    )
    data = groups((3, 4, 2))
    best_worst = Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "chosen": row["completions"][row["scores"].index(max(row["scores"]))],
                "rejected": row["completions"][row["scores"].index(min(row["scores"]))],
                "score_chosen": max(row["scores"]),
                "score_rejected": min(row["scores"]),
            }
            for row in data
        ]
    )
    for loss_type in ("offset", "anchored", "sigmoid"):
        tried = trainer(tiny_model_dir, tmp_path, pairs, loss_type=loss_type, trainer_kwargs={"eval_dataset": data})
        for parameter in tried.model.parameters():
            parameter.data += 0.01
        by_hand = tried.evaluate(best_worst)
        assert tried.evaluate()["eval_loss"] == pytest.approx(by_hand["eval_loss"], rel=1e-6)
        assert tried.evaluate(data)["eval_loss"] == pytest.approx(by_hand["eval_loss"], rel=1e-6)


def test_training_on_groups_and_evaluating_on_pairs_is_refused(tiny_model_dir, tmp_path):
    tried = trainer(tiny_model_dir, tmp_path, groups(), loss_type="anchored")
    with pytest.raises(ValueError, match="The eval dataset holds no groups, the train dataset does"):
        tried.evaluate(Dataset.from_list(preference_rows(4)))
    tried.evaluate()  # and nothing is broken


@pytest.mark.parametrize("loss_type", ["sigmoid", "offset"])
def test_a_compiled_model(loss_type, tiny_model_dir, tmp_path):
    compiled = trainer(
        tiny_model_dir, tmp_path / "a", loss_type=loss_type, max_steps=1, torch_compile=True, torch_compile_backend="eager",
        gradient_checkpointing=False,
    )  # fmt: skip
    plain = trainer(tiny_model_dir, tmp_path / "b", loss_type=loss_type, max_steps=1, share_prefix=False)
    for each in (compiled, plain):
        each.train()
        each.evaluate()
    assert_same_parameters(parameters(compiled), parameters(plain), rtol=1e-4, atol=1e-5)


def test_settings_of_the_model_are_in_the_key_of_the_reference_cache(tiny_model_dir, tmp_path):
    """The same weights with other rotary positions: what is on disk for the first must not be read for the second."""
    path = tmp_path / "data.jsonl"
    Dataset.from_list(preference_rows(8)).to_json(path)
    sums = []
    for theta in (10_000.0, 5.0, 10_000.0):
        model = AutoModelForCausalLM.from_pretrained(
            tiny_model_dir, dtype=torch.float32, rope_parameters={"rope_type": "default", "rope_theta": theta}
        )
        built = trl_ext.DPOTrainer(
            model=model,
            args=trl_ext.DPOConfig(**options(tmp_path / "out", precompute_ref_log_probs=True)),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
            train_dataset=Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache")),
        )
        sums.append(sum(built.train_dataset["ref_chosen_logps"]))
    assert sums[0] == sums[2] != sums[1]


def test_predictions_of_all_rows_beside_their_tokens(tiny_model_dir, tmp_path):
    """`compute_metrics` is given logits and token ids of the same rows, those of the empty-trace pairs among them."""
    seen = []
    trainer = build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, loss_type="bias_variance", per_device_eval_batch_size=4,
        trainer_kwargs={
            "eval_dataset": Dataset.from_list(preference_rows(4)),
            "compute_metrics": lambda prediction: seen.append(prediction) or {"found": 1.0},
        },
    )  # fmt: skip
    assert trainer.evaluate()["eval_found"] == 1.0
    logits, ids = seen[0].predictions, seen[0].label_ids
    assert logits.shape[:2] == ids.shape and len(ids) == 4 * 4

    with torch.no_grad():
        row = torch.tensor(ids[-1:])
        kept = row != trainer.processing_class.pad_token_id
        plain = trainer.model(input_ids=row, attention_mask=kept.long()).logits[0][kept[0]]
    torch.testing.assert_close(torch.tensor(logits[-1])[kept[0]], plain, rtol=1e-4, atol=1e-4)
