"""A loss that reads teachers, in the trainers: what it is given, against full logits; which models it takes."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import (
    assert_same_parameters,
    build,
    first_batch,
    history,
    loss_and_gradients,
    masked_rows,
    parameters,
)
from tests.plain import assert_equals_plain
from tests.stateful import keep_registry
from trl_ext.losses.base import Loss
from trl_ext.trainers import teachers as module


def changed(model_dir, seed: int, dtype=torch.float32):
    """The tiny model with other weights: a model that was trained on."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def teachers(tiny_model_dir):
    return {"teacher_model": changed(tiny_model_dir, 1), "reverse_model": changed(tiny_model_dir, 2)}


def trainer(model_dir, tmp_path, teachers, loss_type="aligndistil", dataset=None, trainer_kwargs=None, **options):
    options = {"train_sampling_strategy": "sequential", "beta": 0.5, "share_prefix": False, **options}
    return build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, model_dir, tmp_path, loss_type=loss_type, dataset=dataset,
        trainer_kwargs={**teachers, **(trainer_kwargs or {})}, **options,
    )  # fmt: skip


def completion_logits(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Of each completion token, alone after its prompt, without padding or a batch."""
    return model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].double()


def plain_loss(policy, teachers, prompt, completion, beta=0.5, beta2=10.0, temperature=1.0, length_norm=True):
    """One completion: the formula written out over the whole vocabulary, token by token, from full logits in float64."""
    mine = completion_logits(policy, prompt, completion)
    with torch.no_grad():
        good, bad = (completion_logits(model, prompt, completion) for model in teachers)
    total = 0.0
    for z, z_good, z_bad in zip(mine, good, bad, strict=True):
        p_good, p_bad, p = ((each - each.max()).exp() / (each - each.max()).exp().sum() for each in (z_good, z_bad, z))
        w = beta2 * (p_good - p_bad).abs().sum() + 0.001
        goal = (z_good + w * (z_good - z_bad)) / temperature
        q = (goal - goal.max()).exp() / (goal - goal.max()).exp().sum()
        total = total + beta / w * (p * (p / q).log()).sum()
    return total / len(completion) if length_norm else total


def doubles(*models):
    return [copy.deepcopy(model).double() for model in models]


@pytest.mark.parametrize(
    ("options", "kwargs"),
    [
        ({}, {}),
        ({"share_prefix": True}, {"length_norm": False}),
        ({"logprob_memory_mb": 0.2}, {"beta2": 2.0, "temperature": 1.5}),
        ({"gradient_checkpointing": False}, {"beta2": 0.0}),
    ],
    ids=str,
)
def test_loss_and_every_gradient_equal_the_plain_way(options, kwargs, tiny_model_dir, tmp_path, teachers):
    ours = trainer(tiny_model_dir, tmp_path, teachers, loss_kwargs=kwargs, **options)
    assert ours.ref_model is None
    loss, gradients = loss_and_gradients(ours, first_batch(ours))
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    plain = doubles(*teachers.values())
    examples = list(ours.train_dataset.select(range(4)))
    each = [plain_loss(policy, plain, row["prompt_ids"], row["chosen_ids"], **kwargs) for row in examples]
    assert_equals_plain(loss, gradients, torch.stack(each).mean(), policy)
    assert all(parameter.grad is None for model in ours._teachers.models for parameter in model.parameters())


def expected_of(rows, policy, teachers, **kwargs):
    return torch.stack([plain_loss(policy, teachers, prompt, ids, **kwargs) for prompt, ids in rows]).mean()


def chosen_of(ours, count=4):
    return [(row["prompt_ids"], row["chosen_ids"]) for row in ours.train_dataset.select(range(count))]


@pytest.mark.parametrize("share_prefix", [False, True])
def test_teachers_run_on_chosen_completions_alone(share_prefix, tiny_model_dir, tmp_path, teachers, monkeypatch):
    teachers["teacher_model"].train()
    ours = trainer(tiny_model_dir, tmp_path, teachers, share_prefix=share_prefix)
    seen = []
    forward = module.fused_forward

    def watched(model, inputs, router_logits):
        assert not torch.is_grad_enabled() and not model.training
        seen.append((inputs["input_ids"].shape[0], int(inputs["completion_mask"].sum())))
        return forward(model, inputs, router_logits)

    monkeypatch.setattr(module, "fused_forward", watched)
    loss_and_gradients(ours, first_batch(ours))
    assert seen == [(4, sum(len(ids) for _, ids in chosen_of(ours)))] * 2


def test_masked_rows_that_share_a_prompt(tiny_model_dir, tmp_path, teachers):
    with masked_rows():
        ours = trainer(tiny_model_dir, tmp_path, teachers, share_prefix=True)
        loss, _ = loss_and_gradients(ours, first_batch(ours))
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    with torch.no_grad():
        expected = expected_of(chosen_of(ours), policy, doubles(*teachers.values()))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_with_ligers_head(tiny_model_dir, tmp_path, teachers, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    losses = [
        loss_and_gradients(ours, first_batch(ours))[0]
        for ours in (
            trainer(tiny_model_dir, tmp_path, teachers, loss_type=["aligndistil", "cpo"], logprob_backend=backend)
            for backend in ("torch", "liger")
        )
    ]
    torch.testing.assert_close(*losses)


def test_an_adapter_learns_and_its_base_does_not(tiny_model_dir, tmp_path, teachers):
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    ours = trainer(tiny_model_dir, tmp_path, teachers, trainer_kwargs={"peft_config": peft})
    loss, gradients = loss_and_gradients(ours, first_batch(ours))
    assert gradients and all("lora" in name for name in gradients)
    policy = copy.deepcopy(ours.model).double()
    policy.zero_grad()
    expected = expected_of(chosen_of(ours), policy.get_base_model(), doubles(*teachers.values()))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name].double(), parameter.grad, rtol=1e-3, atol=1e-6)


def test_a_learnt_prompt(tiny_model_dir, tmp_path, teachers):
    """Its virtual tokens stand before the policy's tokens, and not before the teachers'."""
    peft = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    ours = trainer(tiny_model_dir, tmp_path, teachers, trainer_kwargs={"peft_config": peft})
    loss, gradients = loss_and_gradients(ours, first_batch(ours))
    policy = copy.deepcopy(ours.model).double()

    def without_virtual(input_ids):
        outputs = policy(input_ids=input_ids)
        outputs.logits = outputs.logits[:, 3:]
        return outputs

    expected = expected_of(chosen_of(ours), without_virtual, doubles(*teachers.values()))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = gradients.values()
    torch.testing.assert_close(
        gradient.double(), policy.prompt_encoder.default.embedding.weight.grad, rtol=1e-3, atol=1e-6
    )


def test_half_precision_is_close_to_full(tiny_model_dir, tmp_path, teachers):
    (exact, full), (loss, half) = (
        loss_and_gradients(ours, first_batch(ours))
        for ours in (trainer(tiny_model_dir, tmp_path, teachers, bf16=bf16) for bf16 in (False, True))
    )
    assert loss.item() == pytest.approx(exact.item(), rel=0.01) and loss != exact
    assert all((half[name] - full[name]).norm() < 0.1 * full[name].norm() for name in full)


WORDS = [" good", " bad film", " slow sad film", " very long sad film"]
GROUPS = [
    {"prompt": "what a", "completions": WORDS, "scores": [0.0, 2.0, 1.0, 3.0]},
    {"prompt": "why", "completions": WORDS[:2], "scores": [1.0, 0.0]},
]


@pytest.mark.parametrize("pairing", [None, "best_worst"])
def test_groups_teach_by_all_of_their_completions(pairing, tiny_model_dir, tmp_path, teachers):
    options = {"per_device_train_batch_size": 2, "pairing": pairing}
    ours = trainer(tiny_model_dir, tmp_path, teachers, dataset=Dataset.from_list(GROUPS), **options)
    loss, _ = loss_and_gradients(ours, first_batch(ours))
    policy, plain = (
        AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64),
        doubles(*teachers.values()),
    )
    tokenizer, each = ours.processing_class, []
    for row in GROUPS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        best = row["completions"][row["scores"].index(max(row["scores"]))]
        texts = row["completions"] if pairing is None else [best]
        ids = [tokenizer(row["prompt"] + text + tokenizer.eos_token)["input_ids"] for text in texts]
        with torch.no_grad():
            each.append(expected_of([(prompt, each[len(prompt) :]) for each in ids], policy, plain))
    assert loss.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


def test_mixed_with_other_losses(tiny_model_dir, tmp_path, teachers):
    """TRL's own, which has a reference; and pairs without a trace, where some rows have no chosen completion."""
    rows = [{**row, "weight": 1.0} for row in preference_rows(4)]
    rows[0] |= {"chosen_empty_trace": None, "rejected_empty_trace": None}
    rows[1] |= {"chosen": None, "rejected": None}
    names, data = ["sigmoid", "aligndistil", "bias_variance"], Dataset.from_list(rows)
    ours = trainer(tiny_model_dir, tmp_path, teachers, names, data, loss_weights=[1.0, 2.0, -1.0])
    loss, _ = loss_and_gradients(ours, first_batch(ours))
    alone = trainer(tiny_model_dir, tmp_path, {}, [names[0], names[2]], data, loss_weights=[1.0, -1.0])
    other, _ = loss_and_gradients(alone, first_batch(alone))
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    there = [(row["prompt_ids"], row["chosen_ids"]) for index, row in enumerate(ours.train_dataset) if index != 1]
    with torch.no_grad():
        expected = 3 / 4 * expected_of(there, policy, doubles(*teachers.values()))
    assert (loss - other).item() == pytest.approx(2 * expected.item(), rel=1e-4)
    assert ours.ref_model is not None


# A run


def run(model_dir, folder, teachers, **options):
    ours = trainer(model_dir, folder, teachers, **options)
    ours.train()
    return ours


def test_micro_batches_are_one_batch(tiny_model_dir, tmp_path, teachers):
    """Eight of one pair are one of eight: loss, gradients and metrics."""
    sgd = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 2}
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    runs = [run(tiny_model_dir, tmp_path, teachers, **sgd, **kw) for kw in (cut, {"per_device_train_batch_size": 8})]
    assert_same_parameters(*map(parameters, runs), rtol=1e-5, atol=1e-6)
    for one, other in zip(*(history(each)[:2] for each in runs), strict=True):
        for name in ("loss", "divergence/per_token", "lengths/chosen", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), name


