"""When two functions are taken for the same, so that kept results are used."""

import functools
import importlib
import logging
import sys

import pytest
import torch
from datasets import Dataset

from trl_ext.data import JudgeFunction, RewardFunction, score_preferences
from trl_ext.data.fingerprint import _constant, function_key


PAIRS = Dataset.from_list([{"prompt": "p", "chosen": "aaa", "rejected": "b"}])

JUDGE = """
import functools
import math
import numpy as np
import torch
import {package}_words as words
from {package}_tools import Scale

FACTOR = 2.0
TABLE = {{"a": [1.0, 2.0]}}

def helper(text):
    return words.count(text) * FACTOR

def reward(prompts, completions, *, offset=0.0):
    return [helper(text) + offset + TABLE["a"][0] for text in completions]

def by_word(prompts, completions):
    kinds = {{"good", "bad", "fine", "dull"}}
    return [float(text in kinds or text in {{"x", "y", "z"}}) for text in completions]

class Judge:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, prompts, completions):
        return [self.weight * len(text) for text in completions]

    def judge(self, prompts, completions):
        return self(prompts, completions)

    @staticmethod
    def plain(prompts, completions):
        return [1.0 for _ in completions]

def closure(weight):
    def inner(prompts, completions):
        return [weight * len(text) for text in completions]
    return inner

class Network(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale, self.layer = scale, torch.nn.Linear(2, 2)
        torch.nn.init.ones_(self.layer.weight), torch.nn.init.ones_(self.layer.bias)

    def forward(self, prompts, completions):
        return [self.scale * self.layer(torch.ones(2)).sum().item() - len(text) for text in completions]

@functools.lru_cache
def cached(prompts, completions):
    return [1.0]
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A user's modules, written anew and imported anew on each call."""
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "judges_" + tmp_path.name.replace("-", "_")
    files = {
        name: JUDGE.format(package=name),
        f"{name}_words": f"import {name}\n\ndef count(text):\n    return len(text)\n",
        f"{name}_tools": "class Scale:\n    def __call__(self, x):\n        return x\n",
    }

    def load(part="", old="", new="", reload=True):
        files[name + part] = files[name + part].replace(old, new)
        if old:
            assert new in files[name + part]
        for each, source in files.items():
            (tmp_path / f"{each}.py").write_text(source)
        if reload:
            for each in files:
                sys.modules.pop(each, None)
            importlib.invalidate_caches()
        sys.dont_write_bytecode = True
        return importlib.import_module(name)

    yield load
    for each in files:
        sys.modules.pop(each, None)


def key(function):
    return function_key(function, None, "function")


EVERYTHING = {
    "function": lambda judges: judges.reward,
    "partial": lambda judges: functools.partial(judges.reward, offset=1.0),
    "object": lambda judges: judges.Judge(2.0),
    "method": lambda judges: judges.Judge(2.0).judge,
    "static": lambda judges: judges.Judge.plain,
    "closure": lambda judges: judges.closure(2.0),
    "cached": lambda judges: judges.cached,
    "network": lambda judges: judges.Network(1.0).eval(),
    "inside": lambda judges: judges.closure(torch.nn.Sequential(judges.Network(1.0))),
    "set": lambda judges: judges.by_word,
}


@pytest.mark.parametrize("kind", EVERYTHING)
def test_edits_give_another_key_and_nothing_else_does(kind, package):
    make = EVERYTHING[kind]
    first = key(make(package()))
    assert first is not None and first.startswith("function-")
    assert key(make(package())) == first  # imported anew
    seen = {first}
    for edit in (
        ("", "FACTOR = 2.0", "FACTOR = 3.0"),
        ("", "return words.count(text) * FACTOR", "return -words.count(text) * FACTOR"),
        ("", "self.weight * len(text)", "self.weight - len(text)"),
        ("_words", "return len(text)", "return len(text) + 1"),
        ("_tools", "return x", "return -x"),
    ):
        changed = key(make(package(*edit)))
        assert changed is not None and changed not in seen, edit
        seen.add(changed)


def test_different_functions_have_different_keys(package):
    judges = package()
    functions = [make(judges) for make in EVERYTHING.values()]
    functions += [
        judges.Network(2.0), judges.closure(torch.nn.Sequential(judges.Network(2.0))),
        functools.partial(judges.reward, offset=2.0), judges.Judge(3.0), judges.Judge(3.0).judge, judges.closure(3.0),
        lambda prompts, completions: [1.0], lambda prompts, completions: [2.0], judges.closure({"a": 1}),
        judges.closure({"a": 2}), judges.closure([1, 2]), judges.closure((1, 2)), judges.closure({1, 2}), judges.closure({1}),
        judges.closure(torch.nn.Linear(1, 1)), judges.closure(torch.nn.Linear(1, 1)), judges.closure(judges.helper),
        judges.closure(True), judges.closure(1), judges.closure(torch.tensor([1.0])), judges.closure(torch.tensor([2.0])),
    ]  # fmt: skip
    assert key(judges.Network(1.0).train()) == key(judges.Network(1.0).eval())
    keys = [key(function) for function in functions]
    assert None not in keys and len({*keys}) == len(keys)


