"""What `pip install` gives, and what `import trl_ext` costs."""

import ast
import importlib
import importlib.metadata
import pkgutil
import re
import statistics
import subprocess
import sys
import time
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import trl_ext
from tests import mutants


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


def test_one_range_of_python_versions():
    """Metadata, ruff, the Makefile and the prose offer the same versions, and this is one of them."""
    makefile = (ROOT / "Makefile").read_text()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = settings["project"]
    classified = [re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", each) for each in project["classifiers"]]
    minors = [int(match[1]) for match in classified if match]
    first, last = minors[0], minors[-1]
    assert minors == list(range(first, last + 1))
    assert sys.version_info.minor in minors
    assert project["requires-python"] == f">=3.{first}"
    assert settings["tool"]["ruff"]["target-version"] == f"py3{first}"
    for name in ("README.md", "CONTRIBUTING.md"):
        prose = (ROOT / name).read_text()
        assert re.findall(r"Python 3\.(\d+) to 3\.(\d+)", prose) == [(str(first), str(last))], name
    assert f"(3, {first}) <= sys.version_info[:2] <= (3, {last})" in makefile
    assert [int(minor) for minor in re.findall(r"python3\.(\d+)", makefile)] == minors[::-1]
    *others, end = [f"3.{minor}" for minor in minors]
    assert f"No Python {', '.join(others)} or {end} found" in makefile


def test_rooms_of_the_mutation_tests():
    """Each room has files, and its tests are there."""
    for files, paths in mutants.ROOMS.values():
        assert list(ROOT.glob(files))
        assert all((ROOT / path).exists() for path in paths)
    assert all((ROOT / name).exists() for name in mutants.ALSO_COPIED)


def test_pins_fit_together():
    """Each pinned package is content with the pinned versions of the others, and none of ours lacks a pin."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if not line.startswith("#"))
    assert pins["triton"] == "3.7.1", "torch 2.13.0 of PyPI asks for triton 3.7.1; its build for CPUs does not say so"
    for name in ["trl-ext", *pins]:
        extras = ("", "dev", "docs", "plots", "test", "text-rewards") if name == "trl-ext" else ("",)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform or version of Python
            continue
        for need in map(Requirement, needs):
            if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in extras):
                continue
            pin = pins.get(need.name.lower().replace("_", "-"))
            if pin is None:
                assert name != "trl-ext" or need.name == "trl-ext", f"{need} has no pin"
            else:
                assert need.specifier.contains(pin), f"{name} asks for {need}; the pin is {pin}"


@pytest.mark.parametrize("room", ["logprobs", "data", "trainers", "trainers/online"])
def test_the_house_is_shown_as_it_is(room):
    """CONTRIBUTING names each file of the rooms in the middle, and no file that is not there."""
    house = (ROOT / "CONTRIBUTING.md").read_text().split("```")[1]
    shown = set(re.findall(r"\b(\w+)\.py\b", house))
    assert {path.stem for path in (ROOT / "trl_ext" / room).glob("*.py")} - {"__init__"} <= shown
    assert shown <= {path.stem for path in (ROOT / "trl_ext").rglob("*.py")} | {"mutants"}


def own_imports(path: Path) -> set[str]:
    """What of this package a file imports, wherever in it, but for what is there for type checkers alone."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            up = package.split(".")
            base = (
                ".".join(filter(None, [*up[: len(up) - node.level + 1], node.module])) if node.level else node.module
            )
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "trl_ext"}


def test_imports_make_no_circle_and_go_down():
    modules = {}
    for path in (ROOT / "trl_ext").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        modules[name] = path
    # An import of `a.b` runs `a` too, but a file does not wait for the package that it is in
    graph = {
        name: {each for each in own_imports(path) if each in modules and each != name}
        for name, path in modules.items()
    }
    graph = {name: {each for each in used if not name.startswith(f"{each}.")} for name, used in graph.items()}
    list(TopologicalSorter(graph).static_order())  # raises a CycleError that shows the circle

    def rooms(prefix: str) -> set[str]:
        used = {each for name, several in graph.items() if name.startswith(prefix) for each in several}
        return {".".join(each.split(".")[:2]) for each in used} - {prefix}

    assert rooms("trl_ext.losses") == set()
    assert rooms("trl_ext.logprobs") == set()
    assert rooms("trl_ext.rows") == {"trl_ext.logprobs", "trl_ext.losses"}
    assert not rooms("trl_ext.data") & {"trl_ext.trainers", "trl_ext.rounds", "trl_ext.cli"}
    assert not rooms("trl_ext.trainers") & {"trl_ext.rounds", "trl_ext.cli", "trl_ext.demo"}
