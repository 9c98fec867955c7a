"""What a loss asks for reaches it: log-probs of tokens with their turns, and those under the policy that sampled."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import build, first_batch, loss_and_gradients
from tests.plain import assert_equals_plain, token_logps
from tests.stateful import keep_registry
from trl_ext.losses.base import Loss


SEEN: list = []


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """`discounted` reads tokens, `discounted_alone` those of the policy alone, `sampled` the policy that sampled."""
    keep_registry(monkeypatch)
    SEEN.clear()

    @trl_ext.register_loss("discounted")
    @dataclass(frozen=True)
    class Discounted(Loss):
        """`-log sigma(beta sum_t gamma^t logratio_t)`, of the chosen less that of the rejected completion; t from 0."""

        reads: ClassVar[frozenset[str]] = frozenset({"ref_logps", "token_logps"})
        gamma: float = 0.9

        def _sum(self, logps, ref_logps, turns):
            discount = self.gamma ** ((turns >= 0).cumsum(1) - 1)
            return (discount * (logps if ref_logps is None else logps - ref_logps)).sum(1)

        def __call__(self, batch):
            SEEN.append(batch)
            tokens = batch.tokens
            chosen = self._sum(tokens.chosen_logps, tokens.ref_chosen_logps, tokens.chosen_turns)
            rejected = self._sum(tokens.rejected_logps, tokens.ref_rejected_logps, tokens.rejected_turns)
            return -F.logsigmoid(batch.beta * (chosen - rejected))

    @trl_ext.register_loss("discounted_alone")
    @dataclass(frozen=True)
    class DiscountedAlone(Discounted):
        reads: ClassVar[frozenset[str]] = frozenset({"token_logps"})

    @trl_ext.register_loss("sampled")
    @dataclass(frozen=True)
    class Sampled(Loss):
        """Squared log-ratio to the policy that sampled, averaged over a group."""

        reads: ClassVar[frozenset[str]] = frozenset({"behaviour_logps"})
        takes_groups: ClassVar[bool] = True

        def __call__(self, batch):
            SEEN.append(batch)
            return ((batch.logps - batch.behaviour_logps) ** 2 * batch.mask).sum(1) / batch.mask.sum(1)


def trainer(model_dir, tmp_path, loss_type, dataset=None, reference=None, **options):
    options = {"train_sampling_strategy": "sequential", "share_prefix": False, "beta": 0.5, **options}
    trainer_kwargs = {} if reference is None else {"ref_model": reference}
    return build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, model_dir, tmp_path, loss_type=loss_type, dataset=dataset,
        trainer_kwargs=trainer_kwargs, **options,
    )  # fmt: skip


@pytest.fixture
def reference(tiny_model_dir):
    """One that differs from the policy."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


# Tokens


def discounted(policy, reference, example):
    """The loss of one pair, token by token."""
    sums = []
    for side in ("chosen_ids", "rejected_ids"):
        logps = token_logps(policy, example["prompt_ids"], example[side])
        if reference is not None:
            with torch.no_grad():
                ref_logps = token_logps(reference, example["prompt_ids"], example[side])
            logps = logps - ref_logps
        sums.append(sum(0.9**t * value for t, value in enumerate(logps)))
    return -F.logsigmoid(0.5 * (sums[0] - sums[1]))


@pytest.mark.parametrize("options", [{}, {"share_prefix": True}, {"logprob_backend": "trl"}], ids=str)
def test_tokens_equal_the_plain_way(options, tiny_model_dir, tmp_path, reference):
    ours = trainer(tiny_model_dir, tmp_path, "discounted", reference=reference, **options)
    batch = first_batch(ours)
    loss, gradients = loss_and_gradients(ours, batch)
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    theirs = copy.deepcopy(reference).double()
    examples = list(ours.train_dataset.select(range(4)))
    expected = torch.stack([discounted(policy, theirs, example) for example in examples]).mean()
    assert_equals_plain(loss, gradients, expected, policy)
    # Token by token, where it stands in its row; elsewhere 0, and turn -1
    (seen,) = SEEN
    for row, example in enumerate(examples):
        for side in ("chosen", "rejected"):
            start, length = len(example["prompt_ids"]) - 1, len(example[f"{side}_ids"])
            here = slice(start, start + length)
            turns = getattr(seen.tokens, f"{side}_turns")[row]
            assert turns.dtype == torch.int64 and turns[here].tolist() == [0] * length
            assert (turns >= 0).sum() == length and set(turns.tolist()) <= {0, -1}
            for model, name in ((policy, f"{side}_logps"), (theirs, f"ref_{side}_logps")):
                values = getattr(seen.tokens, name)[row]
                with torch.no_grad():
                    plain = token_logps(model, example["prompt_ids"], example[f"{side}_ids"])
                torch.testing.assert_close(values[here].double(), plain, rtol=1e-4, atol=1e-5, check_dtype=False)
                assert not values[turns < 0].any()


