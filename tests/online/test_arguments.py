"""What an online trainer is given reaches the place where it is used."""

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    TrainerCallback,
)
from trl.experimental.online_dpo import OnlineDPOTrainer as TRLTrainer

import trl_ext
from tests.helpers import options
from tests.online.runs import Scripted, batch, learn, length_reward, online, prompts, scripted
from tests.online.test_values import BETA, TwoTraces, assert_equal, expected, oracle, sigmoid
from trl_ext.losses.base import Loss
from trl_ext.trainers.online.generate import _with_image


def test_what_is_handed_on(tiny_model_dir, tmp_path):
    class Watch(TrainerCallback):
        pass

    callback, collate, logits = Watch(), lambda rows: {"prompt": [row["prompt"] for row in rows]}, lambda *args: args
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    evaluation = prompts(2)
    trainer = trl_ext.OnlineDPOTrainer(
        model=model,
        reward_funcs=length_reward,
        args=trl_ext.OnlineDPOConfig(**options(tmp_path)),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        train_dataset=prompts(),
        eval_dataset=evaluation,
        data_collator=collate,
        callbacks=[callback],
        optimizers=(optimizer, scheduler),
        preprocess_logits_for_metrics=logits,
    )
    assert trainer.model is model and callback in trainer.callback_handler.callbacks
    assert trainer.data_collator is collate and trainer.preprocess_logits_for_metrics is logits
    assert trainer.optimizer is optimizer and trainer.lr_scheduler is scheduler
    assert trainer.eval_dataset["prompt"][:] == evaluation["prompt"][:]
    assert trainer.ref_model is not model and not trainer.ref_model.training


def test_all_arguments_are_handed_on_to_trl(tiny_model_dir, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    seen = {}

    def init(self, **kwargs):
        seen.update(kwargs)
        raise Stop

    monkeypatch.setattr(TRLTrainer, "__init__", init)
    names = ("data_collator", "callbacks", "optimizers", "preprocess_logits_for_metrics", "reward_processing_classes")
    given = {name: object() for name in names}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model, reference = (AutoModelForCausalLM.from_pretrained(tiny_model_dir) for _ in range(2))
    args = trl_ext.OnlineDPOConfig(**options(tmp_path))
    for peft_config in (None, object()):
        with pytest.raises(Stop):
            trl_ext.OnlineDPOTrainer(
                model, None if peft_config else reference, length_reward, args, train_dataset=prompts(2),
                eval_dataset={"a": prompts(1)}, processing_class=tokenizer, peft_config=peft_config, **given,
            )  # fmt: skip
        assert {name: seen[name] for name in given} == given
        assert (seen["model"], seen["args"], seen["processing_class"]) == (model, args, tokenizer)
        assert seen["peft_config"] is peft_config and seen["reward_funcs"] == [length_reward]
        # A stand-in where adapters are switched off for the reference: given none, TRL would copy the model
        assert isinstance(seen["ref_model"], torch.nn.Identity) if peft_config else seen["ref_model"] is reference
        assert seen["train_dataset"][:] == prompts(2)[:] and seen["eval_dataset"]["a"][:] == prompts(1)[:]


def test_a_name_is_loaded_as_the_config_says(tiny_model_dir, tmp_path):
    given = {"dtype": "bfloat16"}
    trainer = online(tiny_model_dir, tmp_path, model_init_kwargs=given, trainer_kwargs={"model": str(tiny_model_dir)})
    assert trainer.model.dtype == trainer.ref_model.dtype == torch.bfloat16
    assert trainer.args.model_init_kwargs == given  # and the config is as it was
    plain = online(tiny_model_dir, tmp_path, trainer_kwargs={"model": str(tiny_model_dir)})
    assert plain.args.model_init_kwargs is None


def test_without_a_config_the_folder_is_named_after_the_model(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.chdir(tmp_path)
    for model in (f"{tiny_model_dir}/", AutoModelForCausalLM.from_pretrained(tiny_model_dir)):
        trainer = trl_ext.OnlineDPOTrainer(
            model,
            reward_funcs=length_reward,
            train_dataset=prompts(),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        )
        assert trainer.args.output_dir == f"{tiny_model_dir.name}-Online-DPO"


@pytest.mark.parametrize(("given", "found"), [(None, False), (True, True), (False, False)])
def test_texts_are_not_dispatched_by_one_process(given, found, tiny_model_dir, tmp_path):
    config = {"dispatch_batches": given}
    trainer = online(tiny_model_dir, tmp_path, accelerator_config=config)
    assert trainer.args.accelerator_config.dispatch_batches is found


def test_a_reference_that_is_given(tiny_model_dir, tmp_path):
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    weight = reference.lm_head.weight.clone()
    trainer = online(tiny_model_dir, tmp_path, cls=Scripted, beta=BETA, trainer_kwargs={"ref_model": reference})
    assert trainer.ref_model is reference and torch.equal(reference.lm_head.weight, weight)
    inputs = batch(trainer)
    assert_equal(learn(trainer, inputs), expected(trainer, inputs, sigmoid))


def test_under_zero3_the_reference_is_loaded_by_the_policys_name(tiny_model_dir, tmp_path, monkeypatch):
    """A model cannot be copied there, so one that has no name is refused."""
    for module in ("trl_ext.trainers.online.trainer", "trl.experimental.utils"):
        monkeypatch.setattr(f"{module}.is_deepspeed_zero3_enabled", lambda: True)
    trainer = online(tiny_model_dir, tmp_path, trainer_kwargs={"model": str(tiny_model_dir)})
    first = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).lm_head.weight
    assert trainer.ref_model is not trainer.model and torch.equal(trainer.ref_model.lm_head.weight, first)
    with pytest.raises(ValueError, match="instantiate your reference model directly"):
        online(tiny_model_dir, tmp_path)  # a model that is loaded


def test_how_completions_are_sampled(tiny_model_dir, tmp_path):
    kwargs = {
        "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.5, "max_new_tokens": 9,
        "cache_implementation": "static",
    }  # fmt: skip
    trainer = online(tiny_model_dir, tmp_path, generation_kwargs={"no_repeat_ngram_size": 3}, **kwargs)
    config, tokenizer = trainer._sampling, trainer.processing_class
    assert {name: getattr(config, name) for name in kwargs} == kwargs
    assert config.do_sample and config.use_cache and config.no_repeat_ngram_size == 3
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, [tokenizer.eos_token_id])
    assert trainer.generation_config is config and trainer.generation_kwargs["use_cache"] is True
    tokenizer.bos_token = "<think>"
    assert trainer._sampling_config().bos_token_id == tokenizer.convert_tokens_to_ids("<think>")
    trainer.use_vllm = True  # these options are then arguments of vLLM's
    assert not trainer._sampling_config().no_repeat_ngram_size
    greedy = online(tiny_model_dir, tmp_path, generation_kwargs={"do_sample": False, "use_cache": False})
    assert not greedy._sampling.do_sample and greedy.generation_kwargs["use_cache"] is False


