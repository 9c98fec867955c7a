"""One prefill for K samples, mixtures, and what generation leaves behind."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.online.runs import batch as first_batch
from tests.online.runs import online
from trl_ext.generation import DrawToken, GeometricMixture, evaluating, sample, sampling, without_defaults
from trl_ext.generation.decoding import draw


GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False, use_cache=True, pad_token_id=0)


@pytest.fixture
def batch(batch):
    return batch[0][:3], batch[1][:3]


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


@pytest.mark.parametrize(("point", "token"), [(0.0, 1), (1.0, 4)])
def test_the_ends_of_the_distribution_are_no_impossible_tokens(point, token):
    scores = torch.tensor([[0.0, 0.5, 0.0, 0.2, 0.3, 0.0]]).log()
    assert draw(scores, torch.tensor([[point]], dtype=torch.float64)).item() == token


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


# The model's own `generation_config` changes nothing


STRANGE = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(100, 300)),
    "min_new_tokens": 12,
    "top_k": 1,
    "typical_p": 0.1,
    "temperature": 0.01,
    "max_new_tokens": 3,
}


def exact_draws(model, ids, mask, count, steps, temperature):
    """What sampling gives from the definition: no cache, and inversion of the distribution function at each step."""
    ids, mask = (tensor.repeat_interleave(count, 0) for tensor in (ids, mask))
    width = ids.size(1)
    with torch.no_grad():
        for _ in range(steps):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1].float()
            cumulated = (logits / temperature).softmax(-1).double().cumsum(-1)
            point = torch.rand(len(ids), 1, dtype=torch.float64) * cumulated[:, -1:]
            token = (cumulated <= point).sum(dim=1, keepdim=True)
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    return ids[:, width:].view(-1, count, steps).transpose(0, 1).flatten(0, 1)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_samples_are_the_models_own(peft, model, batch):
    if peft:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    own = GenerationConfig(eos_token_id=1, **STRANGE)
    (model.get_base_model() if peft else model).generation_config = own
    config = GenerationConfig(max_new_tokens=8, do_sample=True, temperature=0.7, pad_token_id=0)
    torch.manual_seed(3)
    with torch.no_grad():
        drawn = sample(model, *batch, config, 2)
    torch.manual_seed(3)
    assert torch.equal(drawn, exact_draws(model, *batch, 2, 8, 0.7))
    assert model.generation_config is own and config.top_k is None
    assert not peft or model.get_base_model().generation_config is own


def test_what_the_config_asks_for_is_done(model, batch):
    config = GenerationConfig(max_new_tokens=8, do_sample=True, suppress_tokens=list(range(20, 600)), pad_token_id=0)
    with torch.no_grad():
        assert sample(model, *batch, config, 2).max() < 20


def test_the_own_config_is_back_after_an_error(model):
    own = model.generation_config
    with pytest.raises(RuntimeError, match="stop"), without_defaults(model):
        assert model.generation_config is not own
        raise RuntimeError("stop")
    assert model.generation_config is own


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_an_online_run_samples_the_policy_at_its_temperature(peft, tiny_model_dir, tmp_path):
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = online(
        tiny_model_dir, tmp_path, temperature=0.8, max_new_tokens=6,
        trainer_kwargs={"peft_config": lora if peft else None},
    )  # fmt: skip
    for name, value in STRANGE.items():
        setattr(trainer.model.generation_config, name, value)
    inputs = first_batch(trainer)
    torch.manual_seed(4)
    completions = trainer.generate(trainer.model, inputs)
    rows = completions.prompt_ids
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(width - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([torch.tensor([0] * (width - len(row)) + [1] * len(row)) for row in rows])
    torch.manual_seed(4)
    expected = exact_draws(trainer.model.eval(), ids, mask, 2, 6, 0.8)
    for row, wanted in zip(completions.ids, expected.tolist(), strict=True):
        end = wanted.index(trainer.eos_token_ids[0]) + 1 if trainer.eos_token_ids[0] in wanted else 6
        assert row.tolist() == wanted[:end]


def test_no_top_k_is_all_of_the_vocabulary(tiny_model_dir, tmp_path):
    assert online(tiny_model_dir, tmp_path, top_k=None)._sampling.top_k is None  # which `sample` takes as all


@pytest.mark.parametrize("implementation", [None, "static"])
def test_a_cache_of_the_users_choice(implementation, tiny_model_dir, tmp_path):
    trainer = online(
        tiny_model_dir, tmp_path, cache_implementation=implementation, generation_kwargs={"do_sample": False}
    )
    plain = online(tiny_model_dir, tmp_path, generation_kwargs={"do_sample": False})
    inputs = first_batch(trainer)
    ours, theirs = (each.generate(each.model, inputs) for each in (trainer, plain))
    assert [row.tolist() for row in ours.ids] == [row.tolist() for row in theirs.ids]
    assert trainer.model.generation_config.cache_implementation is None


# Models that are sharded over processes


class Peers:
    """The other processes: they still generate for a number of steps after this one has finished."""

    def __init__(self, monkeypatch, steps):
        self.steps, self.calls = steps, 0
        monkeypatch.setattr(sampling, "_is_sharded", lambda model: True)
        monkeypatch.setattr(torch.distributed, "all_reduce", self.all_reduce)

    def all_reduce(self, flag, op):
        self.calls += 1
        if self.calls <= self.steps:
            flag += 1


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *args: calls.append(1))
    return calls


@pytest.mark.parametrize("do_sample", [True, False])
def test_a_sharded_model_runs_as_long_as_any_process_samples(do_sample, model, batch, monkeypatch):
    config = GenerationConfig(max_new_tokens=2, do_sample=do_sample, pad_token_id=0, eos_token_id=1)
    peers, calls = Peers(monkeypatch, 7), count_calls(model)
    with torch.no_grad():
        output = sample(model, *batch, config, 2)
    assert output.size(1) == 2 and peers.calls == 8
    assert len(calls) == 1 + 7  # the prefill, and a step whenever another process had one


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize(("steps", "calls"), [(0, 1), (1, 1), (5, 5)])
def test_the_reference_of_a_mixture_runs_in_every_step_of_any_process(
    steps, calls, implementation, model, batch, monkeypatch
):
    """All tokens end a completion: without the other processes, this one would stop after its first step."""
    reference = copy.deepcopy(model)
    config = GenerationConfig(
        max_new_tokens=7,
        do_sample=True,
        pad_token_id=0,
        eos_token_id=list(range(512)),
        cache_implementation=implementation,
    )
    Peers(monkeypatch, steps)
    found = [count_calls(network) for network in (reference, model)]
    with torch.no_grad():
        output = sample(
            model, *batch, config, 2, lambda mask: GeometricMixture(reference, mask, torch.full((6, 1), 0.5), copies=2)
        )
    # Both prefill once more, but where a static cache cannot be copied
    assert [len(each) for each in found] == [calls + 1, calls + (implementation is None)]
    assert output.shape == (6, 1)


def test_one_process_is_not_sharded(model, monkeypatch):
    assert not sampling._is_sharded(model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert not sampling._is_sharded(model)
    monkeypatch.setattr(sampling, "is_deepspeed_zero3_enabled", lambda: True)
    assert sampling._is_sharded(model)
    monkeypatch.setattr(sampling, "is_deepspeed_zero3_enabled", lambda: False)
    monkeypatch.setattr(sampling, "FSDPModule", type(model.model.layers[0]))
    assert sampling._is_sharded(model)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert not sampling._is_sharded(model)
