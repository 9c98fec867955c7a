"""The first batch, scored in shared rows and in plain ones: what is right passes, what is wrong is seen, and costs a warning."""

import dataclasses
import logging

import pytest
import torch
from datasets import Dataset
from trl.trainer.utils import add_fused_lm_head

from tests.conftest import preference_rows
from tests.helpers import build, first_batch, loss_and_gradients
from tests.logprobs.families import EXACT, batch, tiny
from tests.logprobs.test_varlen import served  # noqa: F401
from tests.online.runs import Scripted, online
from tests.online.runs import batch as batch_of
from trl_ext import DPOConfig, DPOTrainer
from trl_ext.logprobs import Head, SharedPrefixLayout, Sharing, varlen
from trl_ext.rows import Rows, from_batch
from trl_ext.trainers import scoring, self_check
from trl_ext.trainers.scoring import Scorer
from trl_ext.trainers.self_check import one_more_rounding, why_differs


def rows_of(inputs, groups):
    inputs = dict(inputs)
    mask = inputs.pop("completion_mask")
    return Rows(inputs, mask, torch.arange(len(mask)) % groups, torch.arange(len(mask)))


def checked(name, dtype=torch.float32, unpadded=True, inputs=None, hidden_size=32):
    model = tiny(name, EXACT[name]).to(dtype)
    add_fused_lm_head(model, outputs=("log_probs",))
    scorer = Scorer(Head())
    return why_differs(
        lambda model, rows: scorer.forward(model, rows, ()).log_probs,
        model,
        rows_of(inputs or batch(prompts=(30, 20), members=3), 2),
        Sharing(hidden_size, unpadded=unpadded),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unpadded", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "gemma3_text", "mistral-window", "gpt2"])
def test_what_is_right_passes(name, unpadded, dtype, served):  # noqa: F811
    assert checked(name, dtype, unpadded) is None


def no_window(layout, mask):
    return layout, dataclasses.replace(mask, window=None)


def longer_window(layout, mask):
    return layout, dataclasses.replace(mask, window=mask.window and mask.window + 1)


def another_prompt(layout, mask):
    """The last sequence's first key is the last one's of the sequence before it."""
    sequences = mask.sequences
    keys, start = sequences.keys.clone(), sequences.key_ends[-2]
    keys[start] = keys[start - 1]
    return layout, dataclasses.replace(mask, sequences=dataclasses.replace(sequences, keys=keys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("fault", "name"), [(no_window, "qwen3-window"), (longer_window, "gemma3_text"), (another_prompt, "qwen3")]
)
def test_what_is_wrong_is_seen(fault, name, dtype, served, monkeypatch):  # noqa: F811
    attend = varlen.attend

    def wrong(query, key, value, mask, scale):
        return attend(query, key, value, fault(None, mask)[1], scale)

    monkeypatch.setattr(varlen, "attend", wrong)
    reason = checked(name, dtype)
    assert reason.startswith("their log-probabilities differ by ") and "and by rounding alone" in reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_mask_is_seen(dtype, monkeypatch):
    sees = SharedPrefixLayout.sees
    monkeypatch.setattr(SharedPrefixLayout, "sees", lambda *args: sees(*args) | True)
    assert checked("llama", dtype, unpadded=False).startswith("their log-probabilities differ by ")
    # Where so few rows would cost more than plain ones too
    few = batch(prompts=(3, 2), members=3)
    assert checked("llama", dtype, unpadded=False, inputs=few, hidden_size=1).startswith("their log-probabilities")


def test_a_gradient_that_is_wrong_alone_is_seen(served, monkeypatch):  # noqa: F811
    attend = varlen.attend
    monkeypatch.setattr(varlen, "attend", lambda q, k, *rest: attend(q, k.detach(), *rest))
    reason = checked("llama")
    assert reason.startswith("gradients of a length of ") and "log-probabilities" not in reason
    with torch.no_grad():
        assert checked("llama") is None  # nothing is trained
    monkeypatch.setattr(varlen, "attend", attend)
    measure = self_check._measure
    monkeypatch.setattr(
        self_check,
        "_measure",
        lambda forward, model, rows, parameters: measure(
            forward, model, rows, parameters if rows.layout is None else []
        ),
    )
    assert checked("llama").startswith("gradients of a length of ")  # none at all


def test_not_a_number_is_seen(served, monkeypatch):  # noqa: F811
    attend = varlen.attend
    monkeypatch.setattr(varlen, "attend", lambda *args: attend(*args) * float("nan"))
    assert "differ by nan nats" in checked("llama")


def test_what_fails_on_shared_rows(served, monkeypatch):  # noqa: F811
    def fail(*args):
        raise TypeError("no such mask")

    monkeypatch.setattr(varlen, "attend", fail)
    assert checked("llama") == "the model fails on them (TypeError: no such mask)"

    def run_out(*args):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(varlen, "attend", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        checked("llama")


def test_rows_that_are_compared():
    """Three completions each of the first two prompts, as they come, and no wider than these are."""
    prompt = torch.tensor([7, 4, 7, 9, 7, 4, 7])
    lengths = torch.tensor([2, 3, 2, 9, 4, 2, 8])
    ids = torch.arange(7 * 10).view(7, 10)
    attention = (torch.arange(10) < lengths.unsqueeze(1)).long()
    scored = attention * (torch.arange(10) > 0)
    inputs = {"input_ids": ids, "attention_mask": attention, "token_type_ids": ids + 1, "image": torch.arange(7.0)}
    few = self_check._few(Rows(inputs, scored, prompt, torch.arange(7)))
    assert few.prompt.tolist() == [7, 7, 7, 4, 4]
    assert torch.equal(few.inputs["input_ids"], ids[[0, 2, 4, 1, 5], :4])
    assert torch.equal(few.inputs["attention_mask"], attention[[0, 2, 4, 1, 5], :4])
    assert torch.equal(few.inputs["token_type_ids"], ids[[0, 2, 4, 1, 5], :4] + 1)
    assert few.inputs["image"].tolist() == [0, 2, 4, 1, 5]
    assert torch.equal(few.completion_mask, scored[[0, 2, 4, 1, 5], :4]) and few.layout is None


def test_tokens_that_are_compared():
    """Those that are scored, behind the virtual ones of a prompt that is learnt; the first of a row has nothing in front."""
    rows = Rows({}, torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]), torch.zeros(2), torch.arange(2))
    log_probs = torch.arange(10.0).view(2, 5)
    measured = self_check._measure(lambda model, rows: log_probs, None, rows, [])
    assert measured.log_probs.tolist() == [3, 4, 7] and measured.gradient is None


def test_rounding_by_hand():
    """Each layer's output is off by at most the precision of its dtype, and of autocast's where that is on."""
    model = tiny("llama", {})
    ids = torch.arange(5, 15).view(1, 10)
    seen = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=ids)
        with one_more_rounding(model) as precision:
            model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
            model(input_ids=ids)
            model(input_ids=ids)
            assert precision() == 2.0**-23
        _, _, changed, _, again = seen
        plain = seen[0]
        off = (changed / plain - 1).abs().max().item()
        assert 0.5 * 2.0**-23 < off < 2.0**-22
        assert not torch.equal(changed, again)
        with torch.autocast("cpu", torch.bfloat16), one_more_rounding(model) as precision:
            model(input_ids=ids)
            assert precision() == 2.0**-7
        with one_more_rounding(model.to(torch.float16)) as precision:
            model(input_ids=ids)
            assert precision() == 2.0**-10
    assert [len(layer._forward_hooks) for layer in model.model.layers] == [2, 0]


