# ruff: noqa: F401, F811 -- fixtures are imported and then named as arguments
"""Settings of the rounds: read from YAML and the command line, and refused before anything is sampled."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from datasets import Dataset
from transformers import AutoTokenizer

import trl_ext
from tests.stateful import keep_registry
from tests.test_rounds import length, longer, prompts, settings
from trl_ext.cli import main
from trl_ext.data.paths import refuse_unwritable_folder
from trl_ext.data.rewards import Ensemble, JudgeFunction, RewardFunction, RewardModel
from trl_ext.losses.base import Loss
from trl_ext.rounds import IterativeDPO, RoundsConfig
from trl_ext.rounds.checks import keyword_arguments, load_rows, read_yaml, refuse_unknown, refuse_wrong_types
from trl_ext.rounds.rewards import build_scorer, model_names
from trl_ext.trainers.loss_types import resolve_loss_types


JUDGE = "tests.test_rounds:longer"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("5E+2", 500.0),
        ("-1.e3", -1000.0),
        (".5e1", 5.0),
        ("1.5", 1.5),
        ("3", 3),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("null", None),
        ("e6", "e6"),
        ("1e", "1e"),
        ("1e-6x", "1e-6x"),
        ("[offset, 1e-6]", ["offset", 1e-6]),
        ("{a: 1e-3}", {"a": 1e-3}),
    ],
)
def test_yaml(text, value):
    read = read_yaml(text, "here")
    assert read == value and type(read) is type(value)


def test_text_that_is_not_yaml():
    with pytest.raises(ValueError, match="--judge is not YAML"):
        read_yaml("{a: [", "--judge")
    assert yaml.safe_load("1e-6") == "1e-6"  # and for others it is as it was


def test_nearest_names():
    with pytest.raises(
        ValueError, match=r"^here: unknown settings \['bta', 'zzz'\]\. Did you mean 'beta' for 'bta'\? Known: "
    ):
        refuse_unknown(["bta", "beta", "zzz"], ["beta", "alpha"], "here")
    with pytest.raises(ValueError, match=r"unknown settings \['zzz'\]\.$"):
        refuse_unknown(["zzz"], [str(number) for number in range(41)], "here")
    with pytest.raises(ValueError, match=r"Known: \['0', '1', '10', .*'9'\]\.$"):
        refuse_unknown(["zzz"], [str(number) for number in range(40)], "here")
    refuse_unknown(["beta"], ["beta"], "here")


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, 3, None),
        (int, 3.0, "a whole number"),
        (int, "3", "a whole number"),
        (int, True, "a whole number"),
        (int, None, "a whole number"),
        (int | None, None, None),
        (float, 3, None),
        (float, 0.5, None),
        (float, "1e-6", "a number"),
        (float, False, "a number"),
        (float | None, [1.0], "a number or null"),
        (bool, True, None),
        (bool, 1, "true or false"),
        (bool, "no", "true or false"),
        (float | str, "fit", None),
        (float | str, [], None),
        (str, 3, None),
        (list[float] | None, 3, None),
        (dict, 3, None),
    ],
)
def test_numbers_and_booleans(hint, value, expected):
    if expected is None:
        refuse_wrong_types({"name": value}, {"name": hint}, "x.")
    else:
        with pytest.raises(ValueError, match=rf"^`x\.name=.*` is a {type(value).__name__}; expected {expected}\.$"):
            refuse_wrong_types({"name": value}, {"name": hint}, "x.")


def test_arguments_of_a_function():
    def function(a, *, b: int, c=3, **rest):
        pass

    assert keyword_arguments(function) == {"b": int, "c": Any}


TWO = ["tests.test_rounds:length", "tests.test_rounds:length"]
REFUSED = [
    (
        {"reward_funcs": TWO, "training": {"loss_type": ["e_dpo", "sigmoid"]}},
        r"take each of several rewards, and rounds keep one score per completion.*`reward_funcs=\{\"mean\": \[...\]\}`",
    ),
    ({"reward_funcs": TWO, "training": {"loss_type": ["e_dpo", "offset"]}}, r"take each and \['offset'\] the sum"),
    ({"reward_funcs": Ensemble([length, length], "list")}, r"takes one number: give `Ensemble\(\[...\], \"mean\"\)`"),
    ({"rounds": 0}, "`rounds=0` must be a whole number, at least 1"),
    ({"rounds": 2.0}, "`rounds=2.0` is a float; expected a whole number"),
    ({"num_generations": 1}, "`num_generations=1` must be a whole number, at least 2"),
    ({"prompts_per_round": 0}, "`prompts_per_round=0`"),
    ({"prompts_per_round": "8"}, "`prompts_per_round='8'` is a str"),
    ({"seed": "x"}, "`seed='x'`"),
    ({"min_margin": "0.1"}, "`min_margin='0.1'` is a str; expected a number"),
    ({"min_margin": -0.1}, "must be at least 0"),
    ({"min_margin": float("inf")}, "finite"),
    ({"extrapolation": float("nan")}, "`extrapolation=nan` finite"),
    ({"model": 3}, "`model=3` must be a name or a path"),
    ({"output_dir": ""}, "`output_dir=''` must be a name or a path"),
    ({"model": "./nowhere"}, "There is no model './nowhere'"),
    ({"replay": "nowhere.jsonl"}, "There is no dataset to replay 'nowhere.jsonl'"),
    ({"reward_funcs": "path/to/reward-model"}, "There is no reward model 'path/to/reward-model'"),
    ({"reward_funcs": {"min": ["tests.test_rounds:length", "./nowhere"]}}, "There is no reward model './nowhere'"),
    ({"reward_funcs": "folder-of-nothing"}, "The reward model 'folder-of-nothing' cannot be loaded"),
    (
        {"reward_funcs": {"mean": ["tests.test_rounds:length", "nothing"]}},
        "The reward model 'nothing' cannot be loaded",
    ),
    (
        {"reward_funcs": "implicit", "implicit_reference": "nothing"},
        "The implicit reference 'nothing' cannot be loaded",
    ),
    ({"model": "nothing"}, "The model 'nothing' cannot be loaded"),
    ({"pairing": "best"}, "choose one of"),
    ({"reference": "keep", "training": {"loss_type": "simpo"}}, r"none of the losses \['simpo'\] reads a reference"),
    ({"reference": "ema"}, "choose one of"),
    ({"length_shaping": "penalty"}, "choose one of"),
    ({"reward_funcs": "implicit"}, "give that one as `implicit_reference`"),
    ({"implicit_reference": "somebody/model"}, "and with no other rewards"),
    ({"reward_funcs": "implicit", "implicit_reference": "./nowhere"}, "There is no implicit reference './nowhere'"),
    ({"reward_funcs": "implicit", "implicit_reference": "x", "scoring": {"temperature": 2.0}}, "unknown settings"),
    ({"reward_funcs": "tests.test_rounds:nothing"}, "The reward function .* cannot be imported"),
    ({"judge": "tests.test_rounds:nothing"}, "The judge .* cannot be imported"),
    ({"judge": "path/to/reward-model"}, "What scores one completion at a time is `reward_funcs`"),
    ({"judge": JUDGE, "reward_funcs": "tests.test_rounds:length"}, "got both"),
    ({"reward_funcs": None}, "got neither"),
    ({"reward_weights": [1.0, 2.0]}, "one for each of the 1 rewards"),
    ({"reward_weights": [1.0], "judge": JUDGE}, "no meaning with a `judge`"),
    ({"reward_funcs": "tests.test_rounds:TRAINING"}, "is a dict; expected a function"),
    ({"judge": "tests.test_rounds:TRAINING"}, "is a dict; expected a function"),
    ({"reward_funcs": {"vote": []}}, "expected one of the keys"),
    ({"reward_funcs": {"mean": "tests.test_rounds:length"}}, "takes a list of rewards"),
    ({"reward_funcs": {"mean": []}}, "at least one reward"),
    ({"reward_funcs": {"mean": [JudgeFunction(longer)]}}, "is a judge of two"),
    ({"reward_funcs": {"mean": ["implicit"]}}, "'implicit' cannot be one of several"),
    ({"reward_funcs": 3}, "is none of"),
    ({"judge": 3}, "is no judge of two"),
    ({"scoring": {"temperature": "fit"}}, "groups have none"),
    ({"scoring": {"temperature": 0}}, "must be a positive number"),
    ({"scoring": {"temperature": float("inf")}}, "must be a positive number"),
    ({"scoring": {"batch_size": "4"}}, "`scoring.batch_size='4'` is a str"),
    ({"judge": JUDGE, "scoring": {"temperature": 2.0}}, "no meaning for a judge"),
    ({"replay_share": 1.0}, r"must lie in \[0, 1\)"),
    ({"replay_share": -0.1}, r"must lie in \[0, 1\)"),
    ({"pairing": "group", "min_margin": 0.5, "training": {"loss_type": "anchored"}}, "have no meaning with"),
    ({"pairing": "group", "replay": "somebody/data", "training": {"loss_type": "anchored"}}, "have no meaning with"),
    ({"pairing": "group", "training": {"loss_type": ["anchored", "inpo"]}}, "`inpo` is a loss on pairs"),
    ({"sampling": {"max_tokens": 3}}, r"unknown settings \['max_tokens'\]\. Did you mean 'max_new_tokens'"),
    ({"sampling": {"temperature": "hot"}}, "`sampling.temperature='hot'` is a str; expected a number"),
    ({"sampling": {"seed": 3}}, r"`sampling` may not set \['seed'\]"),
    ({"sampling": {"cache_dir": "x"}}, "may not set"),
    ({"sampling": [3]}, "must be a dictionary"),
    ({"training": {"output_dir": "x"}}, "may not set"),
    ({"training": {"pairing": "all"}}, "may not set"),
    ({"training": {"resume_from_checkpoint": "x"}}, "may not set"),
    ({"training": {"learning_rat": 1e-6}}, r"unknown settings \['learning_rat'\]\. Did you mean 'learning_rate'"),
    ({"training": {"learning_rate": "1e-6"}}, "`training.learning_rate='1e-6'` is a str; expected a number"),
    ({"training": {"max_steps": 2.5}}, "`training.max_steps=2.5` is a float; expected a whole number"),
    ({"training": {"save_strategy": "never"}}, "`training` cannot be used: never is not a valid SaveStrategy"),
    ({"training": {"bf16": True, "use_cpu": False}}, "there is no GPU that computes in bfloat16"),
    ({"training": {"report_to": "nobody"}}, "`training` cannot be used: nobody is not supported"),
    ({"training": {"use_liger_kernel": True}}, "`use_liger_kernel` needs a GPU"),
    ({"training": {"loss_type": "ofset"}}, "Did you mean 'offset'"),
    ({"training": {"loss_type": "offset,anchored"}}, r"a list elsewhere: \['offset', 'anchored'\]"),
    ({"training": {"loss_type": "bias_variance"}}, "which rounds do not make"),
    ({"training": {"loss_type": "sppo_soft"}}, r"which `reward_funcs='tests\.test_rounds:length'`"),
    (
        {"judge": JUDGE, "length_shaping": "balance", "training": {"loss_type": "sppo_soft"}},
        "`length_shaping='balance'`",
    ),
    # What only the trainer of a round says
    ({"training": {"loss_type": "simpo", "sync_ref_model": True}}, "reads a reference model, so"),
    ({"training": {"loss_type": "simpo", "precompute_ref_log_probs": True}}, "reads a reference model, so"),
    ({"training": {"sync_ref_model": True, "precompute_ref_log_probs": True}}, "assumes a fixed reference model"),
    ({"training": {"eval_strategy": "steps"}}, "you didn't pass an `eval_dataset`"),
    (
        {"training": {"loss_type": "offset", "accelerator_config": {"dispatch_batches": True}}},
        "Leave it out of `accelerator_config`",
    ),
    ({"training": {"teacher_model_name_or_path": "."}}, "None of the losses .* reads teachers"),
    ({"training": {"max_length": 1}}, "nothing of a completion is left"),
    ({"training": {"pad_token": "<|none|>"}}, "is not found in the vocabulary"),
    ({"training": {"train_sampling_strategy": "group_by_length"}}, "`training` cannot be used"),
    ({"training": {"optim": "adamw_bnb_8bit"}}, "bitsandbytes"),
    ({"training": {"model_init_kwargs": {"dtype": "float99"}}}, "`dtype='float99'` is no dtype"),
]


@pytest.mark.parametrize(
    ("change", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else str(value)[:60]
)
def test_refused(change, message, tiny_model_dir, prompts, tmp_path):
    with pytest.raises(ValueError, match=message):
        IterativeDPO(RoundsConfig(**settings(tiny_model_dir, prompts, tmp_path / "run", **change)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"judge": JUDGE, "training": {"loss_type": "sppo_soft"}},
        {"training": {"loss_type": "sppo_soft", "loss_kwargs": {"target": "score"}}},
        {"scoring": {"temperature": 2}, "min_margin": 1, "prompts_per_round": 1, "replay_share": 0},
        {"rounds": 1, "num_generations": 2, "extrapolation": -0.5},
        {"reward_funcs": {"mean": TWO}, "training": {"loss_type": "e_dpo"}},
        {"reward_funcs": TWO, "training": {"loss_type": "offset"}},
        # Of rows as few as those of the rehearsal neither is left
        {"training": {"dataloader_drop_last": True, "per_device_train_batch_size": 64, "dataset_num_proc": 4}},
        {"training": {"loss_type": "inpo", "loss_kwargs": {"eta": 0.5, "tau": 0.25}}},
        {"training": {"loss_type": "anchored"}, "pairing": "group"},
        {"pairing": "all", "training": {"precompute_ref_log_probs": True, "optim_target_modules": ["q_proj"]}},
    ],
)
def test_accepted(change, tiny_model_dir, prompts, tmp_path):
    given = settings(tiny_model_dir, prompts, tmp_path / "run", **change)
    IterativeDPO(RoundsConfig(**given))
    config = RoundsConfig(**{**given, "model": tiny_model_dir, "output_dir": tmp_path / "run"})  # paths as text
    assert (config.model, config.output_dir) == (given["model"], given["output_dir"])


def test_prompts_of_which_some_are_too_long(tiny_model_dir, tmp_path):
    """Training drops them: the rehearsal takes the shortest."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in (" film" * 60, " a review", " film" * 50)))
    given = settings(tiny_model_dir, str(path), tmp_path / "run", training={"max_length": 12})
    IterativeDPO(RoundsConfig(**given))


