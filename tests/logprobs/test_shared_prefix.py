"""A prompt that its completions share gives what rows of their own give."""

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from tests.logprobs.families import EXACT, INEXACT, batch, tiny
from trl_ext.logprobs import Head, Sharing, pays, shared_prefix_layout, why_not_shared
from trl_ext.rows import Rows
from trl_ext.trainers.scoring import Scorer
from trl_ext.trainers.trl_seam import fused_forward


def prompts_of(inputs, groups):
    """Rows are `groups` apart: the first completion of each prompt, then the second of each."""
    return torch.arange(len(inputs["input_ids"])) % groups


def layout_of(inputs, groups):
    return shared_prefix_layout(**inputs, prompt=prompts_of(inputs, groups))


def shared(model, inputs, groups, unpadded=False):
    inputs, prompt = dict(inputs), prompts_of(inputs, groups)
    mask = inputs.pop("completion_mask")
    sharing = Sharing(hidden_size=32, always=True, unpadded=unpadded)
    layout = sharing.layout(inputs, mask, prompt)
    return Scorer(Head(), sharing)(model, Rows(inputs, mask, prompt, torch.arange(len(mask)), layout))


def gradients(model, output, upstream):
    model.zero_grad()
    (output.log_probs * upstream).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, inputs, groups, unpadded=False):
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    plain, ours = fused_forward(model, inputs, router_logits=False), shared(model, inputs, groups, unpadded)
    mask = inputs["completion_mask"][:, 1:].bool()
    for field in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(ours[field][mask], plain[field][mask], rtol=1e-5, atol=2e-5)
    assert torch.equal(ours.is_top1, plain.is_top1)
    assert not ours.log_probs[~mask].any()
    upstream = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    theirs, mine = gradients(model, plain, upstream), gradients(model, ours, upstream)
    assert theirs.keys() == mine.keys()
    for name, value in theirs.items():
        scale = value.abs().max().item() + 1e-3
        torch.testing.assert_close(
            mine[name] / scale, value / scale, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", EXACT)
def test_family(name):
    model = tiny(name, EXACT[name])
    assert why_not_shared(model) is None
    assert_same(model, batch(), groups=3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementation(attention):
    assert_same(tiny("qwen3-window", EXACT["qwen3-window"], attn_implementation=attention), batch(), groups=3)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_gradient_checkpointing(name):
    model = tiny(name, EXACT[name]).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(model, batch(), groups=3)


@pytest.mark.parametrize("members", [1, 2, 4, 7])
def test_group_size(members):
    assert_same(tiny("llama", {}), batch(members=members), groups=3)


def test_prompts_that_differ_are_not_shared():
    inputs = batch(prompts=(9, 9), members=4)
    inputs["input_ids"][2, 3] = 50  # the second completion of the first prompt has another prompt
    layout = layout_of(inputs, 2)
    lengths, prefix = inputs["attention_mask"].sum(1), 8
    assert (layout.groups >= 0).sum() == (lengths - 1).sum() - prefix * (2 + 3)  # five of eight read another's prompt
    assert_same(tiny("llama", {}), inputs, groups=2)


def test_prompts_that_truncation_left_none_of():
    inputs = batch(prompts=(4, 3))
    inputs["completion_mask"] = inputs["attention_mask"].clone()
    assert_same(tiny("llama", {}), inputs, groups=2)


def test_nothing_to_score():
    inputs = batch()
    inputs["completion_mask"][:] = 0
    model = tiny("llama", {})
    add_fused_lm_head(model)
    output = shared(model, inputs, 3)
    assert not output.log_probs.any()
    output.log_probs.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_one_completion_much_longer():
    inputs = batch(prompts=(3, 3, 3, 3))
    long = torch.randint(3, 97, (1, 60))
    width = 60 + inputs["input_ids"].size(1)
    for name, value in inputs.items():
        inputs[name] = torch.nn.functional.pad(value, (0, width - value.size(1)))
    inputs["input_ids"][1, 3:63], inputs["attention_mask"][1, 3:63] = long, 1
    inputs["completion_mask"][1, 3:63] = 1
    layout = layout_of(inputs, 4)
    assert layout.tokens.size(0) < 4  # short rows are packed together
    assert_same(tiny("llama", {}), inputs, groups=4)


def test_left_padding_is_not_laid_out():
    inputs = {name: value.flip(1) for name, value in batch().items()}
    assert layout_of(inputs, 3) is None
    with pytest.raises(ValueError, match="not padded on the right"):
        shared(tiny("llama", {}), inputs, 3)


def test_pays_where_prompts_are_long():
    def both(prompt, completion, hidden_size):
        ones = torch.ones(2, prompt + completion, dtype=torch.long)
        scored = ones.clone()
        scored[:, :prompt] = 0
        return pays(shared_prefix_layout(ones, ones, scored, torch.zeros(2)), *ones.shape, hidden_size)

    assert both(prompt=60, completion=8, hidden_size=1)
    assert both(prompt=1, completion=60, hidden_size=1024)  # a token less
    assert not both(prompt=1, completion=60, hidden_size=1)  # the row is twice as long, and attention all there is


@pytest.mark.parametrize("name", INEXACT)
def test_where_it_is_not_exact(name):
    options, reason = INEXACT[name]
    said = why_not_shared(tiny(name, options))
    # Before transformers 5.23 the layers of RecurrentGemma were called after the model
    assert reason in said or (name == "recurrent_gemma" and "'recurrent'" in said)


def test_dropout():
    assert why_not_shared(tiny("llama", {"attention_dropout": 0.1})) == "dropout is on"


def test_several_devices():
    model = tiny("llama", {})
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "lm_head": 0}
    assert why_not_shared(model) is None
    model.hf_device_map["lm_head"] = 1
    assert why_not_shared(model) == "it is spread over several devices, and masks would stay on the first"


def test_attention_that_is_not_known():
    model = tiny("llama", {})
    for name in ("flex_attention", "flash_attention_4"):
        model.config._attn_implementation = name
        assert why_not_shared(model).startswith(f"`attn_implementation='{name}'` is none of")


def test_a_model_that_masks_by_itself(monkeypatch):
    model = tiny("llama", {})
    add_fused_lm_head(model)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", lambda **kwargs: None)
    with pytest.raises(
        ValueError, match=r"not exact: the model fails on them \(RuntimeError: The model built no attention mask"
    ):
        shared(model, batch(), 3)


def test_masks_are_put_back():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    before = dict(ALL_MASK_ATTENTION_FUNCTIONS.items())
    test_group_size(2)
    assert dict(ALL_MASK_ATTENTION_FUNCTIONS.items()) == before