def test_training_moves_the_policy_alone_towards_the_target(tiny_model_dir, tmp_path, teachers):
    before = {name: parameters_of(model) for name, model in teachers.items()}
    ours = trainer(tiny_model_dir, tmp_path, teachers, max_steps=8, learning_rate=3e-3, loss_kwargs={"beta2": 0.5})
    first = ours.evaluate()
    ours.train()
    last = ours.evaluate()
    assert last["eval_loss"] < 0.8 * first["eval_loss"]
    assert last["eval_divergence/per_token"] < 0.8 * first["eval_divergence/per_token"]
    # The loss is beta times the mean per token of each completion; TRL's metrics of both completions are there
    assert {"eval_rewards/accuracies", "eval_logps/rejected", "eval_lengths/chosen"} <= last.keys()
    assert not any("logratios" in name for name in last)
    for name, model in teachers.items():
        assert_same_parameters(before[name], parameters_of(model))
        assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def parameters_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_a_resumed_run_goes_on_exactly_and_checkpoints_hold_no_teacher(tiny_model_dir, tmp_path, teachers):
    saves = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = run(tiny_model_dir, tmp_path / "whole", teachers, **saves)
    resumed = trainer(tiny_model_dir, tmp_path / "resumed", teachers, **saves)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_parameters(parameters(whole), parameters(resumed))
    plain = trainer(tiny_model_dir, tmp_path / "plain", {}, "cpo", **{**saves, "max_steps": 2})
    plain.train()
    folders = [tmp_path / name / "checkpoint-2" for name in ("whole", "plain")]
    sizes = [{file.name: file.stat().st_size for file in folder.glob("*.safetensors")} for folder in folders]
    assert sizes[0] == sizes[1]
    assert len({tuple(sorted(file.name for file in folder.iterdir())) for folder in folders}) == 1


