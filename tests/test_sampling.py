"""Completions of prompts, in one sitting or several."""

import dataclasses
import shutil
import sys
from collections import Counter
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import trl_ext.data.generators as generators
from tests.conftest import preference_rows
from trl_ext.data import pair_traces, sample_completions, score_preferences
from trl_ext.data.reasoning import completion_text
from trl_ext.generation import sampling


PROMPTS = Dataset.from_list([{"prompt": row["prompt"], "topic": i} for i, row in enumerate(preference_rows(5))])


def draw(model_dir, folder, **kwargs):
    options = {"num_generations": 3, "max_new_tokens": 6, "batch_size": 2, "cache_dir": folder, **kwargs}
    return sample_completions(PROMPTS, str(model_dir), **options)


def test_samples(tiny_model_dir, tmp_path):
    data = draw(tiny_model_dir, tmp_path)
    assert data["topic"] == list(range(5)) and all(len(row) == 3 for row in data["completions"])
    assert {reason for row in data["stop_reasons"] for reason in row} <= {"stop", "length"}
    assert data["completions"] == draw(tiny_model_dir, tmp_path / "elsewhere")["completions"]
    assert data["completions"] != draw(tiny_model_dir, tmp_path, seed=1)["completions"]


@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_killed_and_started_again(killed_at, tiny_model_dir, tmp_path, monkeypatch):
    whole = draw(tiny_model_dir, tmp_path / "whole")
    calls, real = [], sampling.sample

    def fails(*args):
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(sampling, "sample", fails)
    with pytest.raises(KeyboardInterrupt):
        draw(tiny_model_dir, tmp_path / "killed")
    again = []
    monkeypatch.setattr(sampling, "sample", lambda *args: again.append(1) or real(*args))
    assert draw(tiny_model_dir, tmp_path / "killed").to_list() == whole.to_list()
    assert len(again) == 3 - killed_at


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_what_transformers_are_asked(temperature, monkeypatch):
    """Two prompts of different lengths, two completions each; the first of both come first, as `generate` gives them."""
    asked = []

    def fake(model, inputs, mask, config, n, *none):
        asked.append((inputs.tolist(), mask.tolist(), config, n, torch.initial_seed(), model.training))
        return torch.tensor([[10], [20], [11], [21]])

    monkeypatch.setattr(sampling, "sample", fake)
    options = generators.Sampling(2, temperature=temperature, top_p=0.8, max_new_tokens=5, seed=3)
    model, tokenizer = torch.nn.Linear(1, 1), SimpleNamespace(pad_token_id=7)
    model.generation_config = GenerationConfig()
    before = torch.initial_seed(), torch.get_rng_state()
    generate = generators.with_transformers(model, tokenizer, [8, 9], options)
    assert generate([[1, 2, 3], [4]], 0) == [[[10], [11]], [[20], [21]]]
    for start in (0, 2):
        generate([[1, 2, 3], [4]], start)
    inputs, mask, config, n, seed, training = asked[0]
    assert (inputs, mask) == ([[1, 2, 3], [7, 7, 4]], [[1, 1, 1], [0, 0, 1]]) and n == 2 and not training
    assert (config.max_new_tokens, config.pad_token_id, config.eos_token_id) == (5, 7, [8, 9])
    assert config.use_cache is True and config.do_sample is bool(temperature)
    if temperature:
        assert (config.temperature, config.top_p, config.top_k) == (0.7, 0.8, 0)
    # The seed of a chunk is its own, and that of the process is as it was
    assert asked[1][4] == seed != asked[2][4] and model.training
    generators.with_transformers(model, tokenizer, [8, 9], dataclasses.replace(options, seed=4))([[1, 2, 3], [4]], 0)
    assert asked[3][4] != seed
    assert before[0] == torch.initial_seed() and torch.equal(before[1], torch.get_rng_state())


@pytest.mark.parametrize(("pad", "stops", "expected"), [(None, [8, 9], 8), (None, [], 0), (0, [8], 0)])
def test_which_token_fills_rows_up(pad, stops, expected, monkeypatch):
    asked = []
    monkeypatch.setattr(sampling, "sample", lambda model, *args: asked.append(args) or torch.tensor([[1], [1]]))
    model = torch.nn.Linear(1, 1)
    model.generation_config = GenerationConfig()
    options = generators.Sampling(1, temperature=1.0, top_p=1.0, max_new_tokens=1, seed=0)
    generators.with_transformers(model, SimpleNamespace(pad_token_id=pad), stops, options)([[1, 2], [3]], 0)
    inputs, _, config, *_ = asked[0]
    assert inputs.tolist() == [[1, 2], [expected, 3]]
    assert config.pad_token_id == expected and config.eos_token_id == (stops or None)