@pytest.mark.parametrize(
    ("reads", "pairing", "message"),
    [
        ({"behaviour_logps"}, "group", "under the policy that sampled the completions, which rounds do not keep"),
        ({"teachers"}, "group", "learns from a teacher and a reverse teacher, which rounds have not"),
        ({"ref_logps", "token_logps"}, "group", "reads log-probs of tokens, which pairs have"),
    ],
)
def test_what_a_loss_reads_is_refused(reads, pairing, message, monkeypatch, tiny_model_dir, prompts, tmp_path):
    keep_registry(monkeypatch)

    @trl_ext.register_loss("reader")
    @dataclass(frozen=True)
    class Reader(Loss):
        takes_groups = True

        def __call__(self, batch):
            raise AssertionError("nothing is to be trained")

    Reader.reads = frozenset(reads)
    change = {"training": {"loss_type": "reader"}, "pairing": pairing}
    with pytest.raises(ValueError, match=message):
        IterativeDPO(RoundsConfig(**settings(tiny_model_dir, prompts, tmp_path / "run", **change)))
    assert not (tmp_path / "run").exists()


def test_losses_by_name():
    assert resolve_loss_types(["offset", "sigmoid"]) == ["offset", "sigmoid"]
    with pytest.raises(ValueError, match="--loss_type offset anchored"):
        resolve_loss_types(["offset, anchored"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "what"}], "no column 'prompt'; its columns are"),
        ([{"prompt": [{"role": "user", "content": "what"}]}], "has no chat template"),
    ],
)
def test_prompts_that_cannot_be_used(rows, message, tiny_model_dir, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(model)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=message):
        IterativeDPO(RoundsConfig(**settings(model, str(path), tmp_path / "run")))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.csv", "prompt\n", "`prompts`: Cannot read .*a header and no rows"),
        ("rows.jsonl", "", "`prompts`: Cannot read .*the file is empty"),
        ("rows.jsonl", '{"prompt": "a"', "`prompts`: Cannot read .*line 1 is no JSON"),
        (None, None, "There is no dataset of prompts"),
    ],
)
def test_prompts_that_cannot_be_read(name, text, message, tiny_model_dir, tmp_path):
    path = tmp_path / (name or "nowhere.jsonl")
    if name:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        IterativeDPO(RoundsConfig(**settings(tiny_model_dir, str(path), tmp_path / "run")))


