"""TRL's own command: what it is given, and what it says about mistakes before the long work."""

import json
import shutil

import pytest
import torch
import trl
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import integration_utils

from tests.conftest import preference_rows
from trl_ext import run_dpo
from trl_ext.cli import main
from trl_ext.trainers import arguments
from trl_ext.trainers.arguments import explained


CPU = ["--use_cpu", "--bf16", "false", "--report_to", "none", "--max_steps", "1", "--per_device_train_batch_size", "2"]


# The command patches TRL in this process
pytestmark = pytest.mark.usefixtures("trl_as_it_was")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with data in several forms, and things that are none."""
    rows = preference_rows(6)
    conversations = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in rows
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, conversations)))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "chosen"')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def command(model, *extra, data="pairs.jsonl"):
    return [
        "run",
        "dpo",
        "--model_name_or_path",
        str(model),
        "--dataset_name",
        data,
        "--output_dir",
        "out",
        *CPU,
        *extra,
    ]


@pytest.fixture
def trained(monkeypatch):
    """What TRL's script would have been called with."""
    calls = []
    monkeypatch.setattr(run_dpo.dpo, "main", lambda *args: calls.append(args))
    return calls


@pytest.mark.parametrize("form", ["pairs.jsonl", "pairs.JSON", "pairs.csv", "pairs.parquet", "saved", "splits"])
def test_local_data(form, here, tiny_model_dir, capsys):
    data = Dataset.from_list(preference_rows(6)).select_columns(
        ["prompt", "chosen", "rejected", "score_chosen", "score_rejected"]
    )
    if form == "pairs.JSON":
        shutil.copy(here / "pairs.jsonl", here / form)
    elif form.startswith("pairs") and form != "pairs.jsonl":
        getattr(data, f"to_{form.split('.')[1]}")(here / form)
    elif form == "saved":
        data.save_to_disk(here / form)
    elif form == "splits":
        DatasetDict(other=data.select(range(2)), mine=data).save_to_disk(here / form)
    split = ["--dataset_train_split", "mine"] if form == "splits" else []
    extra = [
        "--loss_type",
        "offset",
        "--logging_steps",
        "1",
        "--save_strategy",
        "no",
        "--num_train_epochs",
        "1",
        "--max_steps",
        "-1",
    ]
    assert main(command(tiny_model_dir, *extra, *split, data=form)) == 0
    state = capsys.readouterr().out
    assert "offset/mean" in state and "'epoch': '1'" in state
    assert state.count("'loss'") == 3  # six rows, two at a time


def test_a_part_of_a_file_for_evaluation(here, tiny_model_dir, capsys):
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "1", "--test_split_size", "0.5", "--save_strategy", "no"]
    assert main(command(tiny_model_dir, *evaluation)) == 0
    assert "eval_loss" in capsys.readouterr().out


def test_what_is_left_to_trl(here, trained, tiny_model_dir):
    (here / "config.yaml").write_text(
        "learning_rate: 1e-3\nenv: {TRL_EXT_TEST_OF_ENV: 5}\ndatasets: [{path: some/data}]\n"
    )
    assert main(command(tiny_model_dir, "--config=config.yaml", "--beta=0.5")) == 0
    ((script, training, model, data),) = trained
    assert (training.learning_rate, training.beta, training.output_dir) == (1e-3, 0.5, "out")
    assert (script.dataset_name, data.datasets[0].path) == ("pairs.jsonl", "some/data")
    assert model.model_name_or_path == str(tiny_model_dir)
    import os

    assert os.environ.pop("TRL_EXT_TEST_OF_ENV") == "5"
    trained.clear()
    assert main(command(tiny_model_dir, "--dataset_train_split", "mine", data="owner/data")) == 0
    ((script, _, _, data),) = trained
    assert (script.dataset_name, script.dataset_train_split, data.datasets) == ("owner/data", "mine", [])
    trained.clear()
    assert main(command(tiny_model_dir, "--dataset_streaming")) == 0
    ((script, _, _, data),) = trained
    assert script.dataset_name is None and data.streaming
    assert (data.datasets[0].path, data.datasets[0].data_files) == ("json", "pairs.jsonl")