# Judges


def test_a_reward_model_with_a_tokenizer_of_its_own(tiny_model_dir, tmp_path):
    """Whose words have other ids: it adds a token before each text."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    own = AutoTokenizer.from_pretrained(tiny_model_dir)
    own.chat_template = "{% for m in messages %}{{ '!' + m.content }}{% endfor %}"
    torch.manual_seed(1)
    config = Qwen3Config.from_pretrained(tiny_model_dir, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    model = Qwen3ForSequenceClassification(config).eval()
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": row}]} for row in prompts()["prompt"]])
    kwargs = {"reward_funcs": model, "reward_processing_classes": own, "train_dataset": data}
    trainer = online(tiny_model_dir, tmp_path, trainer_kwargs=kwargs)
    assert trainer.reward_processing_classes == [own]
    inputs = {"prompt": data["prompt"][:5]}  # more than the four that the model scores at a time
    completions = trainer.generate(trainer.model, inputs)
    scores = trainer.score(inputs, completions)
    for k in range(2):
        for row in range(5):
            text = f"!{inputs['prompt'][row][0]['content']}!{completions.texts[5 * k + row][0]['content']}"
            with torch.no_grad():
                value = model(input_ids=torch.tensor([own(text)["input_ids"]])).logits[0, 0].item()
            assert scores.values[row, k].item() == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_a_reward_model_scores_as_many_as_are_learnt_from_together(tiny_model_dir, tmp_path):
    """Three prompts and not four, where a step of four does not fit."""

    class Small(Scripted):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if len(inputs["prompt"]) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    config = Qwen3Config.from_pretrained(tiny_model_dir, num_labels=1, pad_token_id=0)
    model, rows = Qwen3ForSequenceClassification(config), []
    model.register_forward_pre_hook(lambda module, args, given: rows.append(len(given["input_ids"])), with_kwargs=True)
    kwargs = {"reward_funcs": model, "reward_processing_classes": AutoTokenizer.from_pretrained(tiny_model_dir)}
    trainer = online(
        tiny_model_dir, tmp_path, cls=Small, trainer_kwargs=kwargs, auto_find_batch_size=True, gradient_accumulation_steps=2,
        max_steps=1,
    )  # fmt: skip
    trainer.train()
    assert trainer.args.per_device_train_batch_size == 4 and rows == [6, 6]  # two completions of each


ORACLE = {"reward_funcs": None, "judge": oracle}


def test_a_single_completion_has_nothing_to_win_against(tiny_model_dir, tmp_path):
    trainer = online(tiny_model_dir, tmp_path, cls=Scripted, loss_type="anchored", trainer_kwargs=ORACLE)
    inputs = {"prompt": ["a", "b", "c"]}
    scores = trainer.score(inputs, trainer.generate(trainer.model, inputs, reference=True))
    assert scores.values.tolist() == [[0.0]] * 3 and scores.mask.tolist() == [[True]] * 3
    assert scores.mask.dtype == torch.bool and scores.probabilities is None and scores.per_function == {}


def test_evaluation_data_where_a_loss_reads_the_oracle(tiny_model_dir, tmp_path):
    class Reads(Loss):
        columns = ("preference_prob",)

    data = prompts(2)
    trainer = online(tiny_model_dir, tmp_path, loss_type="anchored", trainer_kwargs=ORACLE)
    trainer._data.losses = {"reads": Reads()}
    assert trainer._data.evaluation(data)["prompt"][:] == data["prompt"][:]
    trainer._data.judged = False
    with pytest.raises(ValueError, match="'reads' needs 'preference_prob': give a `judge`"):
        trainer._data.evaluation(data)


# Evaluation


def test_both_traces_are_compared_with_the_reference(tiny_model_dir, tmp_path):
    """The first completion is the reference's own, so it ties; the second is longer."""
    data = prompts(3)
    trainer = online(
        tiny_model_dir, tmp_path, cls=TwoTraces, loss_type="bias_variance", per_device_eval_batch_size=3,
        trainer_kwargs={"eval_dataset": data},
    )  # fmt: skip
    metrics = trainer.evaluate()
    tokenizer = trainer.processing_class
    for suffix, ending in (("", ""), ("_empty_trace", " so")):
        texts = [[scripted(prompt + ending, k) for prompt in data["prompt"]] for k in range(2)]
        of = lambda name, suffix=suffix: metrics[f"eval_{name}{suffix}"]  # noqa: E731
        tokens = [[len(tokenizer(text)["input_ids"]) + 1 for text in each] for each in texts]
        assert of("win_rate") == pytest.approx(0.75)
        assert of("reference/scores") == pytest.approx(sum(map(len, texts[0])) / 3)
        assert of("reference/mean_length") == pytest.approx(sum(tokens[0]) / 3)
        assert of("completions/mean_length") == pytest.approx(sum(map(sum, tokens)) / 6)
        assert of("completions/mean_score") == pytest.approx(sum(len(text) for each in texts for text in each) / 6)
        assert of("objective/scores_margin") == pytest.approx(
            sum(len(b) - len(a) for a, b in zip(*texts, strict=True)) / 3
        )
        assert of("pairs/dropped_prompts") == 0


