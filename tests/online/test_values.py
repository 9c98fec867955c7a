"""Losses and gradients of online runs on scripted completions, against formulas in float64 on rows without padding."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import trl_ext
from tests.online.runs import Scripted, batch, learn, online, prompts, scripted
from trl_ext.losses import register_loss, registry
from trl_ext.losses.base import Loss


BETA = 0.3


def score(text):
    return len(text) / 20


def rewards(completions, **kwargs):
    return [score(text) for text in completions]


def win(a, b):
    return 1 / (1 + math.exp((len(b) - len(a)) / 30))


def oracle(prompts, first, second):
    return [win(a, b) for a, b in zip(first, second, strict=True)]


def moved(trainer):
    """The trainer, its policy away from the reference."""
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.05)
    return trainer


def answers(prompt, count, tokenizer):
    texts = [scripted(prompt, k) for k in range(count)]
    return texts, [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]


def log_probs(network, prompt_ids, answer_ids):
    """Of each answer: the sum over its tokens."""
    sums = []
    for ids in answer_ids:
        row = torch.tensor([prompt_ids + ids])
        logits = network(input_ids=row).logits[0, len(prompt_ids) - 1 : -1]
        sums.append(logits.log_softmax(-1).gather(1, torch.tensor(ids).unsqueeze(1)).sum())
    return sums


def expected(trainer, inputs, formula, count=2, suffix=""):
    """
    Mean over prompts of `formula(texts, logps, ref_logps, lengths)`, and its gradient; all in float64.

    The logps of the reference are `None` where the run has none.
    """
    tokenizer = trainer.processing_class
    networks = []
    for network in (trainer.model, trainer.ref_model):
        if network is None:
            networks.append(None)
            continue
        plain = type(network)(network.config).double().eval()
        plain.load_state_dict({name: value.double() for name, value in network.state_dict().items()})
        networks.append(plain)
    policy, reference = networks
    total = 0.0
    for prompt in inputs["prompt"]:
        ids = tokenizer(prompt + suffix)["input_ids"]
        texts, answer_ids = answers(prompt + suffix, count, tokenizer)
        logps = log_probs(policy, ids, answer_ids)
        with torch.no_grad():
            refs = None if reference is None else log_probs(reference, ids, answer_ids)
        total = total + formula(texts, logps, refs, [len(each) for each in answer_ids]) / len(inputs["prompt"])
    total.backward()
    return total.detach(), {name: p.grad for name, p in policy.named_parameters()}


def assert_equal(ours, theirs):
    (loss, grads), (expected_loss, expected_grads) = ours, theirs
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-6)
    assert grads.keys() == expected_grads.keys()
    for name, value in expected_grads.items():
        scale = value.abs().max() + 1e-9
        torch.testing.assert_close(grads[name].double() / scale, value / scale, rtol=1e-3, atol=1e-4)


# With two completions the second is the longer one, and is chosen


def on_delta(function):
    """A formula of the chosen minus the rejected log-ratio, the margin of the scores and that of the lengths."""

    def formula(texts, logps, refs, lengths):
        delta = (logps[1] - refs[1]) - (logps[0] - refs[0])
        return function(delta, score(texts[1]) - score(texts[0]), lengths[1] - lengths[0])

    return formula


def madpo(delta, margin, length):
    c = 0.5 + 1.5 / (1 + 1 / 0.5 * math.exp(margin - 2))
    weight = (1 + math.exp(-margin)) / (1 + math.exp(-c * margin))
    return -weight * F.logsigmoid(BETA * delta)


def anchored(delta, margin, length):
    q = 1 / (1 + math.exp(-margin / 2))
    return -q * F.logsigmoid(BETA * delta) - (1 - q) * F.logsigmoid(-BETA * delta)


FORMULAS = {
    "sigmoid": ({}, lambda d, h, n: -F.logsigmoid(BETA * d)),
    "hinge": ({}, lambda d, h, n: torch.relu(1 - BETA * d)),
    "ipo": ({}, lambda d, h, n: (d - 1 / (2 * BETA)) ** 2),
    "offset": ({"alpha": 0.5}, lambda d, h, n: -F.logsigmoid(BETA * d - 0.5 * math.log(h))),
    "anchored": ({"beta_r": 2.0}, anchored),
    "margin_adaptive": ({}, madpo),
    "length_regularized": ({"alpha": 0.1}, lambda d, h, n: -F.logsigmoid(BETA * d + 0.1 * n)),
}


@pytest.mark.parametrize("loss_type", FORMULAS)
def test_pairs(loss_type, tiny_model_dir, tmp_path):
    kwargs, function = FORMULAS[loss_type]
    trainer = moved(
        online(
            tiny_model_dir,
            tmp_path,
            cls=Scripted,
            loss_type=loss_type,
            loss_kwargs=kwargs or None,
            beta=BETA,
            trainer_kwargs={"reward_funcs": rewards},
        )
    )
    inputs = batch(trainer)
    assert_equal(learn(trainer, inputs), expected(trainer, inputs, on_delta(function)))


@pytest.mark.parametrize("generations", [2, 3])
def test_sppo_reads_the_win_rates_of_an_oracle(generations, tiny_model_dir, tmp_path):
    kwargs = {"reward_funcs": None, "judge": oracle}
    trainer = moved(
        online(
            tiny_model_dir,
            tmp_path,
            cls=Scripted,
            loss_type="sppo_soft",
            beta=BETA,
            num_generations=generations,
            trainer_kwargs=kwargs,
        )
    )

    def formula(texts, logps, refs, lengths):
        total = 0.0
        for k in (len(texts) - 1, 0):  # the longest against the shortest
            rate = sum(win(texts[k], other) for other in texts if other is not texts[k]) / (len(texts) - 1)
            total = total + (logps[k] - refs[k] - (rate - 0.5) / BETA) ** 2
        return total

    inputs = batch(trainer)
    assert_equal(learn(trainer, inputs), expected(trainer, inputs, formula, generations))


def test_sppo_reads_scores_as_they_are_where_it_is_told_to(tiny_model_dir, tmp_path):
    trainer = moved(
        online(
            tiny_model_dir,
            tmp_path,
            cls=Scripted,
            loss_type="sppo_soft",
            beta=BETA,
            loss_kwargs={"target": "score"},
            trainer_kwargs={"reward_funcs": rewards},
        )
    )

    def formula(texts, logps, refs, lengths):
        return sum((logps[k] - refs[k] - score(texts[k]) / BETA) ** 2 for k in range(2))

    inputs = batch(trainer)
    assert_equal(learn(trainer, inputs), expected(trainer, inputs, formula))


def test_groups(tiny_model_dir, tmp_path):
    trainer = moved(
        online(
            tiny_model_dir,
            tmp_path,
            cls=Scripted,
            loss_type="anchored",
            beta=BETA,
            num_generations=3,
            pairing="group",
            trainer_kwargs={"reward_funcs": rewards},
        )
    )

    def formula(texts, logps, refs, lengths):
        targets = torch.tensor([score(text) for text in texts], dtype=torch.float64).softmax(0)
        ratios = torch.stack([BETA * (a - b) for a, b in zip(logps, refs, strict=True)])
        return -(targets * ratios.log_softmax(0)).sum()

    inputs = batch(trainer)
    assert_equal(learn(trainer, inputs), expected(trainer, inputs, formula, 3))


def test_all_pairs(tiny_model_dir, tmp_path):
    trainer = moved(
        online(tiny_model_dir, tmp_path, cls=Scripted, num_generations=3, pairing="all", beta=BETA)
    )  # fmt: skip

    def formula(texts, logps, refs, lengths):
        ratios = [a - b for a, b in zip(logps, refs, strict=True)]
        return sum(-F.logsigmoid(BETA * (ratios[a] - ratios[b])) for a, b in ((2, 0), (2, 1), (1, 0))) / 3

    inputs = batch(trainer)
    assert_equal(learn(trainer, inputs), expected(trainer, inputs, formula, 3))


class TwoTraces(Scripted):
    """Other completions where reasoning is switched off."""

    def generate(self, model, inputs, thinking=True, reference=False):
        if not thinking:
            inputs = {**inputs, "prompt": [prompt + " so" for prompt in inputs["prompt"]]}
        return super().generate(model, inputs, thinking, reference)


def sigmoid(texts, logps, refs, lengths):
    return -F.logsigmoid(BETA * (logps[1] - refs[1] - logps[0] + refs[0]))


def test_two_traces(tiny_model_dir, tmp_path):
    trainer = moved(
        online(
            tiny_model_dir,
            tmp_path,
            cls=TwoTraces,
            loss_type="bias_variance",
            beta=BETA,
            loss_kwargs={"alpha": 0.3},
        )
    )
    inputs = batch(trainer)
    traced, empty = expected(trainer, inputs, sigmoid), expected(trainer, inputs, sigmoid, suffix=" so")
    loss = 0.3 * traced[0] + 0.7 * empty[0]
    grads = {name: 0.3 * traced[1][name] + 0.7 * empty[1][name] for name in traced[1]}
    assert_equal(learn(trainer, inputs), (loss, grads))


def test_a_trace_that_ties_leaves_the_other(tiny_model_dir, tmp_path):
    """The base refuses margins of 0: those of a pair that is not there are not read."""

    def only_without(completions, prompts, **kwargs):
        return [1.0 if not prompt.endswith(" so") else score(text) for prompt, text in zip(prompts, completions)]  # noqa: B905

    trainer = moved(
        online(
            tiny_model_dir,
            tmp_path,
            cls=TwoTraces,
            loss_type="bias_variance",
            beta=BETA,
            loss_kwargs={"alpha": 0.25, "base": "offset"},
            trainer_kwargs={"reward_funcs": only_without},
        )
    )
    offset = on_delta(lambda d, h, n: -0.75 * F.logsigmoid(BETA * d - math.log(h)))
    inputs = batch(trainer)
    assert_equal(learn(trainer, inputs), expected(trainer, inputs, offset, suffix=" so"))
    means = trainer._means["train"].over_processes()
    assert means["pairs/dropped_prompts"] == 1 and means["pairs/dropped_prompts_empty_trace"] == 0
    assert means["empty_trace/share"] == 1


# Weights


@pytest.mark.parametrize(("loss_type", "pairing"), [("sigmoid", "all"), ("anchored", "group")])
def test_a_weight_scales_each_prompts_loss(loss_type, pairing, tiny_model_dir, tmp_path):
    data = prompts().add_column("weight", [0.0, 0.5, 1.0, 2.0, 3.0, 0.25, 0.0, 1.5])
    weights = dict(zip(data["prompt"], data["weight"], strict=True))
    options = {"cls": Scripted, "loss_type": loss_type, "pairing": pairing, "num_generations": 3, "beta": BETA}
    trainer = moved(online(tiny_model_dir, tmp_path, trainer_kwargs={"train_dataset": data}, **options))
    single = moved(online(tiny_model_dir, tmp_path, **options))
    inputs = batch(trainer)
    loss, grads = learn(trainer, inputs)
    total, sums = 0.0, {}
    for prompt in inputs["prompt"]:
        each, each_grads = learn(single, {"prompt": [prompt]})
        total = total + weights[prompt] * each / len(inputs["prompt"])
        for name, value in each_grads.items():
            sums[name] = sums.get(name, 0) + weights[prompt] * value / len(inputs["prompt"])
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-6)
    for name, value in sums.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-3, atol=1e-6)
    means = trainer._means["train"].over_processes()
    assert means["pair_weight/mean"] == pytest.approx(sum(weights[p] for p in inputs["prompt"]) / 4)


def test_a_weight_scales_both_traces(tiny_model_dir, tmp_path):
    data = prompts().add_column("weight", [3.0] * 8)
    runs = []
    for kwargs in ({}, {"train_dataset": data}):
        trainer = moved(
            online(tiny_model_dir, tmp_path, cls=TwoTraces, loss_type="bias_variance", trainer_kwargs=kwargs)
        )
        runs.append(learn(trainer, batch(trainer))[0])
    torch.testing.assert_close(runs[1], 3 * runs[0])


def test_a_prompt_that_ties_shifts_no_column(tiny_model_dir, tmp_path):
    """The second prompt of the batch ties: the others keep their own values."""
    seen = []

    class Reads(Loss):
        columns = ("level",)

        def __call__(self, batch):
            seen.append(batch)
            return batch.delta

    def second_ties(completions, **kwargs):
        return [0.0 if i % 4 == 1 else float(len(text)) for i, text in enumerate(completions)]

    data = (
        prompts().add_column("level", [float(i) for i in range(8)]).add_column("weight", [1.0 + i for i in range(8)])
    )
    trainer = online(
        tiny_model_dir,
        tmp_path,
        cls=Scripted,
        trainer_kwargs={"train_dataset": data, "reward_funcs": second_ties},
    )
    trainer._terms.losses, trainer._data.columns = {"sigmoid": Reads()}, ["level", "weight"]
    inputs = batch(trainer)
    learn(trainer, inputs)
    levels = inputs["level"]
    assert seen[0].columns["level"].tolist() == [levels[0], levels[2], levels[3]]
    means = trainer._means["train"].over_processes()
    assert means["pair_weight/mean"] == pytest.approx((levels[0] + levels[2] + levels[3]) / 3 + 1)


# Without a reference


@pytest.fixture
def policy_alone(monkeypatch):
    """A loss that reads the policy alone, registered for one test."""
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))

    @register_loss("policy_alone")
    @dataclass(frozen=True)
    class PolicyAlone(Loss):
        reads = frozenset()

        def __call__(self, batch):
            assert batch.ref_chosen_logps is None and batch.ref_rejected_logps is None
            return -F.logsigmoid(batch.beta * (batch.chosen_logps - batch.rejected_logps))

    return "policy_alone"


def test_no_reference_where_none_is_read(policy_alone, tiny_model_dir, tmp_path):
    trainer = moved(
        online(
            tiny_model_dir,
            tmp_path,
            cls=Scripted,
            loss_type=policy_alone,
            beta=BETA,
            trainer_kwargs={"eval_dataset": prompts(4)},
        )
    )
    assert trainer.ref_model is None
    inputs = batch(trainer)
    found = []

    def formula(texts, logps, refs, lengths):
        found.append([BETA * value.item() for value in logps])
        return -F.logsigmoid(BETA * (logps[1] - logps[0]))

    assert_equal(learn(trainer, inputs), expected(trainer, inputs, formula))
    means = trainer._means["train"].over_processes()
    assert not {"objective/kl", "objective/non_score_reward", "objective/rlhf_reward"} & set(means)
    assert means["rewards/chosen"] == pytest.approx(sum(pair[1] for pair in found) / 4, rel=1e-4)
    assert means["rewards/rejected"] == pytest.approx(sum(pair[0] for pair in found) / 4, rel=1e-4)
    metrics = trainer.evaluate()
    assert "eval_loss" in metrics and "eval_objective/scores" in metrics and "eval_win_rate" not in metrics


def test_a_mix_with_a_loss_that_reads_the_reference_has_one(policy_alone, tiny_model_dir, tmp_path):
    trainer = online(tiny_model_dir, tmp_path, loss_type=["sigmoid", "offset"])
    assert trainer.ref_model is not None


@pytest.mark.parametrize("option", [{"mixture_coef": 0.5}, {"sync_ref_model": True}])
def test_options_that_need_a_reference_say_so(option, policy_alone):
    with pytest.raises(ValueError, match=r"needs a reference model, and a run of \['policy_alone'\] has none"):
        trl_ext.OnlineDPOConfig(output_dir="out", use_cpu=True, bf16=False, loss_type=policy_alone, **option)


def test_a_reference_that_is_not_read_is_refused(policy_alone, tiny_model_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with pytest.raises(ValueError, match=r"None of the losses \['policy_alone'\] reads a reference model"):
        online(tiny_model_dir, tmp_path, loss_type=policy_alone, trainer_kwargs={"ref_model": reference})
