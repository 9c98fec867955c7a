"""Results on disk, whatever becomes of the process that writes them."""

import hashlib
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from trl_ext.data import cache
from trl_ext.data.cache import Ledger, write_atomically


def test_a_torn_line_is_passed_over(tmp_path):
    ledger = Ledger(tmp_path, "x")
    ledger.append({"a": 1.0})
    with open(ledger.path, "a") as file:
        file.write('["b", 2.')
    assert Ledger(tmp_path, "x").read() == {"a": 1.0}
    Ledger(tmp_path, "x").append({"c": 3.0})
    assert Ledger(tmp_path, "x").read() == {"a": 1.0, "c": 3.0} and Ledger(tmp_path, "y").read() == {}


@pytest.mark.parametrize(
    "line",
    [b"1", b"null", b'"ab"', b'["b"]', b'["b", "2"]', b"[1, 2.0]", b'["b", 2.0, 3]', b"\xff\x00", b"{}"],
    ids=repr,
)
def test_what_is_no_result_is_passed_over(line, tmp_path):
    ledger = Ledger(tmp_path, "x")
    ledger.append({"a": 1.0})
    with open(ledger.path, "ab") as file:
        file.write(line + b"\n")
    ledger.append({"c": 3.0})
    assert Ledger(tmp_path, "x").read() == {"a": 1.0, "c": 3.0}


def test_two_runs_on_one_folder(tmp_path):
    """Both write at once: neither into the other's lines, and what one has done the other need not do."""
    first, second = Ledger(tmp_path, "x"), Ledger(tmp_path, "x")
    first.append({"a": 1.0})
    with open(first.path, "a") as file:  # in the middle of a line
        file.write('["b", ')
        file.flush()
        second.append({"c": 3.0})
        file.write("2.0]\n")
    assert first.read() == second.read() == {"a": 1.0, "b": 2.0, "c": 3.0}


def test_appending_does_not_read(tmp_path, monkeypatch):
    """The files may be large."""
    ledger = Ledger(tmp_path, "x")
    ledger.append({"a": 1.0})
    with monkeypatch.context() as patch:
        for name in ("read_bytes", "read_text"):
            patch.delattr(Path, name)
        ledger.append({"b": 2.0})
    assert ledger.read() == {"a": 1.0, "b": 2.0}


def test_atomic_files(tmp_path):
    write_atomically(tmp_path / "a" / "b.json", "1")
    assert (tmp_path / "a" / "b.json").read_text() == "1" and len(list((tmp_path / "a").iterdir())) == 1


def test_where_results_lie(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path))
    assert cache.default_folder() == tmp_path
    for unset in (lambda: monkeypatch.setenv("TRL_EXT_CACHE", ""), lambda: monkeypatch.delenv("TRL_EXT_CACHE")):
        unset()
        assert cache.default_folder() == Path.home() / ".cache" / "trl_ext"


def test_keys_of_contents():
    """Orders that say nothing make no difference; all else does, and the key is the same in every process."""
    key = cache.content_key
    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1}) and key({8, 0}) == key({0, 8}) == key(frozenset((0, 8)))
    different = [
        key("a", "b"),
        key(["a", "b"]),
        key("b", "a"),
        key("ab"),
        key({"a": "b"}),
        key(1),
        key("1"),
        key(None),
        key(),
    ]
    different += [key(Path("a/b")), key({1}), key({1, 2}), key("ä"), key("é")]
    assert len({*different}) == len(different)
    # sha256 of the JSON text ["a", 1]
    assert (
        key("a", 1) == hashlib.sha256(b'["a", 1]').hexdigest()[:24]
        and key("ä") == hashlib.sha256('["ä"]'.encode()).hexdigest()[:24]
    )


def test_keys_of_models():
    def model(**changes):
        torch.manual_seed(0)
        sizes = {
            "n_embd": 4,
            "n_layer": 1,
            "n_head": 1,
            "n_positions": 4,
            "vocab_size": 8,
            "bos_token_id": 1,
            "eos_token_id": 1,
        }
        return GPT2LMHeadModel(GPT2Config(**{**sizes, **changes}))

    plain = cache.model_key(model())
    assert plain == cache.model_key(model(use_cache=False, architectures=["X"], name_or_path="elsewhere"))
    other = model()
    other.transformer.ln_f.bias.data[0] = 1.0
    keys = [plain, cache.model_key(other), cache.model_key(model(layer_norm_epsilon=0.5))]
    # An adapter whose weights are zero: how it is added, and whether it is, are told apart all the same
    adapted = [
        get_peft_model(model(), LoraConfig(target_modules=["c_attn"], r=2, lora_alpha=alpha)) for alpha in (1, 2)
    ]
    for each in adapted:
        for name, value in each.named_parameters():
            if "lora" in name:
                value.data.zero_()
    keys += [cache.model_key(each) for each in adapted]
    adapted[0].add_adapter("second", LoraConfig(target_modules=["c_attn"], r=2))
    keys.append(cache.model_key(adapted[0]))
    adapted[0].set_adapter("second")
    keys.append(cache.model_key(adapted[0]))
    assert len({*keys}) == len(keys) == 7


@pytest.mark.parametrize(
    ("world", "gpu", "asked"),
    [(None, False, {}), ("1", False, {}), ("2", False, {"cpu": True}), ("2", True, {}), ("1", True, {})],
)
def test_processes_on_cpus_have_to_be_told(world, gpu, asked, monkeypatch):
    seen = []
    monkeypatch.setattr(cache, "PartialState", lambda **options: seen.append(options))
    monkeypatch.setattr(cache.torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    cache.processes()
    assert seen == [asked]
