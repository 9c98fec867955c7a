"""The four steps alone and together."""

import copy
import logging
import math

import pytest
import torch
from peft import LoraConfig
from torch._dynamo import OptimizedModule
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.online_dpo import OnlineDPOConfig as TRLConfig
from trl.experimental.online_dpo import OnlineDPOTrainer as TRLTrainer

import trl_ext
from tests.helpers import REFERENCE_FREE, assert_same_parameters, history, parameters
from tests.online.runs import Scripted, batch, learn, length_reward, online, prompts, scripted
from trl_ext.losses.base import Loss


# `inpo` and `step_apo` read columns of completions, which nobody has before they are sampled
OURS = (
    "alpha_dpo",
    "anchored",
    "asft",
    "beta_dpo",
    "bias_variance",
    "cpo",
    "dmpo",
    "eurus",
    "length_regularized",
    "margin_adaptive",
    "offset",
    "reward_distillation",
    "robust_em",
    "simpo",
    "sppo_soft",
)


def lora(heads=None):
    return LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, modules_to_save=heads
    )


# Against TRL, and by hand


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("peft", [None, lora(), lora(["lm_head"])], ids=["full", "lora", "lora and head"])
@pytest.mark.parametrize("backend", ["auto", "torch", "liger", "trl"])
def test_loss_and_gradients_are_trls_on_the_same_completions(loss_type, peft, backend, tiny_model_dir, tmp_path):
    kwargs = {"loss_type": loss_type, "gradient_checkpointing": False}
    results = []
    for cls, config in ((TRLTrainer, TRLConfig), (Scripted, trl_ext.OnlineDPOConfig)):
        options = {**kwargs, "logprob_backend": backend} if cls is Scripted else kwargs
        torch.manual_seed(0)
        trainer = online(
            tiny_model_dir,
            tmp_path,
            cls=cls,
            config=config,
            trainer_kwargs={"peft_config": peft},
            **options,
        )
        if peft is None:  # the policy away from its reference
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.mul_(1.05)
        inputs = batch(trainer)
        trainer.model.zero_grad()
        if cls is TRLTrainer:
            trainer._generate = lambda model, prompts, images=None, t=trainer: padded(t, prompts)
            trainer.current_gradient_accumulation_steps = 1
            loss = trainer.training_step(trainer.model, inputs)
            grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
            results.append((loss, grads))
        else:
            results.append(learn(trainer, inputs))
    (loss, grads), (our_loss, our_grads) = results
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    assert grads.keys() == our_grads.keys()
    assert peft is None or any("lm_head" in name for name in grads) == bool(peft.modules_to_save)
    for name, value in grads.items():
        scale = value.abs().max() + 1e-6
        torch.testing.assert_close(our_grads[name] / scale, value / scale, rtol=1e-4, atol=2e-5)


