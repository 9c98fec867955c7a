"""What is logged, by hand on small tensors and on scripted runs."""

import math

import pytest
import torch

from tests.helpers import history
from tests.online.runs import Scripted, batch, learn, length_reward, online
from trl_ext.generation import Completions
from trl_ext.losses.base import Loss
from trl_ext.trainers.metrics import Means
from trl_ext.trainers.online.metrics import dropped_prompts, of_completions, of_learnt
from trl_ext.trainers.online.rewards import Scores
from trl_ext.trainers.online.selection import select


def made(values, mask=None, lengths=None):
    """Scored completions, `(B, K)`."""
    values = torch.tensor(values)
    b, k = values.shape
    lengths = lengths or [1] * (b * k)
    completions = Completions(
        prompts=["p"] * b,
        texts=["t"] * (b * k),
        prompt_ids=[torch.tensor([1])] * b,
        ids=[torch.zeros(length, dtype=torch.long) for length in lengths],
        ended=torch.tensor([i % 2 == 0 for i in range(b * k)]),
    )
    mask = torch.ones(b, k, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return completions, Scores(values, mask, per_function={"mine": values.masked_fill(~mask, math.nan)})


def means(values):
    return {name: value[~value.isnan()].double().mean().item() for name, value in values.items()}


def test_means_count_rows():
    ours = Means()
    ours.add({"a": torch.tensor([1.0, math.nan, 5.0]), "c": math.nan})
    ours.add({"a": torch.tensor([6.0]), "c": torch.tensor([math.nan])})
    ours.add({"b": 2.0}, rows=3)
    ours.add({"b": torch.tensor(4.0), "d": 7}, rows=1)
    assert ours.over_processes() == {"a": 4.0, "b": 2.5, "d": 7.0}
    assert ours.over_processes() == {}  # they have been asked for


def test_of_all_completions():
    completions, scores = made([[1.0, 3.0], [7.0, 0.0]], [[True, True], [True, False]], [1, 2, 3, 4])
    values = means(of_completions(completions, scores))
    assert values == {
        "completions/mean_length": 2.5,
        "completions/mean_score": pytest.approx(11 / 3),
        "completions/truncated": 0.5,
        "val/contain_eos_token": 0.5,
        "rewards/mine/mean": pytest.approx(11 / 3),
        "rewards/unscored": 0.25,
    }


# Of completion k of prompt b at place k B + b, in a table whose first row is another's
PLACE = torch.arange(1, 7)
LOGPS = torch.tensor([77.0, -1.0, -3.0, -2.0, -8.0, -4.0, -5.0])
REFS = torch.tensor([99.0, -2.0, -4.0, -2.5, -6.0, -3.0, -9.0])


def test_of_pairs_by_hand():
    """Of the first prompt 1 beats 0, of the second 0 beats 1; the third completions are in no pair."""
    completions, scores = made([[1.0, 4.0, 2.0], [6.0, 3.0, 5.0]])
    selection = select(completions, scores, "best_worst", False)
    assert selection.pairs.tolist() == [[2, 0], [1, 3]]  # completion k of prompt b is number 2 k + b
    values = means(of_learnt(selection, PLACE, LOGPS, REFS, 0.5))
    kl = [0.5, 1.0, 1.0, -2.0]  # chosen and rejected of the first, of the second
    assert values == {
        "objective/kl": pytest.approx(sum(kl) / 4),
        "objective/entropy": pytest.approx((2 + 1 + 3 + 8) / 4),
        "objective/non_score_reward": pytest.approx(-0.5 * sum(kl) / 4),
        "objective/scores": pytest.approx((4 + 1 + 6 + 3) / 4),
        "objective/rlhf_reward": pytest.approx((14 - 0.5 * sum(kl)) / 4),
        "objective/scores_margin": pytest.approx(3.0),
        "logps/chosen": pytest.approx(-2.5),
        "logps/rejected": pytest.approx(-4.5),
        "rewards/chosen": pytest.approx((0.25 + 0.5) / 2),
        "rewards/rejected": pytest.approx((0.5 - 1.0) / 2),
        "rewards/margins": pytest.approx((-0.25 + 1.5) / 2),
        "rewards/accuracies": 0.5,
    }


def test_a_completion_in_two_pairs_counts_once():
    completions, scores = made([[1.0, 4.0, 2.0], [3.0, 3.0, 3.0]])
    selection = select(completions, scores, "all", False)
    values = of_learnt(selection, PLACE, LOGPS, REFS, 0.5)
    assert values["objective/scores"].tolist() == [1.0, 4.0, 2.0]
    assert sorted(values["objective/scores_margin"].tolist()) == [1.0, 2.0, 3.0]


def test_groups_without_what_was_not_scored():
    """Scores 1, 3 and none: the margin is 2, whatever stands in the place of the third."""
    for nothing in (0.0, -9.0, 99.0):
        completions, scores = made([[1.0, 3.0, nothing], [6.0, 3.0, 5.0]], [[True, True, False], [True] * 3])
        selection = select(completions, scores, "group", False)
        assert selection.groups.tolist() == [[0, 2, -1], [1, 3, 5]]
        values = means(of_learnt(selection.only(torch.tensor([True, False])), PLACE, LOGPS, REFS, 0.5))
        assert values["objective/scores"] == 2.0 and values["objective/scores_margin"] == 2.0
        assert values["objective/kl"] == pytest.approx((1.0 + 0.5) / 2)
        assert values["rewards/chosen"] == pytest.approx(0.25) and values["rewards/rejected"] == pytest.approx(0.5)
        assert values["objective/rlhf_reward"] == pytest.approx(2.0 - 0.5 * 0.75)


def test_what_counts_nothing_is_in_no_mean():
    completions, scores = made([[1.0, 4.0, 2.0], [6.0, 3.0, 5.0]])
    selection = select(completions, scores, "best_worst", False).only(torch.tensor([False, True]))
    values = means(of_learnt(selection, PLACE, LOGPS, REFS, 0.5))
    assert values["objective/scores"] == 4.5 and values["logps/chosen"] == -3.0


def test_without_a_reference():
    completions, scores = made([[1.0, 4.0, 2.0], [6.0, 3.0, 5.0]])
    selection = select(completions, scores, "best_worst", False)
    values = means(of_learnt(selection, PLACE, LOGPS, None, 0.5))
    assert not {"objective/kl", "objective/non_score_reward", "objective/rlhf_reward"} & set(values)
    assert values["rewards/chosen"] == pytest.approx(0.5 * -2.5)
    assert values["rewards/margins"] == pytest.approx(0.5 * (-1 + 5) / 2)


def test_prompts_of_which_nothing_is_learnt():
    completions, scores = made([[1.0, 4.0], [3.0, 3.0], [2.0, 0.0]])
    selection = select(completions, scores, "best_worst")
    assert dropped_prompts(selection).tolist() == [0.0, 1.0, 0.0]
    assert selection.prompts.tolist() == [0, 2] and selection.share.tolist() == [1.0, 1.0]
    assert select(*made([[1.0, 4.0, 2.0], [3.0, 3.0, 3.0]]), "all").share.tolist() == pytest.approx([1 / 3] * 3)


# In a run


def test_scores_and_penalties_add_up(tiny_model_dir, tmp_path):
    trainer = online(
        tiny_model_dir, tmp_path, cls=Scripted, num_generations=4, beta=0.3, gradient_accumulation_steps=2,
        learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    last = history(trainer)[2]
    assert abs(last["objective/non_score_reward"]) > 1e-3
    assert last["objective/rlhf_reward"] == pytest.approx(
        last["objective/scores"] + last["objective/non_score_reward"], abs=1e-9
    )
    assert last["objective/non_score_reward"] == pytest.approx(-0.3 * last["objective/kl"], abs=1e-9)


class Measures(Loss):
    """Metrics of every kind a loss may give."""

    def __call__(self, batch):
        return batch.delta

    def metrics(self, batch):
        rows = torch.full_like(batch.delta, math.nan)
        rows[0] = 5.0
        return {"float": 2.0 * len(rows), "scalar": torch.tensor(3.0), "rows": rows, "none": math.nan * rows}


def test_metrics_of_a_loss(tiny_model_dir, tmp_path):
    def first_three(completions, **kwargs):  # of four prompts, then of two
        return [float(len(text)) if i % 4 < 3 else 0.0 for i, text in enumerate(completions)]

    trainer = online(tiny_model_dir, tmp_path, cls=Scripted, trainer_kwargs={"reward_funcs": first_three})
    trainer._terms.losses = {"sigmoid": Measures()}
    inputs = batch(trainer)
    learn(trainer, inputs)
    learn(trainer, {name: value[:1] for name, value in inputs.items()})
    found = trainer._means["train"].over_processes()
    # A number counts as often as its batch has rows: 3 and 1
    assert found["float"] == pytest.approx((3 * 6.0 + 2.0) / 4) and found["scalar"] == 3.0 and found["rows"] == 5.0
    assert "none" not in found
    assert found["pairs/dropped_prompts"] == pytest.approx(1 / 5)


def test_a_metric_of_another_shape_is_refused(tiny_model_dir, tmp_path):
    class Odd(Measures):
        def metrics(self, batch):
            return {"odd": torch.zeros(2, 2)}

    trainer = online(tiny_model_dir, tmp_path, cls=Scripted)
    trainer._terms.losses = {"sigmoid": Odd()}
    with pytest.raises(
        ValueError, match=r"'odd' of the loss 'sigmoid' has shape \(2, 2\); expected a number, or \(4,\)"
    ):
        learn(trainer, batch(trainer))


def test_a_loss_of_another_shape_is_refused(tiny_model_dir, tmp_path):
    class Mean(Loss):
        def __call__(self, batch):
            return batch.delta.mean()

    trainer = online(tiny_model_dir, tmp_path, cls=Scripted)
    trainer._terms.losses = {"sigmoid": Mean()}
    with pytest.raises(ValueError, match=r"returned shape \(\); expected one value per pair or group, shape \(4,\)"):
        learn(trainer, batch(trainer))


def test_each_loss_of_a_mix_is_logged(tiny_model_dir, tmp_path):
    trainer = online(tiny_model_dir, tmp_path, cls=Scripted, loss_type=["sigmoid", "hinge"], loss_weights=[1.0, 0.5])
    loss, _ = learn(trainer, batch(trainer))
    found = trainer._means["train"].over_processes()
    assert found["loss/sigmoid"] == pytest.approx(math.log(2), rel=1e-5) and found["loss/hinge"] == pytest.approx(1.0)
    assert loss.item() == pytest.approx(math.log(2) + 0.5, rel=1e-5)


# A run that learns nothing


def tied(prompts, **kwargs):
    return [0.5] * len(prompts)


def test_a_run_in_which_every_prompt_ties_says_so(tiny_model_dir, tmp_path, caplog):
    trainer = online(tiny_model_dir, tmp_path, cls=Scripted, trainer_kwargs={"reward_funcs": tied})
    trainer.train()
    said = [record.message for record in caplog.records if "Nothing was learnt" in record.message]
    assert len(said) == 1 and "all prompts were dropped" in said[0] and "the same value to every completion" in said[0]


def test_it_is_said_without_a_log_too(tiny_model_dir, tmp_path, caplog):
    trainer = online(
        tiny_model_dir, tmp_path, cls=Scripted, max_steps=1, logging_strategy="no",
        per_device_train_batch_size=1, gradient_accumulation_steps=10, trainer_kwargs={"reward_funcs": tied},
    )  # fmt: skip
    inputs = batch(trainer)
    for rewards in [tied] * 5 + [length_reward] + [tied] * 9:
        trainer.reward_funcs = [rewards]
        learn(trainer, inputs)
    assert "Nothing was learnt" not in caplog.text
    learn(trainer, inputs)
    learn(trainer, inputs)
    assert caplog.text.count("Nothing was learnt in 10 batches in a row") == 1


def test_nothing_is_said_of_a_run_that_learns(tiny_model_dir, tmp_path, caplog):
    def half(completions, **kwargs):
        return [float(len(text)) if i % 4 < 2 else 0.0 for i, text in enumerate(completions)]

    online(tiny_model_dir, tmp_path, cls=Scripted, trainer_kwargs={"reward_funcs": half}).train()
    assert "Nothing was learnt" not in caplog.text
