"""Arguments of the commands, and what lies where they point."""

import json
from pathlib import Path

import pytest

from tests.conftest import preference_rows
from tests.hostile.refusal import command_refused


BASE = ["--use_cpu", "--bf16", "false", "--report_to", "none", "--output_dir", "out"]
OF_DPO: dict[str, tuple[list[str], str]] = {
    "learning rate NaN": (["--learning_rate", "nan"], "`learning_rate=nan`"),
    "learning rate negative": (["--learning_rate", "-1"], "`learning_rate=-1.0`"),
    "no rows at a time": (["--per_device_train_batch_size", "0"], "`per_device_train_batch_size=0`"),
    "no accumulation": (["--gradient_accumulation_steps", "0"], "`gradient_accumulation_steps=0`"),
    "epochs NaN": (["--num_train_epochs", "nan"], "`num_train_epochs=nan`"),
    "seed negative": (["--seed", "-1"], "`seed=-1`"),
    "warm-up NaN": (["--warmup_steps", "nan"], "`warmup_steps=nan`"),
    "gradient norm NaN": (["--max_grad_norm", "nan"], "`max_grad_norm=nan`"),
    "ld_alpha NaN": (["--ld_alpha", "nan"], "`ld_alpha=nan`"),
    "smoothing NaN": (["--label_smoothing", "nan"], "`label_smoothing=nan`"),
    "smoothing of robust": (["--loss_type", "robust", "--label_smoothing", "0.5"], "`label_smoothing=0.5`"),
    "no steps between": (["--sync_ref_model", "--ref_model_sync_steps", "0"], "`ref_model_sync_steps=0`"),
    "a hyper-parameter twice": (["--loss_type", "offset", "--loss_kwargs", '{"alpha": 1, "alpha": 2}'], "'alpha' twice"),
    "hyper-parameters too deep": (["--loss_type", "offset", "--loss_kwargs", "[" * 5000], "too deeply"),
    "hyper-parameters of a list": (["--loss_type", "offset", "--loss_kwargs", "[]"], "`loss_kwargs=[]` is a list"),
    "teachers' options": (["--teacher_model_init_kwargs", "{"], "`teacher_model_init_kwargs='{'` is not JSON"),
    "model options": (["--model_init_kwargs", "{"], "{"),
    "no output": (["--output_dir", ""], "`output_dir=''` names no folder"),
    "NUL in the output": (["--output_dir", "a\0b"], "names no folder"),
    "no checkpoint": (["--resume_from_checkpoint", "nowhere"], "There is no checkpoint 'nowhere'"),
    "no tracker": (["--report_to", "nosuch"], "'nosuch', which is no tracker"),
    "nothing": ([""], "[''] belong to no option"),
    "a dash": (["-"], "Unknown options ['-']"),
    "config without a name": (["--config="], "There is no config file ''"),
}  # fmt: skip
OF_DPO_DATA: dict[str, tuple[str, str]] = {
    "data.csv": ("prompt,chosen,chosen\na,b,c\n", "several columns called ['chosen']"),
    "data.json": ("null", "a row of line 1 is 'null'"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in preference_rows(3)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("name", OF_DPO)
def test_run_dpo(name, tiny_model_dir, folder, capfd):
    given, said = OF_DPO[name]
    start = ["run", "dpo", "--model_name_or_path", str(tiny_model_dir), "--dataset_name", "data.jsonl", *BASE]
    command_refused([*start, *given], said, folder, capfd)


@pytest.mark.parametrize("file", OF_DPO_DATA)
def test_run_dpo_on_broken_files(file, tiny_model_dir, folder, capfd):
    text, said = OF_DPO_DATA[file]
    Path(file).write_text(text)
    start = ["run", "dpo", "--model_name_or_path", str(tiny_model_dir), "--dataset_name", file, *BASE]
    command_refused(start, said, folder, capfd)


OTHERS: dict[str, tuple[list[str], str]] = {
    "a script that is none": (["run", "nowhere.py"], "There is no script 'nowhere.py'"),
    "no script": (["run", ""], "There is no script ''"),
    "an unknown loss": (["losses", "ofset"], "Did you mean 'offset'"),
    "a loss without a name": (["losses", ""], "Unknown loss ''"),
    "a tokenizer without a name": (["inspect", "data.jsonl", "--processing_class", ""], "The tokenizer is ''"),
    "no length": (["inspect", "data.jsonl", "--max_length", "0"], "`--max_length 0`"),
    "a column without a name": (["inspect", "data.jsonl", "--columns", "=a"], "`--columns =a`"),
    "no run": (["compare", "nowhere"], "There is no run 'nowhere'"),
    "NUL in a run": (["compare", "a\0b"], "There is no run 'a\\x00b'"),
    "settings without a value": (["iterate", "config.yaml", "--rounds"], "['--rounds']"),
    "settings that are no YAML": (["iterate", "config.yaml", "--model", "["], "--model is not YAML"),
    "settings of an object": (["iterate", "config.yaml", "--seed", "!!python/object/apply:os.system [ls]"], "os.system"),
    "settings in themselves": (["iterate", "config.yaml", "--training", "&a [*a]"], "--training holds more than"),
    "a setting twice": (["iterate", "config.yaml", "--training", "{beta: 1, beta: 2}"], "'beta' twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_commands(name, folder, capfd):
    given, said = OTHERS[name]
    Path("config.yaml").write_text("model: a/model\nprompts: data.jsonl\noutput_dir: out\nreward_funcs: a/reward\n")
    command_refused(given, said, folder, capfd)


STATES: dict[str, tuple[str, str]] = {
    "empty": ("", "is empty"),
    "null": ("null", "is no state of a trainer"),
    "no log": ("{}", "is no state of a trainer"),
    "log a number": ('{"log_history": 3}', "is no state of a trainer"),
    "log text": ('{"log_history": "abc"}', "is no state of a trainer"),
    "log of numbers": ('{"log_history": [3]}', "is no state of a trainer"),
    "two logs": ('{"log_history": [], "log_history": []}', "the name 'log_history' twice"),
    "step a boolean": ('{"log_history": [{"step": true, "loss": 1}]}', "'step': True"),
    "step NaN": ('{"log_history": [{"step": NaN, "loss": 1}]}', "'step': nan"),
    "step infinite": ('{"log_history": [{"step": Infinity, "loss": 1}]}', "'step': inf"),
    "step too large": ('{"log_history": [{"step": 1' + "0" * 400 + ', "loss": 1}]}', "a finite `step`"),
    "loss too large": ('{"log_history": [{"step": 1, "loss": 1' + "0" * 400 + "}]}", "a finite `step`"),
    "too deep": ("[" * 100000, "too deeply"),
    "no text": ("é", "is not UTF-8"),
}  # fmt: skip
TABLES: dict[str, tuple[str, str]] = {
    "two columns alike": ("step,loss,loss\n1,2,3\n", "several columns called ['loss']"),
    "two steps": ("step,Step,loss\n1,2,3\n", "['Step', 'step']"),
    "more cells than columns": ("step,loss\n1,2,3\n", "Line 2"),
    "a number with underscores": ("step,loss\n1_0,2\n", "'1_0'"),
    "a step infinite": ("step,loss\ninf,2\n", "'inf'"),
    "an open quote": ('step,loss\n"1,2\n', "Line 2"),
    "a cell without end": ("step,loss\n1," + "9" * 200_000 + "\n", "cannot be read as CSV"),
    "no text": ("step,loss\n1,é\n", "cannot be read as CSV"),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_compare_states(name, folder, capfd):
    text, said = STATES[name]
    Path("run").mkdir()
    Path("run", "trainer_state.json").write_bytes(text.encode("latin-1"))
    command_refused(["compare", "run", "--csv", "table.csv", "--plot", "plot.png"], said, folder, capfd)


@pytest.mark.parametrize("name", TABLES)
def test_compare_tables(name, folder, capfd):
    text, said = TABLES[name]
    Path("run.csv").write_bytes(text.encode("latin-1"))
    command_refused(["compare", "run.csv", "--csv", "table.csv", "--plot", "plot.png"], said, folder, capfd)


@pytest.mark.parametrize(
    "given", [["demo", "--no-such"], ["demo", "--seeds", "nan"], ["inspect"], ["compare"], ["run"], []]
)
def test_what_argparse_refuses(given, folder, capfd):
    from trl_ext.cli import main

    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2 and "error: " in capfd.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["data.jsonl"]