def test_teachers_that_a_trainer_has_trained_on_a_stream(tiny_model_dir, tmp_path, teachers):
    """The way of the paper in one process: the objects come with that trainer's forward, and are trained on afterwards."""
    dpo = build(trl.DPOTrainer, trl.DPOConfig, tiny_model_dir, tmp_path, max_steps=1)
    dpo.train()
    trained = copy.deepcopy(dpo.accelerator.unwrap_model(dpo.model))
    with torch.no_grad():
        trained.lm_head.weight.mul_(1.1)  # no longer what it was copied from
    stream = Dataset.from_list(preference_rows(12)).to_iterable_dataset()
    given = {"teacher_model": trained, "reverse_model": teachers["reverse_model"]}
    ours = run(tiny_model_dir, tmp_path, given, dataset=stream, max_steps=2)
    other = run(tiny_model_dir, tmp_path, {**given, "teacher_model": fresh(trained)}, dataset=stream, max_steps=2)
    assert history(ours)[-1]["train_loss"] == pytest.approx(history(other)[-1]["train_loss"], rel=1e-6)
    assert all(parameter.requires_grad for parameter in trained.parameters())
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(trained(input_ids=ids).logits, fresh(trained)(input_ids=ids).logits)


def fresh(model):
    """The same weights in a model that no trainer has seen."""
    other = type(model)(model.config).to(next(model.parameters()).dtype)
    other.load_state_dict(model.state_dict())
    return other


# Which models