def padded(trainer, texts):
    """The scripted completions as TRL's `_generate` returns them."""
    tokenizer = trainer.processing_class
    encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    rows = [tokenizer(scripted(text, k))["input_ids"] + [tokenizer.eos_token_id] for k in range(2) for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return encoded["input_ids"].repeat(2, 1), encoded["attention_mask"].repeat(2, 1), ids, mask, None


def test_rewards_are_scores_and_groups_are_groups(tiny_model_dir, tmp_path):
    seen = []

    class Spy(Loss):
        takes_groups = True

        def __call__(self, batch):
            seen.append(batch)
            return (batch.logps if hasattr(batch, "logps") else batch.delta.unsqueeze(1)).sum(1)

    for pairing in ("best_worst", "group"):
        trainer = online(
            tiny_model_dir, tmp_path, cls=Scripted, loss_type="anchored", num_generations=3, pairing=pairing
        )
        trainer._terms.losses = {"anchored": Spy()}
        learn(trainer, batch(trainer))
    pair, group = seen
    assert (pair.columns["score_chosen"] > pair.columns["score_rejected"]).all()
    assert group.logps.shape == group.scores.shape == (4, 3) and group.mask.all()
    torch.testing.assert_close(group.logps[:, 2], pair.chosen_logps)
    torch.testing.assert_close(group.scores[:, 2], pair.columns["score_chosen"])
    assert (group.lengths[:, 2] == pair.chosen_lengths).all()


# Every loss, every pairing


@pytest.mark.parametrize("loss_type", ["sigmoid", *OURS])
def test_each_loss_trains_on_what_the_policy_writes(loss_type, tiny_model_dir, tmp_path):
    kwargs = {"loss_type": loss_type, "num_generations": 3, "max_steps": 1}
    judged = {"reward_funcs": None, "judge": soft} if loss_type == "sppo_soft" else {}
    trainer = online(tiny_model_dir, tmp_path, trainer_kwargs=judged, **kwargs)
    before = parameters(trainer)
    trainer.train()
    logs = history(trainer)[0]
    assert logs["pairs/dropped_prompts"] < 1
    if loss_type in REFERENCE_FREE:
        assert trainer.ref_model is None and "objective/kl" not in logs
    else:
        assert logs["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert any(not torch.equal(value, before[name]) for name, value in parameters(trainer).items())
    assert logs["val/contain_eos_token"] + logs["completions/truncated"] == pytest.approx(1)


def test_ties_are_dropped_and_counted(tiny_model_dir, tmp_path):
    trainer = online(
        tiny_model_dir, tmp_path, trainer_kwargs={"reward_funcs": lambda prompts, **k: [0.5] * len(prompts)}
    )
    before = parameters(trainer)
    trainer.train()
    assert history(trainer)[0]["pairs/dropped_prompts"] == 1 and history(trainer)[0]["loss"] == 0
    assert_same_parameters(parameters(trainer), before)


def test_half_of_the_prompts_tied_counts_half(tiny_model_dir, tmp_path):
    def first_half(completions, **kwargs):  # blocks of four prompts
        return [float(len(c)) if i % 4 < 2 else 0.0 for i, c in enumerate(completions)]

    whole = online(tiny_model_dir, tmp_path, cls=Scripted)
    half = online(tiny_model_dir, tmp_path, cls=Scripted, trainer_kwargs={"reward_funcs": first_half})
    inputs = batch(whole)
    first = {name: value[:2] for name, value in inputs.items()}
    _, expected = learn(whole, first)
    _, grads = learn(half, inputs)
    for name in expected:
        torch.testing.assert_close(grads[name], expected[name] / 2, rtol=1e-4, atol=1e-6)


def test_penalties_and_weights(tiny_model_dir, tmp_path):
    two = {"reward_funcs": [length_reward, lambda completions, **k: [None if "a" in c else 1.0 for c in completions]]}
    trainer = online(
        tiny_model_dir,
        tmp_path,
        missing_eos_penalty=3.0,
        length_penalty=0.5,
        reward_weights=[1.0, 2.0],
        trainer_kwargs=two,
    )
    completions = Scripted.generate(trainer, trainer.model, {"prompt": ["x", "y"]})
    completions.ended[0] = False
    scores = trainer.score({"prompt": ["x", "y"]}, completions)
    for k in range(2):
        for row in range(2):
            i = 2 * k + row
            text = completions.texts[i]
            expected = len(text) + 2.0 * ("a" not in text) - 0.5 * len(completions.ids[i]) - 3.0 * (i == 0)
            assert scores.values[row, k].item() == pytest.approx(expected)
            given = scores.per_function["<lambda>"][row, k].item()
            assert given == 1.0 if "a" not in text else math.isnan(given)
    assert any("a" in text for text in completions.texts) and not all("a" in text for text in completions.texts)
    assert scores.mask.all()  # one of the two functions has an opinion on each


def test_two_functions_of_one_name_are_both_there(tiny_model_dir, tmp_path):
    both = [lambda completions, **k: [1.0] * len(completions), lambda completions, **k: [2.0] * len(completions)]
    trainer = online(tiny_model_dir, tmp_path, trainer_kwargs={"reward_funcs": both})
    scores = trainer.score({"prompt": ["x"]}, Scripted.generate(trainer, trainer.model, {"prompt": ["x"]}))
    assert scores.values.tolist() == [[3.0, 3.0]] and len(scores.per_function) == 2


def test_columns_reach_reward_functions_in_the_order_of_completions(tiny_model_dir, tmp_path):
    def own(prompts, completions, level, trainer_state, **kwargs):
        assert trainer_state.global_step == 0 and len(prompts) == len(completions)
        return level

    trainer = online(tiny_model_dir, tmp_path, num_generations=3, trainer_kwargs={"reward_funcs": own})
    inputs = {"prompt": ["x", "y"], "level": [4, 9]}
    scores = trainer.score(inputs, Scripted.generate(trainer, trainer.model, inputs))
    assert scores.values.tolist() == [[4.0] * 3, [9.0] * 3]


@pytest.mark.parametrize("pairing", ["best_worst", "all", "group"])
def test_a_penalty_makes_no_pair_of_what_nobody_scored(pairing, tiny_model_dir, tmp_path):
    trainer = online(
        tiny_model_dir,
        tmp_path,
        cls=Scripted,
        loss_type="anchored",
        pairing=pairing,
        length_penalty=0.5,
        trainer_kwargs={"reward_funcs": lambda completions, **k: [None] * len(completions)},
    )
    inputs = batch(trainer)
    selection = trainer.pair(*[each := trainer.generate(trainer.model, inputs), trainer.score(inputs, each)])
    assert not len(selection.prompts) and not selection.scores.mask.any()
    assert learn(trainer, inputs)[0] == 0


def test_a_completion_that_nobody_scores_is_left_out(tiny_model_dir, tmp_path):
    def only_some(completions, **kwargs):
        return [None if i < 4 else 1.0 for i, _ in enumerate(completions)]

    trainer = online(tiny_model_dir, tmp_path, trainer_kwargs={"reward_funcs": only_some})
    trainer.train()
    assert history(trainer)[0]["rewards/unscored"] == 0.5
    assert history(trainer)[0]["pairs/dropped_prompts"] == 1


def test_empty_and_endless_completions(tiny_model_dir, tmp_path):
    class Odd(Scripted):
        def generate(self, model, inputs, thinking=True, reference=False):
            completions = super().generate(model, inputs, thinking, reference)
            completions.ids[0] = completions.ids[0][:0]
            completions.ids[1] = completions.ids[1][-1:]
            completions.ended[0] = False
            completions.texts[:2] = ["", ""]
            return completions

    trainer = online(tiny_model_dir, tmp_path, cls=Odd)
    loss, grads = learn(trainer, batch(trainer))
    assert loss.isfinite() and all(value.isfinite().all() for value in grads.values())


# Judges


def soft(prompts, first, second):
    return [0.5 if len(a) == len(b) else 0.7 if len(a) > len(b) else 0.3 for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("loss_type", ["ipo", "anchored", "sigmoid"])
def test_a_preference_oracle(loss_type, tiny_model_dir, tmp_path):
    trainer = online(
        tiny_model_dir,
        tmp_path,
        loss_type=loss_type,
        cls=Scripted,
        trainer_kwargs={"reward_funcs": None, "judge": soft},
    )
    loss, _ = learn(trainer, batch(trainer))
    # policy = reference: delta is 0
    expected = {"ipo": ((0.7 - 0.5) / 0.1) ** 2, "anchored": 0.6931, "sigmoid": 0.6931}[loss_type]
    assert loss.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("loss_type", "loss"), [("anchored", 0.6931), ("ipo", 0.0), ("sppo_soft", 0.0)])
def test_soft_targets_learn_from_ties(loss_type, loss, tiny_model_dir, tmp_path):
    trainer = online(
        tiny_model_dir,
        tmp_path,
        loss_type=loss_type,
        cls=Scripted,
        trainer_kwargs={"reward_funcs": None, "judge": lambda prompts, a, b: [0.5] * len(a)},
    )
    assert learn(trainer, batch(trainer))[0].item() == pytest.approx(loss, abs=1e-4)
    assert trainer._means["train"].over_processes()["pairs/dropped_prompts"] == 0


@pytest.mark.parametrize("loss_type", ["sigmoid", ["anchored", "sigmoid"]])
def test_hard_labels_do_not(loss_type, tiny_model_dir, tmp_path):
    kwargs = {"reward_funcs": None, "judge": lambda prompts, a, b: [0.5] * len(a)}
    trainer = online(tiny_model_dir, tmp_path, loss_type=loss_type, cls=Scripted, trainer_kwargs=kwargs)
    assert learn(trainer, batch(trainer))[0] == 0
    assert trainer._means["train"].over_processes()["pairs/dropped_prompts"] == 1


def test_ties_of_rewards_are_no_soft_targets(tiny_model_dir, tmp_path):
    kwargs = {"reward_funcs": lambda completions, **k: [1.0] * len(completions)}
    trainer = online(tiny_model_dir, tmp_path, loss_type="anchored", cls=Scripted, trainer_kwargs=kwargs)
    assert learn(trainer, batch(trainer))[0] == 0


@pytest.mark.parametrize("samples", ["all", "half"])
def test_mixture_with_the_reference(samples, tiny_model_dir, tmp_path):
    trainer = online(
        tiny_model_dir,
        tmp_path,
        mixture_coef=1.0,
        mixture_samples=samples,
        generation_kwargs={"do_sample": False},
        trainer_kwargs={"peft_config": lora()},
    )
    inputs = batch(trainer)
    mixed = trainer.generate(trainer.model, inputs)
    theirs = trainer.generate(trainer.model, inputs, reference=True)
    b = len(inputs["prompt"])
    reference = [row.tolist() for row in theirs.ids]
    assert [row.tolist() for row in mixed.ids[b:]] == reference
    assert ([row.tolist() for row in mixed.ids[:b]] == reference) == (samples == "all")


# Trainers


def test_accumulation_averages(tiny_model_dir, tmp_path):
    runs = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = online(
            tiny_model_dir,
            tmp_path,
            cls=Scripted,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.1,
            max_steps=2,
        )
        trainer.train()
        runs.append((parameters(trainer), [entry["loss"] for entry in history(trainer) if "loss" in entry]))
    for values, losses in runs[1:]:
        assert_same_parameters(values, runs[0][0], rtol=1e-4, atol=1e-6)
        assert losses == pytest.approx(runs[0][1], rel=1e-4)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_a_reference_that_moves(peft, tiny_model_dir, tmp_path):
    kwargs = {"peft_config": lora() if peft else None}
    options = {"sync_ref_model": True, "ref_model_sync_steps": 2, "max_steps": 3, "loss_type": "anchored"}
    trainer = online(tiny_model_dir, tmp_path, ref_model_mixup_alpha=1.0, trainer_kwargs=kwargs, **options)
    trainer.train()
    kl = [entry["objective/kl"] for entry in history(trainer) if "objective/kl" in entry]
    assert abs(kl[0]) < 1e-4 and abs(kl[1]) > 1e-3 and abs(kl[2]) < 1e-4  # copied after two steps
    with torch.no_grad(), trainer._reference() as reference:
        assert reference(input_ids=torch.tensor([[5, 6]])).logits.isfinite().all()


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_a_resumed_run_continues_exactly(peft, tiny_model_dir, tmp_path):
    options = {
        "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "sync_ref_model": True, "ref_model_sync_steps": 1,
        "loss_type": "anchored", "learning_rate": 1e-2,
    }  # fmt: skip

    def make(folder):
        torch.manual_seed(0)
        return online(
            tiny_model_dir, tmp_path / folder, trainer_kwargs={"peft_config": lora() if peft else None}, **options
        )

    whole = make("whole")
    whole.train()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_parameters(parameters(resumed), parameters(whole))
    assert history(resumed)[2:4] == history(whole)[2:4]


def test_a_checkpoint_without_the_moved_reference_is_refused(tiny_model_dir, tmp_path):
    online(tiny_model_dir, tmp_path, save_strategy="steps", save_steps=2).train()
    trainer = online(tiny_model_dir, tmp_path, sync_ref_model=True, max_steps=4)
    with pytest.raises(ValueError, match=r"has no ref_model\.safetensors"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_evaluation(tiny_model_dir, tmp_path):
    trainer = online(
        tiny_model_dir, tmp_path, trainer_kwargs={"eval_dataset": prompts(6)}, eval_strategy="steps", eval_steps=2
    )
    before = trainer.evaluate()  # before training too
    assert before["eval_objective/kl"] == pytest.approx(0, abs=1e-4)
    trainer.train()
    assert 2 in [entry["step"] for entry in trainer.state.log_history if "eval_win_rate" in entry]
    names = {
        "eval_loss", "eval_win_rate", "eval_objective/kl", "eval_completions/mean_length", "eval_objective/scores",
        "eval_reference/scores", "eval_reference/mean_length",
    }  # fmt: skip
    assert names <= set(trainer.evaluate())


def test_evaluations_draw_alike_and_disturb_nothing(tiny_model_dir, tmp_path):
    drawn = []

    class Watch(trl_ext.OnlineDPOTrainer):
        def generate(self, *args, **kwargs):
            completions = super().generate(*args, **kwargs)
            drawn[-1].append([row.tolist() for row in completions.ids])
            return completions

    kwargs = {"eval_dataset": prompts(3)}
    trainer = online(tiny_model_dir, tmp_path, cls=Watch, trainer_kwargs=kwargs)
    for seed, own in ((1, 3), (2, 3), (1, 4)):
        torch.manual_seed(seed)
        trainer.args.seed = own
        state = torch.get_rng_state()
        drawn.append([])
        trainer.evaluate()
        assert torch.equal(state, torch.get_rng_state())
    assert drawn[0] == drawn[1] != drawn[2]


def test_each_process_evaluates_with_draws_of_its_own(tiny_model_dir, tmp_path, monkeypatch):
    seeds = []
    trainer = online(tiny_model_dir, tmp_path, cls=Scripted, trainer_kwargs={"eval_dataset": prompts(2)})
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    trainer.evaluate()
    trainer.accelerator.state.process_index = 5
    try:
        trainer.evaluate()
    finally:
        trainer.accelerator.state.process_index = 0
    assert seeds == [3, 8]


def test_win_rate_of_the_policy_against_itself(tiny_model_dir, tmp_path):
    kwargs = {"eval_dataset": prompts(6), "reward_funcs": length_reward}
    trainer = online(tiny_model_dir, tmp_path, cls=Scripted, trainer_kwargs=kwargs, per_device_eval_batch_size=6)
    # its second completion is longer than the first, which is the reference's
    metrics = trainer.evaluate()
    assert metrics["eval_win_rate"] == pytest.approx(0.75)
    texts = [scripted(prompt, 0) for prompt in prompts(6)["prompt"]]
    assert metrics["eval_reference/scores"] == pytest.approx(sum(map(len, texts)) / 6)


def test_each_of_several_evaluation_datasets_has_its_metrics(tiny_model_dir, tmp_path):
    data = {"one": prompts(8).select([0]), "two": prompts(8).select([1])}
    trainer = online(tiny_model_dir, tmp_path, cls=Scripted, trainer_kwargs={"eval_dataset": data})
    metrics = trainer.evaluate()
    for name, rows in data.items():
        lengths = [len(scripted(rows["prompt"][0], k)) for k in range(2)]
        assert metrics[f"eval_{name}_completions/mean_score"] == pytest.approx(sum(lengths) / 2)
        assert f"eval_{name}_loss" in metrics
    assert "eval_completions/mean_score" not in metrics


def test_win_rate_by_an_oracle(tiny_model_dir, tmp_path):
    """The longer of two wins with 0.7: the first completions tie with the reference's, the second beat them."""
    kwargs = {"eval_dataset": prompts(6), "reward_funcs": None, "judge": soft}
    trainer = online(tiny_model_dir, tmp_path, cls=Scripted, loss_type="anchored", trainer_kwargs=kwargs)
    assert trainer.evaluate()["eval_win_rate"] == pytest.approx((0.5 + 0.7) / 2)


def test_generation_uses_a_cache_and_training_does_not_change(tiny_model_dir, tmp_path):
    trainer = online(tiny_model_dir, tmp_path, gradient_checkpointing=True)
    trainer.model.gradient_checkpointing_enable()
    trainer.model.train()
    seen = []
    hook = trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["input_ids"].size(1), module.training)), with_kwargs=True
    )
    trainer.generate(trainer.model, batch(trainer))
    hook.remove()
    assert all(width == 1 for width, _ in seen[1:]) and not any(training for _, training in seen)
    assert trainer.model.training and trainer.model.is_gradient_checkpointing


