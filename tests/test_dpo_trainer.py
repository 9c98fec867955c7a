"""Our losses in the trainer: the right numbers through every path that TRL has."""

import copy
from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import (
    OUR_LOSSES,
    assert_same_parameters,
    build,
    first_batch,
    history,
    loss_and_gradients,
    parameters,
)
from trl_ext import DPOConfig, DPOTrainer, PreferenceBatch, get_loss
from trl_ext.trainers.reference import SyncReferenceAdapter, add_reference_adapter


METRICS = {
    "offset": {"offset/mean"},
    "anchored": {"target/mean"},
    "margin_adaptive": {"weight/mean", "weight/min", "weight/max"},
    "bias_variance": {"empty_trace/margins", "empty_trace/accuracies", "empty_trace/share"},
    "length_regularized": {"length_gap/mean", "length_margin/mean"},
    "inpo": {"margin/mean"},
    "sppo_soft": {"target/chosen", "target/rejected"},
}
SHARED_METRICS = {"lengths/chosen", "lengths/rejected", "logratios/chosen", "logratios/rejected"}


def completion_logps(model, input_ids, attention_mask, completion_mask, ld_alpha=None):
    """Sum of completion log-probs from full logits, in float64: the slow, plain way, row by row."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits.double()[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    rows = [values[mask.bool()] for values, mask in zip(logps, completion_mask[:, 1:], strict=True)]
    if ld_alpha is None:
        return torch.stack([row.sum() for row in rows])
    # LD-DPO: what goes beyond the shorter of the two completions of a pair counts `ld_alpha` times
    pairs = len(rows) // 2
    shorter = [min(len(rows[i % pairs]), len(rows[i % pairs + pairs])) for i in range(len(rows))]
    return torch.stack([row[:n].sum() + ld_alpha * row[n:].sum() for row, n in zip(rows, shorter, strict=True)])


def plain_batch(trainer, policy, reference, batch, prefix="", ld_alpha=None):
    """The batch a loss should see, worked out without TRL or our trainer; the policy keeps its gradient."""
    sides = [batch[prefix + key] for key in ("input_ids", "attention_mask", "completion_mask")]
    logps = completion_logps(policy, *sides, ld_alpha)
    with torch.no_grad():
        ref_logps = completion_logps(reference, *sides, ld_alpha)
    lengths = sides[2].sum(1)
    columns = {name: batch[name] for name in trainer._numeric_columns}
    return PreferenceBatch(*logps.chunk(2), *ref_logps.chunk(2), *lengths.chunk(2), beta=trainer.beta, columns=columns)


@pytest.mark.parametrize(
    ("loss_type", "loss_kwargs", "ld_alpha"),
    [
        *((name, {}, None) for name in OUR_LOSSES),
        # Losses that read lengths, on both pairs
        ("bias_variance", {"base": "ipo", "alpha": 0.3}, None),
        ("bias_variance", {"base": "length_regularized", "alpha": 0.3}, None),
        *((name, {}, 0.3) for name in ("offset", "bias_variance", "sppo_soft")),
    ],
)
def test_loss_and_gradients_equal_the_plain_way(loss_type, loss_kwargs, ld_alpha, tiny_model_dir, tmp_path):
    # A reference that differs from the policy, so that no term vanishes
    torch.manual_seed(1)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for parameter in reference.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=loss_type, loss_kwargs=loss_kwargs or None,
        ld_alpha=ld_alpha, trainer_kwargs={"ref_model": reference},
    )  # fmt: skip
    batch = first_batch(trainer)
    loss, gradients = loss_and_gradients(trainer, batch)

    policy, reference = (
        AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64),
        copy.deepcopy(reference).double(),
    )
    expected_batch = plain_batch(trainer, policy, reference, batch, ld_alpha=ld_alpha)
    if loss_type == "bias_variance":
        empty = plain_batch(trainer, policy, reference, batch, "empty_trace_", ld_alpha)
        expected_batch = PreferenceBatch(**{**vars(expected_batch), "empty_trace": empty})
    expected = get_loss(loss_type, **loss_kwargs)(expected_batch).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    largest = max(parameter.grad.abs().max().item() for parameter in policy.parameters())
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(
            gradients[name].double(), parameter.grad, rtol=1e-4, atol=3e-6 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("peft", [False, True], ids=["full", "peft"])
@pytest.mark.parametrize(
    ("loss_type", "loss_kwargs"),
    [
        ("offset", {"alpha": 0.0}),
        ("length_regularized", {"alpha": 0.0}),
        ("bias_variance", {"alpha": 1.0}),
    ],
)
def test_limit_trains_like_trls_sigmoid(loss_type, loss_kwargs, peft, tiny_model_dir, tmp_path):
    kwargs = {
        "trainer_kwargs": {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")}
        if peft
        else None
    }
    theirs = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path / "trl", **kwargs)
    ours = build(
        DPOTrainer,
        DPOConfig,
        tiny_model_dir,
        tmp_path / "ours",
        loss_type=loss_type,
        loss_kwargs=loss_kwargs,
        **kwargs,
    )
    for trainer in (theirs, ours):
        trainer.train()
        trainer.evaluate()
    assert_same_parameters(parameters(theirs), parameters(ours), rtol=1e-4, atol=1e-5)
    # Every metric of TRL's is there, with its value, beside ours
    extra = METRICS[loss_type] | SHARED_METRICS
    for expected, entry in zip(history(theirs), history(ours), strict=True):
        prefix = "eval_" if any(key.startswith("eval_") for key in entry) else ""
        if "train_loss" not in entry:
            assert entry.keys() == expected.keys() | {prefix + key for key in extra}
        for key, value in expected.items():
            if key not in ("num_tokens", "eval_num_tokens") or loss_type != "bias_variance":
                assert entry[key] == pytest.approx(value, rel=2e-3, abs=2e-4), key


def test_anchored_without_scores_is_trls_sigmoid(tiny_model_dir, tmp_path):
    dataset = Dataset.from_list(preference_rows(8)).select_columns(["prompt", "chosen", "rejected"])
    theirs = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path / "trl", dataset=dataset)
    ours = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "ours", dataset=dataset, loss_type="anchored")
    theirs.train()
    ours.train()
    assert_same_parameters(parameters(theirs), parameters(ours), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss_type", OUR_LOSSES)
@pytest.mark.parametrize(
    "overrides",
    [{"precompute_ref_log_probs": True}, {"gradient_checkpointing": False}, {"remove_unused_columns": False}],
    ids=lambda overrides: "-".join(overrides),
)
def test_option_that_changes_no_number(loss_type, overrides, tiny_model_dir, tmp_path):
    runs = []
    for options in (overrides, {}):
        trainer = build(
            DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / str(len(runs)), loss_type=loss_type, **options
        )
        trainer.train()
        evaluation = trainer.evaluate()
        runs.append(trainer)
    assert METRICS[loss_type] | SHARED_METRICS <= history(runs[0])[0].keys()
    assert {f"eval_{name}" for name in METRICS[loss_type]} <= evaluation.keys()
    assert_same_parameters(parameters(runs[1]), parameters(runs[0]), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("loss_type", ["offset", "anchored", "bias_variance", "sppo_soft"])
def test_half_precision_is_close_to_full(loss_type, tiny_model_dir, tmp_path):
    losses = []
    for bf16 in (True, False):
        trainer = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=loss_type, bf16=bf16)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter *= 1.1  # the policy moves away from its reference
        trainer.train()
        losses.append([entry["loss"] for entry in history(trainer)[:3]])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("loss_type", ["sigmoid", "offset", "sppo_soft"])
def test_a_reference_that_follows_the_policy(loss_type, tiny_model_dir, tmp_path):
    """Every second step the reference is `0.25 policy + 0.75 reference`, by hand from the weights at that step."""
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append({name: value.detach().clone() for name, value in model.state_dict().items()})

    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=loss_type, max_steps=4, learning_rate=1e-2,
        sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.25, trainer_kwargs={"callbacks": [Watch()]},
    )  # fmt: skip
    expected = {name: value.detach().clone() for name, value in trainer.ref_model.state_dict().items()}
    trainer.train()
    for step in (1, 3):
        expected = {name: 0.25 * seen[step][name] + 0.75 * value for name, value in expected.items()}
    for name, value in trainer.ref_model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    # The third step is the first that is measured against the moved reference
    margins = [entry["rewards/margins"] for entry in history(trainer)[:4]]
    assert margins[0] == pytest.approx(0, abs=1e-6) and abs(margins[2]) > 1e-6


def test_an_adapter_that_follows_another():
    """The reference adapter moves by `ref_model_mixup_alpha`, every `ref_model_sync_steps` steps."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(3, 3))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    add_reference_adapter(model)
    of = lambda name: {n: p for n, p in model.named_parameters() if f".{name}." in n}  # noqa: E731
    before = {name: value.detach().clone() for name, value in of("ref").items()}
    assert len(before) == 2 and not any(value.requires_grad for value in of("ref").values())
    for name, value in of("default").items():
        torch.testing.assert_close(before[name.replace(".default.", ".ref.")], value.detach())
        value.data += 1.0
    args = SimpleNamespace(ref_model_sync_steps=3, ref_model_mixup_alpha=0.25)
    callback = SyncReferenceAdapter()
    for step in (1, 2):
        callback.on_step_end(args, SimpleNamespace(global_step=step), None, model=model)
    for name, value in of("ref").items():
        assert torch.equal(value, before[name])
    callback.on_step_end(args, SimpleNamespace(global_step=3), None, model=model)
    for name, value in of("ref").items():
        torch.testing.assert_close(value, before[name] + 0.25)


