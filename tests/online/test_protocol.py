"""What a loss may ask for, online: state, log-probs of tokens, log-probs under the policy that sampled."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

import trl_ext
from tests.helpers import parameters
from tests.online.runs import Scripted, batch, learn, length_reward, online, prompts
from tests.online.test_values import BETA, answers, assert_equal, expected, log_probs, moved
from trl_ext.losses import registry
from trl_ext.losses.base import Loss
from trl_ext.trainers.checkpoints import CONTENTS


@pytest.fixture
def register(monkeypatch):
    """Registers a loss for one test."""
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    return lambda name, cls: trl_ext.register_loss(name)(dataclass(frozen=True)(type(name, (cls,), {})))


class Centred(Loss):
    """`sigmoid` of delta less its running mean, which moves halfway to that of each micro-batch."""

    def init_state(self):
        return {"mean": torch.zeros((), dtype=torch.float64)}

    def update(self, state, batch, reduce=lambda sums: sums):
        delta = batch.delta.double()
        sums = reduce({"sum": delta.sum(), "count": torch.ones_like(delta).sum()})
        return {"mean": 0.5 * state["mean"] + 0.5 * sums["sum"] / sums["count"]}

    def __call__(self, batch):
        return -torch.nn.functional.logsigmoid(batch.beta * (batch.delta - batch.state["mean"].to(batch.delta.dtype)))


class CentredAfter(Centred):
    update_first: ClassVar[bool] = False


def mean_delta(trainer, inputs):
    """In float64 and without padding; the second completion is the longer one, and is chosen."""
    found = []
    expected(
        trainer,
        inputs,
        lambda texts, logps, refs, lengths: found.append(d := logps[1] - refs[1] - logps[0] + refs[0]) or d,
    )
    return sum(value.item() for value in found) / len(found)


@pytest.mark.parametrize("first", [True, False])
def test_state_moves_before_or_after_it_is_read(first, register, tiny_model_dir, tmp_path):
    register("centred", Centred if first else CentredAfter)
    trainer = moved(online(tiny_model_dir, tmp_path, cls=Scripted, loss_type="centred", beta=BETA))
    inputs = batch(trainer)
    mean = mean_delta(trainer, inputs)
    assert abs(mean) > 0.01
    state = 0.0
    for _ in range(3):
        after = 0.5 * state + 0.5 * mean
        read = after if first else state

        def formula(texts, logps, refs, lengths, read=read):
            return -torch.nn.functional.logsigmoid(BETA * (logps[1] - refs[1] - logps[0] + refs[0] - read))

        assert_equal(learn(trainer, inputs), expected(trainer, inputs, formula))
        state = after
        assert trainer._terms.state["centred"]["mean"].item() == pytest.approx(state, rel=1e-4)


def test_evaluation_and_batches_that_teach_nothing_leave_state_alone(register, tiny_model_dir, tmp_path):
    register("centred", Centred)
    trainer = moved(
        online(
            tiny_model_dir, tmp_path, cls=Scripted, loss_type="centred", trainer_kwargs={"eval_dataset": prompts(4)}
        )
    )
    learn(trainer, batch(trainer))
    before = trainer._terms.state["centred"]["mean"].item()
    assert before != 0
    trainer.evaluate()
    trainer.reward_funcs = [lambda prompts, **kwargs: [1.0] * len(prompts)]
    loss, _ = learn(trainer, batch(trainer))
    assert trainer._terms.state["centred"]["mean"].item() == before and loss == 0


def test_a_resumed_run_has_the_state(register, tiny_model_dir, tmp_path):
    register("centred", Centred)
    options = {"cls": Scripted, "loss_type": "centred", "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
    options |= {"save_strategy": "steps", "dataloader_num_workers": 0}
    whole = online(tiny_model_dir, tmp_path / "whole", **options)
    whole.train()
    half = tmp_path / "whole" / "checkpoint-2"
    saved = load_file(half / "loss_state.safetensors")
    assert list(saved) == ["centred/mean"] and saved["centred/mean"].dtype == torch.float64
    again = online(tiny_model_dir, tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(half))
    assert again._terms.state["centred"]["mean"].item() == whole._terms.state["centred"]["mean"].item() != 0
    for name, value in parameters(whole).items():
        assert torch.equal(value, parameters(again)[name]), name
    for name in ("loss_state.safetensors", CONTENTS):  # as where another trainer has saved
        (half / name).unlink()
    with pytest.raises(
        ValueError, match=r"holds the state \{\} of losses; this run needs \{'centred/mean': \(\(\), torch.float64\)\}"
    ):
        online(tiny_model_dir, tmp_path / "third", **options).train(resume_from_checkpoint=str(half))


# Tokens


class FirstTokens(Loss):
    """Chosen minus rejected log-ratio of the first two tokens of each completion."""

    reads: ClassVar[frozenset[str]] = frozenset({"ref_logps", "token_logps"})
    seen: ClassVar[list] = []

    def __call__(self, batch):
        tokens = batch.tokens
        self.seen.append(tokens)
        sides = []
        for logps, refs, turns in (
            (tokens.chosen_logps, tokens.ref_chosen_logps, tokens.chosen_turns),
            (tokens.rejected_logps, tokens.ref_rejected_logps, tokens.rejected_turns),
        ):
            first = (turns == 0) & ((turns == 0).cumsum(dim=1) <= 2)
            sides.append(((logps - refs) * first).sum(dim=1))
        return -torch.nn.functional.logsigmoid(batch.beta * (sides[0] - sides[1]))


def test_log_probs_of_tokens(register, tiny_model_dir, tmp_path):
    register("first_tokens", FirstTokens)
    FirstTokens.seen.clear()
    trainer = moved(online(tiny_model_dir, tmp_path, cls=Scripted, loss_type="first_tokens", beta=BETA))
    inputs = batch(trainer)
    found = learn(trainer, inputs)
    tokens = FirstTokens.seen[0]
    assert tokens.chosen_logps.shape == tokens.chosen_turns.shape == tokens.ref_rejected_logps.shape
    assert set(tokens.chosen_turns.unique().tolist()) == {-1, 0}
    assert not tokens.chosen_logps[tokens.chosen_turns == -1].any()
    lengths = [len(answers(prompt, 2, trainer.processing_class)[1][1]) for prompt in inputs["prompt"]]
    assert (tokens.chosen_turns == 0).sum(dim=1).tolist() == lengths

    # The plain way, on answers that are cut after two tokens
    networks = [type(each)(each.config).double().eval() for each in (trainer.model, trainer.ref_model)]
    for network, source in zip(networks, (trainer.model, trainer.ref_model), strict=True):
        network.load_state_dict({name: value.double() for name, value in source.state_dict().items()})
    total = 0.0
    for prompt in inputs["prompt"]:
        ids = trainer.processing_class(prompt)["input_ids"]
        short = [each[:2] for each in answers(prompt, 2, trainer.processing_class)[1]]
        logps = log_probs(networks[0], ids, short)
        with torch.no_grad():
            refs = log_probs(networks[1], ids, short)
        delta = logps[1] - refs[1] - logps[0] + refs[0]
        total = total - torch.nn.functional.logsigmoid(BETA * delta) / len(inputs["prompt"])
    total.backward()
    assert_equal(found, (total.detach(), {name: each.grad for name, each in networks[0].named_parameters()}))


# The policy that sampled


class Sampled(Loss):
    """Distance to the policy that sampled, of groups."""

    takes_groups: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"behaviour_logps"})
    seen: ClassVar[list] = []

    def __call__(self, batch):
        self.seen.append(batch)
        ratio = (batch.logps - batch.behaviour_logps).exp() * batch.scores
        return -torch.where(batch.mask, ratio, 0).sum(dim=1)


def test_log_probs_under_the_policy_that_sampled(register, tiny_model_dir, tmp_path):
    """It is the policy as it stands: ratios are 1, and gradients those of each completion's log-prob times its score."""
    register("sampled", Sampled)
    Sampled.seen.clear()
    trainer = moved(
        online(tiny_model_dir, tmp_path, cls=Scripted, loss_type="sampled", pairing="group", num_generations=3)
    )
    assert trainer.ref_model is None
    inputs = batch(trainer)
    found = learn(trainer, inputs)
    given = Sampled.seen[0]
    assert given.ref_logps is None and not given.behaviour_logps.requires_grad
    assert torch.equal(given.behaviour_logps, given.logps) and given.logps.shape == (4, 3)

    def formula(texts, logps, refs, lengths):
        return -sum((value - value.detach()).exp() * len(text) for value, text in zip(logps, texts, strict=True))

    assert_equal(found, expected(trainer, inputs, formula, count=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss_type": "sampled"},
            r"'sampled' reads log-probs under the policy that sampled the completions, which whole",
        ),
        (
            {"loss_type": "sampled", "pairing": "group", "mixture_coef": 0.5},
            r"\['sampled'\] read log-probs under the policy",
        ),
        (
            {"loss_type": "tokens_of_groups", "pairing": "group"},
            r"'tokens_of_groups' reads log-probs of tokens, which pairs",
        ),
    ],
)
def test_what_batches_do_not_hold_is_refused(options, message, register, tmp_path):
    class TokensOfGroups(Sampled):
        reads: ClassVar[frozenset[str]] = frozenset({"token_logps", "ref_logps"})

    class SampledWithReference(Sampled):
        reads: ClassVar[frozenset[str]] = frozenset({"behaviour_logps", "ref_logps"})

    register("sampled", SampledWithReference)
    register("tokens_of_groups", TokensOfGroups)
    with pytest.raises(ValueError, match=message):
        trl_ext.OnlineDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


