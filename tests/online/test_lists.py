"""Several reward functions reach a loss that takes lists one by one; all others get the total, which chooses the pairs."""

import math

import pytest
import torch

import trl_ext
from tests.helpers import history
from tests.online.runs import Scripted, batch, learn, length_reward, online
from tests.online.test_selection import completions
from trl_ext.trainers.online.checks import check_rewards
from trl_ext.trainers.online.rewards import Scores
from trl_ext.trainers.online.selection import build_table, select


def few_as(completions, **kwargs):
    return [-float(text.count("a")) for text in completions]


def silent_on_good(completions, **kwargs):
    return [None if "good" in text else 1.0 for text in completions]


BOTH = {"reward_funcs": [length_reward, few_as]}


def test_each_reward_by_hand(tiny_model_dir, tmp_path):
    trainer = online(
        tiny_model_dir, tmp_path, cls=Scripted, loss_type="e_dpo", trainer_kwargs=BOTH, reward_weights=[0.5, 2.0],
        missing_eos_penalty=3.0, length_penalty=0.25, num_generations=3,
    )  # fmt: skip
    inputs = {"prompt": ["x", "y"]}
    made = trainer.generate(trainer.model, inputs)
    made.ended[4] = False
    scores = trainer.score(inputs, made)
    assert scores.each.shape == (2, 3, 2) and scores.mask.all()
    for k in range(3):
        for row in range(2):
            text, number = made.texts[2 * k + row], 2 * k + row
            penalty = 0.25 * len(made.ids[number]) + 3.0 * (number == 4)
            rewards = [0.5 * len(text), -2.0 * text.count("a")]
            assert scores.each[row, k].tolist() == pytest.approx([reward - penalty for reward in rewards])
            assert scores.values[row, k].item() == pytest.approx(sum(rewards) - penalty)


def test_who_takes_the_total(tiny_model_dir, tmp_path):
    def scores(loss_type, **kwargs):
        trainer = online(
            tiny_model_dir, tmp_path, cls=Scripted, loss_type=loss_type, trainer_kwargs={**BOTH, **kwargs}
        )
        return trainer.score({"prompt": ["x"]}, trainer.generate(trainer.model, {"prompt": ["x"]}))

    assert scores(["sigmoid", "e_dpo"]).each is not None
    assert scores("margin_adaptive").each is None
    assert scores("e_dpo", reward_funcs=[length_reward]).each is None
    with pytest.raises(ValueError, match=r"\['reward_distillation'\] take each and \['offset'\] the sum"):
        scores(["offset", "e_dpo"])
    with pytest.raises(
        ValueError, match="'reward_distillation' needs 'score_chosen': rewards, which a `judge` has not"
    ):
        scores("e_dpo", reward_funcs=None, judge=lambda prompts, first, second: [0.5] * len(first))


def test_a_completion_without_every_opinion_is_not_learnt_from(tiny_model_dir, tmp_path):
    """Beside losses that read the total it counts with the rewards that it has."""
    inputs = {"prompt": ["x", "y", "z"]}
    for loss_type in ("e_dpo", "margin_adaptive"):
        trainer = online(
            tiny_model_dir, tmp_path, cls=Scripted, loss_type=loss_type, num_generations=4,
            trainer_kwargs={"reward_funcs": [length_reward, silent_on_good]},
        )  # fmt: skip
        made = trainer.generate(trainer.model, inputs)
        scores = trainer.score(inputs, made)
        silent = torch.tensor(["good" in text for text in made.texts]).view(4, 3).T
        assert silent.any() and not silent.all()
        assert torch.equal(scores.mask, ~silent if loss_type == "e_dpo" else torch.ones_like(silent))
        if loss_type == "e_dpo":
            assert not any("good" in made.texts[number] for number in trainer.pair(made, scores).members)
            assert scores.each[~silent].isfinite().all() and scores.each[silent][:, 1].isnan().all()


EACH = torch.tensor([[[1.0, 0.0], [4.0, 1.0], [3.0, 0.5]], [[2.0, 0.0], [0.5, 0.5], [5.0, 5.0]]])


