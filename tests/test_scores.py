"""Scores from models, functions and judges; what survives a kill; calibration."""

import json
import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import build, history
from trl_ext.data import Ensemble, PairFunction, RewardModel, calibrate, fit_temperature, score_preferences
from trl_ext.data.cache import Ledger, write_atomically


PAIRS = Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in preference_rows(6)])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def reward_dir(tiny_model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("rm")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(1)
    config = Qwen3Config.from_pretrained(tiny_model_dir, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    Qwen3ForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def length(prompts, completions):
    return [float(len(completion)) for completion in completions]


def test_a_function_on_pairs_and_groups():
    scored = score_preferences(PAIRS, length)
    assert scored["score_chosen"] == [float(len(text)) for text in PAIRS["chosen"]]
    groups = Dataset.from_list(
        [{"prompt": "p", "completions": ["a", "bbb"]}, {"prompt": "q", "completions": ["cc"] * 3}]
    )
    assert score_preferences(groups, length)["scores"] == [[1.0, 3.0], [2.0, 2.0, 2.0]]


def test_a_model_from_a_folder(reward_dir):
    scored = score_preferences(PAIRS, str(reward_dir), batch_size=4)
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    model = Qwen3ForSequenceClassification.from_pretrained(reward_dir)
    for row in scored:
        for side in ("chosen", "rejected"):
            with torch.no_grad():
                text = row["prompt"] + row[side] + tokenizer.eos_token
                expected = model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item()
            assert row[f"score_{side}"] == pytest.approx(expected, abs=1e-4)


def test_conversations_have_the_reward_models_template(reward_dir):
    rows = [
        {"prompt": [{"role": "user", "content": "what"}], "chosen": [{"role": "assistant", "content": a}],
         "rejected": [{"role": "assistant", "content": b}]}
        for a, b in (("good", "bad"), ("great", "dull"))
    ]  # fmt: skip
    scored = score_preferences(Dataset.from_list(rows), str(reward_dir))
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    model = Qwen3ForSequenceClassification.from_pretrained(reward_dir)
    for row in scored:
        text = f"<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n{row['rejected'][0]['content']}<|im_end|>\n"
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item()
        assert row["score_rejected"] == pytest.approx(expected, abs=1e-4)


def test_long_texts_keep_their_end(reward_dir):
    reward = RewardModel(str(reward_dir), max_length=4)
    reward.load()
    a, b = (reward(["start " * n], [" the end"])[0] for n in (5, 9))
    assert a == pytest.approx(b, abs=1e-5)


def test_nothing_is_scored_twice(monkeypatch):
    calls = []

    def counted(prompts, completions):
        calls.extend(completions)
        return length(prompts, completions)

    monkeypatch.setattr("trl_ext.data.scores.RewardFunction.key", lambda self: "fixed")
    first = score_preferences(PAIRS, counted)
    assert len(calls) == 12
    assert score_preferences(PAIRS, counted).to_list() == first.to_list() and len(calls) == 12
    score_preferences(Dataset.from_list([*PAIRS, {"prompt": "new", "chosen": "a", "rejected": "bb"}]), counted)
    assert len(calls) == 14


@pytest.mark.parametrize("survivors", [1, 3, 5])
def test_killed_and_started_again(survivors, monkeypatch):
    monkeypatch.setattr("trl_ext.data.scores.RewardFunction.key", lambda self: "fixed")
    calls = []

    def fails(prompts, completions):
        if len(calls) == survivors:
            raise KeyboardInterrupt
        calls.append(completions)
        return length(prompts, completions)

    with pytest.raises(KeyboardInterrupt):
        score_preferences(PAIRS, fails, batch_size=2)
    rest = []

    def works(prompts, completions):
        rest.append(completions)
        return length(prompts, completions)

    assert score_preferences(PAIRS, works, batch_size=2).to_list() == score_preferences(PAIRS, length).to_list()
    assert len(rest) == 6 - survivors


def test_a_torn_line_is_passed_over(tmp_path):
    ledger = Ledger(tmp_path, "x")
    ledger.append({"a": 1.0})
    with open(ledger.path, "a") as file:
        file.write('["b", 2.')
    assert Ledger(tmp_path, "x").read() == {"a": 1.0}
    Ledger(tmp_path, "x").append({"c": 3.0})
    assert Ledger(tmp_path, "x").read() == {"a": 1.0, "c": 3.0}


def test_atomic_files(tmp_path):
    write_atomically(tmp_path / "a" / "b.json", "1")
    assert (tmp_path / "a" / "b.json").read_text() == "1" and len(list((tmp_path / "a").iterdir())) == 1


def test_ensembles():
    def minus(prompts, completions):
        return [-value for value in length(prompts, completions)]

    assert set(score_preferences(PAIRS, [length, minus])["score_chosen"]) == {0.0}
    lowest = score_preferences(PAIRS, Ensemble([length, minus], "min"))["score_chosen"]
    assert lowest == [-float(len(text)) for text in PAIRS["chosen"]]
    with pytest.raises(ValueError, match="'mean' or 'min'"):
        Ensemble([length], "max")


def longer(prompts, first, second):
    return [1.0 if len(a) > len(b) else 0.0 if len(a) < len(b) else 0.5 for a, b in zip(first, second, strict=True)]


def test_a_judge_of_two():
    scored = score_preferences(PAIRS, PairFunction(longer))
    assert scored["preference_prob"] == longer(None, PAIRS["chosen"], PAIRS["rejected"])
    groups = Dataset.from_list([{"prompt": "p", "completions": ["a", "bbb", "cc"]}])
    assert score_preferences(groups, PairFunction(longer))["scores"] == [[0.0, 1.0, 0.5]]
    with pytest.raises(ValueError, match=r"expected probabilities in \[0, 1\]"):
        score_preferences(PAIRS, PairFunction(lambda p, a, b: [2.0] * len(p)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": ""}, "Row 1: the completion '' is empty"),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, "Row 1: the completion None is empty"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "Row 1: the prompt is None"),
    ],
)
def test_rows_that_cannot_be_scored(row, message):
    data = Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b"}, row])
    with pytest.raises(ValueError, match=message):
        score_preferences(data, length)


def test_refused_scores_and_rewards():
    with pytest.raises(ValueError, match="returned nan for"):
        score_preferences(PAIRS, lambda prompts, completions: [math.nan] * len(prompts))
    with pytest.raises(ValueError, match="1 scores for"):
        score_preferences(PAIRS, lambda prompts, completions: [1.0])
    with pytest.raises(ValueError, match="is none of"):
        score_preferences(PAIRS, 3)
    with pytest.raises(ValueError, match=r"lacks \['prompt'\]"):
        score_preferences(PAIRS.remove_columns("prompt"), length)
    with pytest.raises(ValueError, match="must be a positive number"):
        score_preferences(PAIRS, length, temperature=0.0)


# Calibration


def test_temperature_recovers_the_unit():
    torch.manual_seed(0)
    logits = torch.randn(20_000, dtype=torch.float64) * 2
    labels = torch.rand(20_000, dtype=torch.float64) < torch.sigmoid(logits)
    margins = torch.where(labels, logits, -logits) * 3.0
    assert fit_temperature(margins.tolist()) == pytest.approx(3.0, rel=0.05)
    report = calibrate(margins.tolist())
    assert report.nll_fitted < report.nll and report.accuracy == pytest.approx((margins > 0).double().mean().item())


def test_temperature_is_the_minimum():
    margins = [2.0, 1.0, -0.5, 3.0]
    fitted = fit_temperature(margins)
    nll = lambda t: sum(math.log1p(math.exp(-m / t)) for m in margins)  # noqa: E731
    assert nll(fitted) < min(nll(fitted * 1.01), nll(fitted / 1.01))


def test_where_no_temperature_fits(tmp_path):
    for margins, message in (([1.0, 2.0], "no label is contradicted"), ([-1.0, 0.5], "no better than a coin")):
        with pytest.raises(ValueError, match=message):
            fit_temperature(margins)
        report = calibrate(margins)
        assert report.temperature is None and message in report.remark
    report.table()
    report.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


def test_fitted_scores_are_in_logits():
    def noisy(prompts, completions):
        return [float(len(completion) % 7) for completion in completions]

    raw = score_preferences(PAIRS, noisy)
    fitted = fit_temperature([a - b for a, b in zip(raw["score_chosen"], raw["score_rejected"], strict=True)])
    scaled = score_preferences(PAIRS, noisy, temperature="fit")
    assert scaled["score_chosen"] == pytest.approx([value / fitted for value in raw["score_chosen"]])


# Through the trainer


def test_the_trainer_scores_what_has_no_scores(tiny_model_dir, tmp_path, reward_dir):
    trainer = build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=PAIRS, loss_type="margin_adaptive",
        trainer_kwargs={"reward_model": str(reward_dir)},
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    assert "weight/mean" in history(trainer)[0]


def test_a_reward_model_that_nothing_reads_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="would not be used"):
        build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=PAIRS,
              trainer_kwargs={"reward_model": length})  # fmt: skip


