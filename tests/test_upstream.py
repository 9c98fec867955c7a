"""What is said when TRL or transformers is not the one that the tests run with."""

import logging
import subprocess
import sys
import tomllib
import types
from importlib import metadata
from pathlib import Path

import pytest
import trl
from packaging.requirements import Requirement

from trl_ext import upstream
from trl_ext.trainers.trl_seam.check import require_names


ROOT = Path(__file__).resolve().parents[1]


def python(code: str) -> tuple[str, str]:
    """What a process of its own prints and says."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def installed(monkeypatch, **versions):
    """Pretend that these versions are installed; a library with `None` has no metadata."""
    before = metadata.version

    def version(name):
        if name in versions and versions[name] is None:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or before(name)

    monkeypatch.setattr(metadata, "version", version)


def test_tested_versions_are_those_that_are_pinned():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ranges = {need.name: need.specifier for need in map(Requirement, needs)}
    assert {"trl", "transformers"} <= upstream.TESTED.keys()
    for name, series in upstream.TESTED.items():
        assert pins[name].split(".")[:2] == series.split("."), name
        assert ranges[name].contains(pins[name]), name


@pytest.mark.parametrize(
    "versions",
    [{}, {"trl": "1.16.4", "transformers": "5.23.1"}, {"trl": "1.16.1.dev0"}, {"transformers": "5.23"}],
)
def test_tested_versions_are_loaded_in_silence(versions, monkeypatch, caplog):
    installed(monkeypatch, **versions)
    upstream.warn_of_untested_versions()
    assert not caplog.messages


@pytest.mark.parametrize(
    ("versions", "found", "command"),
    [
        ({"trl": "1.17.0"}, "; installed: trl 1.17.0. It", 'pip install "trl==1.16.*"'),
        ({"trl": "1.160.0"}, "; installed: trl 1.160.0. It", 'pip install "trl==1.16.*"'),
        ({"transformers": "5.2.3"}, "; installed: transformers 5.2.3. It", 'pip install "transformers==5.23.*"'),
        (
            {"trl": "2.0.0", "transformers": "6.1.0.dev0"},
            "; installed: trl 2.0.0 and transformers 6.1.0.dev0. It",
            'pip install "trl==1.16.*" "transformers==5.23.*"',
        ),
        ({"trl": None}, "; installed: trl of an unknown version. It", 'pip install "trl==1.16.*"'),
    ],
)
def test_other_versions_are_said(versions, found, command, monkeypatch, caplog):
    installed(monkeypatch, **versions)
    upstream.warn_of_untested_versions()
    [(_, level, said)] = caplog.record_tuples
    assert level == logging.WARNING
    assert "tested with trl 1.16 and transformers 5.23" in said and "It may well work" in said
    assert found in said and said.endswith(command)


def test_the_warning_comes_once_and_with_the_first_trainer():
    code = """
import sys
from importlib import metadata
before = metadata.version
metadata.version = lambda name: "1.17.0" if name == "trl" else before(name)
import trl_ext
trl_ext.list_losses(), trl_ext.get_loss("offset")
from trl_ext.cli import main
main(["losses", "offset"])
print("THEN", file=sys.stderr)
from trl_ext import DPOConfig, DPOTrainer, OnlineDPOTrainer
from trl_ext.trainers.reward import RewardTrainer
trl_ext.patch_trl()
"""
    _, said = python(code)
    first, then = said.split("THEN")
    assert "tested with" not in first
    assert then.count("; installed: trl 1.17.0. It") == then.count("tested with") == 1


GONE = r"trl_ext needs `trl\.DPOTrainer\._prepare_dataset`, which trl \S+ does not have. It is tested with trl 1\.16: "


def test_a_method_that_is_gone_is_said_by_name_wherever_a_trainer_is_loaded():
    code = rf"""
import os, re, sys
import trl
from trl.trainer import utils
from trl.trainer.dpo_trainer import DPOTrainer as theirs
from trl_ext.cli import main
import trl_ext

def said(action):
    try:
        action()
    except ImportError as error:
        return str(error)

def direct():
    from trl_ext.trainers.dpo import DPOTrainer

paths = [lambda: trl_ext.DPOTrainer, lambda: trl_ext.DPOConfig, lambda: trl_ext.OnlineDPOTrainer, direct,
         lambda: trl_ext.patch_trl()]
method, use_adapter = theirs._prepare_dataset, utils.use_adapter
del theirs._prepare_dataset, utils.use_adapter  # what is listed is looked up before the trainer's file asks for the other
for path in paths:
    assert re.match(r'''{GONE}pip install "trl==1\.16\.\*"$''', said(path) or "nothing"), said(path)
utils.use_adapter = use_adapter
dpo = ["run", "dpo", "--model_name_or_path", "owner/model", "--dataset_name", "owner/data"]
for command in (dpo, ["run", os.__file__], ["iterate", "examples/rounds/ilr_dpo.yaml"], ["demo"]):
    print("COMMAND", file=sys.stderr)
    assert main(command) == 2
theirs._prepare_dataset = method

