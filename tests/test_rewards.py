"""Scores of reward models: which tokens they read, what their scores depend on, and through the trainer."""

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

import trl_ext
from tests.conftest import build_tokenizer, preference_rows
from tests.helpers import build, history
from trl_ext.data import RewardModel, sample_completions, score_preferences


PAIRS = Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in preference_rows(6)])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def reward_dir(tiny_model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("rm")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(1)
    config = Qwen3Config.from_pretrained(tiny_model_dir, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    Qwen3ForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_model_from_a_folder(reward_dir):
    scored = score_preferences(PAIRS, str(reward_dir), batch_size=4)
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    model = Qwen3ForSequenceClassification.from_pretrained(reward_dir)
    for row in scored:
        for side in ("chosen", "rejected"):
            with torch.no_grad():
                text = row["prompt"] + row[side] + tokenizer.eos_token
                expected = model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item()
            assert row[f"score_{side}"] == pytest.approx(expected, abs=1e-4)


def test_conversations_have_the_reward_models_template(reward_dir):
    rows = [
        {"prompt": [{"role": "user", "content": "what"}], "chosen": [{"role": "assistant", "content": a}],
         "rejected": [{"role": "assistant", "content": b}]}
        for a, b in (("good", "bad"), ("great", "dull"))
    ]  # fmt: skip
    scored = score_preferences(Dataset.from_list(rows), str(reward_dir))
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    model = Qwen3ForSequenceClassification.from_pretrained(reward_dir)
    for row in scored:
        text = f"<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n{row['rejected'][0]['content']}<|im_end|>\n"
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item()
        assert row["score_rejected"] == pytest.approx(expected, abs=1e-4)


def test_long_texts_keep_their_end(reward_dir):
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    model = Qwen3ForSequenceClassification.from_pretrained(reward_dir)
    reward = RewardModel(str(reward_dir), max_length=4)
    reward.load()
    ids = tokenizer("start of it the end<|eos|>", return_tensors="pt")["input_ids"]
    assert ids.size(1) > 8
    with torch.no_grad():
        expected = model(input_ids=ids[:, -4:]).logits[0, 0].item()
        others = [model(input_ids=each).logits[0, 0].item() for each in (ids, ids[:, :4], ids[:, -5:])]
    assert reward(["start of it"], [" the end"])[0] == pytest.approx(expected, abs=1e-5)
    assert all(abs(expected - other) > 1e-3 for other in others)


@pytest.mark.parametrize(
    ("positions", "known", "expected"), [(64, 10**30, 64), (64, 32, 32), (0, 48, 48), (0, 4096, 4096)]
)
def test_the_length_is_the_models_own_by_default(positions, known, expected):
    model = encoder()
    model.config.max_position_embeddings = positions
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = known
    reward = RewardModel(model, tokenizer)
    reward.load()
    assert reward.max_length == expected
    assert RewardModel(model, tokenizer, max_length=1).max_length == 1
    for value in (0, -1, True, 2.5):
        with pytest.raises(ValueError, match=f"`max_length={value}` must be a whole number, at least 1"):
            RewardModel(model, tokenizer, max_length=value)


SIZES = {"num_labels": 1, "initializer_range": 0.5}


def encoder():
    """BERT: attends to all of a row, has absolute positions, and dropout."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=512, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=128, hidden_dropout_prob=0.3, **SIZES,
        )
    )  # fmt: skip


def decoder():
    """GPT-2: absolute positions, dropout, and a reward at the last token that is no padding."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=512, n_embd=16, n_layer=2, n_head=2, n_positions=128, resid_pdrop=0.3, bos_token_id=1, eos_token_id=1,
        **SIZES,
    )  # fmt: skip
    return GPT2ForSequenceClassification(config)


@pytest.mark.parametrize("pad", ["<|pad|>", None])
@pytest.mark.parametrize("make", [encoder, decoder])
def test_a_reward_does_not_depend_on_its_batch(make, pad):
    """Short and long texts together, the last batch of one, against each text alone without padding or dropout."""
    tokenizer, model = build_tokenizer(), make()
    tokenizer.pad_token = pad
    scored = score_preferences(PAIRS, RewardModel(model.train(), tokenizer), batch_size=11)
    assert tokenizer.pad_token == pad
    model.eval()
    for row in scored:
        for side in ("chosen", "rejected"):
            ids = tokenizer(row["prompt"] + row[side] + "<|eos|>", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                expected = model(input_ids=ids).logits[0, 0].item()
            assert row[f"score_{side}"] == pytest.approx(expected, abs=1e-5)
    assert len({*scored["score_chosen"], *scored["score_rejected"]}) == 12


def test_what_a_score_depends_on(reward_dir):
    """A change of anything that a score depends on gives other scores, not those that were kept."""
    model = Qwen3ForSequenceClassification.from_pretrained(reward_dir)
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    reward = RewardModel(model, tokenizer)
    seen = [score_preferences(PAIRS, reward)["score_chosen"]]

    def differs(reward):
        found = score_preferences(PAIRS, reward)["score_chosen"]
        fresh = all(found != other for other in seen)
        seen.append(found)
        return fresh

    assert not differs(RewardModel(model, tokenizer))
    assert differs(RewardModel(model, tokenizer, max_length=5))
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1.0
    assert differs(reward)
    model.config.rms_norm_eps = model.model.norm.variance_epsilon = 0.5
    assert differs(reward)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 2)]
    )
    assert differs(reward)
    tokenizer.eos_token = "<|im_end|>"
    assert differs(reward)