def test_tokens_without_a_reference(tiny_model_dir, tmp_path):
    ours = trainer(tiny_model_dir, tmp_path, "discounted_alone")
    assert ours.ref_model is None
    loss, _ = loss_and_gradients(ours, first_batch(ours))
    assert SEEN[0].tokens.ref_chosen_logps is None and SEEN[0].ref_chosen_logps is None
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    examples = ours.train_dataset.select(range(4))
    expected = torch.stack([discounted(policy, None, example) for example in examples]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    # Without it, a loss beside one that reads tokens is given none of the reference
    mixed = trainer(tiny_model_dir, tmp_path, ["discounted_alone", "offset"])
    loss_and_gradients(mixed, first_batch(mixed))
    assert mixed.ref_model is not None and SEEN[1].tokens.ref_chosen_logps is not None


def test_other_losses_have_no_tokens(tiny_model_dir, tmp_path, monkeypatch):
    ours = trainer(tiny_model_dir, tmp_path, "length_regularized")
    loss = type(ours._terms.losses["length_regularized"])
    before = loss.__call__
    monkeypatch.setattr(loss, "__call__", lambda self, batch: SEEN.append(batch) or before(self, batch))
    loss_and_gradients(ours, first_batch(ours))
    assert SEEN[0].tokens is None and SEEN[0].state == {}


def test_tokens_beside_pairs_with_empty_traces(tiny_model_dir, tmp_path, reference):
    """Rows that lack one of the pairs are among them: the tokens are those of the traced pair, none where there is none."""
    rows = preference_rows(4)
    rows[0] |= {"chosen_empty_trace": None, "rejected_empty_trace": None}
    rows[1] |= {"chosen": None, "rejected": None}
    ours = trainer(
        tiny_model_dir, tmp_path, ["discounted", "bias_variance"], Dataset.from_list(rows), reference, loss_weights=[2.0, -1.0]
    )  # fmt: skip
    loss, _ = loss_and_gradients(ours, first_batch(ours))
    alone = trainer(tiny_model_dir, tmp_path, "bias_variance", Dataset.from_list(rows), reference)
    other, _ = loss_and_gradients(alone, first_batch(alone))
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    theirs = copy.deepcopy(reference).double()
    examples = list(ours.train_dataset)
    with torch.no_grad():
        parts = [discounted(policy, theirs, example) for i, example in enumerate(examples) if i != 1]
    # Of the row without a traced pair the sums are 0: log 2
    expected = (sum(parts) + torch.tensor(2.0).log()) / 4
    assert loss.item() == pytest.approx(2 * expected.item() - other.item(), rel=1e-5)
    assert not (SEEN[0].tokens.chosen_turns[1] >= 0).any() and not SEEN[0].tokens.chosen_logps[1].any()
    lengths = [
        len(example["further_pairs"][0]["chosen_ids"]) if example["further_pairs"] else 0 for example in examples
    ]
    assert (SEEN[0].empty_trace.tokens.chosen_turns >= 0).sum(1).tolist() == lengths and lengths[0] == 0 < lengths[1]


def test_tokens_with_precomputed_references_are_refused(tiny_model_dir, tmp_path):
    with pytest.raises(
        ValueError, match=r"'discounted' reads the reference's log-probs of tokens.*Set `precompute_ref_log_pr"
    ):
        trainer(tiny_model_dir, tmp_path, "discounted", precompute_ref_log_probs=True)


def groups(**columns):
    words = [" good", " bad film", " slow sad film", " very long sad film"]
    rows = [
        {"prompt": "what a", "completions": words, "scores": [0.0, 2.0, 1.0, 3.0]},
        {"prompt": "why", "completions": words[:2], "scores": [1.0, 0.0]},
        {"prompt": "how", "completions": words[1:], "scores": [5.0, 4.0, 6.0]},
    ]
    return Dataset.from_list(
        [{**row, **{name: values[i] for name, values in columns.items()}} for i, row in enumerate(rows)]
    )


def test_tokens_of_groups(tiny_model_dir, tmp_path, reference):
    """A loss on pairs is given best and worst; one that takes whole groups would have to be given a table for each."""
    ours = trainer(tiny_model_dir, tmp_path, ["discounted", "anchored"], groups(), reference)
    loss_and_gradients(ours, first_batch(ours))
    lengths = [[len(row[f"{side}_ids"]) for row in ours.train_dataset] for side in ("chosen", "rejected")]
    tokens = SEEN[0].tokens
    assert [(turns >= 0).sum(1).tolist() for turns in (tokens.chosen_turns, tokens.rejected_turns)] == lengths

    @trl_ext.register_loss("grouped_tokens")
    @dataclass(frozen=True)
    class GroupedTokens(Loss):
        takes_groups: ClassVar[bool] = True
        reads: ClassVar[frozenset[str]] = frozenset({"ref_logps", "token_logps"})

    with pytest.raises(ValueError, match=r"'grouped_tokens' reads log-probs of tokens, which pairs have"):
        trainer(tiny_model_dir, tmp_path, "grouped_tokens", groups())


def test_tokens_under_ld_alpha_are_refused(tiny_model_dir, tmp_path):
    with pytest.raises(
        ValueError, match=r"'discounted' reads log-probs of tokens, which `ld_alpha=0.5` \(LD-DPO\) does not w"
    ):
        trainer(tiny_model_dir, tmp_path, ["discounted", "sigmoid"], ld_alpha=0.5)


# The policy that sampled


def test_behaviour_reaches_the_batch_in_its_order(tiny_model_dir, tmp_path):
    """Given in the order of each group's completions; in the batch best, worst, the others, as the scores are."""
    data = groups(behaviour_logps=[[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0], [-7, -8, -9]])
    ours = trainer(tiny_model_dir, tmp_path, "sampled", data)
    assert ours.ref_model is None
    loss, _ = loss_and_gradients(ours, first_batch(ours))
    (batch,) = SEEN
    assert batch.scores.tolist() == [[3, 0, 2, 1], [1, 0, 0, 0], [6, 4, 5, 0]]
    assert batch.behaviour_logps.tolist() == [[-4, -1, -2, -3], [-5, -6, 0, 0], [-9, -8, -7, 0]]
    assert batch.mask.sum(1).tolist() == [4, 2, 3] and batch.ref_logps is None
    # The loss, from each completion alone
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    tokenizer = ours.processing_class
    parts = []
    with torch.no_grad():
        for row in data:
            prompt = tokenizer(row["prompt"])["input_ids"]
            squares = []
            for text, sampled in zip(row["completions"], row["behaviour_logps"], strict=True):
                ids = tokenizer(row["prompt"] + text + tokenizer.eos_token)["input_ids"][len(prompt) :]
                squares.append((token_logps(policy, prompt, ids).sum().item() - sampled) ** 2)
            parts.append(sum(squares) / len(squares))
    assert loss.item() == pytest.approx(sum(parts) / 3, rel=1e-5)
    ours.train()
    ours.evaluate()


def test_behaviour_that_is_not_there_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(
        ValueError, match=r"'sampled' reads log-probs under the policy that sampled.*'behaviour_logps'"
    ):
        trainer(tiny_model_dir, tmp_path, "sampled", groups())
    with pytest.raises(
        ValueError, match=r"'sampled' reads log-probs under the policy that sampled.*`pairing=\"group\"`"
    ):
        trainer(tiny_model_dir, tmp_path, "sampled")
    data = groups(behaviour_logps=[[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0], [-7.0, -8.0, -9.0]])
    with pytest.raises(ValueError, match=r"'sampled' reads .*`pairing=\"group\"`"):
        trainer(tiny_model_dir, tmp_path, "sampled", data, pairing="best_worst")


@pytest.mark.parametrize("wrong", [[-5.0], [-5.0, -6.0, -7.0], [], None, [-5.0, float("nan")], [-5.0, None]], ids=str)
def test_behaviour_of_another_form_is_refused(wrong, tiny_model_dir, tmp_path):
    data = groups(behaviour_logps=[[-1.0, -2.0, -3.0, -4.0], wrong, [-7.0, -8.0, -9.0]])
    with pytest.raises(ValueError, match=r"Row 1 of the train dataset.*behaviour_logps"):
        trainer(tiny_model_dir, tmp_path, "sampled", data)


def test_behaviour_of_an_evaluation_dataset_is_asked_for_too(tiny_model_dir, tmp_path):
    data = groups(behaviour_logps=[[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0], [-7.0, -8.0, -9.0]])
    ours = trainer(tiny_model_dir, tmp_path, "sampled", data)
    with pytest.raises(ValueError, match="'behaviour_logps'"):
        ours.evaluate(groups())