@pytest.mark.parametrize("loss_type", OUR_LOSSES)
def test_accumulation_equals_one_batch(loss_type, tiny_model_dir, tmp_path):
    runs = [
        build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / str(size), loss_type=loss_type, max_steps=2, optim="sgd",
              learning_rate=0.1, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        for size in (8, 2)
    ]  # fmt: skip
    for trainer in runs:
        trainer.train()
    assert_same_parameters(parameters(runs[0]), parameters(runs[1]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss_type", OUR_LOSSES)
def test_stream_equals_dataset(loss_type, tiny_model_dir, tmp_path):
    rows = preference_rows(12)
    runs = []
    for dataset in (Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        trainer = build(
            DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / type(dataset).__name__, loss_type=loss_type, dataset=dataset,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer.train()
        runs.append(trainer)
    assert isinstance(runs[1].train_dataset, IterableDataset)
    assert_same_parameters(parameters(runs[0]), parameters(runs[1]))


def test_mixture_is_the_weighted_sum(tiny_model_dir, tmp_path):
    def gradients(loss_type, **overrides):
        trainer = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=loss_type, **overrides)
        return loss_and_gradients(trainer, first_batch(trainer))

    mixture = ["sft", "offset", "bias_variance"]
    loss, grads = gradients(mixture, loss_weights=[0.5, 2.0, -0.25], loss_kwargs={"offset": {"alpha": 0.5}})
    parts = [gradients("sft"), gradients("offset", loss_kwargs={"alpha": 0.5}), gradients("bias_variance")]
    weights = [0.5, 2.0, -0.25]
    assert loss.item() == pytest.approx(
        sum(w * part[0].item() for w, part in zip(weights, parts, strict=True)), rel=1e-5
    )
    for name in grads:
        expected = sum(w * part[1][name] for w, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(grads[name], expected, rtol=1e-4, atol=1e-6)


def test_mixture_logs_each_loss(tiny_model_dir, tmp_path):
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=["sigmoid", "offset", "margin_adaptive"]
    )
    trainer.train()
    assert {"loss/offset", "loss/margin_adaptive", "offset/mean", "weight/mean"} <= history(trainer)[0].keys()


@pytest.mark.parametrize("loss_type", OUR_LOSSES)
def test_adapter_that_was_trained_before(loss_type, tiny_model_dir, tmp_path):
    """The reference of a PEFT model that comes with an adapter is that adapter, so the first loss is that at delta 0."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**_options(tmp_path, loss_type=loss_type)),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        train_dataset=Dataset.from_list(preference_rows(8)),
    )
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["logratios/chosen"] == pytest.approx(0, abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)


def _options(tmp_path, **overrides):
    from tests.helpers import options

    return options(tmp_path, **overrides)


def test_evaluation_of_a_dict_and_of_a_new_dataset(tiny_model_dir, tmp_path):
    dataset = Dataset.from_list(preference_rows(8))
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=["bias_variance", "offset"], dataset=dataset,
        precompute_ref_log_probs=True, trainer_kwargs={"eval_dataset": {"a": dataset, "b": dataset.select(range(4))}},
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_offset/mean", "eval_empty_trace/share"} <= metrics.keys()
    new = trainer.evaluate(Dataset.from_list(preference_rows(8)))
    assert new["eval_loss"] == pytest.approx(metrics["eval_a_loss"], rel=1e-6)
    with pytest.raises(ValueError, match=r"score_rejected.*eval dataset"):
        trainer.evaluate(dataset.remove_columns("score_rejected"))


def test_stale_reference_cache_is_not_read(tiny_model_dir, tmp_path):
    """Precomputed reference log-probs depend on `max_length` and `ld_alpha`, which TRL's cache key leaves out."""
    path = tmp_path / "data.jsonl"
    Dataset.from_list(preference_rows(8)).to_json(path)
    sums = []
    for overrides in ({}, {"ld_alpha": 0.0}, {"max_length": 14}, {}):
        trainer = build(
            DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "out", precompute_ref_log_probs=True,
            dataset=Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache")), **overrides,
        )  # fmt: skip
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
        sums.append(sum(trainer.train_dataset["ref_chosen_logps"]))
    assert sums[0] == sums[3]
    assert len(set(sums)) == 3


@pytest.mark.parametrize("loss_type", OUR_LOSSES)
def test_resumed_run_equals_the_uninterrupted_one(loss_type, tiny_model_dir, tmp_path):
    kwargs = {"loss_type": loss_type, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "run", **kwargs)
    whole.train()
    resumed = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "run", **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same_parameters(parameters(whole), parameters(resumed))
    for entry, again in zip(history(whole)[2:4], history(resumed)[2:4], strict=True):
        # TRL counts the tokens of a process, not of a run
        assert {**entry, "num_tokens": 0} == {**again, "num_tokens": 0}
    saved = torch.load(tmp_path / "run" / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert saved.loss_type == [loss_type]


def test_saved_model_loads(tiny_model_dir, tmp_path):
    trainer = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type="offset")
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert_same_parameters(parameters(trainer), dict(loaded.named_parameters()))


def test_model_card(tiny_model_dir, tmp_path):
    trainer = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=["sigmoid", "offset", "bias_variance"],
        loss_weights=[1.0, 0.5, 0.25], loss_kwargs={"offset": {"alpha": 0.5}},
    )  # fmt: skip
    trainer.train()
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert "https://huggingface.co/papers/2402.10571" in card
    assert "https://huggingface.co/papers/2510.05095" in card
    assert '| `offset` | 0.5 | `{"alpha": 0.5, "scaling": "log", "margin_floor": null}` |' in card
    assert '| `bias_variance` | 0.25 | `{"alpha": 0.5, "base": "sigmoid"}` |' in card
    assert "amini2024direct" in card

    plain = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "plain")
    plain.create_model_card(model_name="mine")
    theirs = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path / "trl")
    theirs.create_model_card(model_name="mine")
    # TRL calls a model from a folder "None", and links to it
    name = f"the local model `{tiny_model_dir.name}`"
    assert f"fine-tuned version of {name}." in _body(tmp_path / "plain" / "README.md")
    unnamed = _body(tmp_path / "trl" / "README.md").replace("[None](https://huggingface.co/None)", name)
    assert _body(tmp_path / "plain" / "README.md") == unnamed


