"""General preference models: their maths, their training, and preferences that go in circles."""

import json
import math
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from tests.conftest import preference_rows
from tests.helpers import assert_same_parameters, history, options, parameters
from trl_ext.data import PreferenceModel, preference_score
from trl_ext.trainers.reward import RewardConfig, RewardTrainer


PAIRS = Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in preference_rows(8)])
CIRCLE = [(" good", " bad"), (" bad", " great"), (" great", " good")]


def gpm(model, output_dir, dataset=PAIRS, trainer_kwargs=None, **overrides):
    args = RewardConfig(**options(output_dir, preference_dim=4, **overrides))
    kwargs = {"train_dataset": dataset, "eval_dataset": dataset, **(trainer_kwargs or {})}
    return RewardTrainer(model=str(model) if isinstance(model, Path) else model, args=args, **kwargs)


# The maths


def test_scores_by_hand():
    first, second = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0, 7.0, -8.0])
    # (1 * 6 - 2 * 5) + (3 * -8 - 4 * 7)
    assert preference_score(first, second).item() == -4.0 - 52.0
    assert preference_score(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).item() == 1.0
    # With (r, 1) it is the difference of rewards
    rewards = torch.tensor([[3.0, 1.0], [-2.0, 1.0]])
    assert preference_score(rewards[:1], rewards).tolist() == [0.0, 5.0]


