"""Losses on whole groups alone, online: the policy that samples is the one that learns."""

import math

import pytest
import torch
import torch.nn.functional as F
from trl.experimental.online_dpo import OnlineDPOConfig as TRLConfig

import trl_ext
from tests.helpers import assert_same_parameters, history, parameters
from tests.online.runs import Scripted, batch, learn, online, prompts
from tests.online.test_values import BETA, assert_equal, expected, moved
from trl_ext.losses import base


LOSSES = ["trpa", "drpo"]
OF = {"trpa": {}, "drpo": {"loss_kwargs": {"max_length": 8, "tau": 2.0}}}


def level(text):
    """1 and 2 are right, 0 is wrong. Of the scripted groups of four one has one level, two are right throughout, three have all."""
    return float(text.count("i") % 3)


def levels(completions, **kwargs):
    return [level(text) for text in completions]


def run(model_dir, folder, loss_type, reward=levels, cls=Scripted, **options):
    trainer_kwargs = {"reward_funcs": reward, **options.pop("trainer_kwargs", {})}
    options = {"num_generations": 4, "max_new_tokens": 8, **OF[loss_type], **options}
    return online(model_dir, folder, cls=cls, loss_type=loss_type, trainer_kwargs=trainer_kwargs, **options)


def trpa(texts, logps, refs, lengths):
    ratios = [(logp - ref) / n for logp, ref, n in zip(logps, refs, lengths, strict=True)]
    terms = [
        -F.logsigmoid((2.5 if level(texts[i]) >= 1 else 1.0) * BETA * (ratios[i] - ratios[j]))
        for i in range(len(texts))
        for j in range(len(texts))
        if level(texts[i]) > level(texts[j])
    ]
    return sum(terms) / len(terms) if terms else 0 * logps[0]


def drpo(texts, logps, refs, lengths):
    assert refs is None
    averages = [logp / n for logp, n in zip(logps, lengths, strict=True)]
    right = [k for k, text in enumerate(texts) if level(text) >= 1]
    wrong = [k for k in range(len(texts)) if k not in right]
    if not right or not wrong:
        return 0 * logps[0]
    rewards = torch.tensor([(1 - lengths[k] / 8) / 0.1 for k in right], dtype=torch.float64).softmax(0)
    powers = sum((averages[k] / 2.0).exp() for k in wrong)
    ratio = powers / powers.detach()
    return -sum(weight * (averages[k] - 2.0 * ratio) for weight, k in zip(rewards, right, strict=True))


@pytest.mark.parametrize(("name", "formula"), [("trpa", trpa), ("drpo", drpo)])
def test_values_and_gradients(name, formula, tiny_model_dir, tmp_path):
    """The KL to the policy that has just sampled is 0, and so is its gradient."""
    trainer = moved(run(tiny_model_dir, tmp_path, name, beta=BETA))
    assert trainer.args.pairing == "group" and (trainer.ref_model is None) == (name == "drpo")
    inputs = batch(trainer)
    seen = []

    def counted(texts, *rest):
        seen.append({level(text) for text in texts})
        return formula(texts, *rest)

    assert_equal(learn(trainer, inputs), expected(trainer, inputs, counted, count=4))
    assert max(map(len, seen)) == 3, "no group has all levels"
    note = trainer._means["train"].over_processes()
    assert note["behaviour/kl"] == pytest.approx(0, abs=1e-9)
    assert ("objective/kl" in note) == (name == "trpa")
    mixed = [levels for levels in seen if len(levels) > 1]
    assert note["pairs/dropped_prompts"] == 1 - len(mixed) / len(seen)