@pytest.fixture
def folders(tiny_model_dir, tmp_path, teachers):
    names = {}
    for name, model in teachers.items():
        names[f"{name}_name_or_path"] = str(tmp_path / name)
        model.save_pretrained(tmp_path / name)
    return names


def test_names_are_loaded_with_the_policys_dtype_and_attention(tiny_model_dir, tmp_path, teachers, folders):
    args = {"loss_type": "aligndistil", **folders}
    named = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, **args)
    objects = trainer(
        tiny_model_dir, tmp_path, teachers, share_prefix="auto", beta=0.1, train_sampling_strategy="random"
    )
    batch = first_batch(named)
    torch.testing.assert_close(loss_and_gradients(named, batch)[0], loss_and_gradients(objects, batch)[0])
    assert {model.dtype for model in named._teachers.models} == {torch.float32}
    other = {"teacher_model_init_kwargs": '{"dtype": "bfloat16", "attn_implementation": "eager"}'}
    named = build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, **args, **other)
    for model in named._teachers.models:
        assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert loss_and_gradients(named, first_batch(named))[0].isfinite()
    # As arguments of the trainer
    given = {"teacher_model": folders["teacher_model_name_or_path"], "reverse_model": teachers["reverse_model"]}
    assert trainer(tiny_model_dir, tmp_path, given)._teachers.models[1].dtype == torch.float32


def test_teachers_that_cannot_be_used_are_refused(tiny_model_dir, tmp_path, teachers, folders, monkeypatch):
    keep_registry(monkeypatch)

    @trl_ext.register_loss("silent")
    @dataclass(frozen=True)
    class Silent(Loss):
        reads: ClassVar[frozenset[str]] = frozenset({"teachers"})

    good, bad = teachers.values()
    wide = copy.deepcopy(bad)
    wide.resize_token_embeddings(bad.config.vocab_size + 8)
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    own = {"model": policy}
    cases = [
        ({}, {}, r"'aligndistil' reads two models.*missing: \['teacher_model', 'reverse_model'\].*swapped"),
        ({"teacher_model": good}, {}, r"missing: \['reverse_model'\].*`reverse_model_name_or_path`"),
        (teachers, {"loss_type": "cpo"}, r"None of the losses \['cpo'\] reads teachers, so \['teacher_model', 'rev"),
        (teachers, {"loss_type": "sigmoid"}, "None of the losses of TRL reads teachers"),
        ({}, {"loss_type": "cpo", **folders}, "None of the losses .*would have no effect"),
        ({}, {"loss_type": "cpo", "teacher_model_init_kwargs": {"dtype": "float32"}}, r"\['teacher_model_init_kwargs'\]"),
        (teachers, folders, "given to the trainer and `teacher_model_name_or_path=.*Give one of them"),
        (teachers, {"teacher_model_init_kwargs": {"dtype": "float32"}}, "both models are loaded already"),
        ({"teacher_model": good, "reverse_model": good}, {}, "are the same, and differ in nothing"),
        ({}, dict.fromkeys(folders, str(tiny_model_dir)), "are the same, and differ in nothing"),
        ({"teacher_model": policy, "reverse_model": bad, **own}, {}, "`teacher_model` and `model` are the same object"),
        ({**teachers, "reverse_model": wide}, {}, r"`reverse_model` gives .* logits per token and the policy.*resize_tok"),
        ({**teachers, "teacher_model": 3}, {}, "`teacher_model` is a int; expected a model, or the folder"),
        ({**teachers, "teacher_model": "/no/such/folder"}, {}, "teacher_model"),
        ({**teachers, "ref_model": policy}, {}, "reads a reference model.*What AlignDistil's own code calls"),
        (teachers, {"logprob_backend": "trl"}, "TRL's forward gives log-probs of tokens alone"),
        (teachers, {"loss_type": ["aligndistil", "silent"]}, r"\['aligndistil', 'silent'\] all read teachers.*one of them"),
        (teachers, {"loss_type": "silent"}, "'silent' reads teachers and does not say.*`per_token"),
        (teachers, {"loss_type": "bias_variance", "loss_kwargs": {"base": "aligndistil"}}, "reads 'teachers', but the mix"),
        (teachers, {"precompute_ref_log_probs": True}, "reads a reference model, so .*'precompute_ref_log_probs'"),
    ]  # fmt: skip
    for given, options, message in cases:
        with pytest.raises(ValueError, match=message):
            arguments = {"model": str(tiny_model_dir), **given}
            options = {"loss_type": "aligndistil", **options}
            trl_ext.DPOTrainer(
                args=trl_ext.DPOConfig(
                    output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options
                ),
                train_dataset=Dataset.from_list(preference_rows(4)),
                **arguments,
            )
