"""One prefill for K samples, mixtures, and what generation leaves behind."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from trl_ext.generation import DrawToken, GeometricMixture, evaluating, sample


GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False, use_cache=True, pad_token_id=0)


@pytest.fixture
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.fixture
def batch():
    torch.manual_seed(0)
    ids, mask = torch.randint(10, 300, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = mask[1, :2] = 0
    return ids, mask


def plain(model, ids, mask, **kwargs):
    with torch.no_grad():
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=GREEDY, **kwargs)
    return output[:, ids.size(1) :]


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_samples_of_one_prefill_are_those_of_generate(samples, model, batch):
    with torch.no_grad():
        output = sample(model, *batch, GREEDY, samples)
    for block in output.chunk(samples):
        assert torch.equal(block, plain(model, *batch))


def test_the_prompt_runs_once(model, batch):
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    with torch.no_grad():
        sample(model, *batch, GREEDY, 4)
    assert seen[0] == (3, 8) and all(shape == (12, 1) for shape in seen[1:])


def test_sliding_windows(batch):
    from tests.logprobs.families import EXACT, tiny

    name = next(name for name in EXACT if "mistral" in name and EXACT[name].get("sliding_window"))
    model = tiny(name.split("-")[0], EXACT[name]).eval()
    ids, mask = batch[0] % model.config.vocab_size, batch[1]
    with torch.no_grad():
        output = sample(model, ids, mask, GREEDY, 2)
    assert torch.equal(output[:3], plain(model, ids, mask))


@pytest.mark.parametrize("coefficient", [0.0, 0.3, 1.0])
def test_mixture(coefficient, model, batch):
    torch.manual_seed(1)
    reference = AutoModelForCausalLM.from_config(model.config).float().eval()
    with torch.no_grad():
        mixed = sample(
            model, *batch, GREEDY, 2, lambda mask: GeometricMixture(reference, mask, torch.full((6, 1), coefficient))
        )
    # Without any cache, from the definition
    ids, mask = (tensor.repeat_interleave(2, 0) for tensor in batch)
    expected = []
    with torch.no_grad():
        for _ in range(GREEDY.max_new_tokens):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logps = [
                network(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1].log_softmax(-1)
                for network in (model, reference)
            ]
            token = ((1 - coefficient) * logps[0] + coefficient * logps[1]).argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
            expected.append(token)
    expected = torch.cat(expected, 1).view(3, 2, -1).transpose(0, 1).flatten(0, 1)
    eos = model.config.eos_token_id
    for row, wanted in zip(mixed, expected, strict=True):
        stop = (wanted == eos).nonzero()
        end = int(stop[0]) if len(stop) else len(wanted)
        assert row[:end].tolist() == wanted[:end].tolist()


def test_everything_is_as_before_even_after_an_error(model):
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="stop"), evaluating(model, None):
        assert not model.training and not model.is_gradient_checkpointing and not torch.is_grad_enabled()
        raise RuntimeError("stop")
    assert model.training and model.is_gradient_checkpointing and torch.is_grad_enabled()


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    scores = probabilities.log().expand(20_000, 6)
    drawn = DrawToken()(None, scores).argmax(dim=1)
    shares = drawn.bincount(minlength=6) / len(drawn)
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)
    assert not shares[probabilities == 0].any()


def test_warpers_come_before_the_draw(model, batch):
    config = GenerationConfig(max_new_tokens=12, do_sample=True, top_k=1, use_cache=True, pad_token_id=0)
    with torch.no_grad():
        output = sample(model, *batch, config, 2)
    assert torch.equal(output[:3], plain(model, *batch))
    assert config.do_sample  # the caller's own


def test_samples_of_a_prompt_differ_and_seeds_repeat(model, batch):
    config = GenerationConfig(max_new_tokens=12, do_sample=True, top_k=0, use_cache=True, pad_token_id=0)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        with torch.no_grad():
            runs.append(sample(model, *batch, config, 2))
    assert torch.equal(*runs) and not torch.equal(*runs[0].chunk(2))