def test_reasoning_switched_off(tiny_model_dir, tmp_path):
    from trl_ext.data.sampling import render_prompt

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    row = {"prompt": [{"role": "user", "content": "what"}]}
    assert render_prompt(row, tokenizer, False).endswith("<think>\n\n</think>\n\n")
    assert render_prompt(row, tokenizer, True).endswith("assistant\n")
    conversations = Dataset.from_list([row, row])
    data = sample_completions(
        conversations, str(tiny_model_dir), 2, max_new_tokens=4, thinking=False, cache_dir=tmp_path
    )
    assert data[0]["completions"][0][0]["role"] == "assistant"


def test_traced_and_empty_trace_pairs_from_prompts_alone(tiny_model_dir, tmp_path):
    groups = []
    for thinking in (None, False):
        sampled = draw(tiny_model_dir, tmp_path, thinking=thinking, num_generations=4)
        groups.append(
            score_preferences(
                sampled,
                lambda prompts, completions: [float(len(text)) for text in completions],
                cache_dir=tmp_path,
            )
        )
    pairs = pair_traces(*groups)
    for row in pairs:
        assert row["chosen"] is None or len(row["chosen"]) > len(row["rejected"])
        assert row["chosen_empty_trace"] is None or len(row["chosen_empty_trace"]) > len(row["rejected_empty_trace"])
    with pytest.raises(ValueError, match="different prompts"):
        pair_traces(groups[0], groups[1].select([1, 0, 2, 3, 4]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_generations": 0}, "`num_generations=0` must be a whole number"),
        ({"max_new_tokens": 0}, "`max_new_tokens=0`"),
        ({"temperature": -1.0}, "at least 0"),
        ({"temperature": float("nan")}, "at least 0"),
        ({"temperature": float("inf")}, "must be finite"),
        ({"top_p": 0.0}, r"`top_p=0.0` must lie in \(0, 1\]"),
        ({"top_p": 1.1}, "`top_p=1.1`"),
        ({"num_generations": True}, "`num_generations=True` must be a whole number"),
        ({"batch_size": 0}, "`batch_size=0` must be a whole number, at least 1"),
        ({"use_vllm": "yes"}, "`use_vllm='yes'` must be True or False"),
    ],
)
def test_refused(kwargs, message, tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw(tiny_model_dir, tmp_path, **kwargs)
    with pytest.raises(ValueError, match="column 'prompt'"):
        sample_completions(Dataset.from_dict({"text": ["a"]}), str(tiny_model_dir))
    with pytest.raises(ValueError, match=r"There is no model '\./none'"):
        sample_completions(PROMPTS, "./none")
    with pytest.raises(ValueError, match=r"Row 1: the prompt is ''"):
        sample_completions(Dataset.from_dict({"prompt": ["a", ""]}), str(tiny_model_dir))
    with pytest.raises(ValueError, match=r"Row 0: the prompt has the message \{'text': 'a'\}"):
        sample_completions(Dataset.from_dict({"prompt": [[{"text": "a"}]]}), str(tiny_model_dir))


# The policy's own distribution

MEDDLING = {
    "repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "top_k": 2, "min_p": 0.3, "typical_p": 0.5, "min_new_tokens": 5,
    "suppress_tokens": list(range(20, 80)), "begin_suppress_tokens": list(range(80, 120)), "forced_eos_token_id": 1,
    "bad_words_ids": [[9]], "sequence_bias": [[[10], -9.0]], "exponential_decay_length_penalty": (1, 3.0),
    "temperature": 0.2, "epsilon_cutoff": 0.1, "renormalize_logits": True, "max_time": 0.0,
}  # fmt: skip


def meddled(model_dir, kind="plain"):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    for name, value in MEDDLING.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize("kind", ["plain", "adapter"])
@pytest.mark.parametrize(
    "options", [{}, {"num_generations": 1}, {"temperature": 0}, {"temperature": 2.0, "top_p": 0.9}], ids=str
)
def test_defaults_of_the_model_do_not_meddle(kind, options, tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    options = {
        "num_generations": 3,
        "max_new_tokens": 8,
        "processing_class": tokenizer,
        "dtype": torch.float32,
        **options,
    }
    model = meddled(tiny_model_dir, kind)
    before = model.generation_config
    plain = sample_completions(PROMPTS, str(tiny_model_dir), cache_dir=tmp_path / "1", **options)
    found = sample_completions(PROMPTS, model, cache_dir=tmp_path / "2", **options)
    assert found["completions"] == plain["completions"] and found["stop_reasons"] == plain["stop_reasons"]
    assert model.generation_config is before and before.repetition_penalty == 1.8


def test_no_temperature_takes_the_likeliest_token(tiny_model_dir, tmp_path):
    """Against a loop of plain forwards, for a tokenizer that adds BOS to plain text."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 2)]
    )
    model = meddled(tiny_model_dir).eval()
    model.generation_config.eos_token_id = [1, 3]
    data = sample_completions(
        PROMPTS, model, 1, processing_class=tokenizer, temperature=0, max_new_tokens=6, cache_dir=tmp_path
    )
    for row in data:
        ids = [2, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
        start, reason = len(ids), "length"
        while len(ids) < start + 6 and reason == "length":
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            reason = "stop" if ids[-1] in (1, 3) else "length"
        text = ids[start : -1 if reason == "stop" else None]
        assert (row["completions"], row["stop_reasons"]) == ([tokenizer.decode(text)], [reason])


def test_draws_follow_the_distribution(tiny_model_dir, tmp_path):
    """First tokens of many draws against the softmax of the logits, the unlikely ones included."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model.lm_head.weight.data *= 0.1  # each of the vocabulary can be drawn
    rows = PROMPTS.select([0])
    with torch.no_grad():
        logits = model(**tokenizer(rows[0]["prompt"], return_tensors="pt")).logits[0, -1].double()
    expected = Counter()
    for token, p in enumerate(torch.softmax(logits / 0.5, 0).tolist()):
        special = token < 4  # <|pad|>, <|eos|> and the marks of a turn are no text
        expected["" if special else tokenizer.decode([token])] += p
    data = sample_completions(
        rows, model, 4000, processing_class=tokenizer, temperature=0.5, max_new_tokens=1, cache_dir=tmp_path
    )
    drawn = Counter(data["completions"][0])
    assert set(drawn) <= set(expected) and len(expected) > 200
    for text, p in expected.items():
        assert abs(drawn[text] / 4000 - p) < 5 * (p * (1 - p) / 4000) ** 0.5 + 1e-9, text


def test_what_is_kept_depends_on_all_that_matters(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    folders = set()

    def kept(**options):
        sample_completions(
            PROMPTS,
            model,
            **{
                "num_generations": 2,
                "max_new_tokens": 2,
                "processing_class": tokenizer,
                "cache_dir": tmp_path,
                **options,
            },
        )
        before = set(folders)
        folders.update(path.name for path in tmp_path.iterdir())
        return len(folders) - len(before)

    assert kept() == 1 and kept() == 0
    for option in (
        {"num_generations": 3},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"max_new_tokens": 3},
        {"seed": 1},
        {"batch_size": 3},
        {"thinking": False},
    ):
        assert kept(**option) == 1, option
    model.config.rms_norm_eps *= 2
    assert kept() == 1
    model.model.norm.weight.data[0] += 1e-3
    assert kept() == 1
    model.generation_config.eos_token_id = [1, 3]
    assert kept() == 1
    model.generation_config.top_k = 3  # not applied
    assert kept() == 0
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 2)]
    )
    assert kept() == 1


