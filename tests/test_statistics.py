"""Which statistics of tokens are measured when."""

from types import SimpleNamespace

import pytest

import trl_ext
from tests.helpers import build, history
from trl_ext.trainers.scoring import statistics_of_step


def ours(tiny_model_dir, tmp_path, **kwargs):
    return build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, **kwargs)


def test_entropy_is_that_of_logged_steps(tiny_model_dir, tmp_path):
    kwargs = {"optim": "sgd", "max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    every = history_of(ours(tiny_model_dir, tmp_path, logging_steps=1, **kwargs))
    second = history_of(ours(tiny_model_dir, tmp_path, logging_steps=2, **kwargs))
    assert [entry["entropy"] for entry in second] == pytest.approx(
        [every[1]["entropy"], every[3]["entropy"]], rel=1e-5
    )
    # the others are means over all steps, as TRL's are
    means = [(every[i]["mean_token_accuracy"] + every[i + 1]["mean_token_accuracy"]) / 2 for i in (0, 2)]
    assert [entry["mean_token_accuracy"] for entry in second] == pytest.approx(means, abs=1e-6)


def history_of(trainer):
    trainer.train()
    return [entry for entry in history(trainer) if "loss" in entry]


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_logging_strategies(strategy, tiny_model_dir, tmp_path):
    trainer = ours(tiny_model_dir, tmp_path, logging_strategy=strategy, logging_first_step=True)
    trainer.train()
    trainer.evaluate()
    entries = history(trainer)
    assert "entropy" in entries[0]
    assert all("eval_entropy" in entry for entry in entries if "eval_loss" in entry)


def statistics(step, *, training=True, capped=None, state=2, strategy="steps", first=False):
    """Of the step after `step`; `logging_steps` is `state`."""
    trainer = SimpleNamespace()
    trainer.args = SimpleNamespace(logging_strategy=strategy, logging_first_step=first)
    trainer.state = SimpleNamespace(global_step=step, logging_steps=state)
    text_config = SimpleNamespace() if capped is None else SimpleNamespace(final_logit_softcapping=capped)
    trainer.model = SimpleNamespace(training=training, config=SimpleNamespace(get_text_config=lambda: text_config))
    return statistics_of_step(trainer)


CHEAP = ("mean_logits", "is_top1")


def test_all_statistics_in_steps_that_are_logged():
    assert [statistics(step) for step in range(4)] == [CHEAP, None, CHEAP, None]
    assert [statistics(step, state=3) for step in range(4)] == [CHEAP, CHEAP, None, CHEAP]
    assert [statistics(step, first=True) for step in range(4)] == [None, None, CHEAP, None]
    assert statistics(0, state=0) is None  # not known yet
    assert [statistics(step, strategy="epoch") for step in range(2)] == [None, None]
    assert [statistics(step, strategy=SimpleNamespace(value="no")) for step in range(2)] == [CHEAP, CHEAP]
    assert statistics(0, strategy="no", first=True) is None
    assert statistics(0, training=False) is None and statistics(0, strategy="no", training=False) is None


def test_means_of_capped_logits_are_not_cheap():
    assert statistics(0, capped=30.0) == ("is_top1",)