def _body(path):
    return path.read_text().split("# Model Card")[1]


def test_weight_scales_each_pair(tiny_model_dir, tmp_path):
    rows = preference_rows(8)
    weights = [0.0, 2.0, 1.0, 0.5, 0.0, 3.0, 1.0, 0.25]
    weighted = Dataset.from_list([{**row, "weight": weight} for row, weight in zip(rows, weights, strict=True)])
    for loss_type in ("sigmoid", "length_regularized", ["sigmoid", "offset"]):
        trainer = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=loss_type, dataset=weighted,
                        per_device_train_batch_size=8, train_sampling_strategy="sequential")  # fmt: skip
        loss, grads = loss_and_gradients(trainer, first_batch(trainer))
        singles = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type=loss_type, dataset=Dataset.from_list(rows),
                        per_device_train_batch_size=1, train_sampling_strategy="sequential")  # fmt: skip
        parts = [loss_and_gradients(singles, batch) for batch in singles.get_train_dataloader()]
        expected = sum(w * part[0] for w, part in zip(weights, parts, strict=True)) / 8
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for name in grads:
            total = sum(w * part[1][name] for w, part in zip(weights, parts, strict=True)) / 8
            torch.testing.assert_close(grads[name], total, rtol=1e-4, atol=1e-6)