def test_chunks_are_kept_in_the_cache_by_default(tiny_model_dir, tmp_path, monkeypatch):
    """One file per chunk, named by its first prompt, and taken from there the next time."""
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    options = {"processing_class": AutoTokenizer.from_pretrained(tiny_model_dir), "max_new_tokens": 2, "batch_size": 2}
    first = sample_completions(PROMPTS, model, 1, **options)
    assert sorted(path.name for path in tmp_path.glob("samples/*/*")) == ["0.json", "2.json", "4.json"]
    monkeypatch.setattr(sampling, "sample", None)
    assert sample_completions(PROMPTS, model, 1, **options).to_list() == first.to_list()


def test_marks_of_a_trace_stay_in_the_text(tiny_model_dir):
    """They may be special tokens, which are left out otherwise."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ids = tokenizer("<|im_start|><think>so</think> good<|im_end|><|pad|>")["input_ids"]
    assert completion_text(ids, tokenizer) == "<think>so</think> good"


# vLLM, which is not installed here: a stand-in with the same interface


class StandIn:
    """Answers each prompt with its own first ids; keeps what it was given."""

    calls: ClassVar[list] = []

    def __init__(self, **options):
        self.calls.append(options)

    def generate(self, prompts, parameters, use_tqdm):
        self.calls.append((prompts, parameters))
        ends = [[(), "length"], [(3,), "stop"]]
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(
                        token_ids=(*prompt["prompt_token_ids"][: k + 1], *ends[k % 2][0]),
                        finish_reason=ends[k % 2][1],
                        text="not read",
                    )
                    for k in range(each.n)
                ]
            )
            for prompt, each in zip(prompts, parameters, strict=True)
        ]


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=StandIn, SamplingParams=SimpleNamespace))
    StandIn.calls.clear()
    return StandIn.calls


def test_vllm_gets_token_ids_and_no_defaults_of_the_model(vllm, tiny_model_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{- '<|im_start|>' }}" + tokenizer.chat_template  # its own BOS
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 2)]
    )
    tokenizer.chat_template = "{%- if tools %}{{- tools[0].name }}{%- endif %}" + tokenizer.chat_template
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 3], "top_k": 2}')
    rows = [
        {"prompt": [{"role": "user", "content": "what"}], "tools": '[{"name": "clock"}]'},
        {"prompt": [{"role": "user", "content": "what"}], "tools": '[{"name": "clock"}]'},
    ]
    options = {
        "processing_class": tokenizer,
        "use_vllm": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "max_new_tokens": 9,
        "cache_dir": tmp_path / "kept",
    }
    data = sample_completions(Dataset.from_list(rows), str(folder), 2, **options)
    start, (prompts, parameters) = vllm
    assert start == {"model": str(folder), "dtype": "auto", "generation_config": "vllm"}
    text = "clock<|im_start|><|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(prompt["prompt_token_ids"]) for prompt in prompts] == [text] * 2
    first, second = (vars(each) for each in parameters)
    seeds = first.pop("seed"), second.pop("seed")
    assert first == second == {"n": 2, "temperature": 0.7, "top_p": 0.8, "max_tokens": 9, "stop_token_ids": [1, 3]}
    assert seeds[0] != seeds[1]  # equal prompts, different completions
    ids = prompts[0]["prompt_token_ids"]
    assert data["stop_reasons"] == [["length", "stop"]] * 2
    assert data[0]["completions"][1] == [{"role": "assistant", "content": tokenizer.decode(ids[:2])}]
    # Kept by the weights, not by the path
    assert sample_completions(Dataset.from_list(rows), str(folder), 2, **options).to_list() == data.to_list()
    assert len(vllm) == 2
    shutil.copytree(folder, tmp_path / "copy")
    sample_completions(Dataset.from_list(rows), str(tmp_path / "copy"), 2, **options)
    assert len(vllm) == 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data[0] += 1e-3
    model.save_pretrained(folder)
    sample_completions(Dataset.from_list(rows), str(folder), 2, **options)
    assert len(vllm) == 4


def test_vllm_on_a_model_of_the_hub(vllm, tiny_model_dir, tmp_path, monkeypatch):
    """Its commit says which weights they are."""
    commit, asked = ["1a2b"], []
    monkeypatch.setattr(
        generators,
        "snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or f"/cache/{name}/{commit[0]}",
    )
    keys = [generators.weights_key("owner/model")] * 2
    commit[0] = "3c4d"
    keys += [generators.weights_key("owner/model"), generators.weights_key("owner/other")]
    assert keys[0] == keys[1] and len({*keys}) == 3
    assert asked[0] == ("owner/model", "config.json")  # not the weights, for their name alone


def test_where_a_completion_ends(tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    stops = lambda eos: generators.stop_tokens(SimpleNamespace(eos_token_id=eos), tokenizer)  # noqa: E731
    assert (stops(None), stops(1), stops(3), stops([3, 1]), stops([3, 4])) == ([1], [1], [1, 3], [3, 1], [1, 3, 4])
    tokenizer.eos_token = None
    assert (stops(None), stops(3)) == ([], [3])
    for file in ("config.json", "generation_config.json"):
        shutil.copy(tiny_model_dir / file, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert generators.generation_config_of(str(tmp_path)).eos_token_id == 9
    (tmp_path / "generation_config.json").unlink()
    assert generators.generation_config_of(str(tmp_path)).eos_token_id == 1


def test_vllm_takes_a_name(vllm, tiny_model_dir, monkeypatch):
    with pytest.raises(ValueError, match="give its name or folder"):
        sample_completions(PROMPTS, AutoModelForCausalLM.from_pretrained(tiny_model_dir), use_vllm=True)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="pip install vllm"):
        draw(tiny_model_dir, "/nonexistent", use_vllm=True)
