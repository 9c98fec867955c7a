"""What `pip install` gives, and what `import trl_ext` costs."""

import importlib
import pkgutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import trl_ext


ROOT = Path(__file__).resolve().parents[1]
PUBLIC = [
    "DPOConfig",
    "DPOTrainer",
    "GroupBatch",
    "PreferenceBatch",
    "get_loss",
    "list_losses",
    "patch_trl",
    "register_loss",
]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_costs_no_more_than_trls():
    def seconds(module):
        began = time.perf_counter()
        python(f"import {module}")
        return time.perf_counter() - began

    pairs = [(seconds("trl"), seconds("trl_ext")) for _ in range(3)]
    assert statistics.median(ours - theirs for theirs, ours in pairs) < 0.3


def test_import_touches_no_device():
    code = "import sys, trl_ext; print([name for name in ('torch', 'triton', 'liger_kernel') if name in sys.modules])"
    assert python(code) == "[]"
    code = "import sys; from trl_ext import get_loss; get_loss('offset'); print('triton' in sys.modules, 'trl' in sys.modules)"
    assert python(code) == "False False"


def test_public_names():
    assert set(PUBLIC) < set(trl_ext.__all__)
    for name in trl_ext.__all__:
        assert getattr(trl_ext, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = trl_ext.nothing


@pytest.mark.parametrize(
    "module", [m.name for m in pkgutil.walk_packages(trl_ext.__path__, "trl_ext.") if "__main__" not in m.name]
)
def test_every_module_imports_alone(module):
    assert importlib.import_module(module)


def test_losses_import_nothing_else_of_ours():
    code = "import sys, trl_ext.losses; print(sorted(n for n in sys.modules if n.startswith('trl_ext.') and 'losses' not in n))"
    assert python(code) == "['trl_ext.version']"


def test_typed_and_versioned():
    assert (ROOT / "trl_ext" / "py.typed").is_file()
    assert f"## {trl_ext.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
