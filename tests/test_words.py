"""One word per thing: the public names, the settings, the flags and the pages say the same of the same."""

import argparse
import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import yaml

import trl_ext
import trl_ext.data
import trl_ext.metrics
import trl_ext.rounds
from trl_ext.cli import _parser
from trl_ext.data import recipes
from trl_ext.generation import sample
from trl_ext.trainers.reward import RewardConfig, RewardTrainer


ROOT = Path(__file__).resolve().parents[1]
# The word of a thing, and what else it could be called
WORDS = {
    "reward_funcs": "reward rewards reward_fn reward_fns reward_func reward_model reward_models reward_function scorer scorers",
    "judge": "preference_fn preference_func pair pair_function oracle judges compare",
    "num_generations": "n k count num_samples num_completions samples best_of",
    "processing_class": "tokenizer tokenizer_name",
    "use_vllm": "backend",
    "max_new_tokens": "max_tokens",
    "cache_dir": "cache folder",
    "absolute_weight": "absolute_coefficient",
    "learning_rate": "lr",
}
# On the command line, where TRL's own command has a word of its own
FLAGS = {"loss_type": "loss", "max_steps": "steps", "dataset_name": "dataset data", "output_dir": "output out"}
REFUSED = {other: word for word, others in WORDS.items() for other in others.split()}
REFUSED_FLAGS = REFUSED | {other: word for word, others in FLAGS.items() for other in others.split()}


def signatures(value):
    """The parameters of a function; of a class those of its construction and of its public methods, and its fields."""
    if not inspect.isclass(value):
        return set(inspect.signature(value).parameters) if callable(value) else set()
    methods = [method for name, method in vars(value).items() if name == "__init__" or not name.startswith("_")]
    methods = [getattr(method, "__func__", method) for method in methods]
    names = {name for method in methods if inspect.isfunction(method) for name in inspect.signature(method).parameters}
    return names | ({field.name for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set())


def exported():
    modules = [trl_ext, trl_ext.data, trl_ext.metrics, trl_ext.rounds]
    found = {f"{module.__name__}.{name}": getattr(module, name) for module in modules for name in module.__all__}
    for name, value in vars(recipes).items():
        if getattr(value, "__module__", None) == recipes.__name__ and not name.startswith("_"):
            found[f"recipes.{name}"] = value
    return found | {"RewardConfig": RewardConfig, "RewardTrainer": RewardTrainer, "generation.sample": sample}


def other_words(names, refused=REFUSED):
    return {name: refused[name] for name in names if name in refused}


@pytest.mark.parametrize("name", sorted(exported()))
def test_signatures(name):
    assert not other_words(signatures(exported()[name]))
    assert not re.search("Pair(Function|Judge)|PreferenceF|Scorer", name)


def test_the_words_are_there():
    """What is looked at above holds each word, so that it could hold another in its place."""
    assert set(WORDS) <= {name for value in exported().values() for name in signatures(value)}


def commands(parser):
    """The parser of the command and of each command below it, by name."""
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return subparsers.choices


@pytest.mark.parametrize("command", sorted(commands(_parser())))
def test_flags(command):
    flags = [flag for action in commands(_parser())[command]._actions for flag in action.option_strings]
    names = [flag.lstrip("-") for flag in flags]
    assert not other_words(names, REFUSED_FLAGS)
    assert not [name for name in names if "-" in name], "TRL's flags have underscores"


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "rounds").rglob("*.yaml")), ids=lambda path: path.stem)
def test_settings(path):
    def keys(value):
        return {*value, *(key for each in value.values() for key in keys(each))} if isinstance(value, dict) else set()

    settings = yaml.safe_load(path.read_text())
    assert ("num_generations" in settings) == (path.parent.name == "rounds") and not other_words(keys(settings))


PAGES = [
    page
    for pattern in ("*.md", "docs/*.md", "examples/**/*", "benchmarks/*", "trl_ext/losses/README.md")
    for page in ROOT.glob(pattern)
    if page.suffix in (".md", ".py", ".yaml") and page.name != "CHANGELOG.md"
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages(page):
    """What is called, set and given in examples: arguments, flags and the settings of a file."""
    text = page.read_text()
    arguments = re.findall(r"[(,] ?(\w+)=(?!=)", text) + re.findall(r"^(\w+):", text, flags=re.MULTILINE)
    flags = [] if page.parent.name == "benchmarks" else re.findall(r"(?<![\w`-])`?--([\w-]+)", text)
    assert not other_words(arguments) and not other_words(flags, REFUSED_FLAGS)
    assert not re.search(
        r"PairFunction|preference_fn|--output-dir|--max-length|absolute_coefficient|`(n|pair): ", text
    )