@pytest.mark.parametrize("dim", [2, 4, 6, 8])
def test_scores_are_those_of_the_matrix(dim):
    first, second = torch.randn(2, 5, 7, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turn = torch.block_diag(*[torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)] * (dim // 2))
    expected = torch.einsum("ab,xyb,xya->xy", turn, first, second)
    torch.testing.assert_close(preference_score(first, second), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_exchanged_completions_give_the_other_sign_to_the_bit(dtype):
    for dim in (2, 6, 8, 64):
        first, second = (torch.randn(2, 999, dim, generator=torch.Generator().manual_seed(dim)) * 30).to(dtype)
        assert torch.equal(preference_score(first, second), -preference_score(second, first))
        assert torch.equal(preference_score(first, first), torch.zeros(999, dtype=dtype))


# The config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preference_dim": 3}, "`preference_dim=3` must be an even number"),
        ({"preference_dim": 0}, "`preference_dim=0` must be a whole number, at least 2"),
        ({"preference_dim": -2}, "`preference_dim=-2` must be a whole number, at least 2"),
        ({"preference_dim": 2.0}, "`preference_dim=2.0` must be a whole number"),
        ({"preference_dim": 2, "preference_temperature": 0.0}, "`preference_temperature=0.0` must be finite and above 0"),
        ({"preference_dim": 2, "preference_temperature": math.nan}, "must be finite and above 0"),
        ({"preference_dim": 2, "preference_temperature": math.inf}, "must be finite and above 0"),
        ({"preference_temperature": 1.0}, "is of general preference models: give `preference_dim` too"),
        ({"preference_dim": 2, "absolute_weight": 1.0}, r"`absolute_weight=1.0` is of rewards"),
        ({"preference_dim": 2, "center_rewards_coefficient": 0.1}, r"`center_rewards_coefficient=0.1` is of rewards"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**options(tmp_path, **given))


# Training


def embeddings_of(model, tokenizer, texts):
    """Of each text alone, without padding."""
    with torch.no_grad():
        ids = [torch.tensor([tokenizer(text + tokenizer.eos_token)["input_ids"]]) for text in texts]
        return [model(input_ids=row).logits[0].double().tolist() for row in ids]


def logits_by_hand(model, tokenizer, rows, tau):
    logits = []
    for row in rows:
        a, b = embeddings_of(model, tokenizer, [row["prompt"] + row[side] for side in ("chosen", "rejected")])
        logits.append(sum(a[k] * b[k + 1] - a[k + 1] * b[k] for k in range(0, len(a), 2)) / tau)
    return logits


@pytest.mark.parametrize("margin", [False, True])
def test_loss_and_metrics_by_hand(margin, tiny_model_dir, tmp_path):
    margins = [0.5 * row - 1 for row in range(8)] if margin else [0.0] * 8
    data = PAIRS.add_column("margin", margins) if margin else PAIRS
    trainer = gpm(tiny_model_dir, tmp_path, data, preference_temperature=0.5, per_device_eval_batch_size=3)
    trainer.model.eval()
    logits = logits_by_hand(trainer.model, trainer.processing_class, PAIRS, 0.5)
    expected = sum(math.log1p(math.exp(m - x)) for x, m in zip(logits, margins, strict=True)) / 8
    assert trainer.evaluate(PAIRS if not margin else data)["eval_loss"] == pytest.approx(expected, rel=1e-4)
    trainer = gpm(tiny_model_dir, tmp_path, data, preference_temperature=0.5, per_device_train_batch_size=8)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    assert loss.item() == pytest.approx(expected, rel=1e-4) and outputs.logits.shape == (16, 4)
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == loss.item()
    metrics = trainer._metrics["train"]
    assert metrics["accuracy"][0] == sum(x > 0 for x in logits) / 8
    assert metrics["margin"][0] == pytest.approx(sum(logits) / 8, rel=1e-4)
    assert metrics.keys() == {"num_tokens", "accuracy", "margin"}


def test_what_is_logged(tiny_model_dir, tmp_path):
    trainer = gpm(tiny_model_dir, tmp_path)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    names = {"loss", "accuracy", "margin", "num_tokens"}
    assert {f"eval_{name}" for name in names} <= after.keys() and not any("reward" in name for name in after)
    assert names <= history(trainer)[1].keys() and not any(
        "reward" in name for row in history(trainer) for name in row
    )
    assert after["eval_loss"] < before["eval_loss"]


def test_metrics_of_the_users_own_see_embeddings(tiny_model_dir, tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"own": 1.0}

    trainer = gpm(tiny_model_dir, tmp_path, trainer_kwargs={"compute_metrics": compute_metrics})
    trainer.label_names = ["attention_mask"]  # TRL has no labels; metrics are called where there are some
    assert trainer.evaluate()["eval_own"] == 1.0 and seen == [(16, 4)]


def circle(prompts=("what", "how quick")):
    return Dataset.from_list([{"prompt": p, "chosen": a, "rejected": b} for p in prompts for a, b in CIRCLE])


def test_a_circle_is_learnt(tiny_model_dir, tmp_path):
    """A beats B, B beats C, C beats A: a reward gets two of three right at most."""
    data, accuracy = circle(), {}
    for dim in (None, 2):
        args = options(
            tmp_path,
            max_steps=40,
            per_device_train_batch_size=6,
            learning_rate=5e-3,
            logging_steps=40,
            preference_dim=dim,
        )
        trainer = RewardTrainer(
            model=str(tiny_model_dir), args=RewardConfig(**args), train_dataset=data, eval_dataset=data
        )
        trainer.train()
        accuracy[dim] = trainer.evaluate()["eval_accuracy"]
    assert accuracy[None] <= 2 / 3 + 1e-6
    assert accuracy[2] == 1.0
    trainer.save_model()
    judge = PreferenceModel(str(tmp_path))
    probabilities = judge(["what"] * 3, *(list(side) for side in zip(*CIRCLE, strict=True)))
    assert min(probabilities) > 0.9
    assert judge(["what"] * 3, *(list(side) for side in list(zip(*CIRCLE, strict=True))[::-1])) == pytest.approx(
        [1 - p for p in probabilities], abs=1e-12
    )


def test_micro_batches_add_up(tiny_model_dir, tmp_path):
    """8 pairs at once, or one at a time."""
    runs = [
        gpm(tiny_model_dir, tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=8 // rows, max_steps=2,
            optim="sgd", learning_rate=0.1)
        for rows in (8, 1)
    ]  # fmt: skip
    before = parameters(runs[0])
    for trainer in runs:
        trainer.train()
    assert_same_parameters(parameters(runs[0]), parameters(runs[1]), rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(value, before[name]) for name, value in parameters(runs[0]).items())


def test_a_resumed_run_goes_on_exactly(tiny_model_dir, tmp_path):
    whole = gpm(tiny_model_dir, tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = gpm(tiny_model_dir, tmp_path / "again", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same_parameters(parameters(whole), parameters(resumed))
    # TRL's reward trainer counts tokens anew
    logged = [
        [{**row, "num_tokens": 0} for row in history(trainer) if row.get("step", 0) > 2]
        for trainer in (whole, resumed)
    ]
    assert logged[0][:2] == logged[1][:2] and [row["step"] for row in logged[0][:2]] == [3, 4]


# Models by name and as objects, saved and loaded


def test_saved_and_loaded(tiny_model_dir, tmp_path):
    trainer = gpm(tiny_model_dir, tmp_path / "run", preference_temperature=0.25, save_strategy="steps")
    trainer.train()
    config = AutoConfig.from_pretrained(tmp_path / "run" / "checkpoint-3")
    assert (config.num_labels, config.preference_temperature) == (4, 0.25)
    assert config.id2label == {k: f"LABEL_{k}" for k in range(4)}
    trainer.save_model()
    judge = PreferenceModel(str(tmp_path / "run"))
    logits = logits_by_hand(trainer.model.eval(), trainer.processing_class, PAIRS, 0.25)
    found = judge.compare(PAIRS["prompt"], PAIRS["chosen"], PAIRS["rejected"])
    assert found == pytest.approx(logits, rel=1e-4, abs=1e-5)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "huggingface.co/papers/2410.02197" in card and "zhang2024gpm" in card and "general-preference-model" in card
    # A second stage by name goes on with the embedding that is there
    again = gpm(tmp_path / "run", tmp_path / "next", preference_temperature=0.25)
    assert torch.equal(again.model.score.weight, trainer.model.score.weight)
    for given, message in (
        ({"preference_temperature": 0.1}, "was trained with `preference_temperature=0.25`, and the config has 0.1"),
        ({"preference_temperature": 0.25, "preference_dim": 6}, "has 4 outputs, and `preference_dim=6` asks for 6"),
    ):
        with pytest.raises(ValueError, match=message):
            RewardTrainer(
                model=str(tmp_path / "run"),
                args=RewardConfig(**options(tmp_path / "no", **{"preference_dim": 4, **given})),
                train_dataset=PAIRS,
            )
    for model in (str(tmp_path / "run"), trainer.model):
        with pytest.raises(ValueError, match=r"is a general preference model.*outputs are no rewards"):
            RewardTrainer(model=model, args=RewardConfig(**options(tmp_path / "no")), train_dataset=PAIRS)


def test_a_given_model(tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    load = lambda labels: AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=labels)  # noqa: E731
    model = load(4)
    model.config.id2label = {0: "a", 1: "b", 2: "c", 3: "d"}
    trainer = gpm(model, tmp_path, trainer_kwargs={"processing_class": tokenizer})
    assert trainer.model is model and model.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d"}
    assert model.config.preference_temperature == 0.1
    trainer.train()
    model = load(2)
    with pytest.raises(ValueError, match=r"has 2 outputs, and `preference_dim=4` asks for 4. Give the model with"):
        gpm(model, tmp_path, trainer_kwargs={"processing_class": tokenizer})
    assert model.config.num_labels == 2 and not hasattr(model.config, "preference_temperature")
    # What TRL refuses leaves the model as it was
    model = load(4)
    with pytest.raises(TypeError, match="train_dataset"):
        gpm(model, tmp_path, "no dataset", trainer_kwargs={"processing_class": tokenizer, "eval_dataset": None})
    assert model.config.num_labels == 4 and not hasattr(model.config, "preference_temperature")
    with pytest.raises(ValueError, match="There is no model '/no/such'"):
        gpm("/no/such", tmp_path)


def test_a_model_by_name_is_loaded_as_trl_loads_it(tiny_model_dir, tmp_path):
    """The same seed gives the same head; `model_init_kwargs` are used, and stay in the config."""
    trainers = [gpm(tiny_model_dir, tmp_path, model_init_kwargs={"dtype": dtype}) for dtype in ("float32", "bfloat16")]
    assert [next(trainer.model.parameters()).dtype for trainer in trainers] == [torch.float32, torch.bfloat16]
    assert trainers[1].args.model_init_kwargs == {"dtype": "bfloat16"}
    torch.manual_seed(5)
    again = gpm(tiny_model_dir, tmp_path)
    assert torch.equal(again.model.score.weight, trainers[0].model.score.weight)
    assert again.model.score.weight.shape == (4, 32) and again.processing_class.eos_token == "<|eos|>"
    theirs = trl.RewardTrainer(str(tiny_model_dir), trl.RewardConfig(**options(tmp_path)), train_dataset=PAIRS)
    ours = gpm(tiny_model_dir, tmp_path)
    for name, value in theirs.model.model.named_parameters():
        assert torch.equal(value, ours.model.model.get_parameter(name)), name
    with pytest.raises(ValueError, match="`quantization_config` is given twice"):
        gpm(
            tiny_model_dir,
            tmp_path,
            trainer_kwargs={"quantization_config": 1},
            model_init_kwargs={"quantization_config": 1},
        )


def test_an_adapter(tiny_model_dir, tmp_path):
    """Trained, resumed, saved without the base model, and a judge from its folder, as an object and merged."""
    adapter = lambda: LoraConfig(r=4, task_type="SEQ_CLS", modules_to_save=["score"])  # noqa: E731
    run = lambda folder, **more: gpm(  # noqa: E731
        tiny_model_dir,
        folder,
        max_steps=4,
        trainer_kwargs={"peft_config": adapter()},
        preference_temperature=0.5,
        **more,
    )
    whole = run(tmp_path / "run", save_strategy="steps", save_steps=2)
    whole.train()
    resumed = run(tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same_parameters(parameters(whole), parameters(resumed))
    whole.save_model()
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    assert (
        json.loads((tmp_path / "run" / "preference_model" / "config.json").read_text())["preference_temperature"]
        == 0.5
    )
    expected = logits_by_hand(whole.model.eval(), whole.processing_class, PAIRS, 0.5)
    judges = [PreferenceModel(str(tmp_path / "run")), PreferenceModel(whole.model, whole.processing_class)]
    judges.append(PreferenceModel(resumed.model.merge_and_unload(), whole.processing_class))
    for judge in judges:
        for _ in range(2):  # loaded, and as it is then
            found = judge.compare(PAIRS["prompt"], PAIRS["chosen"], PAIRS["rejected"])
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