def test_beta_by_epoch(tiny_model_dir, tmp_path):
    trainer = online(tiny_model_dir, tmp_path, beta=[0.1, 0.3], max_steps=-1, num_train_epochs=3)
    trainer.train()
    assert [entry["beta"] for entry in history(trainer) if "beta" in entry] == [0.1, 0.1, 0.3, 0.3, 0.3, 0.3]


def test_a_plain_config_of_trl_and_a_model_by_path(tiny_model_dir, tmp_path):
    trainer = online(tiny_model_dir, tmp_path, config=TRLConfig, trainer_kwargs={"model": str(tiny_model_dir)})
    trainer.train()
    assert history(trainer)[0]["beta"] == 0.1


def test_without_args(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = {}

    def config(output_dir):
        made["args"] = trl_ext.OnlineDPOConfig(output_dir, use_cpu=True, bf16=False)
        return made["args"]

    monkeypatch.setattr(
        "trl_ext.trainers.online.trainer.OnlineDPOConfig",
        type(
            "C",
            (),
            {
                "__new__": lambda cls, output_dir: config(output_dir),
                "__dataclass_fields__": trl_ext.OnlineDPOConfig.__dataclass_fields__,
            },
        ),
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    trainer = trl_ext.OnlineDPOTrainer(
        model,
        reward_funcs=length_reward,
        train_dataset=prompts(),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
    )
    assert trainer.args.output_dir.endswith("-Online-DPO")


def test_learning_makes_no_tensor_of_vocabulary_times_length(tiny_model_dir, tmp_path):
    from torch.utils._python_dispatch import TorchDispatchMode

    vocabulary, hidden_size = AutoTokenizer.from_pretrained(tiny_model_dir).vocab_size, 32  # the transposed weight

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else (result,):
                if (
                    isinstance(value, torch.Tensor)
                    and value.shape[1:] == (vocabulary,)
                    and value.size(0) != hidden_size
                ):
                    self.numel = max(self.numel, value.numel())
            return result

    trainer = online(tiny_model_dir, tmp_path, cls=Scripted, logprob_memory_mb=0.01)
    with Largest() as largest:
        learn(trainer, batch(trainer))
    assert trainer.model.config.vocab_size == vocabulary
    budget = 0.01 * 2**20 / 4
    assert 0 < largest.numel <= budget


def test_a_deep_copied_model_has_its_own_reference(tiny_model_dir, tmp_path, caplog):
    first = online(tiny_model_dir, tmp_path)
    with caplog.at_level(logging.WARNING):
        second = trl_ext.OnlineDPOTrainer(
            model=copy.deepcopy(first.model),
            reward_funcs=length_reward,
            args=trl_ext.OnlineDPOConfig(
                output_dir=str(tmp_path),
                use_cpu=True,
                bf16=False,
                report_to="none",
                max_steps=3,
                learning_rate=1e-2,
                logging_steps=1,
                save_strategy="no",
                max_new_tokens=8,
            ),
            train_dataset=prompts(),
            processing_class=first.processing_class,
        )
    second.train()
    assert abs(history(second)[2]["objective/kl"]) > 1e-3


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_the_mixture_projects_no_prompt(peft, tiny_model_dir, tmp_path):
    kwargs = {"peft_config": lora() if peft else None}
    trainer = online(tiny_model_dir, tmp_path, mixture_coef=0.5, trainer_kwargs=kwargs)
    widths = []
    heads = {
        trainer.model.get_output_embeddings(),
        (trainer.model if peft else trainer.ref_model).get_output_embeddings(),
    }
    hooks = [head.register_forward_hook(lambda module, args, output: widths.append(output.size(1))) for head in heads]
    trainer.generate(trainer.model, batch(trainer))
    for hook in hooks:
        hook.remove()
    assert set(widths) == {1}


def compiled_calls(trainer, monkeypatch):
    """How often compiled models run while completions are generated, and while a batch is learnt from."""
    counts, calls, call = [], [], OptimizedModule.__call__
    monkeypatch.setattr(OptimizedModule, "__call__", lambda *args, **kwargs: calls.append(1) or call(*args, **kwargs))
    for step in (trainer.generate, trainer.compute_loss):
        calls.clear()
        step(trainer.model_wrapped, batch(trainer))
        counts.append(len(calls))
    return counts


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@torch._dynamo.config.patch(disable=True)
def test_a_compiled_model_trains_alike(peft, tiny_model_dir, tmp_path, monkeypatch):
    """With the wrappers of `torch.compile`, but no compiler: that takes a minute."""
    runs = []
    for compiled in (True, False):
        torch.manual_seed(0)
        trainer = online(
            tiny_model_dir,
            tmp_path / str(compiled),
            torch_compile=compiled,
            mixture_coef=0.5,
            max_steps=1,
            save_strategy="steps",
            save_steps=1,
            trainer_kwargs={"peft_config": lora() if peft else None, "eval_dataset": prompts(2)},
        )
        before, stops = trainer.model.generation_config, trainer.model.generation_config.eos_token_id
        trainer.train()
        metrics = trainer.evaluate()
        runs.append((parameters(trainer), metrics["eval_loss"], metrics["eval_win_rate"]))
        if compiled:
            assert hasattr(trainer.model_wrapped, "_orig_mod")
            generated, learnt = compiled_calls(trainer, monkeypatch)
            assert generated == 0 < learnt  # in generating, each length would be compiled anew
        assert trainer.model.generation_config is before and before.eos_token_id == stops
        assert (tmp_path / str(compiled) / "checkpoint-1").is_dir()
    assert_same_parameters(runs[0][0], runs[1][0], rtol=1e-4, atol=1e-6)
    assert runs[0][1:] == pytest.approx(runs[1][1:], rel=1e-4)


def test_the_model_card_names_model_and_losses(tiny_model_dir, tmp_path):
    trainer = online(
        tiny_model_dir, tmp_path, loss_type=["offset", "sigmoid"], loss_kwargs={"alpha": 0.25}, loss_weights=[1.0, 0.5]
    )
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"fine-tuned version of the local model `{tiny_model_dir.name}`" in card
    assert "| `offset` | 1.0 |" in card and '"alpha": 0.25' in card and "| `sigmoid` | 0.5 |" in card
    assert "Direct Preference Optimization with an Offset" in card


def test_a_reference_is_the_model_as_it_stands(tiny_model_dir, tmp_path, caplog):
    first = online(tiny_model_dir, tmp_path, cls=Scripted)
    assert "differ from those" not in caplog.text
    with torch.no_grad():
        for parameter in first.model.parameters():
            parameter.mul_(1.05)
    second = trl_ext.OnlineDPOTrainer(
        first.model, reward_funcs=length_reward, args=first.args, train_dataset=prompts(),
        processing_class=first.processing_class,
    )  # fmt: skip
    assert "differ from those" in caplog.text
    for name, value in second.ref_model.named_parameters():
        assert torch.equal(value, second.model.get_parameter(name)) and not value.requires_grad