def test_values_that_a_function_reads_from_its_module_count(package):
    judges = package()
    before = key(judges.reward)
    judges.TABLE["a"][0] = 5.0
    after = key(judges.reward)
    judges.TABLE["a"][0] = 1.0
    assert before == key(judges.reward) != after


def test_a_file_that_was_edited_but_not_imported_anew(package):
    """What runs is the old code: its scores must not stand under the key of the new."""
    old = package()
    edit = ("", "return words.count(text) * FACTOR", "return -words.count(text) * FACTOR")
    stale = key(package(*edit, reload=False).reward)
    fresh = key(package().reward)
    assert stale != fresh and old.reward is not package().reward
    stale = key(package("", "self.weight * len(text)", "self.weight - len(text)", reload=False).Judge(2.0))
    assert stale != key(package().Judge(2.0))  # a method


def test_the_order_of_a_set_is_no_difference(package):
    """Which depends on the process, for text; for these numbers on what was put in first."""
    judges = package()
    first, second = {0, 8}, {8, 0}
    assert list(first) != list(second)
    assert key(judges.closure(first)) == key(judges.closure(second))
    assert _constant(frozenset((0, 8))) == _constant(frozenset((8, 0))) != _constant(frozenset((0, 9)))


def test_where_nobody_can_say(package):
    namespace = {"__name__": "__main__"}
    exec("def typed(prompts, completions):\n    return [1.0 for _ in completions]", namespace)  # as in a notebook
    assert key(namespace["typed"]) is None
    judges = package()
    assert key(judges.closure(each for each in ())) is None  # a generator is no value
    assert key(functools.partial(namespace["typed"])) is key(judges.closure({namespace["typed"]})) is None
    assert key(judges.closure(torch.nn.Linear(1, 1, device="meta"))) is None
    deep = []
    for _ in range(5000):
        deep = [deep]
    assert key(judges.closure(deep)) is None


def test_versions():
    namespace = {"__name__": "__main__"}
    exec("def typed(prompts, completions): return []\ndef other(prompts, completions): return []", namespace)
    typed, other = namespace["typed"], namespace["other"]
    keys = [RewardFunction(typed, "1").key(), RewardFunction(typed, "2").key(), RewardFunction(other, "1").key()]
    assert len({*keys}) == 3 and RewardFunction(typed, "1").key() == keys[0]
    assert RewardFunction(functools.partial(typed), "1").key() == keys[0]
    assert JudgeFunction(typed, "1").key().split("-") == ["judge", keys[0].split("-")[1]]
    assert RewardFunction(typed).key() is JudgeFunction(typed).key() is None


def test_versions_of_objects_of_different_classes():
    """An object has no name of its own: that of its class tells it from others of the same version."""

    class One:
        def __call__(self, prompts, completions):
            return []

    class Two(One):
        pass

    assert RewardFunction(One(), "1").key() == RewardFunction(One(), "1").key() != RewardFunction(Two(), "1").key()


def test_edited_functions_are_asked_anew(package, tmp_path):
    """From file to score: an edit of a helper in another module, then back again."""
    folder = tmp_path / "kept"
    assert score_preferences(PAIRS, package().reward, cache_dir=folder)["score_chosen"] == [7.0]
    longer = package("_words", "return len(text)", "return 10 * len(text)")
    assert score_preferences(PAIRS, longer.reward, cache_dir=folder)["score_chosen"] == [61.0]
    judge = JudgeFunction(longer.closure(0.01))
    judge.function = functools.partial(_pairs, longer)
    assert score_preferences(PAIRS, judge=judge, cache_dir=folder)["preference_prob"] == [0.3]
    back = package("_words", "return 10 * len(text)", "return len(text)")
    assert score_preferences(PAIRS, back.reward, cache_dir=folder)["score_chosen"] == [7.0]
    judge.function = functools.partial(_pairs, back)
    assert score_preferences(PAIRS, judge=judge, cache_dir=folder)["preference_prob"] == [0.03]


def _pairs(judges, prompts, first, second):
    return [judges.words.count(text) / 100 for text in first]


def test_without_a_source_nothing_is_kept(tmp_path, caplog):
    calls, namespace = [], {"__name__": "__main__"}
    exec("def typed(prompts, completions):\n    calls.append(1)\n    return [1.0 for _ in completions]", namespace)
    namespace["calls"] = calls
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert score_preferences(PAIRS, namespace["typed"], cache_dir=tmp_path)["score_chosen"] == [1.0]
    assert len(calls) == 2 and not list(tmp_path.iterdir())
    assert "its scores are not kept" in caplog.text and "version=" in caplog.text
    caplog.clear()
    for _ in range(2):
        score_preferences(PAIRS, RewardFunction(namespace["typed"], version="1"), cache_dir=tmp_path)
    assert len(calls) == 3 and len(list(tmp_path.iterdir())) == 1 and not caplog.text