# Now the public one, which only the trainer's own file asks for
del utils.use_adapter
expected = r"trl_ext needs `trl\.trainer\.utils\.use_adapter`, which trl \S+ does not have\. .*"
assert re.fullmatch(expected, said(lambda: trl_ext.DPOTrainer)), said(lambda: trl_ext.DPOTrainer)
assert re.fullmatch(expected, said(lambda: trl_ext.patch_trl()))
print("COMMAND", file=sys.stderr)
assert main(dpo) == 2
utils.use_adapter = use_adapter
assert trl.DPOTrainer is theirs and theirs in trl_ext.DPOTrainer.__mro__
"""
    _, said = python(code)
    _, *commands = said.split("COMMAND")
    assert len(commands) == 5 and "Traceback" not in said
    for each in commands[:4]:
        assert "trl-ext: error: trl_ext needs `trl.DPOTrainer._prepare_dataset`" in each
    assert "trl-ext: error: trl_ext needs `trl.trainer.utils.use_adapter`" in commands[4]


def test_without_trls_online_trainer_the_other_works():
    code = r"""
import re, sys
import trl
import trl.experimental.online_dpo as online
import trl_ext

def said():
    try:
        trl_ext.OnlineDPOTrainer
    except ImportError as error:
        return str(error)

theirs, method = online.OnlineDPOTrainer, online.OnlineDPOTrainer._generate
del theirs._generate
assert re.match(r"trl_ext needs `trl\.experimental\.online_dpo\.OnlineDPOTrainer\._generate`, which trl ", said()), said()
trl_ext.patch_trl()
assert trl.DPOTrainer is trl_ext.DPOTrainer and online.OnlineDPOTrainer is theirs
theirs._generate = method

class Gone:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "trl.experimental.online_dpo":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

del sys.modules["trl.experimental.online_dpo"]
sys.meta_path.insert(0, Gone)
assert re.match(r"trl_ext needs `trl\.experimental\.online_dpo`, which trl \S+ does not have\. ", said()), said()
del sys.meta_path[0]
sys.modules["trl.experimental.online_dpo"] = online
assert theirs in trl_ext.OnlineDPOTrainer.__mro__
"""
    _, said = python(code)
    assert said.count("OnlineDPOTrainer and OnlineDPOConfig stay TRL's own. trl_ext needs `trl.experimental.") == 1
    assert "tested with" not in said.replace("It is tested with trl 1.16: ", "", 1)


def error_of(code: str) -> BaseException:
    with pytest.raises((ImportError, AttributeError)) as raised:
        exec(code, {})
    return raised.value


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("from trl.trainer.utils import never", "trl.trainer.utils.never"),
        ("from transformers import never", "transformers.never"),
        ("from datasets.never import x", "datasets.never"),
        ("import trl.never.x", "trl.never"),
        ("import trl; trl.never", "trl.never"),
        ("import trl; trl.DPOTrainer._never", "trl.trainer.dpo_trainer.DPOTrainer._never"),
        # Not a name of these libraries
        ("from os import never", None),
        ("import never_there", None),
        ("import os; os.never", None),
        ("(1).never", None),
        ("raise ImportError('vLLM is missing')", None),
        ("raise AttributeError('mine')", None),
        ("raise ModuleNotFoundError('No module named \"trl\"', name='trl')", None),
        ("raise ImportError('needs a GPU', name='trl.never')", None),
    ],
)
def test_which_errors_are_about_a_name_that_is_gone(code, name, monkeypatch):
    installed(monkeypatch, trl="1.18.2", transformers="5.30.0", datasets="6.0.0")
    found = upstream.explained(error_of(code))
    if name is None:
        assert found is None
        return
    library = name.split(".")[0]
    version, series = {"trl": ("1.18.2", "1.16"), "transformers": ("5.30.0", "5.23"), "datasets": ("6.0.0", "5.2")}[
        library
    ]
    assert str(found) == (
        f"trl_ext needs `{name}`, which {library} {version} does not have. It is tested with {library} {series}: "
        f'pip install "{library}=={series}.*"'
    )
    assert upstream.explained(found) is None  # is not explained twice
    assert upstream.explained(ValueError("x")) is None


def test_names_are_looked_up_where_they_are_said_to_be(monkeypatch):
    require_names({"trl:DPOTrainer": ("train",), "trl.trainer.utils": ("pad",)})
    for path, name in (("trl:DPOTrainer", "trl.DPOTrainer.never"), ("trl.trainer.utils", "trl.trainer.utils.never")):
        with pytest.raises(ImportError, match=f"needs `{name}`"):
            require_names({path: ("never",)})
    for path, name in (("trl:Never", "trl.Never"), ("trl.never", "trl.never"), ("trl.never:X", "trl.never")):
        with pytest.raises(ImportError, match=f"needs `{name}`"):
            require_names({path: ()})
    # What is wrong inside of TRL keeps its own error
    module = types.ModuleType("trl")
    module.__getattr__ = lambda name: (_ for _ in ()).throw(RuntimeError("broken"))
    monkeypatch.setitem(sys.modules, "trl", module)
    with pytest.raises(RuntimeError, match="broken"):
        require_names({"trl:DPOTrainer": ()})
    assert trl is not module
