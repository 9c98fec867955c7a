"""What of TRL is wrapped, by hand: its fused forward, its loss, and its preparation of pairs."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import Dataset
from torch.distributed.tensor import Partial
from transformers import AutoTokenizer
from trl.trainer import dpo_trainer

from tests.conftest import preference_rows
from tests.helpers import build, first_batch
from trl_ext.logprobs import Divergence, Head
from trl_ext.trainers import trl_seam


def test_head_in_place_is_what_runs(tiny_model_dir, tmp_path, monkeypatch):
    trainer = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path)
    batch, seen = first_batch(trainer), []
    monkeypatch.setattr(
        Head, "__call__", lambda *args, real=Head.__call__, **kwargs: seen.append(1) or real(*args, **kwargs)
    )
    with trl_seam.head_in_place(Head("torch"), ()):
        ours = trl_seam.fused_forward(trainer.model, batch, router_logits=False)
    assert seen == [1]
    theirs = trl_seam.fused_forward(trainer.model, batch, router_logits=False)
    assert seen == [1]
    torch.testing.assert_close(ours.log_probs, theirs.log_probs)
    assert not ours.entropy.any() and theirs.entropy.any()


def test_gradients_of_a_sharded_head_are_averaged():
    sharded = SimpleNamespace(grad_fn=SimpleNamespace(dtensor_spec=SimpleNamespace(mesh=SimpleNamespace(ndim=2))))
    plain = SimpleNamespace(grad_fn=SimpleNamespace())
    trl_seam.forward._average_gradients(torch.nn.Parameter(torch.ones(1)), None, plain, sharded)
    assert sharded.grad_fn.grad_placements == [Partial("avg"), Partial("avg")] and not vars(plain.grad_fn)


def test_a_model_is_called_as_trl_calls_it():
    """Labels where the completion is; nothing is kept for generation; router logits where they are asked for."""
    calls = []
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[1, 1, 1]]),
        "completion_mask": torch.tensor([[0, 1, 0]]), "ref_chosen_logps": torch.zeros(1),
        "ref_rejected_logps": torch.zeros(1), "pixel_values": "image",
    }  # fmt: skip
    for router in (False, True):
        assert trl_seam.fused_forward(lambda **kwargs: calls.append(kwargs) or "output", inputs, router) == "output"
    for kwargs, router in zip(calls, (False, True), strict=True):
        assert kwargs.pop("labels").tolist() == [[-100, 6, -100]]
        assert torch.equal(kwargs.pop("input_ids"), inputs["input_ids"])
        assert torch.equal(kwargs.pop("attention_mask"), inputs["attention_mask"])
        extra = {"output_router_logits": True} if router else {}
        assert kwargs == {"use_cache": False, "fused_lm_head": True, "pixel_values": "image", **extra}


def test_outputs_that_are_there_stand_in_for_the_model():
    model = lambda *args, **kwargs: (args, kwargs)  # noqa: E731
    replay = trl_seam.Replay(model, "outputs", {"input_ids": "all rows", "attention_mask": "theirs"})
    assert replay(input_ids=1, fused_lm_head=True) == "outputs"
    # What else TRL asks of the model, it asks of all rows, of which it may have been given the first alone
    found = replay(2, input_ids="the first", attention_mask="theirs", use_cache=False)
    assert found == ((2,), {"input_ids": "all rows", "attention_mask": "theirs", "use_cache": False})


def test_metrics_that_are_taken_back():
    metrics = {"train": {"a": [1.0, 2.0], "b": [3.0], "entropy": [4.0]}, "eval": {"a": [5.0]}}
    trainer = SimpleNamespace(_metrics=metrics, model=SimpleNamespace(training=True))
    trl_seam.forget_metrics(trainer, ["a", "b"])
    assert metrics == {"train": {"a": [1.0], "entropy": [4.0]}, "eval": {"a": [5.0]}}
    trl_seam.forget_statistics(trainer, ("mean_logits", "is_top1"))
    assert metrics == {"train": {"a": [1.0]}, "eval": {"a": [5.0]}}
    trainer.model.training = False
    trl_seam.forget_metrics(trainer, ["a"])
    assert metrics == {"train": {"a": [1.0]}, "eval": {}}


def test_what_is_set_for_a_while_is_as_it_was_even_after_an_error():
    logged = {"train": {"a": [1.0]}, "eval": {}}
    trainer = SimpleNamespace(
        loss_types=["a", "b"], loss_weights=[2.0, 3.0], aux_loss_enabled=True, _metrics=logged, _total_train_tokens=7,
        precompute_ref_logps=False,
    )  # fmt: skip
    before = dict(vars(trainer))
    for record in (True, False):
        with pytest.raises(RuntimeError, match="stop"), trl_seam.only_term(trainer, "b", record):
            assert (trainer.loss_types, trainer.loss_weights, trainer.aux_loss_enabled) == (["b"], [1.0], record)
            assert (trainer._metrics is logged) == record and trainer._metrics.keys() == {"train", "eval"}
            if not record:
                trainer._metrics["train"]["new"].append(1.0)
                trainer._total_train_tokens = 9
            raise RuntimeError("stop")
        assert vars(trainer) == before and logged == {"train": {"a": [1.0]}, "eval": {}}
    with pytest.raises(RuntimeError, match="stop"), trl_seam.reference_in_inputs(trainer):
        assert trainer.precompute_ref_logps is True
        raise RuntimeError("stop")
    assert trainer.precompute_ref_logps is False


def test_nothing_but_the_policy_is_loaded(monkeypatch):
    def load(path):
        return path

    monkeypatch.setattr(dpo_trainer, "create_model_from_path", load)
    with trl_seam.no_reference("policy"):
        assert [dpo_trainer.create_model_from_path(name) for name in ("policy", "reference")] == ["policy", None]
        with ThreadPoolExecutor() as pool:  # another trainer, built meanwhile
            assert pool.submit(dpo_trainer.create_model_from_path, "other").result() == "other"
    with pytest.raises(RuntimeError, match="stop"), trl_seam.no_reference(torch.nn.Linear(1, 1)):
        assert dpo_trainer.create_model_from_path("reference") is None
        raise RuntimeError("stop")
    assert dpo_trainer.create_model_from_path is load


def test_reference_cache_key():
    dataset = Dataset.from_list(preference_rows(4))
    keyed = trl_seam.with_cache_key(dataset, 1024, None)
    assert keyed._fingerprint != dataset._fingerprint
    assert keyed._fingerprint == trl_seam.with_cache_key(dataset, 1024, None)._fingerprint
    assert keyed._fingerprint != trl_seam.with_cache_key(dataset, 512, None)._fingerprint
    assert keyed.to_list() == dataset.to_list()


def test_tokens_of_pairs_are_those_of_the_trainer(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rows = preference_rows(3)
    rows[1]["prompt"] = " what" * 50
    data = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])
    args = trl.DPOConfig(output_dir="out", use_cpu=True, bf16=False, max_length=8)
    found = trl_seam.tokenize_pairs(data, tokenizer, args)
    assert len(found) == 3  # also what is longer than `max_length`
    for row, given in zip(found, rows, strict=True):
        assert row["prompt_ids"] == tokenizer(given["prompt"])["input_ids"]
        for side in ("chosen", "rejected"):
            assert row[f"{side}_ids"] == [*tokenizer(given[side])["input_ids"], tokenizer.eos_token_id]


def test_the_cache_of_references_is_one_for_all_processes(monkeypatch, tmp_path):
    data = Dataset.from_list(preference_rows(2))
    own = trl_seam.with_cache_key(data, 1)
    assert "_get_cache_file_path" not in vars(own)
    monkeypatch.setattr(trl_seam.data, "PartialState", lambda: SimpleNamespace(num_processes=2))
    first = str(tmp_path / "cache-of-the-first.arrow")
    asked = []
    monkeypatch.setattr(Dataset, "_get_cache_file_path", lambda self, fingerprint: asked.append(fingerprint) or "own")
    monkeypatch.setattr(trl_seam.data, "broadcast_object_list", lambda paths: [first] if paths == ["own"] else paths)
    seen = []
    monkeypatch.setattr(trl_seam.data, "gather_object", lambda found: seen.append(found) or [True, *found])
    shared = trl_seam.with_cache_key(data, 1)
    assert shared._get_cache_file_path("abc") == first and asked == ["abc"] and seen == [[True]]
    monkeypatch.setattr(trl_seam.data, "gather_object", lambda found: [*found, False])
    with pytest.raises(
        ValueError, match=f"keeps the reference log-probs in {tmp_path}, which not every process can read"
    ):
        shared._get_cache_file_path("abc")


def test_a_divergence_comes_out_of_the_forward(tiny_model_dir, tmp_path):
    """In the field of WPO, which TRL's loss reads under `use_weighting` alone. It has a gradient, and nothing else changes."""
    trainer = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path)
    batch = first_batch(trainer)
    scored = batch["completion_mask"][:, 1:] != 0
    with torch.no_grad(), trl_seam.projections_in_place(copied=True) as found:
        nothing = trl_seam.fused_forward(trainer.ref_model, batch, router_logits=False)
    assert len(found) == 1 and not nothing.log_probs.any()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = trainer.ref_model(**inputs).logits[:, :-1][scored]
    torch.testing.assert_close(found[0].logits(torch.arange(len(logits))), logits)
    assert found[0].weight.data_ptr() != trainer.ref_model.lm_head.weight.data_ptr()

    def gap(first, second):
        return ((first - 2 * second) ** 2).sum(1)

    numbers = torch.arange(len(logits)).masked_fill(torch.arange(len(logits)) == 1, -1)
    with trl_seam.head_in_place(Head("torch"), None, Divergence(gap, tuple(found), numbers)):
        ours = trl_seam.fused_forward(trainer.model, batch, router_logits=False)
    expected = (logits**2).sum(1)  # both begin as the same model
    expected[1] = 0
    field = ours[trl_seam.DIVERGENCE]
    torch.testing.assert_close(field[scored], expected)
    assert not field[~scored].any() and field.requires_grad
    with trl_seam.head_in_place(Head("torch"), None):
        plain = trl_seam.fused_forward(trainer.model, batch, router_logits=False)
    assert plain.get(trl_seam.DIVERGENCE) is None
    for name in ("log_probs", "entropy", "mean_logits", "is_top1"):
        assert torch.equal(ours[name], plain[name]), name