def test_eurus_terms(tiny_model_dir, tmp_path):
    from trl_ext.trainers.reward import RewardConfig, RewardTrainer

    losses = []
    for coefficient in (0.0, 0.5):
        torch.manual_seed(0)
        args = RewardConfig(output_dir=str(tmp_path), absolute_coefficient=coefficient, use_cpu=True, bf16=False,
                            report_to="none", max_steps=1, seed=3)  # fmt: skip
        trainer = RewardTrainer(model=str(tiny_model_dir), args=args, train_dataset=PAIRS)
        inputs = next(iter(trainer.get_train_dataloader()))
        loss, outputs = trainer.compute_loss(trainer.model, dict(inputs), return_outputs=True)
        losses.append(loss)
    chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
    absolute = -(torch.nn.functional.logsigmoid(chosen) + torch.nn.functional.logsigmoid(-rejected)).mean()
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * absolute)
    with pytest.raises(ValueError, match="at least 0"):
        RewardConfig(output_dir=str(tmp_path), absolute_coefficient=-1.0, use_cpu=True, bf16=False)


def test_scores_survive_json(tmp_path):
    scored = score_preferences(PAIRS, length)
    path = tmp_path / "scored.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in scored))
    assert trl_ext.data.load_preferences(str(path))["score_chosen"] == scored["score_chosen"]