# A step that somebody replaces


def test_a_step_of_ones_own(tiny_model_dir, tmp_path):
    """The first completion always wins: `Scores` of its values alone, and a `Selection` by numbers."""
    from trl_ext import Completions, Scores, Selection

    class Mine(Scripted):
        def score(self, inputs, completions: Completions) -> Scores:
            b = len(completions.prompts)
            return Scores(torch.tensor([[1.0, 0.0]] * b))

        def pair(self, completions: Completions, scores: Scores) -> Selection:
            b = len(completions.prompts)
            return Selection(completions, scores, torch.tensor([[i, b + i] for i in range(b - 1)]))  # not of the last

    trainer = moved(
        online(tiny_model_dir, tmp_path, cls=Mine, beta=BETA, trainer_kwargs={"reward_funcs": length_reward})
    )
    inputs = batch(trainer)
    loss, _ = learn(trainer, inputs)
    counted = {"prompt": inputs["prompt"][:-1]}

    def formula(texts, logps, refs, lengths):
        return -torch.nn.functional.logsigmoid(BETA * (logps[0] - refs[0] - logps[1] + refs[1]))

    theirs, _ = expected(trainer, counted, formula)
    assert loss.item() == pytest.approx(theirs.item() * 3 / 4, rel=1e-5)
    means = trainer._means["train"].over_processes()
    assert means["pairs/dropped_prompts"] == 0.25 and math.isclose(means["objective/scores"], 0.5)