def test_coarse_products_in_float32(monkeypatch):
    hidden = torch.ones(1)
    assert self_check._precision(hidden) == 2.0**-23
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert self_check._precision(hidden) == 2.0**-10  # TF32 has ten bits
    assert self_check._precision(hidden.double()) == 2.0**-52


def test_tolerance_by_hand():
    """Log-probabilities of size 1 and noise of 0.01: three times as much passes in half precision, twenty times in full."""

    def measured(*values, gradient=None):
        return self_check.Measured(torch.tensor(values), None if gradient is None else torch.tensor(gradient))

    plain, noisy = measured(1.0, 1.0), measured(1.01, 0.99)
    for tolerance in (3.0, 20.0):
        off = 0.01 * tolerance
        assert self_check._difference(plain, measured(1 + 0.99 * off, 1 - 0.99 * off), noisy, tolerance) is None
        reason = self_check._difference(plain, measured(1 + 1.01 * off, 1 - 1.01 * off), noisy, tolerance)
        assert reason == f"their log-probabilities differ by {1.01 * off:.2g} nats, and by rounding alone 0.01"
    plain, noisy = (measured(1.0, gradient=gradient) for gradient in ([3.0, 4.0], [3.1, 4.0]))
    assert self_check._difference(plain, measured(1.0, gradient=[3.0, 4.29]), noisy, 3.0) is None
    reason = self_check._difference(plain, measured(1.0, gradient=[3.0, 4.31]), noisy, 3.0)
    assert reason == "gradients of a length of 5 differ by 0.31, and by rounding alone 0.1"
    # What is equal to the last bit may still round otherwise
    assert self_check._difference(measured(8.0), measured(8.000001), measured(8.0), 3.0) is None
    assert self_check._difference(measured(), measured(), measured(), 3.0) is None


# In the trainer


def ours(model_dir, folder, **options):
    return build(DPOTrainer, DPOConfig, model_dir, folder, **options)


@pytest.fixture
def wrong(monkeypatch):
    """Shared rows that attend wrongly."""
    attend = varlen.attend
    monkeypatch.setattr(varlen, "attend", lambda *args: attend(*args) * 1.1)


@pytest.fixture
def checks(monkeypatch):
    """Whether gradients were on, for each check that ran."""
    found = []
    check = scoring.why_differs

    def counted(*args):
        found.append(torch.is_grad_enabled())
        return check(*args)

    monkeypatch.setattr(scoring, "why_differs", counted)
    return found