def test_what_is_not_scored_wins_and_loses_nothing(tiny_model_dir, tmp_path):
    """Of two prompts the first's completions have no score: what is left is one tie and one win."""

    def second(prompts, completions, **kwargs):
        return [None if i % 2 == 0 else float(len(text)) for i, text in enumerate(completions)]

    data = prompts(2)
    trainer = online(
        tiny_model_dir, tmp_path, cls=Scripted, per_device_eval_batch_size=2,
        trainer_kwargs={"eval_dataset": data, "reward_funcs": second},
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_win_rate"] == pytest.approx(0.75)
    assert metrics["eval_reference/scores"] == len(scripted(data["prompt"][1], 0))
    assert metrics["eval_pairs/dropped_prompts"] == metrics["eval_rewards/unscored"] == 0.5


# Images and cards


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("what", "what"),
        (
            [{"role": "system", "content": "be"}, {"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
            [
                {"role": "system", "content": [{"type": "text", "text": "be"}]},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
                {"role": "user", "content": [{"type": "text", "text": "b"}]},
            ],
        ),
        (
            [{"role": "system", "content": "be", "name": "x"}],
            [{"role": "system", "content": [{"type": "image"}, {"type": "text", "text": "be"}], "name": "x"}],
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "user", "content": "b"}],
            [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "user", "content": "b"}],
        ),
    ],
)
def test_where_an_image_stands(prompt, expected):
    assert _with_image(prompt) == expected


def test_a_card_names_the_first_paper(tiny_model_dir, tmp_path):
    trainer = online(tiny_model_dir, tmp_path, loss_type=["offset", "sigmoid"])
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "trained with Online offset + sigmoid, a method introduced in [Direct Preference" in card
    assert "Optimization with an Offset](https://huggingface.co/papers/2402.10571)." in card
    assert "amini2024direct" in card


def test_a_card_of_a_loss_of_trls_has_no_table(tiny_model_dir, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("trl_ext.trainers.with_terms.complete_model_card", lambda *args: seen.append(args))
    trainer = online(tiny_model_dir, tmp_path)
    trainer.create_model_card()
    ((folder, model, sections),) = seen
    assert (folder, model) == (str(tmp_path), trainer.model)
    assert [section.split("\n")[0] for section in sections] == ["### Data and settings", "### Evaluation"]
    trainer.is_world_process_zero = lambda: False
    trainer.create_model_card()
    assert len(seen) == 1
