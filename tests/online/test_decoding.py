"""Rows that have finished leave the batch, and nobody else notices."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
)

from tests.online.conftest import padded_prompts, saved_model
from trl_ext.generation import GeometricMixture, decoding, sample, sampling


PAD = 0
ENDS = list(range(1, 391, 9))
GREEDY = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": PAD, "eos_token_id": ENDS}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.8}


@pytest.fixture(params=[1e-9, 0.4], ids=["at once", "in groups"])
def share(request, monkeypatch):
    monkeypatch.setattr(decoding, "SHARE", request.param)
    return request.param


def heights(model):
    """How many rows the model has been called with, one by one token."""
    seen = []

    def note(_, args, given):
        if "input_ids" in given and given["input_ids"].size(1) == 1:
            seen.append(given["input_ids"].size(0))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def drawn(model, batch, options, count=2, mixture=None, processing_class=None):
    torch.manual_seed(7)
    with torch.no_grad():
        output = sample(model, *batch, GenerationConfig(**options), count, mixture, processing_class)
    return output, torch.rand(1).item()


def of_transformers(model, batch, options, monkeypatch, **kwargs):
    """The same random numbers in transformers' own loop, where all rows stay until the last has finished."""
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "can_copy_cache", lambda *args: False)
        return drawn(model, batch, options, **kwargs)


def test_greedy_completions_are_those_of_generate(share, model, batch):
    seen = heights(model)
    output, _ = drawn(model, batch, GREEDY)
    with torch.no_grad():
        expected = model.generate(
            input_ids=batch[0], attention_mask=batch[1], generation_config=GenerationConfig(**GREEDY)
        )
    assert torch.equal(output, expected[:, 9:].repeat(2, 1))
    assert seen[0] == 12 and min(seen) < 6 and seen[: output.size(1)] == sorted(seen[: output.size(1)], reverse=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_new_tokens": 9},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
        {"exponential_decay_length_penalty": (3, 1.5), "bad_words_ids": [[17], [40, 41]], "suppress_tokens": [10]},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_samples_are_those_of_transformers_loop(options, share, model, batch, monkeypatch):
    """With a random number for each row and token, in both; and as many numbers are taken."""
    expected = of_transformers(model, batch, SAMPLED | options, monkeypatch)
    seen = heights(model)
    found = drawn(model, batch, SAMPLED | options)
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1]
    ended = (torch.isin(found[0], torch.tensor(ENDS)).any(dim=1)).sum()
    assert ended > 2 and seen[-1] < seen[0] == 12, "no row has left"
    if "min_new_tokens" in options:
        assert not torch.isin(found[0][:, :9], torch.tensor(ENDS)).any() and (found[0] == PAD).any()


class Remembers(LogitsProcessor):
    """Of each row, and does not say how rows are taken out."""

    def __init__(self, mask):
        self.rows = len(mask)

    def __call__(self, input_ids, scores):
        assert len(input_ids) == self.rows
        return scores


@pytest.mark.parametrize(
    ("options", "mixture"), [({"guidance_scale": 1.5}, None), ({"encoder_repetition_penalty": 1.2}, None), ({}, Remembers)]
)  # fmt: skip
def test_rows_stay_where_something_remembers_them(options, mixture, model, batch, monkeypatch):
    expected = of_transformers(model, batch, SAMPLED | options, monkeypatch, mixture=mixture)
    seen = heights(model)
    found = drawn(model, batch, SAMPLED | options, mixture=mixture)
    assert torch.equal(found[0], expected[0]) and set(seen) == {12}


def test_sliding_windows(share):
    from tests.logprobs.families import EXACT, tiny

    name = next(name for name in EXACT if "mistral" in name and EXACT[name].get("sliding_window"))
    model = tiny(name.split("-")[0], EXACT[name]).eval()
    torch.manual_seed(0)
    ids, mask = torch.randint(10, model.config.vocab_size, (6, 9)), torch.ones(6, 9, dtype=torch.long)
    mask[0, :4] = 0
    assert model.config.sliding_window < 9 + 24
    seen = heights(model)
    output, _ = drawn(model, (ids, mask), GREEDY, count=1)
    rows = len(seen)
    with torch.no_grad():
        expected = model.generate(input_ids=ids, attention_mask=mask, generation_config=GenerationConfig(**GREEDY))
    assert torch.equal(output, expected[:, 9:]) and seen[rows - 1] < 6