def test_a_dataset_without_rows(monkeypatch):
    monkeypatch.setattr("trl_ext.rounds.checks.load_preferences", lambda name: Dataset.from_dict({"prompt": []}))
    with pytest.raises(ValueError, match=r"^`replay='x'` has no rows"):
        load_rows("x", "replay")


@pytest.mark.parametrize("where", ["taken", "taken/run", "taken/a/b"])
def test_an_output_folder_that_cannot_be(where, tiny_model_dir, prompts, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match=r"`output_dir=.*` cannot be a folder: .*taken' is a file"):
        RoundsConfig(**settings(tiny_model_dir, prompts, tmp_path / where))


def test_folders_that_can_be_written(tmp_path, monkeypatch):
    refuse_unwritable_folder(tmp_path, "here")
    refuse_unwritable_folder(tmp_path / "a" / "b", "here")
    monkeypatch.chdir(tmp_path)
    refuse_unwritable_folder("a/b", "here")
    monkeypatch.setattr("trl_ext.data.paths.os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot be written"):
        refuse_unwritable_folder("a/b", "here")


def rewards(given, weights=None):
    return build_scorer(given, weights, None)


def test_rewards():
    assert rewards("implicit") == "implicit"
    assert rewards("tests.test_rounds:length") == RewardFunction(length)
    assert rewards(length) == RewardFunction(length)
    assert rewards("somebody/model") == RewardModel("somebody/model")
    built = Ensemble([RewardFunction(length), Ensemble([RewardModel("somebody/model")], "mean")], "min")
    assert rewards({"min": ["tests.test_rounds:length", {"mean": ["somebody/model"]}]}) == built
    assert rewards({"min": ["tests.test_rounds:length", {"min": ["somebody/model"]}]}) != built
    names = lambda scorer: [name for what, name in model_names(scorer) if what == "reward model"]  # noqa: E731
    assert names(built) == ["somebody/model"] and names(RewardModel("one")) == ["one"]
    assert names(RewardModel(object())) == names(RewardFunction(length)) == []
    assert names(Ensemble([length, ["one", RewardModel("two")]])) == ["one", "two"]