@pytest.mark.parametrize("pairing", ["best_worst", "all", "group"])
def test_lists_go_to_their_pairs(pairing):
    """Completion k of prompt b is number 2 k + b; the totals choose."""
    selection = select(completions(2, 3), Scores(EACH.sum(dim=2), each=EACH), pairing)
    _, plan, _ = build_table([selection], {"weight": torch.tensor([1.0, 3.0])}, 99, 0)
    chosen, rejected = {
        "all": ([(0, 1), (0, 1), (0, 2), (1, 0), (1, 2), (1, 2)], [(0, 0), (0, 2), (0, 0), (1, 1), (1, 0), (1, 1)]),
    }.get(pairing, ([(0, 1), (1, 2)], [(0, 0), (1, 1)]))
    assert plan.columns["score_chosen"].tolist() == [EACH[place].tolist() for place in chosen]
    assert plan.columns["score_rejected"].tolist() == [EACH[place].tolist() for place in rejected]
    if pairing == "group":  # whose scores are the totals
        assert plan.scores.tolist() == [[1.0, 5.0, 3.5], [2.0, 1.0, 10.0]]


def test_a_prompt_without_a_pair_of_one_kind_has_the_lists_of_the_other():
    tied = torch.tensor([[[1.0, 2.0], [1.0, 2.0]], [[0.0, 1.0], [2.0, 5.0]]])
    other = torch.tensor([[[9.0, 8.0], [7.0, 6.0]], [[3.0, 3.0], [3.0, 3.0]]])
    both = [select(completions(2, 2), Scores(each.sum(dim=2), each=each), "best_worst") for each in (tied, other)]
    _, plan, _ = build_table(both, {}, 99, 0)
    assert plan.columns["score_chosen"].tolist() == [[9.0, 8.0], [2.0, 5.0]]
    assert plan.empty_columns["score_rejected"].tolist() == [[7.0, 6.0], [0.0, 1.0]]


@pytest.mark.parametrize("combine", ["mean", "min"])
def test_the_loss_by_hand(combine, tiny_model_dir, tmp_path):
    """The policy is its reference, so a pair's loss is the square of the gap that is asked for."""
    trainer = online(
        tiny_model_dir, tmp_path, cls=Scripted, loss_type="e_dpo", loss_kwargs={"combine": combine}, trainer_kwargs=BOTH,
        num_generations=3, reward_weights=[0.01, 1.0],
    )  # fmt: skip
    inputs = batch(trainer)
    made = trainer.generate(trainer.model, inputs)
    selection = trainer.pair(made, trainer.score(inputs, made))
    loss, _ = learn(trainer, inputs)
    expected = []
    for pair in selection.pairs.tolist():
        best, worst = (made.texts[number] for number in pair)
        gaps = [0.01 * (len(best) - len(worst)), worst.count("a") - best.count("a")]
        expected.append((sum(gaps) / 2) ** 2 if combine == "mean" else min(gap**2 for gap in gaps))
    assert len(expected) == len(inputs["prompt"]) and len(set(expected)) > 1
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_a_run(tiny_model_dir, tmp_path):
    trainer = online(
        tiny_model_dir, tmp_path, cls=Scripted, loss_type=["bias_variance", "sigmoid"], max_steps=2,
        loss_kwargs={"bias_variance": {"base": "e_dpo"}}, trainer_kwargs={**BOTH, "eval_dataset": None},
    )  # fmt: skip
    assert trainer._each_reward
    trainer.train()
    assert math.isfinite(history(trainer)[0]["loss"])
    trainer = online(tiny_model_dir, tmp_path, cls=Scripted, loss_type="e_dpo", max_steps=1, trainer_kwargs=BOTH)
    trainer.train()
    assert {"reward_gap/wanted", "reward_gap/disagreement", "rewards/length_reward/mean"} <= history(trainer)[0].keys()
    assert "eval_reward_gap/disagreement" in trainer.evaluate(trainer.train_dataset)


def test_what_is_said_of_a_list_that_a_loss_cannot_take():
    class Picky(type(trl_ext.get_loss("e_dpo"))):
        def check_columns(self, columns):
            return columns["score_chosen"].view(len(columns["score_chosen"]), -1).amin(dim=1) < 0

    columns = {"score_chosen": torch.tensor([[1.0, 2.0], [0.5, -3.0]]), "weight": torch.tensor([1.0, 2.0])}
    with pytest.raises(
        ValueError, match=r"1 of 2 pairs of this batch, the first with .*score_chosen=\[0.5, -3\], weight=2\."
    ):
        check_rewards("picky", Picky(), {"score_rejected": torch.zeros(2, 2), **columns})
