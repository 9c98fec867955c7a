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


# In one process, since each would import torch: nothing is loaded before it is named; the commands; the package's own tests
USE = """
import sys
from trl_ext import get_loss, list_losses
assert "capped" in list_losses() and "capped_loss" not in sys.modules
assert get_loss("capped", cap=1.5).cap == 1.5
from trl_ext.cli import main
assert main(["losses", "capped"]) == 0
from trl_ext.trainers.patch import patch_trl
patch_trl()
from trl_ext import run_dpo
parser = run_dpo.dpo.make_parser(prog="trl-ext run dpo")
training = parser.parse_args_and_config([*sys.argv[2:], "--use_cpu", "--bf16", "false"])[1]
print(training.loss_type, training.loss_kwargs)
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[1]]))
"""


@pytest.mark.slow
def test_it_is_found_and_used_as_the_page_says(installed, tmp_path):
    commands = [shlex.split(line.replace("$run", test_papers.RUN)) for line in lines_of(PAGE) if " capped" in line]
    assert [words[:3] for words in commands] == [["trl-ext", "losses", "capped"], ["trl-ext", "run", "dpo"]]
    path = os.pathsep.join([str(installed), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", USE, str(PLUGIN / "tests"), *commands[1][3:]],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("capped ") and "Reward gap that is enough" in done.stdout
    assert "['capped'] {'cap': 1.5}" in done.stdout and "2 passed" in done.stdout


def test_the_page_shows_the_files():
    """Each block is a part of the file that stands over it, in one piece or, of a test, from its beginning."""
    blocks = re.findall(r"<!-- (\S+) -->\n```\w+\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    for name, block in blocks:
        text = (ROOT / name).read_text()
        assert all(part.strip() in text for part in re.split(r"\n\n\n", block)), name