def test_several_rewards_are_added_up():
    several = ["tests.test_rounds:length", "somebody/model"]
    built = [RewardFunction(length), RewardModel("somebody/model")]
    assert rewards(several) == Ensemble(built, "sum")
    assert rewards(several, [1.0, 0.5]) == Ensemble(built, "sum", [1.0, 0.5])


def test_judges():
    for given in (JUDGE, longer, JudgeFunction(longer)):
        assert build_scorer(None, None, given) == JudgeFunction(longer)


def test_a_folder_may_have_a_colon_in_its_name(tmp_path, monkeypatch):
    (tmp_path / "tests.test_rounds:length").mkdir()
    monkeypatch.chdir(tmp_path)
    assert rewards("tests.test_rounds:length") == RewardModel("tests.test_rounds:length")


def test_what_cannot_be_imported():
    for name in ("tests.test_rounds", "tests.test_rounds:", ":length", "tests.nothing:length"):
        with pytest.raises(ValueError, match=f"The judge '{name}' cannot be imported"):
            build_scorer(None, None, name)


def from_text(folder, text, overrides=None):
    path = folder / "rounds.yaml"
    path.write_text(text)
    return RoundsConfig.from_yaml(path, overrides)


BASE = "model: somebody/model\nprompts: somebody/prompts\nreward_funcs: somebody/reward\noutput_dir: {folder}/out\n"


