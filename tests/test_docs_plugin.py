"""The example of a loss as a package: installed as pip does it, found through its entry point, and shown on its page as it is."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import test_papers
from tests.test_docs import lines_of


ROOT = Path(__file__).resolve().parents[1]
PLUGIN, PAGE = ROOT / "examples" / "plugin", ROOT / "docs" / "your-own-loss.md"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds the package alone; it is built in a copy, since setuptools leaves files where it builds."""
    copy, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("installed")
    names = ["pyproject.toml", "capped_loss/__init__.py"]
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((PLUGIN / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", str(target), str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def run(installed, *arguments: str, cwd=ROOT) -> str:
    path = os.pathsep.join([str(installed), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


FIND = """
import json, sys
from trl_ext import get_loss, list_losses
assert "capped" in list_losses() and "capped_loss" not in sys.modules
print(json.dumps([type(get_loss("capped")).__module__, get_loss("capped", cap=1.5).cap]))
"""
PARSE = """
import sys
from trl_ext.trainers.patch import patch_trl
patch_trl()
from trl_ext import run_dpo
parser = run_dpo.dpo.make_parser(prog="trl-ext run dpo")
training = parser.parse_args_and_config([*sys.argv[1:], "--use_cpu", "--bf16", "false"])[1]
print(training.loss_type, training.loss_kwargs)
"""


def test_found_through_its_entry_point(installed):
    assert run(installed, "-c", FIND).strip() == '["capped_loss", 1.5]'


def test_its_own_tests_pass(installed):
    assert "2 passed" in run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(PLUGIN / "tests"))


def test_commands_of_the_page(installed, tmp_path):
    commands = [line for line in lines_of(PAGE) if " capped" in line]
    assert len(commands) == 2
    for command in commands:
        program, *words = shlex.split(command.replace("$run", test_papers.RUN))
        assert program == "trl-ext"
        if words[0] == "losses":
            assert "cap" in run(installed, "-m", "trl_ext", *words)
        else:
            assert words[:2] == ["run", "dpo"]
            assert run(installed, "-c", PARSE, *words[2:], cwd=tmp_path).strip() == "['capped'] {'cap': 1.5}"


def test_the_page_shows_the_files():
    """Each block is a part of the file that stands over it, in one piece or, of a test, from its beginning."""
    blocks = re.findall(r"<!-- (\S+) -->\n```\w+\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    for name, block in blocks:
        text = (ROOT / name).read_text()
        assert all(part.strip() in text for part in re.split(r"\n\n\n", block)), name