def test_weights_of_one_are_trls_sigmoid(tiny_model_dir, tmp_path):
    dataset = Dataset.from_list([{**row, "weight": 1.0} for row in preference_rows(8)])
    ours = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "a", dataset=dataset)
    theirs = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path / "b", dataset=dataset)
    for trainer in (ours, theirs):
        trainer.train()
    assert_same_parameters(parameters(ours), parameters(theirs), rtol=1e-4, atol=1e-6)


def test_the_users_own_collator(tiny_model_dir, tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    seen = []

    class Collator(DataCollatorForPreference):
        def torch_call(self, examples):
            seen.append(set(examples[0]))
            return super().torch_call(examples)

    kwargs = {"loss_type": ["offset", "bias_variance"]}
    own = build(
        DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "own",
        trainer_kwargs={"data_collator": Collator(pad_token_id=tokenizer.pad_token_id)}, **kwargs,
    )  # fmt: skip
    plain = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path / "plain", **kwargs)
    for trainer in (own, plain):
        trainer.train()
    assert seen
    assert_same_parameters(parameters(own), parameters(plain))


def test_plain_trl_config_with_our_loss(tiny_model_dir, tmp_path):
    trainer = build(DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path, loss_type=["offset"])
    trainer.train()
    assert "offset/mean" in history(trainer)[0]


