"""The script that says what has changed between two versions of a library, on two versions of a small one."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.upstream import ATTRIBUTES, METHODS, Sources, changes, main


OLD = {
    "__init__.py": "from .trainer import Trainer\n",
    "base.py": "class Base:\n    def inherited(self):\n        return 1\n    def goes(self):\n        return 2\n",
    "trainer.py": """
from .base import Base
import elsewhere

LIMIT = 3

class Trainer(Base, elsewhere.Theirs):
    def __init__(self):
        self.kept = self.dropped = 0
    def same(self):
        return 5
    def changed(self):
        return self.kept
""",
    "kernels/fast.py": "def multiply(a, b):\n    return a * b\n",
    "utils.py": "from .kernels.fast import multiply as _multiply\n",
}
NEW = {
    **OLD,
    "base.py": "class Base:\n    def inherited(self):\n        return 10\n",
    "trainer.py": OLD["trainer.py"]
    .replace("self.kept = self.dropped = 0", "self.kept = self.added = 0")
    .replace("return self.kept", "return self.kept + 1"),
    "kernels/fast.py": "def multiply(a, b):\n    return b * a\n",
}
NAMES = {
    "lib:Trainer": ("same", "changed", "inherited", "goes", "theirs"),
    "lib.utils": ("_multiply",),
    "other": ("x",),
}
HAS = {"lib:Trainer": ("kept", "dropped", "added")}


def unpacked(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "lib"


def test_what_has_changed(tmp_path):
    old, new = (Sources(unpacked(tmp_path / name, files)) for name, files in (("old", OLD), ("new", NEW)))
    found = {change.name: change for change in changes(old, new, "lib", NAMES, HAS)}
    assert {name: change.kind for name, change in found.items()} == {
        "lib:Trainer.changed": "changed",
        "lib:Trainer.inherited": "changed",
        "lib:Trainer.goes": "gone",
        "lib.utils._multiply": "changed",
        "lib:Trainer.dropped": "gone",
        "lib:Trainer.added": "new",
    }
    assert found["lib:Trainer.changed"].diff.splitlines()[-2:] == [
        "-        return self.kept",
        "+        return self.kept + 1",
    ]
    assert "-    return a * b" in found["lib.utils._multiply"].diff.splitlines()
    assert changes(old, old, "lib", NAMES, HAS) == []


def test_what_is_installed_is_found(capsys):
    """What this package uses of TRL and transformers stands in their sources, but for what accelerate's state says of a run."""
    folders = {name: Path(find_spec(name).origin).parent for name in ("trl", "transformers")}
    sources = {name: Sources(folder) for name, folder in folders.items()}
    for place, names in METHODS.items():
        package = place.split(":")[0].split(".")[0]
        if package in sources and "masking_utils" not in place:
            for name in names:
                assert sources[package].source(place, name) or sources["transformers"].source(
                    "transformers:Trainer", name
                ), (
                    place,
                    name,
                )
    for place, names in ATTRIBUTES.items():
        for name in names:
            assert sources["trl"].uses(place, name) or sources["transformers"].uses("transformers:Trainer", name), (
                place,
                name,
            )
    assert main([str(folders["trl"]), str(folders["trl"])]) == 0
    assert capsys.readouterr().out == "0 gone, 0 new, 0 changed\n"


def test_a_version_that_is_not_there(monkeypatch):
    done = type("Done", (), {"returncode": 1, "stderr": "No matching distribution"})
    asked = []
    monkeypatch.setattr("tests.upstream.subprocess.run", lambda command, **_: asked.append(command) or done)
    with pytest.raises(SystemExit, match=r"trl 9\.9\.9 cannot be downloaded:\nNo matching distribution"):
        main(["9.9.9", "1.16.0"])
    assert asked[0][:4] == [sys.executable, "-m", "pip", "download"] and asked[0][-1] == "trl==9.9.9"