def test_numbers_of_a_file_and_of_the_command_line(tmp_path):
    base = BASE.format(folder=tmp_path)
    config = from_text(tmp_path, base + "training: {learning_rate: 1e-6, save_strategy: no}\n")
    assert config.training == {"learning_rate": 1e-6, "save_strategy": "no"}
    config = from_text(
        tmp_path,
        base + "training:\nsampling: {top_p: 0.5}\n",
        {"training.beta": 0.2, "sampling.top_p": 0.9, "num_generations": 8},
    )
    assert (config.training, config.sampling, config.num_generations, config.rounds) == (
        {"beta": 0.2},
        {"top_p": 0.9},
        8,
        3,
    )
    config = from_text(tmp_path, base, {"training.loss_kwargs.alpha": 2.0, "training.loss_type": "offset"})
    assert config.training == {"loss_kwargs": {"alpha": 2.0}, "loss_type": "offset"}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("", {"rounds.x": 3}, "--rounds.x: 'rounds' is 5 and holds no settings"),
        ("", {"round": 3}, r"rounds\.yaml: unknown settings \['round'\]\. Did you mean 'rounds' for 'round'\?"),
        ("", {"model": None}, r"\['model'\] missing.*--model VALUE"),
        ("training: [1]\n", {}, "must be a dictionary"),
    ],
)
def test_files_that_are_refused(text, overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        from_text(tmp_path, BASE.format(folder=tmp_path) + "rounds: 5\n" + text, overrides)


def test_files_without_settings(tmp_path):
    with pytest.raises(ValueError, match="holds no settings"):
        from_text(tmp_path, "- 1\n")
    with pytest.raises(ValueError, match=r"rounds\.yaml is not YAML"):
        from_text(tmp_path, "a: [1\n")


def test_command(tiny_model_dir, prompts, tmp_path, capsys, monkeypatch):
    """Overrides reach the config with their types, and mistakes end in one message."""
    seen = []
    monkeypatch.setattr(
        "trl_ext.rounds.IterativeDPO", lambda config: seen.append(config) or type("R", (), {"run": lambda self: []})()
    )
    path = tmp_path / "rounds.yaml"
    path.write_text(yaml.safe_dump(settings(tiny_model_dir, prompts, tmp_path / "run")))
    overrides = ["--rounds", "1", "--training.learning_rate", "1e-6", "--training.save_strategy=no"]
    assert main(["iterate", str(path), *overrides]) == 0
    (config,) = seen
    assert (config.rounds, config.training["learning_rate"], config.training["save_strategy"]) == (1, 1e-6, "no")
    for wrong, message in (
        (["--rounds"], "Settings are given as --name value; got ['--rounds']"),
        (["rounds", "1"], "Settings are given as --name value"),
        (["--rounds", "{a"], "--rounds is not YAML"),
        (["--training.learning_rat", "1"], "Did you mean 'learning_rate'"),
    ):
        capsys.readouterr()
        assert main(["iterate", str(path), *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
    assert main(["iterate", str(tmp_path / "none.yaml")]) == 2
    assert "There is no file" in capsys.readouterr().err
