"""Many prompts, sampled in parts that fit into memory."""

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from trl_ext.generation import GeometricMixture, sample_rows, sampling


CONFIG = GenerationConfig(
    max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=list(range(1, 512, 9))
)
LENGTHS = [3, 9, 1, 7, 7, 2, 12]


@pytest.fixture
def prompts():
    torch.manual_seed(0)
    return [torch.randint(10, 300, (length,)) for length in LENGTHS]


def greedy(model, prompt):
    """From the definition: no cache, no padding."""
    row = prompt
    with torch.no_grad():
        for _ in range(CONFIG.max_new_tokens):
            row = torch.cat([row, model(row[None]).logits[0, -1].argmax().view(1)])
            if int(row[-1]) in CONFIG.eos_token_id:
                break
    return row[len(prompt) :].tolist()


def widths(model):
    """Shapes of what the model has seen of prompts."""
    seen = []
    model.register_forward_pre_hook(lambda _, args, given: seen.append(given["input_ids"].shape), with_kwargs=True)
    return seen


@pytest.mark.parametrize("at_once", [None, 1, 4, 5, 100])
def test_each_prompt_has_its_own_completions_in_blocks(at_once, model, prompts):
    with torch.no_grad():
        rows = sample_rows(model, prompts, CONFIG, 2, torch.device("cpu"), at_once)
    expected = [greedy(model, prompt) for prompt in prompts]
    assert [row.tolist() for row in rows] == expected * 2
    assert len({len(row) for row in expected}) > 1, "all end alike"


def test_parts_are_bounded_and_little_padded(model, prompts):
    seen = widths(model)
    with torch.no_grad():
        sample_rows(model, prompts, CONFIG, 2, torch.device("cpu"), completions_at_once=5)
    # Two prompts at a time, the longest first; seven make four parts. Their last token runs with the completions
    assert [shape for shape in seen if shape[1] > 1] == [(2, 11), (2, 6), (2, 2)]
    assert max(shape[0] for shape in seen) == 4


def test_a_mixture_is_made_for_each_part(model, prompts):
    masks = []

    def mixture(mask):
        masks.append(mask.sum(dim=1).tolist())
        return GeometricMixture(model, mask, torch.full((len(mask), 1), 0.5))

    with torch.no_grad():
        rows = sample_rows(model, prompts, CONFIG, 2, torch.device("cpu"), 6, mixture)
    assert masks == [[12, 12, 9, 9, 7, 7], [7, 7, 3, 3], [2, 2, 1, 1]]
    assert [row.tolist() for row in rows] == [greedy(model, prompt) for prompt in prompts] * 2


def test_processes_of_a_sharded_model_sample_equally_many_parts(model, prompts, monkeypatch):
    """Another process needs nine parts for its prompts; this one has seven prompts."""

    def all_reduce(value, op):
        if op == torch.distributed.ReduceOp.MAX:
            value.clamp_(min=9)

    monkeypatch.setattr(sampling, "_is_sharded", lambda model: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    calls, real = [], sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *args: calls.append(args[1].shape) or real(*args))
    with torch.no_grad():
        rows = sample_rows(model, prompts, CONFIG, 1, torch.device("cpu"), completions_at_once=4)
    assert calls == [(1, length) for length in sorted(LENGTHS, reverse=True)] + [(1, 1)] * 2
    assert [row.tolist() for row in rows] == [greedy(model, prompt) for prompt in prompts]


def test_nothing_is_left_behind_a_stop_string(model, prompts, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model.generation_config = GenerationConfig()
    options = {**CONFIG.to_diff_dict(), "eos_token_id": None}
    with torch.no_grad():
        whole = sample_rows(model, prompts, GenerationConfig(**options), 1, torch.device("cpu"))
        string = tokenizer.decode(whole[0][3]).strip()
        config = GenerationConfig(**options, stop_strings=[string])
        found = sample_rows(model, prompts, config, 1, torch.device("cpu"), 3, processing_class=tokenizer)
        expected = [
            model.generate(row[None], generation_config=config, tokenizer=tokenizer)[0, len(row) :] for row in prompts
        ]
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]
    assert len(found[0]) < 8 and max(map(len, found)) == 8