def test_a_registered_loss(tiny_model_dir, tmp_path, monkeypatch):
    from dataclasses import dataclass

    from trl_ext.losses import registry

    monkeypatch.setattr(registry, "_classes", copy.copy(registry._classes))
    monkeypatch.setattr(registry, "_aliases", copy.copy(registry._aliases))

    @trl_ext.register_loss("squared", aliases=["sq"])
    @dataclass(frozen=True)
    class Squared:
        target: float = 1.0

        def __call__(self, batch):
            return (batch.beta * batch.delta - self.target) ** 2

    trainer = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type="sq", loss_kwargs={"target": 2.0})
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(4.0, abs=1e-5)

    @trl_ext.register_loss("reduced")
    @dataclass(frozen=True)
    class Reduced:
        def __call__(self, batch):
            return batch.delta.mean()

    trainer = build(DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type="reduced")
    with pytest.raises(ValueError, match=r"'reduced' returned shape \(\); expected one value per pair, shape \(4,\)"):
        trainer.train()


def test_a_reference_that_moved_is_resumed(tiny_model_dir, tmp_path):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
               "learning_rate": 1e-2}  # fmt: skip

    def make(folder):
        return build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path / folder, **options)

    whole, resumed = make("whole"), make("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_parameters(parameters(resumed), parameters(whole))
    for name, value in whole.ref_model.state_dict().items():
        assert torch.equal(value, resumed.ref_model.state_dict()[name]), name
