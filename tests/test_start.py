"""What a command imports before it answers: counted in modules, which are the same on every machine, and not in seconds."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trl.scripts import dpo

from tests.test_cli import ROOT
from trl_ext import get_loss, list_losses, sources
from trl_ext.losses import TRL_LOSS_TYPES, list_aliases, loss_class, resolve_name
from trl_ext.rounds import IterativeDPO, RoundsConfig
from trl_ext.run_dpo import MODEL_CONFIG


# Each takes from half a second to many
HEAVY = ("torch", "transformers", "datasets", "pyarrow", "numpy", "pandas", "accelerate", "peft")
COUNTED = """
import json, sys
from trl_ext.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print()
print(json.dumps([code, sorted(sys.modules)]))
"""


PLUGIN = """
from dataclasses import dataclass
from trl_ext import register_loss

@register_loss("plugged", aliases=["pl"])
@dataclass(frozen=True)
class Plugged:
    def __call__(self, batch):
        return -batch.delta
"""


def imported(*arguments, cwd, path=ROOT) -> tuple[int, set[str], subprocess.CompletedProcess]:
    """The exit status of a command, and all modules that it imported."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{path}",
        "HF_DATASETS_CACHE": str(cwd / "cache"),
        "COLUMNS": "80",
    }
    command = [sys.executable, "-c", COUNTED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    code, modules = json.loads(done.stdout.rstrip().rsplit("\n", maxsplit=1)[1])
    return code, set(modules), done


DPO = ["run", "dpo", "--model_name_or_path", "owner/model", "--dataset_name", "owner/data"]
MISTAKES = {
    "no-script": (["run", "nowhere.py"], "There is no script 'nowhere.py'"),
    "option": ([*DPO, "--lose_type", "offset"], "Did you mean '--loss_type'?"),
    "number": ([*DPO, "--learning_rate", "fast"], "invalid float value: 'fast'"),
    "stray-word": ([*DPO, "offset"], "['offset'] belong to no option"),
    "loss": ([*DPO, "--loss_type", "sigmoid", "ofset"], "Unknown loss 'ofset'. Did you mean 'offset'?"),
    "hyper-parameter": (
        [*DPO, "--loss_type", "offset", "--loss_kwargs", '{"alhpa": 1}'],
        "The loss 'offset' has no hyper-parameter 'alhpa'. Did you mean 'alpha'?",
    ),
    "rounds-hyper-parameter": (
        ["iterate", "rounds.yaml", "--training.loss_type", "offset", "--training.loss_kwargs", "{alhpa: 1}"],
        "The loss 'offset' has no hyper-parameter 'alhpa'",
    ),
    "hyper-parameters": (
        [*DPO, "--loss_type", "offset", "--loss_kwargs", "{alpha: 1}"],
        "`loss_kwargs='{alpha: 1}'` is not JSON",
    ),
    "no-data": (DPO[:4], "--dataset_name missing"),
    "model": ([*DPO, "--model_name_or_path", "./nowhere"], "There is no model './nowhere'"),
    "teacher": ([*DPO, "--teacher_model_name_or_path", "./no"], "There is no model --teacher_model_name_or_path './no'"),
    "data": ([*DPO, "--dataset_name", "no.jsonl"], "There is no dataset 'no.jsonl'"),
    "kind-of-file": ([*DPO, "--dataset_name", "text.txt"], "Cannot read 'text.txt': expected a file that ends in"),
    "split-of-a-file": (
        [*DPO, "--dataset_name", "pairs.jsonl", "--eval_strategy", "steps"],
        "Split some off with --test_split_size 0.1",
    ),
    "output": ([*DPO, "--output_dir", "text.txt"], "cannot be a folder: 'text.txt' is a file"),
    "no-config": (["run", "dpo", "--config", "no.yaml"], "There is no config file 'no.yaml'"),
    "no-yaml": (["run", "dpo", "--config", "broken.yaml"], "'broken.yaml' is not YAML"),
    "setting": (["run", "dpo", "--config", "typo.yaml"], "unknown settings ['learning_rat']. Did you mean 'learning_rate'?"),
    "setting-loss": (["run", "dpo", "--config", "loss.yaml"], "Unknown loss 'ofset'. Did you mean 'offset'?"),
    "losses": (["losses", "ofset"], "Unknown loss 'ofset'. Did you mean 'offset'?"),
    "rounds-no-file": (["iterate", "no.yaml"], "There is no file 'no.yaml'"),
    "rounds-no-yaml": (["iterate", "broken.yaml"], "broken.yaml is not YAML"),
    "rounds-setting": (["iterate", "rounds.yaml", "--rouns", "2"], "Did you mean 'rounds' for 'rouns'?"),
    "rounds-form": (["iterate", "rounds.yaml", "rounds", "2"], "Settings are given as --name value"),
    "rounds-number": (["iterate", "rounds.yaml", "--rounds", "two"], "`rounds='two'` is a str; expected a whole number"),
    "rounds-training": (
        ["iterate", "rounds.yaml", "--training.learning_rat", "1e-6"],
        "`training`: unknown settings ['learning_rat']. Did you mean 'learning_rate'",
    ),
    "rounds-training-number": (
        ["iterate", "rounds.yaml", "--training.max_steps", "1.5"],
        "`training.max_steps=1.5` is a float; expected a whole number",
    ),
    "rounds-sampling": (["iterate", "rounds.yaml", "--sampling.temprature", "1"], "Did you mean 'temperature'"),
    "rounds-scoring": (["iterate", "rounds.yaml", "--scoring.batchsize", "1"], "Did you mean 'batch_size'"),
    "rounds-loss": (["iterate", "rounds.yaml", "--training.loss_type", "ofset"], "Unknown loss 'ofset'"),
    "rounds-losses": (["iterate", "rounds.yaml", "--training.loss_type", "[sft, ofset]"], "Unknown loss 'ofset'"),
    "rounds-model": (["iterate", "rounds.yaml", "--model", "./no"], "There is no model './no'"),
    "rounds-prompts": (["iterate", "rounds.yaml", "--prompts", "no.jsonl"], "There is no dataset of prompts 'no.jsonl'"),
    "rounds-output": (["iterate", "rounds.yaml", "--output_dir", "text.txt"], "`output_dir='text.txt'` cannot be a folder"),
    "inspect-data": (["inspect", "no.jsonl"], "There is no dataset 'no.jsonl'"),
    "inspect-kind": (["inspect", "text.txt"], "Cannot read 'text.txt': expected a file that ends in"),
    "inspect-tokenizer": (["inspect", "pairs.jsonl", "--processing_class", "./no"], "There is no tokenizer './no'"),
    "inspect-columns": (["inspect", "pairs.jsonl", "--columns", "score_chosen"], "expected NAME=COLUMN"),
    "inspect-length": (["inspect", "pairs.jsonl", "--max_length", "0"], "must be at least 1"),
    "demo-loss": (["demo", "--loss_type", "ofset"], "Unknown loss 'ofset'. Did you mean 'offset'?"),
    "demo-steps": (["demo", "--max_steps", "0"], "at least 1 step is needed"),
    "demo-seeds": (["demo", "--seeds", "0"], "`--seeds 0`"),
    "demo-data": (["demo", "--dataset_name", "no.jsonl"], "There is no dataset 'no.jsonl'"),
    "demo-output": (["demo", "--output_dir", "text.txt"], "cannot be a folder"),
    "compare": (["compare", "nowhere"], "There is no run 'nowhere'"),
    "compare-group": (["compare", "nowhere", "--group", "sed"], "invalid choice: 'sed'"),
    "no-command": ([], "arguments are required"),
    "help": (["--help"], None),
    "help-of-run": (["run", "--help"], None),
}  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    texts = {
        "text.txt": "x", "empty.jsonl": "", "broken.yaml": "a: [", "typo.yaml": "learning_rat: 1\n", "loss.yaml": "loss_type: [ofset]\n",
        "rounds.yaml": "model: owner/model\nprompts: owner/data\noutput_dir: out\nreward_funcs: owner/reward\n",
        "pairs.jsonl": '{"prompt": "p", "chosen": "a b", "rejected": "c", "score_chosen": 2.5, "score_rejected": 1.0}\n',
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_before_torch_is_imported(name, here):
    arguments, message = MISTAKES[name]
    code, modules, done = imported(*arguments, cwd=here)
    assert code == (0 if message is None else 2) and "Traceback" not in done.stderr
    assert message is None or message in done.stderr
    assert not modules & {*HEAVY}, sorted(modules & {*HEAVY})


@pytest.mark.parametrize("command", [["inspect", "pairs.jsonl"], ["compare", "nowhere"]])
def test_a_plot_that_cannot_be_drawn_is_refused_first(command, here):
    """matplotlib says which formats there are; it brings numpy."""
    code, modules, done = imported(*command, "--plot", "plot.xyz", cwd=here)
    assert code == 2 and "its name must end in one of" in done.stderr
    assert not modules & ({*HEAVY} - {"numpy"})


def test_losses_costs_no_more_than_torch(here):
    for arguments in (["losses"], ["losses", "offset"]):
        code, modules, done = imported(*arguments, cwd=here)
        assert code == 0 and "offset" in done.stdout and "torch" in modules
        assert not modules & {"transformers", "trl", "datasets", "accelerate", "peft", "pyarrow"}


def test_inspect_imports_no_trainer(here):
    code, modules, done = imported("inspect", "pairs.jsonl", cwd=here)
    assert code == 0 and "the longer answer wins" in done.stdout and "datasets" in modules
    trl = [
        name
        for name in modules
        if name.startswith(("trl.trainer", "trl.models", "trl.experimental", "trl_ext.trainers"))
    ]
    models = [
        name
        for name in modules
        if name.startswith(("transformers.model", "transformers.generation", "transformers.trainer"))
    ]
    assert not trl and not models and not modules & {"accelerate", "peft"}


def test_inspect_with_a_tokenizer_imports_no_trainer(here, tiny_model_dir):
    code, modules, _ = imported("inspect", "pairs.jsonl", "--processing_class", tiny_model_dir, cwd=here)
    assert code == 0 and "transformers.tokenization_utils_base" in modules
    assert not modules & {
        "trl.trainer.dpo_trainer",
        "trl.trainer.utils",
        "transformers.modeling_utils",
        "transformers.trainer",
    }


# The first look agrees with the second


def test_losses_read_from_sources_are_those_of_the_registry():
    ours = [name for name in list_losses() if loss_class(name).__module__.startswith("trl_ext.losses.")]
    expected = {}
    for name in ours:
        fields = tuple(field.name for field in dataclasses.fields(loss_class(name)) if field.init)
        expected |= dict.fromkeys((name, *list_aliases(name)), (name, fields))
    assert sources.loss_classes() == expected and len(ours) > 15
    assert sources.trl_loss_types() == TRL_LOSS_TYPES


@pytest.mark.parametrize(
    ("name", "given"), [("offset", {"alhpa": 1}), ("odpo", {"alpha": 1, "zzz": 2}), ("cpl", {"a": 1})]
)
def test_an_unknown_hyperparameter_is_refused_in_the_words_of_the_registry(name, given):
    said = []
    for refuse in (
        lambda: get_loss(name, **given),
        lambda: sources.refuse_unknown_hyperparameters(["sigmoid", name], given),
        lambda: sources.refuse_unknown_hyperparameters([name], json.dumps(given)),
    ):
        with pytest.raises(ValueError) as error:
            refuse()
        said.append(str(error.value))
    assert said[0] == said[1] == said[2] and "has no hyper-parameter" in said[0]


@pytest.mark.parametrize(
    ("names", "given"),
    [
        (["offset"], {"alpha": 1}), (["offset", "anchored"], {"zzz": 1}), (["offset"], {"offset": {"alpha": 1}}),
        (["offset"], None), (["sigmoid"], {"zzz": 1}), (["brought_by_a_package"], {"zzz": 1}), (["offset"], "[1]"), ([["offset"]], {"z": 1}),
    ],
)  # fmt: skip
def test_hyperparameters_that_are_left_to_the_config(names, given):
    sources.refuse_unknown_hyperparameters(names, given)


@pytest.mark.parametrize(("name", "also"), [("ofset", ()), ("ofset", TRL_LOSS_TYPES), ("zzz", ()), ("sigmoid", ())])
def test_an_unknown_loss_is_refused_in_the_words_of_the_registry(name, also, monkeypatch):
    monkeypatch.delitem(sys.modules, "trl_ext.losses.registry")
    said = []
    for refuse in (
        lambda: resolve_name(name, also=also),
        lambda: sources.refuse_unknown_losses([name], trl=bool(also)),
    ):
        with pytest.raises(ValueError) as error:
            refuse()
        said.append(str(error.value))
    assert said[0] == said[1]


def test_with_plug_ins_the_registry_decides(monkeypatch):
    """A package may bring a name that only loading it says, as an alias; so may what this process has registered."""
    sources.refuse_unknown_losses(["registered_here"], trl=False)
    monkeypatch.delitem(sys.modules, "trl_ext.losses.registry")
    with pytest.raises(ValueError, match="Unknown loss 'registered_here'"):
        sources.refuse_unknown_losses(["registered_here"], trl=False)
    monkeypatch.setattr(sources, "entry_points", lambda group: [group])
    sources.refuse_unknown_losses(["brought_by_a_package"], trl=False)


def options(parser: argparse.ArgumentParser) -> dict[str, tuple]:
    """All spellings of an option with what decides how it is parsed."""
    kinds = {int: "int", float: "float", str: "str"}
    known = {}
    for action in parser._actions:
        kind = kinds.get(action.type, getattr(action.type, "__name__", None))
        known |= dict.fromkeys(action.option_strings, (action.dest, action.nargs, action.const, kind))
    return known


def test_options_read_from_sources_are_those_of_the_classes(trl_as_it_was):
    from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments, TrlParser

    from trl_ext import patch_trl

    patch_trl()
    theirs = options(dpo.make_parser())
    classes = (
        ScriptArguments,
        sources.stand_in(sources.DPO_CONFIG),
        sources.stand_in(MODEL_CONFIG),
        DatasetMixtureConfig,
    )
    ours = options(TrlParser(classes))
    assert set(ours) == set(theirs)
    kinds = {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
    # Enums are text here, and of a list of classes the class decides
    assert not {name: both for name, both in kinds.items() if both[1][3] in ("int", "float", "string_to_bool")}
    assert all(both[0][:3] == both[1][:3] for both in kinds.values()), kinds


def test_settings_of_rounds_read_from_sources_are_those_of_the_class():
    import typing

    from trl_ext.data.sampling import sample_completions
    from trl_ext.data.scores import score_preferences
    from trl_ext.rounds.checks import keyword_arguments

    fields = sources.config_fields([("trl_ext", "rounds/config.py")])
    assert {name: field.type for name, field in fields.items()} == typing.get_type_hints(RoundsConfig)
    assert list(fields) == [field.name for field in dataclasses.fields(RoundsConfig)]
    for path, function in (("data/sampling.py", sample_completions), ("data/scores.py", score_preferences)):
        assert set(sources.keyword_arguments(path, function.__name__)) == set(keyword_arguments(function))


def test_a_plug_in_is_found(here, tmp_path, tiny_model_dir):
    """A package beside ours offers a loss, whose alias only loading it says."""
    (tmp_path / "plugged.py").write_text(PLUGIN)
    info = tmp_path / "plugged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trl_ext.losses]\nplugged = plugged:Plugged\n")
    for arguments in (["losses", "plugged"], ["losses", "pl"]):
        code, modules, done = imported(*arguments, cwd=here, path=tmp_path)
        assert code == 0 and "plugged  (aliases: pl)" in done.stdout, done.stderr
        assert not modules & {"transformers", "trl", "datasets"}
    code, _, done = imported("losses", "plu", cwd=here, path=tmp_path)
    assert code == 2 and "Did you mean" in done.stderr and "'plugged'" in done.stderr
    data = [
        "--dataset_name",
        "empty.jsonl",
        "--loss_type",
        "pl",
        "--output_dir",
        "out",
        "--use_cpu",
        "--bf16",
        "false",
    ]
    code, _, done = imported("run", "dpo", "--model_name_or_path", tiny_model_dir, *data, cwd=here, path=tmp_path)
    assert code == 2 and "'empty.jsonl' is empty" in done.stderr  # it came as far as the data


def test_what_cannot_be_read_is_left_to_the_classes(monkeypatch):
    assert sources.config_fields([("trl", "nowhere.py")]) == {} and sources.stand_in([("nowhere", "a.py")]) is None
    assert sources.keyword_arguments("data/scores.py", "nowhere") is None
    monkeypatch.setattr("trl_ext.upstream._installed", lambda name: "1.17.0" if name == "trl" else "5.23.1")
    assert sources.stand_in(sources.DPO_CONFIG) is None  # options may be elsewhere in a version that nobody looked at
    assert sources.config_fields([("trl_ext", "rounds/config.py")])


def test_names_of_rounds_are_loaded_on_first_use():
    import trl_ext.rounds

    assert dir(trl_ext.rounds) == ["IterativeDPO", "RoundsConfig"]
    assert trl_ext.rounds.IterativeDPO is IterativeDPO and IterativeDPO.__module__ == "trl_ext.rounds.iterate"
    with pytest.raises(AttributeError, match="no attribute 'Rounds'"):
        trl_ext.rounds.Rounds  # noqa: B018
