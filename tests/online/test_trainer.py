"""The four steps alone and together."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification
from trl.experimental.online_dpo import OnlineDPOConfig as TRLConfig
from trl.experimental.online_dpo import OnlineDPOTrainer as TRLTrainer

import trl_ext
from tests.conftest import preference_rows
from tests.helpers import assert_same_parameters, history, parameters
from tests.online.runs import Scripted, length_reward, online, prompts, scripted


OURS = ("offset", "anchored", "margin_adaptive", "bias_variance", "length_regularized")


def lora():
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


def batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def learn(trainer, inputs):
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


# Against TRL, and by hand


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("backend", ["auto", "trl"])
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
            trainer_kwargs={"peft_config": lora() if peft else None},
            **options,
        )
        if not peft:  # the policy away from its reference
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


def test_all_pairs_by_hand(tiny_model_dir, tmp_path):
    trainer = online(tiny_model_dir, tmp_path, cls=Scripted, num_generations=3, pairing="all", beta=0.5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.05)
    inputs = batch(trainer)
    loss, _ = learn(trainer, inputs)
    completions = trainer.generate(trainer.model, inputs)
    total = 0.0
    with torch.no_grad():
        for row, prompt in enumerate(completions.prompt_ids):
            ratios = []
            for k in range(3):
                answer = completions.ids[k * len(completions.prompts) + row]
                ids = torch.cat([prompt, answer]).unsqueeze(0)
                sums = [
                    network(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                    .gather(1, answer.unsqueeze(1)).sum()
                    for network in (trainer.model, trainer.ref_model)
                ]  # fmt: skip
                ratios.append(sums[0] - sums[1])
            # longer answers score more, and the later ones are longer
            pairs = [(2, 0), (2, 1), (1, 0)]
            total += sum(-torch.nn.functional.logsigmoid(0.5 * (ratios[a] - ratios[b])) for a, b in pairs) / 3
    torch.testing.assert_close(loss, total / len(completions.prompts), rtol=1e-4, atol=1e-5)


def test_rewards_are_scores_and_groups_are_groups(tiny_model_dir, tmp_path):
    seen = []

    class Spy:
        takes_groups, paper, required_columns, optional_columns = True, "", (), ()
        divides_by_beta = False
        metrics = staticmethod(lambda batch: {})

        def __call__(self, batch):
            seen.append(batch)
            return (batch.logps if hasattr(batch, "logps") else batch.delta.unsqueeze(1)).sum(1)

    for pairing in ("best_worst", "group"):
        trainer = online(
            tiny_model_dir, tmp_path, cls=Scripted, loss_type="anchored", num_generations=3, pairing=pairing
        )
        trainer._losses = {"anchored": Spy()}
        learn(trainer, batch(trainer))
    pair, group = seen
    assert (pair.columns["score_chosen"] > pair.columns["score_rejected"]).all()
    assert group.logps.shape == group.scores.shape == (4, 3) and group.mask.all()
    torch.testing.assert_close(group.logps[:, 2], pair.chosen_logps)
    torch.testing.assert_close(group.scores[:, 2], pair.columns["score_chosen"])
    assert (group.lengths[:, 2] == pair.chosen_lengths).all()


# Every loss, every pairing


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", *OURS])
@pytest.mark.parametrize("generations", [2, 4])
def test_each_loss_trains(loss_type, generations, tiny_model_dir, tmp_path):
    trainer = online(tiny_model_dir, tmp_path, loss_type=loss_type, num_generations=generations)
    before = parameters(trainer)
    trainer.train()
    logs = history(trainer)[0]
    assert logs["pairs/dropped_prompts"] < 1 and logs["objective/kl"] == pytest.approx(0, abs=1e-4)
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


def test_a_reward_model_from_a_folder(tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    config = Qwen3Config.from_pretrained(tiny_model_dir, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    Qwen3ForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    trainer = online(tiny_model_dir, tmp_path, trainer_kwargs={"reward_funcs": str(tmp_path / "rm")})
    inputs = batch(trainer)
    completions = trainer.generate(trainer.model, inputs)
    scores = trainer.score(inputs, completions)
    text = completions.prompts[1] + completions.texts[len(completions.prompts) + 1]
    with torch.no_grad():
        expected = trainer.reward_funcs[0](**tokenizer(text, return_tensors="pt")).logits[0, 0]
    torch.testing.assert_close(scores.values[1, 1], expected, rtol=1e-4, atol=1e-5)
    trainer.train()
    assert "rewards/rm/mean" in history(trainer)[0]


def soft(prompts, first, second):
    return [0.5 if len(a) == len(b) else 0.7 if len(a) > len(b) else 0.3 for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("loss_type", ["ipo", "anchored", "sigmoid"])
def test_a_preference_oracle(loss_type, tiny_model_dir, tmp_path):
    trainer = online(
        tiny_model_dir,
        tmp_path,
        loss_type=loss_type,
        cls=Scripted,
        trainer_kwargs={"reward_funcs": None, "preference_fn": soft},
    )
    loss, _ = learn(trainer, batch(trainer))
    # policy = reference: delta is 0
    expected = {"ipo": ((0.7 - 0.5) / 0.1) ** 2, "anchored": 0.6931, "sigmoid": 0.6931}[loss_type]
    assert loss.item() == pytest.approx(expected, rel=1e-3)


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


# Prompts


def conversations(**columns):
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}], **columns} for row in preference_rows(8)]
    return Dataset.from_list(rows)


def test_conversations_with_thinking_on_and_off(tiny_model_dir, tmp_path):
    seen = []

    def judge(prompts, completions, **kwargs):
        seen.append((prompts[0], completions[0]))
        return [float(len(c[0]["content"])) for c in completions]

    kwargs = {"train_dataset": conversations(), "reward_funcs": judge}
    trainer = online(tiny_model_dir, tmp_path, loss_type="bias_variance", trainer_kwargs=kwargs)
    inputs = batch(trainer)
    on, off = (trainer._render(inputs, 0, thinking) for thinking in (True, False))
    assert on.endswith("<|im_start|>assistant\n") and off == on + "<think>\n\n</think>\n\n"
    trainer.train()
    assert seen[0][0][0]["role"] == "user" and seen[0][1][0]["role"] == "assistant"
    assert "objective/scores_empty_trace" in history(trainer)[0]


def test_a_template_argument_of_the_dataset(tiny_model_dir, tmp_path):
    data = conversations(chat_template_kwargs={"enable_thinking": False})
    trainer = online(
        tiny_model_dir,
        tmp_path,
        trainer_kwargs={"train_dataset": data, "reward_funcs": lambda prompts, **k: range(len(prompts))},
    )
    assert trainer._render(batch(trainer), 0, True).endswith("</think>\n\n")
    trainer.train()


def test_the_answer_alone_is_scored(tiny_model_dir, tmp_path):
    trainer = online(tiny_model_dir, tmp_path, loss_type="bias_variance")
    encode = lambda text: torch.tensor(trainer.processing_class(text)["input_ids"])  # noqa: E731
    texts = ["<think> so what</think> a film<|eos|>", " a film<|eos|>", "<think> so what"]
    assert trainer._texts(["p"], [encode(text) for text in texts]) == ["a film", " a film", ""]


def test_long_prompts_lose_their_beginning(tiny_model_dir, tmp_path):
    trainer = online(tiny_model_dir, tmp_path, cls=Scripted, max_length=12)
    inputs = batch(trainer)
    completions = trainer.generate(trainer.model, inputs)
    selection = trainer.pair(completions, trainer.score(inputs, completions))
    rows, groups, _ = trainer._rows([selection])
    assert rows["input_ids"].size(1) <= 12
    assert (
        rows["completion_mask"].sum(1)
        == torch.tensor([len(completions.ids[int(m) * 4 + g]) for m in (1, 0) for g in range(groups)])
    ).all()


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
    inputs = batch(trainer)
    seen = []

    class Watch(trl_ext.OnlineDPOTrainer):
        pass

    trainer.__class__ = Watch

    def compute(self, *args, **kwargs):
        loss = trl_ext.OnlineDPOTrainer.compute_loss(self, *args, **kwargs)
        seen.append(self._metrics["train"]["objective/kl"][-1])
        return loss

    Watch.compute_loss = compute
    trainer.train()
    assert abs(seen[0]) < 1e-4 and abs(seen[1]) > 1e-3 and abs(seen[2]) < 1e-4  # copied after two steps
    with torch.no_grad(), trainer._reference() as reference:
        assert reference(input_ids=torch.tensor([[5, 6]])).logits.isfinite().all()
    del inputs


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
    trainer.train()
    entries = [entry for entry in history(trainer) if "eval_win_rate" in entry]
    assert entries
    metrics = trainer.evaluate()
    for name in (
        "eval_loss",
        "eval_win_rate",
        "eval_objective/kl",
        "eval_completions/mean_length",
        "eval_objective/scores",
    ):
        assert name in metrics, name
    assert metrics["eval_win_rate"] == trainer.evaluate()["eval_win_rate"]  # same seed, same policy
    state = torch.get_rng_state()
    trainer.evaluate()
    assert torch.equal(state, torch.get_rng_state())


def test_win_rate_of_the_policy_against_itself(tiny_model_dir, tmp_path):
    kwargs = {"eval_dataset": prompts(6), "reward_funcs": length_reward}
    trainer = online(tiny_model_dir, tmp_path, cls=Scripted, trainer_kwargs=kwargs, per_device_eval_batch_size=6)
    # its second completion is longer than the first, which is the reference's
    assert trainer.evaluate()["eval_win_rate"] == pytest.approx(0.75)


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


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reward_funcs": None}, "got neither"),
        ({"preference_fn": soft}, "got both"),
        ({"reward_funcs": None, "preference_fn": 3}, "is not callable"),
        ({"compute_metrics": lambda x: {}}, "would not be called"),
        ({"train_dataset": Dataset.from_dict({"text": ["a"]})}, "no column 'prompt'"),
        ({"train_dataset": Dataset.from_dict({"prompt": []})}, "is empty"),
        ({"train_dataset": None}, "`train_dataset` is required"),
    ],
)
def test_refused_arguments(kwargs, message, tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        online(tiny_model_dir, tmp_path, trainer_kwargs=kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_generations": 1}, "at least 2"),
        ({"pairing": "best"}, "choose one of"),
        ({"pairing": "group"}, r"\['sigmoid'\] take pairs"),
        ({"loss_type": "exo_pair"}, r"names \['exo_pair'\], which are not defined online"),
        ({"loss_type": "bias_variance", "pairing": "all"}, "use `pairing='best_worst'`"),
        ({"mixture_coef": 1.5}, r"must lie in \[0, 1\]"),
        ({"mixture_coef": 0.5, "use_vllm": True}, "use_vllm=False"),
        ({"missing_eos_penalty": -1.0}, "must be positive"),
        ({"length_penalty": float("nan")}, "must be finite"),
        ({"sync_ref_model": True, "ref_model_mixup_alpha": 0.0}, "must lie in"),
        ({"beta": [0.1, -1.0]}, "at least 0"),
        ({"loss_type": "ipo", "beta": 0.0}, "no meaning for"),
        ({"loss_weights": [1.0, 2.0]}, "2 weights for 1 losses"),
    ],
)
def test_refused_configs(kwargs, message):
    with pytest.raises(ValueError, match=message):
        trl_ext.OnlineDPOConfig(output_dir="out", use_cpu=True, bf16=False, **kwargs)


def test_scores_need_rewards(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="which a `preference_fn` has not"):
        online(
            tiny_model_dir, tmp_path, loss_type="offset", trainer_kwargs={"reward_funcs": None, "preference_fn": soft}
        )


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


@pytest.mark.parametrize("count", [2, 3, 4])
def test_vllm_gives_blocks_of_k(count, tiny_model_dir, tmp_path):
    """TRL's method, here a stand-in, gives two completions of each prompt that it is handed."""
    trainer = online(tiny_model_dir, tmp_path, num_generations=count)
    calls = []

    def generate(prompts, images=None):
        calls.append(len(prompts))
        ids = torch.arange(2 * len(prompts)).unsqueeze(1) + 10
        mask = torch.ones_like(ids)
        return ids, mask, ids, mask

    trainer._generate_vllm = generate
    trainer.use_vllm = True
    completions = trainer.generate(trainer.model, {"prompt": ["a", "b", "c"]})
    assert calls == [3 * (1 if count == 2 else 2)]
    assert [row.item() for row in completions.ids] == [10 + i for i in range(3 * count)]
    assert [row.item() for row in completions.prompt_ids] == [10, 11, 12]


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_the_mixture_projects_no_prompt(peft, tiny_model_dir, tmp_path):
    kwargs = {"peft_config": lora() if peft else None}
    trainer = online(tiny_model_dir, tmp_path, mixture_coef=0.5, trainer_kwargs=kwargs)
    widths = []
    heads = {trainer.model.get_output_embeddings(), (trainer.ref_model or trainer.model).get_output_embeddings()}
    hooks = [head.register_forward_hook(lambda module, args, output: widths.append(output.size(1))) for head in heads]
    trainer.generate(trainer.model, batch(trainer))
    for hook in hooks:
        hook.remove()
    assert set(widths) == {1}