def test_what_the_key_of_a_model_leaves_out(reward_dir):
    """Names, and what the last call has left in the tokenizer."""
    model = Qwen3ForSequenceClassification.from_pretrained(reward_dir)
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    before = RewardModel(model, tokenizer).key()
    model.config._name_or_path, model.config.use_cache = "elsewhere", False
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)
    assert RewardModel(model, tokenizer).key() == before == RewardModel(str(reward_dir)).key()
    tokenizer.chat_template += " "
    assert RewardModel(model, tokenizer).key() != before


def test_models_that_cannot_score(tiny_model_dir, reward_dir):
    with pytest.raises(ValueError, match=r"has no weights for \['score.weight'\]"):
        score_preferences(PAIRS, str(tiny_model_dir))
    with pytest.raises(ValueError, match="There is no reward model '/no/such'"):
        score_preferences(PAIRS, "/no/such")
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a padding nor an end-of-sequence token"):
        score_preferences(PAIRS, RewardModel(str(reward_dir), tokenizer))


def test_conversations_need_a_template_before_anything_is_scored(reward_dir):
    rows = [
        {
            "prompt": [{"role": "user", "content": "p"}],
            **{side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")},
        }
    ]
    tokenizer, calls = AutoTokenizer.from_pretrained(reward_dir), []
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        score_preferences(
            Dataset.from_list(rows), [lambda **kwargs: calls.append(1), [RewardModel(str(reward_dir), tokenizer)]]
        )
    assert not calls


def test_tools_reach_the_reward_models_template(reward_dir):
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    tokenizer.chat_template = "{%- for t in tools or [] %}{{- t.name }}{%- endfor %}{{- mood }}{%- for m in messages %}{{- m.content }}{%- endfor %}"
    message = lambda text: [{"role": "user", "content": text}]  # noqa: E731
    rows = [
        {"prompt": message("what"), "chosen": message(" good"), "rejected": message(" bad"), "tools": '[{"name": "clock"}]',
         "chat_template_kwargs": {"mood": mood}}
        for mood in ("fast", "slow")
    ]  # fmt: skip
    model = Qwen3ForSequenceClassification.from_pretrained(reward_dir)
    scored = score_preferences(Dataset.from_list(rows), RewardModel(model, tokenizer))
    for row, mood in zip(scored, ("fast", "slow"), strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(f"clock{mood}what good", return_tensors="pt")).logits[0, 0].item()
        assert row["score_chosen"] == pytest.approx(expected, abs=1e-5)


def test_an_empty_sample_is_scored_by_a_model(tiny_model_dir, reward_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model.generation_config.eos_token_id = list(range(len(tokenizer)))  # ends at once
    groups = sample_completions(
        PAIRS.select_columns(["prompt"]), model, 2, processing_class=tokenizer, cache_dir=tmp_path
    )
    assert groups["completions"] == [["", ""]] * 6
    scored = score_preferences(groups, str(reward_dir))
    reward = Qwen3ForSequenceClassification.from_pretrained(reward_dir)
    with torch.no_grad():
        expected = reward(**tokenizer(PAIRS[0]["prompt"] + "<|eos|>", return_tensors="pt")).logits[0, 0].item()
    assert scored["scores"][0] == pytest.approx([expected] * 2, abs=1e-5)


def test_the_trainer_scores_what_has_no_scores(tiny_model_dir, tmp_path, reward_dir):
    trainer = build(
        trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, dataset=PAIRS, loss_type="margin_adaptive",
        trainer_kwargs={"reward_funcs": str(reward_dir)},
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    assert "weight/mean" in history(trainer)[0]