@pytest.mark.parametrize("name", LOSSES)
def test_trained_evaluated_and_resumed(name, tiny_model_dir, tmp_path):
    options = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2,
        "trainer_kwargs": {"eval_dataset": prompts(4)},
    }  # fmt: skip
    whole = run(tiny_model_dir, tmp_path / "whole", name, **options)
    before = parameters(whole)
    whole.train()
    assert any(not torch.equal(value, before[key]) for key, value in parameters(whole).items())
    found = whole.evaluate()
    assert found["eval_behaviour/kl"] == pytest.approx(0, abs=1e-9) and math.isfinite(found["eval_loss"])
    assert ("eval_win_rate" in found) == (name == "trpa")
    again = run(tiny_model_dir, tmp_path / "again", name, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_parameters(parameters(again), parameters(whole))
    if name == "trpa":
        first = history(whole)[0]
        assert first["loss"] == pytest.approx((1 - first["pairs/dropped_prompts"]) * math.log(2), abs=1e-5)
        other = run(tiny_model_dir, tmp_path / "other", name, **{**options, "loss_kwargs": {"kappa": 1.0}})
        with pytest.raises(ValueError, match="was trained with the losses"):
            other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


@pytest.mark.parametrize("name", LOSSES)
def test_eight_micro_batches_of_one_are_one_of_eight(name, tiny_model_dir, tmp_path):
    """Prompts of which nothing is learnt among them."""
    runs = []
    for size in (1, 8):
        trained = run(
            tiny_model_dir, tmp_path / str(size), name, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
            max_steps=2, optim="sgd", learning_rate=0.1, max_grad_norm=0.0,
        )  # fmt: skip
        trained.train()
        runs.append(trained)
    first, second = (history(each)[0] for each in runs)
    assert 0 < second["pairs/dropped_prompts"] < 1
    # That of the micro-batches is a mean of a process's own
    for key in ("loss", "right/share", "behaviour/kl", "pairs/dropped_prompts"):
        assert first[key] == pytest.approx(second[key], abs=1e-5), key
    assert_same_parameters(parameters(runs[0]), parameters(runs[1]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_completions_that_nobody_scored_are_absent(name, tiny_model_dir, tmp_path):
    """Without them a group is a smaller one."""

    def some(completions, **kwargs):
        return [None if i >= len(completions) // 2 else level(text) for i, text in enumerate(completions)]

    values = []
    for count, reward in ((2, levels), (4, some)):
        trainer = moved(run(tiny_model_dir, tmp_path, name, reward, num_generations=count))
        values.append(learn(trainer, batch(trainer)))
    torch.testing.assert_close(values[0][0], values[1][0])
    for key, value in values[0][1].items():
        torch.testing.assert_close(values[1][1][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_ties_are_dropped_and_one_side_gives_nothing(name, tiny_model_dir, tmp_path):
    trainer = run(tiny_model_dir, tmp_path, name, lambda completions, **kwargs: [1.0] * len(completions))
    loss, gradients = learn(trainer, batch(trainer))
    assert loss == 0 and not any(value.any() for value in gradients.values())
    assert trainer._means["train"].over_processes()["pairs/dropped_prompts"] == 1
    # All wrong, and different: levels to trpa, nothing to drpo
    trainer = run(tiny_model_dir, tmp_path, name, lambda completions, **kwargs: [-float(len(c)) for c in completions])
    loss, gradients = learn(trainer, batch(trainer))
    note = trainer._means["train"].over_processes()
    assert note["pairs/dropped_prompts"] == 0 == note["right/share"]
    if name == "drpo":
        assert loss == 0 == note["groups/mixed"] and not any(value.any() for value in gradients.values())
    else:
        assert loss > 0 and note["ranking/pairs"] > 1 and any(value.any() for value in gradients.values())


def config(tmp_path, **options):
    return trl_ext.OnlineDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_pairing_by_default(tmp_path):
    for loss_type, pairing in [
        ("trpa", "group"), ("drpo", "group"), (["trpa", "anchored"], "group"), ("anchored", "best_worst"), ("sigmoid", "best_worst")
    ]:  # fmt: skip
        made = config(tmp_path, loss_type=loss_type, max_new_tokens=8192)
        assert made.pairing == pairing, loss_type
        assert config(tmp_path, loss_type=loss_type, pairing=made.pairing).pairing == pairing
    assert config(tmp_path, pairing="all").pairing == "all"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "trpa", "pairing": "best_worst"}, r"`pairing='best_worst'` makes pairs, and \['trpa'\] learn from"),
        ({"loss_type": "drpo", "pairing": "all"}, r"`pairing='all'` makes pairs, and \['drpo'\].*`pairing=\"group\"`"),
        ({"loss_type": ["drpo", "cpo"]}, r"\['drpo'\] learn from whole groups alone, and \['cpo'\] from pairs"),
        ({"loss_type": ["trpa", "sigmoid"], "pairing": "group"}, r"\['trpa'\] learn .* and \['sigmoid'\] from pairs"),
        ({"loss_type": "trpa", "pairing": "pairs"}, "`pairing='pairs'` is unknown"),
        ({"loss_type": "trpa", "mixture_coef": 0.5}, r"\['trpa'\] read log-probs under the policy that sampled"),
        ({"loss_type": "drpo", "sync_ref_model": True}, "needs a reference model"),
    ],
)  # fmt: skip
def test_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_a_plain_config_of_trls(tiny_model_dir, tmp_path):
    trainer = online(tiny_model_dir, tmp_path, cls=Scripted, config=TRLConfig, loss_type="trpa", max_steps=1)
    trainer.train()
    assert trainer.args.pairing == "group" and history(trainer)[0]["ranking/pairs"] == 1


def test_the_longest_completion_is_named_twice(tmp_path, caplog):
    """The length reward is 0 at a length that no completion has, or that some exceed."""
    base.warn_once.cache_clear()
    for limit, said in [(64, True), (8192, False)]:
        caplog.clear()
        config(tmp_path, loss_type="drpo", max_new_tokens=limit)
        assert ("`max_new_tokens=64`" in caplog.text and "`max_length=8192`" in caplog.text) == said
    caplog.clear()
    config(tmp_path, loss_type="drpo", max_new_tokens=64, loss_kwargs={"max_length": 64})
    assert "max_length" not in caplog.text