MISTAKES = {
    "nothing": (["run", "dpo"], "--model_name_or_path and --dataset_name missing"),
    "no-data": (["run", "dpo", "--model_name_or_path", "owner/model"], "error: --dataset_name missing"),
    "no-model": (["run", "dpo", "--dataset_name", "owner/data"], "error: --model_name_or_path missing"),
    "no-config": (["run", "dpo", "--config", "none.yaml"], "There is no config file 'none.yaml'"),
    "config-alone": (["run", "dpo", "--config"], "--config needs the path"),
    "config-is-text": (["run", "dpo", "--config", "notes.txt"], "holds 'x'; expected settings"),
    "config-is-broken": (["run", "dpo", "--config", "broken.yaml"], "is not YAML: "),
    "config-misspelled": (
        ["run", "dpo", "--config", "typo.yaml"],
        "typo.yaml: unknown settings ['learning_rat']. Did you mean 'learning_rate'?",
    ),
    "no-such-model": ("./nowhere", [], "There is no model './nowhere'"),
    "model-is-a-folder": ("folder", [], "The folder 'folder' holds no model"),
    "model-is-a-file": ("notes.txt", [], "The model 'notes.txt' is a file"),
    "no-such-file": (None, ["--dataset_name", "nowhere.jsonl"], "There is no dataset 'nowhere.jsonl'"),
    "kind-of-file": (None, ["--dataset_name", "notes.txt"], "Cannot read 'notes.txt': expected a file that ends in"),
    "broken-file": (None, ["--dataset_name", "broken.jsonl"], "'broken.jsonl' cannot be read: JSON parse error"),
    "empty-file": (None, ["--dataset_name", "empty.jsonl"], "'empty.jsonl' is empty"),
    "no-such-file-in-a-mixture": (None, ["--config", "mixture.yaml"], "There is no dataset './nowhere.csv'"),
    "configuration-of-a-file": (
        None,
        ["--dataset_config", "main"],
        "has no configurations: leave --dataset_config out",
    ),
    "split-of-a-file": (None, ["--dataset_train_split", "mine"], "is a file and has no split 'mine'"),
    "split-of-a-folder": (
        None,
        ["--dataset_name", "splits", "--dataset_train_split", "his"],
        "'splits' has no split 'his'",
    ),
    "split-of-data": (None, ["--dataset_name", "loose", "--dataset_train_split", "his"], "'loose' has no split 'his'"),
    "no-evaluation-split": (None, ["--eval_strategy", "steps"], "Split some off with --test_split_size 0.1"),
    "output-is-a-file": (None, ["--output_dir", "notes.txt"], "cannot be a folder: 'notes.txt' is a file"),
    "output-under-a-file": (None, ["--output_dir", "notes.txt/a/b"], "notes.txt' is a file"),
    "liger-on-a-cpu": (None, ["--use_liger_kernel"], "`use_liger_kernel` needs a GPU"),
    "length": (None, ["--max_length", "1"], "--max_length 1 leaves no room"),
    "misspelled": (None, ["--lose_type", "offset"], "Unknown options ['--lose_type']. Did you mean '--loss_type'?"),
    "misspelled-with-=": (None, ["--lose_type=offset"], "Did you mean '--loss_type'?"),
    "no-option": (None, ["offset"], "['offset'] belong to no option"),
    "no-number": (
        None,
        ["--learning_rate", "fast"],
        "argument --learning_rate/--learning-rate: invalid float value: 'fast'",
    ),
    "loss": (None, ["--loss_type", "ofset"], "Did you mean 'offset'?"),
    "losses-with-a-comma": (None, ["--loss_type", "offset,anchored"], "--loss_type offset anchored"),
    "loss-kwargs": (None, ["--loss_type", "offset", "--loss_kwargs", "{alpha: 1}"], "is not JSON"),
    "weights": (None, ["--loss_type", "offset", "sft", "--loss_weights", "nan", "1"], "must be finite"),
    "beta": (None, ["--loss_type", "anchored", "--beta", "0"], "no meaning for"),
    "report-to": (None, ["--report_to", "nobody"], "`report_to` names 'nobody', which is no tracker"),
    "resume": (None, ["--resume_from_checkpoint", "nowhere"], "There is no checkpoint 'nowhere' to resume from"),
    "bf16": (None, ["--bf16", "true", "--use_cpu", "false"], "(command line: --use_cpu --bf16 false)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_message(name, here, tiny_model_dir, capsys):
    (here / "typo.yaml").write_text("learning_rat: 1e-6\n")
    (here / "broken.yaml").write_text("a: [1")
    (here / "mixture.yaml").write_text("datasets: [{path: owner/data}, {path: ./nowhere.csv}]")
    DatasetDict(mine=Dataset.from_list(preference_rows(2))).save_to_disk(here / "splits")
    (here / "loose").mkdir()
    shutil.copy(here / "pairs.jsonl", here / "loose")
    *given, message = MISTAKES[name]
    arguments = given[0] if len(given) == 1 else command(given[0] or tiny_model_dir, *given[1])
    assert main(arguments) == 2
    error = capsys.readouterr().err.split("trl-ext: error: ")
    assert len(error) == 2 and message.removeprefix("error: ") in error[1] and "Traceback" not in error[1]


def test_conversations_without_a_template(here, tiny_model_dir, capsys):
    shutil.copytree(tiny_model_dir, here / "model")
    (here / "model" / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(here / "model").chat_template is None
    assert main(command(here / "model", data="chat.jsonl")) == 2
    assert "has no chat template to render them with" in capsys.readouterr().err


def test_errors_of_training_keep_their_traceback(here, tiny_model_dir, monkeypatch):
    def training_step(*args):
        raise ValueError("in the middle")

    monkeypatch.setattr(run_dpo.dpo, "main", training_step)
    with pytest.raises(ValueError, match="in the middle"):
        main(command(tiny_model_dir))
    monkeypatch.setattr(run_dpo.dpo, "main", lambda *args: {}["a bug"])
    with pytest.raises(KeyError):
        main(command(tiny_model_dir))


def test_liger_where_it_can_run(monkeypatch, here, trained, tiny_model_dir, capsys):
    monkeypatch.setattr(arguments.torch.cuda, "is_available", lambda: True)
    cpu = command(tiny_model_dir, "--use_liger_kernel")
    assert main(cpu) == 2 and not trained
    gpu = [each for each in cpu if each != "--use_cpu"]
    run_dpo._check(run_dpo._given(run_dpo.dpo.make_parser(prog="x"), gpu[2:]))
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install liger-kernel"):
        run_dpo._check(run_dpo._given(run_dpo.dpo.make_parser(prog="x"), gpu[2:]))


@pytest.mark.parametrize("names", ["trackio", "[wandb, trackio]"])
def test_trackers_that_are_not_installed(names, here, trained, tiny_model_dir, monkeypatch, capsys):
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: False)
    given = command(tiny_model_dir)
    at = given.index("--report_to")
    (here / "config.yaml").write_text(f"report_to: {names}\n")
    assert main([*given[:at], *given[at + 2 :], "--config", "config.yaml"]) == 2 and not trained
    assert "`report_to` names 'trackio', which is not installed: pip install trackio." in capsys.readouterr().err
    assert main(command(tiny_model_dir, "--report_to", "wandb")) == 0 and trained


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as done:
        main(["run", "dpo", "--help"])
    assert done.value.code == 0 and "--loss_kwargs" in capsys.readouterr().out


def test_other_messages_are_kept():
    assert explained(ValueError("something else")) == "something else"


def test_trl_is_left_as_it_was():
    """What the fixture of this file is for: after all of the above, these are TRL's own classes."""
    assert (
        trl.DPOTrainer.__module__ == "trl.trainer.dpo_trainer" and trl.DPOConfig.__module__ == "trl.trainer.dpo_config"
    )
    assert trl.experimental.online_dpo.OnlineDPOTrainer.__module__.startswith("trl.experimental")


def test_scores_as_lists(tiny_model_dir, here, capsys):
    rows = [{**row, "score_chosen": [1.0, 0.5], "score_rejected": [0.0, -0.5]} for row in preference_rows(6)]
    (here / "lists.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kwargs = ["--loss_kwargs", '{"combine": "min"}', "--logging_steps", "1"]
    assert main(command(tiny_model_dir, "--loss_type", "e_dpo", *kwargs, data="lists.jsonl")) == 0
    assert "'reward_gap/wanted': '1'" in capsys.readouterr().out
    assert main(command(tiny_model_dir, "--loss_type", "offset", data="lists.jsonl")) == 2
    said = capsys.readouterr().err
    assert "'score_chosen' of the train dataset holds a list, not a number, and ['offset'] take one score" in said
    assert "Traceback" not in said
    assert main(["inspect", "lists.jsonl"]) == 0
    assert "2, one of each reward model" in capsys.readouterr().out


def test_a_loss_with_teachers(tiny_model_dir, here, capsys):
    reverse = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        reverse.lm_head.weight.mul_(0.5)
    reverse.save_pretrained(here / "reverse")
    given = command(tiny_model_dir, *CPU, "--loss_type", "aligndistil", "--loss_kwargs", '{"beta2": 5.0}')
    assert main([*given, "--teacher_model_name_or_path", str(tiny_model_dir)]) == 2
    error = capsys.readouterr().err
    assert (
        "missing: ['reverse_model']" in error and "`reverse_model_name_or_path`" in error and "Traceback" not in error
    )
    models = ["--teacher_model_name_or_path", str(tiny_model_dir), "--reverse_model_name_or_path", "reverse"]
    assert main([*given, *models, "--teacher_model_init_kwargs", '{"dtype": "bfloat16"}']) == 0
    card = (here / "out" / "README.md").read_text()
    assert "2503.02832" in card and '"beta2": 5.0' in card
