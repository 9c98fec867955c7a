"""Images: a tiny LLaVA, offline and online, against TRL."""

import copy

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

import trl_ext
from tests.conftest import build_tokenizer
from tests.helpers import history, loss_and_gradients, options


TEMPLATE = (
    "{%- for m in messages %}{{- m.role + ': ' }}{%- if m.content is string %}{{- m.content }}{%- else %}"
    "{%- for c in m.content %}{{- '<image>' if c.type == 'image' else c.text }}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"
)


@pytest.fixture(scope="module")
def processor():
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = TEMPLATE
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip


def model(processor, seed=0):
    tokenizer = processor.tokenizer
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None, initializer_range=0.2,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def image(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def said(role, text):
    return [{"role": role, "content": [{"type": "text", "text": text}]}]


def test_offline_is_trls(processor, tmp_path):
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}]
    rows = [
        {"prompt": asked, "chosen": said("assistant", " a good film"), "rejected": said("assistant", " dull and slow"),
         "images": [image(i)]}
        for i in range(4)
    ]  # fmt: skip
    runs = []
    for trainer, config in ((trl.DPOTrainer, trl.DPOConfig), (trl_ext.DPOTrainer, trl_ext.DPOConfig)):
        args = config(**options(tmp_path, max_length=None, per_device_train_batch_size=2))
        ours = trainer(model=model(processor), ref_model=model(processor, 1), args=args, processing_class=processor,
                       train_dataset=Dataset.from_list(rows))  # fmt: skip
        runs.append(loss_and_gradients(ours, next(iter(ours.get_train_dataloader()))))
    (loss, gradients), (our_loss, our_gradients) = runs
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    for name, value in gradients.items():
        torch.testing.assert_close(our_gradients[name], value, rtol=1e-3, atol=1e-5)


def test_a_loss_without_a_reference(processor, tmp_path):
    """Images cannot have their reference precomputed, and need none."""
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}]
    answers = {"chosen": said("assistant", " a good film"), "rejected": said("assistant", " dull and slow")}
    args = trl_ext.DPOConfig(
        **options(tmp_path, loss_type="simpo", max_length=None, per_device_train_batch_size=2, max_steps=1)
    )
    trainer = trl_ext.DPOTrainer(
        model=model(processor), args=args, processing_class=processor,
        train_dataset=Dataset.from_list([{"prompt": asked, **answers, "images": [image(i)]} for i in range(4)]),
    )  # fmt: skip
    assert trainer.ref_model is None
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def online(cls, config, processor, tmp_path, **kwargs):
    rows = [{"prompt": [{"role": "user", "content": "what is it"}], "image": image(i)} for i in range(4)]
    args = config(
        **options(tmp_path, max_new_tokens=6, per_device_train_batch_size=2, gradient_checkpointing=False, **kwargs)
    )
    return cls(
        model=model(processor), ref_model=model(processor, 1), args=args, processing_class=processor,
        reward_funcs=lambda completions, completion_ids, **kwargs: [float(sum(ids)) for ids in completion_ids],
        train_dataset=Dataset.from_list(rows),
    )  # fmt: skip


def test_online_is_trls_on_the_same_completions(processor, tmp_path):
    runs, given = [], None
    for cls, config in (
        (OnlineDPOTrainer, OnlineDPOConfig),
        (trl_ext.OnlineDPOTrainer, trl_ext.OnlineDPOConfig),
    ):
        trainer = online(cls, config, processor, tmp_path)
        trainer.current_gradient_accumulation_steps = 1
        inputs = next(iter(trainer.get_train_dataloader()))
        real = trainer._generate

        def generate(model, prompts, images=None, real=real):
            nonlocal given
            given = given or real(model, prompts, images)
            return copy.deepcopy(given)

        trainer._generate = generate
        loss = trainer.training_step(trainer.model, inputs)
        gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        runs.append((loss, gradients))
    (loss, gradients), (our_loss, our_gradients) = runs
    torch.testing.assert_close(our_loss, loss, rtol=1e-4, atol=1e-5)
    assert any("vision" in name for name in our_gradients)
    for name, value in gradients.items():
        torch.testing.assert_close(our_gradients[name], value, rtol=1e-3, atol=2e-5)


def test_completions_of_images_are_the_policys_own(processor, tmp_path):
    """Whatever the model's own `generation_config` would have `generate` do."""
    drawn = []
    for own in ({}, {"suppress_tokens": list(range(100, 400)), "no_repeat_ngram_size": 1, "min_new_tokens": 6}):
        trainer = online(trl_ext.OnlineDPOTrainer, trl_ext.OnlineDPOConfig, processor, tmp_path)
        for name, value in own.items():
            setattr(trainer.model.generation_config, name, value)
        config, inputs = trainer.model.generation_config, next(iter(trainer.get_train_dataloader()))
        torch.manual_seed(1)
        completions = trainer.generate(trainer.model, inputs)
        drawn.append([row.tolist() for row in completions.ids])
        assert trainer.model.generation_config is config
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("pairing", ["best_worst", "all"])
def test_four_completions_of_an_image(pairing, processor, tmp_path):
    trainer = online(
        trl_ext.OnlineDPOTrainer, trl_ext.OnlineDPOConfig, processor, tmp_path, num_generations=4, pairing=pairing,
        loss_type="offset",
    )  # fmt: skip
    trainer.train()
    assert history(trainer)[0]["pairs/dropped_prompts"] < 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_generations": 3}, "even `num_generations`"),
        ({"loss_type": "bias_variance"}, "other than bias_variance"),
        ({"use_vllm": True}, "text alone"),
        ({"mixture_coef": 0.5}, "not sampled from a mixture"),
    ],
)
def test_refused(kwargs, message, processor, tmp_path):
    with pytest.raises(ValueError, match=message):
        online(trl_ext.OnlineDPOTrainer, trl_ext.OnlineDPOConfig, processor, tmp_path, **kwargs)
