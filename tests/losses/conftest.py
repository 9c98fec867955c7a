"""A registry that a test may add to, and packages that offer losses."""

import copy
import sys

import pytest

from trl_ext.losses import registry


PLUGIN = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Plugged:
    scale: float = 1.0

    def __call__(self, batch):
        return self.scale * batch.delta
"""
REGISTERED = "from trl_ext import register_loss\n" + PLUGIN.replace(
    "@dataclass", "@register_loss('plugged', aliases=['pl'])\n@dataclass"
)


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_classes", copy.copy(registry._classes))
    monkeypatch.setattr(registry, "_aliases", copy.copy(registry._aliases))


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Install a package that offers losses: name to entry point."""

    def install(package="plugged", code=PLUGIN, **entries):
        (tmp_path / f"{package}.py").write_text(code)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {target}" for name, target in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[trl_ext.losses]", *lines]))
        if str(tmp_path) not in sys.path:
            monkeypatch.syspath_prepend(str(tmp_path))

    yield install
    for package in ("plugged", "other", "third", "plugged_inner", "plugged_inner.losses"):
        sys.modules.pop(package, None)
