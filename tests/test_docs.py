"""
The pages of docs/ and the READMEs: messages that they quote are in the code, commands are understood, snippets fit, links lead
somewhere.
"""

import argparse
import ast
import dataclasses
import functools
import importlib.util
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.commands.merge import merge_command_parser

import trl_ext
from tests import test_papers
from tests.test_papers import here  # noqa: F401  (a fixture)
from trl_ext.cli import _parser
from trl_ext.trainers.reward import RewardConfig


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Those of papers.md are held by tests/test_papers.py
PAGES = sorted(set(DOCS.glob("*.md")) - {DOCS / "papers.md"})
# Those of examples/training by tests/test_training_recipes.py
READMES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *(ROOT / "examples").glob("README.md"),
           *sorted((ROOT / "examples" / "rounds").glob("*.md"))]  # fmt: skip
ACCELERATE = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))


# Messages


def said_in(path: Path) -> list[str]:
    """The texts of a file, with `{}` in place of each value."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return [text.replace("`", "'") for text in found]


@functools.cache
def all_said(package: str) -> list[str]:
    folder = Path(importlib.util.find_spec(package).origin).parent
    paths = folder.rglob("*.py") if package == "trl_ext" else [*folder.glob("trainer/*.py"), *folder.glob("*_base.py")]
    return [text for path in paths for text in said_in(path)]


def quoted() -> list[tuple[str, str]]:
    """Messages of the page, and whose they are."""
    lines = (DOCS / "troubleshooting.md").read_text().splitlines()
    return [
        (match[1], match[2].strip() or "trl_ext")
        for line in lines
        if (match := re.match(r"\| `([^`]+)` ?(\w*) \|", line))
    ]


@pytest.mark.parametrize(("message", "owner"), quoted(), ids=[message[:40] for message, _ in quoted()])
def test_message_is_one_of_the_code(message, owner):
    """`...` stands for values, and for what else a message says between."""
    pattern = re.compile(".*".join(re.escape(part) for part in re.split(r" ?\.\.\. ?", message)), re.DOTALL)
    assert any(pattern.search(text) for text in all_said(owner.lower()))


def test_every_line_of_the_tables_is_read():
    lines = [line for line in (DOCS / "troubleshooting.md").read_text().splitlines() if line.startswith("| `")]
    assert len(lines) == len(quoted()) >= 25


# Commands


def lines_of(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [
        re.split(r" +# ", line)[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()
    ]
    return [line for line in lines if line and not line.startswith(("#", "run="))]


# A loss that has to be installed first: tests/test_docs_plugin.py
COMMANDS = list(dict.fromkeys(line for page in [*PAGES, *READMES] for line in lines_of(page) if " capped" not in line))


class Parsed(Exception):
    """Raised where a script has read its arguments, and would begin."""


def read_arguments(script: str, words: list[str], monkeypatch) -> None:
    """Run a script until it has parsed what it was given."""
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(command, here, monkeypatch, trl_as_it_was):  # noqa: F811
    words = [word for word in shlex.split(command.replace("$run", test_papers.RUN)) if word != "PYTHONPATH=/tmp/site"]
    if words[:2] == ["accelerate", "launch"]:
        args = launch_command_parser().parse_args(words[2:])
        if args.config_file:
            assert load_config_from_file(str(ROOT / args.config_file))
        inner = args.training_script_args
        words = [args.training_script.replace("trl_ext", "trl-ext"), *inner] if args.module else [
            "python", args.training_script, *inner
        ]  # fmt: skip
        command = shlex.join(words)
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert targets and all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets)
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        read_arguments(words[1], words[2:], monkeypatch)
    elif words[:2] == ["accelerate", "merge-weights"]:
        assert merge_command_parser().parse_args(words[2:]).output_path == "merged"
    elif words[0] == "python" and words[1].endswith("/zero_to_fp32.py"):  # DeepSpeed writes it beside a checkpoint
        tool = importlib.util.find_spec("deepspeed")
        if tool is None:
            pytest.skip("deepspeed is not installed")
        read_arguments(str(Path(tool.origin).parent / "utils" / "zero_to_fp32.py"), words[2:], monkeypatch)
    elif words[0] in ("tensorboard", ".venv/bin/pre-commit") or words[:4] == ["python", "-m", "pip", "install"]:
        assert words[0] == "tensorboard" or (Path(sys.executable).parent / Path(words[0]).name).exists()
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for name in words[2:]:
            wanted = re.fullmatch(r"trl-ext(?:\[([\w,-]+)\])?", name)
            path = (ROOT / name.removeprefix("-e")).is_dir()
            assert name == "-e" or path or (wanted and set((wanted[1] or "").split(",")) - {""} <= set(extras))
    elif words[:3] == ["trl-ext", "run", "train.py"]:
        (here / "train.py").write_text("")
        assert _parser().parse_args(words[1:]).script == "train.py"
    elif words[0] == "trl-ext" and words[1] not in ("run", "iterate"):
        assert _parser().parse_args(words[1:]).function
    else:
        test_papers.test_command_is_understood(command, here, monkeypatch, trl_as_it_was)


INLINE = sorted({each for page in PAGES for each in re.findall(r"`(trl-ext \w+ [^`]*)`", page.read_text())})


@pytest.mark.parametrize("command", INLINE)
def test_command_in_a_sentence_is_understood(command):
    assert _parser().parse_args(shlex.split(command)[1:]).function


# Names


# Of other programs, of data and of models
OTHERS = {
    "metrics": {"eval_accuracy"},
    "several-gpus": {"CUDA_VISIBLE_DEVICES", "HF_HOME", "SHARDED_STATE_DICT"},
    "which-loss-which-data": {"im_start"},
}


@functools.cache
def known_names() -> set[str]:
    """Words of the code and names of its files, options of the configs (which are TRL's and transformers' too), logged keys."""
    examples = [path for path in (ROOT / "examples").rglob("*") if path.suffix in (".py", ".yaml", ".toml")]
    paths = [*(ROOT / "trl_ext").rglob("*.py"), *examples]
    keys = re.findall(r"^\| (`[^|]*) \|", (DOCS / "metrics.md").read_text(), flags=re.MULTILINE)
    words = {word for text in [*(path.read_text() for path in paths), *keys] for word in re.findall(r"\w+", text)}
    configs = (trl_ext.DPOConfig, trl_ext.OnlineDPOConfig, trl_ext.SFTConfig, RewardConfig)
    return (
        words | {path.stem for path in paths} | {field.name for each in configs for field in dataclasses.fields(each)}
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_are_of_the_code(page):
    """Each word with an underscore that stands as code in a sentence: options, columns, losses, functions."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    spans = " ".join(re.findall(r"`([^`]+)`", text))
    words = set(re.findall(r"\b[A-Za-z]\w*_\w*[A-Za-z]\b", spans))
    assert words - known_names() == OTHERS.get(page.stem, set())


# Snippets


BLOCKS = [
    (page, block)
    for page in [*PAGES, *READMES]
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
]
BLOCKS = [(page, block) for page, block in BLOCKS if not block.startswith("{")]  # rows of data


@pytest.mark.parametrize(
    ("page", "block"),
    BLOCKS,
    ids=[f"{page.parent.name}-{page.stem}-{number}" for number, (page, _) in enumerate(BLOCKS)],
)
def test_snippet_fits_the_code(page, block):
    """Imports and calls, with what the blocks above it on the page have imported."""
    above = page.read_text().split(block)[0]
    imports = re.findall(r"^from .*? import .*$", "".join(re.findall(r"```python\n(.*?)```", above, re.DOTALL)), re.M)
    test_papers.test_lines_fit_the_code("\n".join([*imports, block]))


# Configurations of accelerate


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_it(path):
    config = load_config_from_file(str(path))
    given = yaml.safe_load(path.read_text())
    assert {name: getattr(config, name) for name in ("num_machines", "num_processes")}.items() <= given.items()
    assert config.num_processes % config.num_machines == 0
    parts = {"fsdp_config": "FSDP", "deepspeed_config": "DEEPSPEED"}
    assert [kind for part, kind in parts.items() if getattr(config, part)] == (
        [config.distributed_type] if config.distributed_type in parts.values() else []
    )


def test_every_configuration_is_on_the_page():
    page = (DOCS / "several-gpus.md").read_text()
    assert {path.stem for path in ACCELERATE} == {"ddp", "fsdp2", "zero2", "zero3", "multi-node"}
    assert all(f"(../examples/accelerate/{path.name})" in page for path in ACCELERATE)


# Links


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub and MkDocs write them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), flags=re.MULTILINE
    )
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize(
    "page", [*sorted(DOCS.glob("*.md")), *READMES], ids=lambda page: str(page.relative_to(ROOT).with_suffix(""))
)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#?)([^)]*)\)", text):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_every_page_is_in_the_menu():
    menu = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=Plain)["nav"]
    shown = [path for entry in menu for path in entry.values()]
    assert len(shown) == len(set(shown)) and {path.name for path in DOCS.glob("*.md")} <= set(shown)


class Plain(yaml.SafeLoader):
    """Reads `!ENV` and `!!python/name:...` as text."""


Plain.add_multi_constructor("", lambda loader, tag, node: str(node.value))
