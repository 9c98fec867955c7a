"""The index of papers: every paper is there, and what it says to run is what the code takes."""

import ast
import importlib
import inspect
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import trl
import yaml

from trl_ext import list_losses
from trl_ext.losses import TRL_LOSS_TYPES, loss_class, resolve_name


ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "papers.md").read_text()
# Named by the papers that this package began with, beside those of the losses
OTHERS = """
2403.00409 2309.16240 2402.08005 2505.23761 2406.18629 2407.00782 2309.11235 2404.03715 2403.08635 2410.06293 2503.00295 2403.02475
2403.07230 2502.19312 2406.09760 2502.05605 2504.02725 2504.18580 2410.02197 2406.06424 2505.11080
""".split()
LINES = [
    line.split("   #")[0]
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
RUN = next(line for line in LINES if line.startswith("run="))[len('run="') : -1]
COMMANDS = [line for line in LINES if not line.startswith("run=")]
COMMANDS += re.findall(r"`(trl-ext [^`]*)`", TEXT.replace("`trl-ext losses NAME`", ""))
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


class Parsed(Exception):
    """An example has read its flags."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder in which everything lies that the commands name."""
    for name in (
        "path/to/reward-model",
        "path/to/dpo-model",
        "path/to/sft-model",
        "path/to/preference-model",
        "path/to/gpm",
    ):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name in ("pairs", "problems", "answers"):
        (tmp_path / f"{name}.jsonl").write_text("")
    (tmp_path / "my_judge.py").write_text("def prefer(prompts, completions_a, completions_b):\n    return [0.5]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["test"])
    return tmp_path


def test_every_paper_is_there():
    there = set(re.findall(r"\[(\d{4}\.\d{5})\]\(https://huggingface.co/papers/\1\)", TEXT))
    ours = {paper for name in list_losses() for paper in loss_class(name).paper.split(", ")}
    assert there >= ours | set(OTHERS)


def test_every_loss_is_run():
    words = {word for command in COMMANDS for word in command.split()}
    used = set()
    for name in words:
        try:
            used.add(resolve_name(name))
        except ValueError:
            continue
    for path in [ROOT / word for word in words if word.startswith("examples/")]:
        if path.suffix == ".yaml":
            used.add(yaml.safe_load(path.read_text())["training"]["loss_type"])
        else:
            used |= {name for name in list_losses() if f'loss_type=["{name}"]' in path.read_text()}
    assert used >= set(list_losses())


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(command, here, monkeypatch, trl_as_it_was):
    program, *arguments = shlex.split(command.replace("$run", RUN))
    if program == "python":
        script, *flags = arguments
        parse = trl.TrlParser.parse_args_and_config

        def parsed(self, *args, **kwargs):
            parse(self, *args, **kwargs)
            raise Parsed

        monkeypatch.setattr(trl.TrlParser, "parse_args_and_config", parsed)
        monkeypatch.setattr(sys, "argv", [script, *flags, "--use_cpu", "--bf16", "false"])
        with pytest.raises(Parsed):
            runpy.run_path(script, run_name="__main__")
        return
    assert program == "trl-ext"
    from trl_ext import run_dpo
    from trl_ext.cli import _parser
    from trl_ext.rounds import RoundsConfig
    from trl_ext.rounds.checks import read_yaml
    from trl_ext.trainers.patch import patch_trl

    args = _parser().parse_args(arguments)
    if arguments[0] == "run":
        assert args.script == "dpo"
        patch_trl()
        parser = run_dpo.dpo.make_parser(prog="trl-ext run dpo")
        parser.error = run_dpo._refuse
        _, training, _, _ = parser.parse_args_and_config([*args.script_args, "--use_cpu", "--bf16", "false"])
        given = [args.script_args[at + 1] for at, word in enumerate(args.script_args) if word == "--loss_type"]
        assert [name for name in training.loss_type if given] == given
        return
    assert arguments[0] == "iterate"
    names, values = args.overrides[::2], args.overrides[1::2]
    settings = {name[2:]: read_yaml(value, name) for name, value in zip(names, values, strict=True)}
    assert resolve_name(RoundsConfig.from_yaml(args.config, settings).training["loss_type"], also=TRL_LOSS_TYPES)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_lines_fit_the_code(block):
    """Each import is there, and each call of what was imported has arguments that it takes."""
    tree = ast.parse(block)
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    assert any(value.__module__.startswith("trl_ext") for value in names.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            keywords = {keyword.arg: None for keyword in node.keywords}
            inspect.signature(names[node.func.id]).bind_partial(*node.args, **keywords)