def test_stop_strings(share, model, batch, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    options = {**GREEDY, "eos_token_id": None}
    whole, _ = drawn(model, batch, options, count=1)
    model.generation_config = GenerationConfig()  # which `generate` would take its end-of-sequence token from
    strings = [tokenizer.decode(whole[row][5 + 4 * row]).strip() for row in range(3)]
    options |= {"stop_strings": strings}
    found, _ = drawn(model, batch, options, processing_class=tokenizer)
    with torch.no_grad():
        # Without an end-of-sequence token, transformers goes on with rows that have finished
        expected = [
            model.generate(
                input_ids=ids[mask.bool()][None], generation_config=GenerationConfig(**options), tokenizer=tokenizer
            )[0, int(mask.sum()) :].tolist()
            for ids, mask in zip(*batch, strict=True)
        ] * 2
    assert len({len(row) for row in expected}) > 1
    assert found.tolist() == [(row + [PAD] * 24)[: found.size(1)] for row in expected]
    with pytest.raises(ValueError, match="a tokenizer is needed"):
        drawn(model, batch, options)


def test_time_is_up_for_all_rows(model, batch):
    output, _ = drawn(model, batch, GREEDY | {"max_time": 0.0, "eos_token_id": None})
    assert output.shape == (12, 1)


# The reference of a mixture


def mixed(reference, copies=1):
    def make(mask):
        return GeometricMixture(reference, mask, torch.linspace(0, 1, len(mask)).unsqueeze(1), copies)

    return make


def another(model):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(model.config).float().eval()


@pytest.fixture
def reference(model):
    return another(model)


def exact_mixture(model, reference, prompt, coefficient):
    """Greedy, from the definition: no cache, no padding, one row."""
    row = prompt
    with torch.no_grad():
        for _ in range(24):
            logps = [network(input_ids=row[None]).logits[0, -1].log_softmax(-1) for network in (model, reference)]
            row = torch.cat([row, ((1 - coefficient) * logps[0] + coefficient * logps[1]).argmax().view(1)])
            if int(row[-1]) in ENDS:
                break
    return row[len(prompt) :].tolist()


@pytest.fixture(scope="module")
def exact(tiny_model_dir):
    """Of each prompt twice, from the policy (the first row) to the reference (the last); the same for each way of sampling."""
    model, (ids, mask) = saved_model(tiny_model_dir), padded_prompts()
    reference, coefficients = another(model), torch.linspace(0, 1, 12).view(6, 2)
    return [
        exact_mixture(model, reference, ids[row][mask[row].bool()], coefficients[row, k])
        for k in range(2)
        for row in range(6)
    ]


@pytest.mark.parametrize("copies", [1, 2])
def test_a_mixture_whose_rows_leave(copies, share, model, reference, batch, exact):
    seen = heights(reference)
    output, _ = drawn(model, batch, GREEDY, mixture=mixed(reference, copies))
    assert [row[: len(wanted)] for row, wanted in zip(output.tolist(), exact, strict=True)] == exact
    assert len({len(row) for row in exact}) > 2 and seen[-1] < 12


@pytest.mark.parametrize("length", [9, 1])
def test_a_prompt_runs_once_through_the_reference_and_its_last_logits_alone(length, model, reference, batch):
    seen = []
    reference.register_forward_hook(
        lambda _, args, given, output: seen.append((*given["input_ids"].shape, output.logits.size(1))),
        with_kwargs=True,
    )
    batch = batch[0][:, :length], torch.ones(6, length, dtype=torch.long)
    drawn(model, batch, GREEDY, count=4, mixture=mixed(reference, 4))
    assert seen[:2] == [(6, max(length - 1, 1), 1), (24, 1, 1)]
    seen.clear()
    drawn(model, batch, GREEDY, count=4, mixture=mixed(reference))
    assert seen[0] == (24, length, 1)


def test_a_mixture_is_no_beam_search(model, reference, batch):
    with pytest.raises(ValueError, match="leave out `num_beams`"):
        drawn(model, batch, GREEDY | {"num_beams": 2}, mixture=mixed(reference))


def test_what_lies_at_each_point_of_the_distribution():
    """Over a grid of points each token comes as often as it is likely, in a vocabulary of several parts; none of probability 0 does."""
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(1, 700, generator=generator)
    scores[:, ::7], scores[:, 256:512], scores[:, -1] = -torch.inf, -torch.inf, -torch.inf
    grid = 50_000
    points = (torch.arange(grid, dtype=torch.float64) + 0.5).unsqueeze(1) / grid
    tokens = torch.cat([decoding.draw(scores.expand(len(part), -1), part) for part in points.split(10_000)]).squeeze(1)
    expected = scores.double().softmax(dim=-1)[0]
    shares = tokens.bincount(minlength=700) / grid
    # Of a grid no share is off by more than two points, but for rounding
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=3 / grid)
    assert (shares[expected == 0] == 0).all() and (tokens.diff() >= 0).all()
    ends = decoding.draw(scores.expand(2, -1), torch.tensor([[0.0], [1.0]], dtype=torch.float64)).flatten()
    possible = (expected > 0).nonzero().flatten()
    assert ends.tolist() == [possible[0], possible[-1]]


@pytest.mark.parametrize("width", [3, 4, 5, 6])
def test_ends_are_kept_out_as_transformers_does(width):
    theirs = MinNewTokensLengthLogitsProcessor(3, 2, [1, 4, 99])  # a prompt of three tokens, two more without an end
    ids, scores = torch.zeros(2, width, dtype=torch.long), torch.arange(12.0).view(2, 6)
    expected = theirs(ids, scores.clone())
    assert torch.equal(decoding.NoEndYet(theirs)(ids, scores.clone()), expected)
    assert (expected[0, 4] == -torch.inf) == (width < 5)
