"""Sampling, scoring and training see the same token ids."""

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from tests.conftest import build_tokenizer
from trl_ext.data import RewardModel, score_preferences
from trl_ext.data.tokens import prompt_ids, reward_ids
from trl_ext.trainers.reward import RewardConfig, RewardTrainer


BOS, EOS = "<|bos|>", "<|eos|>"


def tokenizer_with_bos(template=f"{BOS} $A"):
    """A tokenizer that adds special tokens to plain text, as those of Llama and Gemma do."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"bos_token": BOS})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in (BOS, EOS)]
    )
    return tokenizer


def message(role, text):
    return [{"role": role, "content": text}]


def pairs(form):
    texts = [("what", " good film", " bad"), ("what was it", " the story was great", " dull")]
    if form == "plain":
        return [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in texts]
    return [
        {"prompt": message("user", p), "chosen": message("assistant", c), "rejected": message("assistant", r)}
        for p, c, r in texts
    ]


def test_plain_text_has_bos_and_eos():
    tokenizer = tokenizer_with_bos()
    assert tokenizer.decode(reward_ids("what", " good", tokenizer)) == "<|bos|>what good<|eos|>"
    assert tokenizer.decode(reward_ids("what", " good<|eos|>", tokenizer)) == "<|bos|>what good<|eos|>"
    assert tokenizer.decode(reward_ids("what", "", tokenizer)) == "<|bos|>what<|eos|>"
    assert tokenizer.decode(prompt_ids("what", tokenizer, False)) == "<|bos|>what"
    assert tokenizer.decode(prompt_ids("what", tokenizer, True)) == "what"


def test_a_prompt_does_not_end_with_what_the_tokenizer_appends():
    tokenizer = tokenizer_with_bos(f"{BOS} $A {EOS}")
    assert tokenizer.decode(prompt_ids("what", tokenizer, False)) == "<|bos|>what"
    assert tokenizer.decode(prompt_ids("what<|eos|>", tokenizer, False)) == "<|bos|>what<|eos|>"  # the user's own
    assert tokenizer.decode(prompt_ids("", tokenizer_with_bos(), False)) == "<|bos|>"


def test_a_template_writes_its_own_special_tokens():
    tokenizer = tokenizer_with_bos()
    ids = reward_ids(message("user", "what"), message("assistant", "good"), tokenizer)
    assert tokenizer.decode(ids) == "<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\ngood<|im_end|>\n"
    tokenizer.chat_template = "{{- tools[0].name ~ mood }}{%- for m in messages %}{{- m.content }}{%- endfor %}"
    ids = reward_ids(
        message("user", "what"), message("assistant", "good"), tokenizer, tools=[{"name": "clock"}],
        chat_template_kwargs={"mood": "!"},
    )  # fmt: skip
    assert tokenizer.decode(ids) == "clock!whatgood"


def test_long_texts_keep_their_end_and_bos():
    tokenizer = tokenizer_with_bos()
    ids = reward_ids("start " * 9, " the end", tokenizer)
    assert ids[0] == tokenizer.bos_token_id and len(ids) > 6
    assert reward_ids("start " * 9, " the end", tokenizer, max_length=4) == [ids[0], *ids[-3:]]
    assert reward_ids("start " * 9, " the end", tokenizer, max_length=1) == ids[:1]
    assert reward_ids("start " * 9, " the end", tokenizer, max_length=len(ids)) == ids
    tokenizer = build_tokenizer()  # nothing in front
    ids = reward_ids("start " * 9, " the end", tokenizer)
    assert reward_ids("start " * 9, " the end", tokenizer, max_length=4) == ids[-4:]


@pytest.mark.parametrize("pad", ["own", "eos"])
@pytest.mark.parametrize("form", ["plain", "conversational"])
def test_the_reward_is_that_of_the_reward_trainer(form, pad, tmp_path):
    """The same logits as in the forward of training, where a tokenizer adds BOS and pads may look like the end."""
    tokenizer = tokenizer_with_bos()
    if pad == "eos":
        tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_labels=1, initializer_range=0.3,
    )  # fmt: skip
    args = RewardConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    rows = Dataset.from_list(pairs(form))
    model = Qwen3ForSequenceClassification(config)
    trainer = RewardTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**next(iter(trainer.get_train_dataloader()))).logits[:, 0]
    scored = score_preferences(rows, RewardModel(model, tokenizer), cache_dir=tmp_path)
    found = torch.tensor([*scored["score_chosen"], *scored["score_rejected"]])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len({round(value, 3) for value in found.tolist()}) == 4


def test_conversations_need_a_chat_template():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template to render them"):
        reward_ids(message("user", "what"), message("assistant", "good"), tokenizer)