def test_a_run_goes_on_in_plain_rows(tiny_model_dir, tmp_path, wrong, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = ours(tiny_model_dir, tmp_path, loss_type="offset", max_steps=3, save_steps=3)
        trainer.train()
    assert caplog.text.count("compared with plain rows on the first batch, their log-probabilities differ by") == 1
    plain = ours(tiny_model_dir, tmp_path / "plain", loss_type="offset", max_steps=3, share_prefix=False)
    plain.train()
    for parameter, other in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_prompts_that_must_be_shared_are_refused(tiny_model_dir, tmp_path, wrong):
    trainer = ours(tiny_model_dir, tmp_path, share_prefix=True)
    with pytest.raises(
        ValueError, match=r"`share_prefix=True`, but rows that share a prompt are not exact: their log"
    ):
        trainer.train()


def test_a_wrong_reference_is_seen(tiny_model_dir, tmp_path, wrong, caplog):
    """Precomputed log-probabilities are read from a cache later, so they are checked before they are computed."""
    with caplog.at_level(logging.WARNING):
        trainer = ours(tiny_model_dir, tmp_path, precompute_ref_log_probs=True)
    assert "compared with plain rows on the first batch" in caplog.text
    plain = ours(tiny_model_dir, tmp_path, precompute_ref_log_probs=True, share_prefix=False)
    assert trainer.train_dataset["ref_chosen_logps"][:] == plain.train_dataset["ref_chosen_logps"][:]


def test_the_check_runs_once(tiny_model_dir, tmp_path, checks):
    """For the policy and for the reference; evaluation beforehand has no gradients, and is followed by a check that has."""
    trainer = ours(
        tiny_model_dir, tmp_path, max_steps=2, trainer_kwargs={"eval_dataset": Dataset.from_list(preference_rows(4))}
    )
    trainer.evaluate()
    assert checks == [False, False]
    trainer.train()
    assert checks == [False, False, True]
    trainer.evaluate()
    assert checks == [False, False, True]
    checks.clear()
    trainer = ours(tiny_model_dir, tmp_path, max_steps=2)
    trainer.train()
    trainer.evaluate()
    assert checks == [False, True]
    checks.clear()
    ours(tiny_model_dir, tmp_path, max_steps=2, share_prefix=False).train()
    ours(tiny_model_dir, tmp_path, max_steps=2, logprob_backend="trl").train()
    assert checks == []


def test_processes_that_share_parameters_go_on_alike(tiny_model_dir, tmp_path, monkeypatch, caplog):
    """What one process finds holds for all of them, and one whose batch shares nothing takes part."""
    asked = []
    monkeypatch.setattr(scoring, "is_sharded", lambda model: True)
    monkeypatch.setattr(scoring, "gather_object", lambda found: asked.append(found) or ["the other's reason", *found])
    trainer = ours(tiny_model_dir, tmp_path)
    rows, _ = from_batch(first_batch(trainer))
    trainer._scorer(trainer.model, dataclasses.replace(rows, layout=None))
    assert asked == [[None]] and trainer._scorer.sharing is None
    assert "on the first batch, the other's reason." in caplog.text


def test_nothing_is_left_behind(tiny_model_dir, tmp_path, checks):
    """Neither gradients nor hooks nor draws of random numbers, and the loss is what it is without the check."""
    trainer = ours(tiny_model_dir, tmp_path, share_prefix=True)
    inputs = first_batch(trainer)
    state = torch.get_rng_state()
    loss = trainer.compute_loss(trainer.model, inputs)
    assert checks == [False, True]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert not any(module._forward_hooks for module in trainer.model.modules())
    again = trainer.compute_loss(trainer.model, inputs)
    assert checks == [False, True]
    assert torch.equal(loss, again)


@pytest.mark.parametrize("trained", ["layers", "embeddings"])
def test_reentrant_checkpointing_compares_no_gradients(trained, tiny_model_dir, tmp_path, checks, caplog, monkeypatch):
    """It gives none of parameters behind it, and refuses to give those in front of it alone."""
    measured, measure = [], self_check._measure
    monkeypatch.setattr(self_check, "_measure", lambda *args: measured.append(measure(*args)) or measured[-1])
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    results = []
    for share in (True, False):
        trainer = ours(tiny_model_dir, tmp_path, share_prefix=share, **options)
        if trained == "embeddings":
            trainer.model.model.layers.requires_grad_(False)
        trainer.model.gradient_checkpointing_enable({"use_reentrant": True})
        trainer.model.train()
        results.append(loss_and_gradients(trainer, first_batch(trainer)))
    assert checks == [False, True] and "compared with plain rows" not in caplog.text
    assert len(measured) == 6 and all(each.gradient is None for each in measured)
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, value in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], value, rtol=1e-4, atol=1e-6)


def test_online(tiny_model_dir, tmp_path, wrong, caplog):
    """Four completions of each prompt, the third of which would see the second."""
    results = []
    for share in ("auto", False):
        trainer = online(
            tiny_model_dir, tmp_path, cls=Scripted, loss_type="anchored", num_generations=4, share_prefix=share
        )
        with caplog.at_level(logging.WARNING):
            results.append(trainer.compute_loss(trainer.model, batch_of(trainer)))
    assert caplog.text.count("compared with plain rows on the first batch") == 1
    assert torch.equal(*results)
