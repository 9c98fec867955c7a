"""
What has changed between two versions of a library, in the places whose private names this package uses.

    make upstream OLD=1.15.0 NEW=1.16.0
    make upstream OLD=5.22.0 NEW=5.23.0 PACKAGE=transformers

Reads source files alone: the versions are downloaded as wheels and unpacked, and nothing of them is imported. Names are those of
`trl_ext/trainers/trl_seam/names.py`. Ends with 1 where a name has gone, with 0 elsewhere.
"""

import argparse
import ast
import dataclasses
import difflib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from trl_ext.trainers.trl_seam import names


# What a class has, by `module:class`, and what a module has, by its name alone
METHODS = {
    "trl:DPOTrainer": names.DPO_METHODS,
    "trl.experimental.online_dpo:OnlineDPOTrainer": names.ONLINE_METHODS,
    "trl:RewardTrainer": names.REWARD_METHODS,
    "trl:SFTTrainer": names.SFT_METHODS,
    "trl.trainer.utils": names.FORWARD_NAMES,
    "trl.trainer.dpo_trainer": names.LOADER_NAMES,
    **names.LIBRARY_NAMES,
}
ATTRIBUTES = {
    "trl:DPOTrainer": names.DPO_ATTRIBUTES,
    "trl.experimental.online_dpo:OnlineDPOTrainer": (*names.ONLINE_ATTRIBUTES, *names.VLLM_ATTRIBUTES),
    "trl:RewardTrainer": names.REWARD_ATTRIBUTES,
    "trl:SFTTrainer": names.SFT_ATTRIBUTES,
}


@dataclasses.dataclass(frozen=True)
class Change:
    """
    Attributes:
        name (`str`): Where it stands and what it is called, as `trl:DPOTrainer.compute_loss`.
        kind (`str`): `"gone"`, `"new"` or `"changed"`.
        diff (`str`): From the old source to the new one.
    """

    name: str
    kind: str
    diff: str = ""


class Sources:
    """
    The classes, functions and values of one version of a package.

    Args:
        folder (`Path`):
            The package's folder, such as `site-packages/trl`.
    """

    def __init__(self, folder: Path):
        self.texts: dict[str, str] = {}
        for path in folder.rglob("*.py"):
            parts = (folder.name, *path.relative_to(folder).with_suffix("").parts)
            self.texts[".".join(parts)] = path.read_text(encoding="utf-8")
        # Where classes are, those nearest to the package itself last: the same name may stand in several modules
        self.where: dict[str, str] = {}
        for module in sorted(self.texts, key=lambda name: (name.count("."), name), reverse=True):
            self.where |= dict.fromkeys(re.findall(r"^class (\w+)", self.texts[module], flags=re.MULTILINE), module)
        self.parsed: dict[str, list[ast.stmt]] = {}

    def source(self, place: str, name: str) -> str | None:
        """The source of what a class, or one that it derives from in this package, or a module calls so."""
        module, _, owner = place.partition(":")
        if owner in self.where:
            found = [(each, where) for node, where in self._line(owner) for each in node.body if name in _names(each)][
                :1
            ]
        else:  # a module, or an object of one
            module = module if module in self.texts else f"{module}.__init__"
            found = [(each, module) for each in self._module(module) if name in _names(each)]
        for each, _ in found:
            if isinstance(each, ast.ImportFrom):
                alias = next(alias for alias in each.names if name in (alias.name, alias.asname))
                return self.source(each.module, alias.name) or ast.unparse(each)
        return "\n".join(ast.get_source_segment(self.texts[where], each) for each, where in found) or None

    def uses(self, place: str, name: str) -> bool:
        """Whether a class, or one that it derives from in this package, sets or reads `self.NAME`, or has it as its own."""
        return any(
            (isinstance(each, ast.Attribute) and each.attr == name) or name in _names(each)
            for node, _ in self._line(place.partition(":")[2])
            for each in ast.walk(node)
        )

    def _module(self, name: str) -> list[ast.stmt]:
        """The statements of a module, parsed where they are asked for; none where there is no such module."""
        if name not in self.parsed:
            package = tuple(name.split(".")[:-1])
            self.parsed[name] = [_absolute(each, package) for each in _statements(ast.parse(self.texts.get(name, "")))]
        return self.parsed[name]

    def _line(self, owner: str) -> Iterable[tuple[ast.ClassDef, str]]:
        """A class and its module, then those of this package that it derives from."""
        where = self.where.get(owner, "")
        for node in self._module(where):
            if isinstance(node, ast.ClassDef) and node.name == owner:
                yield node, where
                for base in node.bases:
                    yield from self._line(ast.unparse(base).rpartition(".")[2])


def _statements(tree: ast.Module) -> Iterable[ast.stmt]:
    """Those of a module, with those that stand under a condition."""
    for node in tree.body:
        yield from (
            (each for each in ast.walk(node) if isinstance(each, ast.stmt))
            if isinstance(node, (ast.If, ast.Try))
            else [node]
        )


def _absolute(node: ast.stmt, package: tuple[str, ...]) -> ast.stmt:
    """An import from a module of the same package with the whole name of that module; anything else as it is."""
    if isinstance(node, ast.ImportFrom) and node.level:
        node.module = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
        node.level = 0
    return node


def _names(node: ast.AST) -> list[str]:
    """What a statement defines."""
    if isinstance(node, ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = (
        node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    )
    return [each.id for each in targets if isinstance(each, ast.Name)]


def changes(
    old: Sources, new: Sources, package: str, methods: Mapping = METHODS, attributes: Mapping = ATTRIBUTES
) -> list[Change]:
    """What has changed of the names that a package has; what neither version has is another library's."""
    found = []
    for place, wanted in methods.items():
        if place.partition(":")[0].split(".")[0] != package:
            continue
        for name in wanted:
            before, after = old.source(place, name), new.source(place, name)
            if before == after:
                continue
            kind = "gone" if after is None else "new" if before is None else "changed"
            lines = difflib.unified_diff(
                (before or "").splitlines(), (after or "").splitlines(), "old", "new", lineterm="", n=2
            )
            found.append(Change(f"{place}.{name}", kind, "\n".join(lines)))
    for place, wanted in attributes.items():
        if place.partition(":")[0].split(".")[0] == package:
            for name in wanted:
                before, after = old.uses(place, name), new.uses(place, name)
                if before != after:
                    found.append(Change(f"{place}.{name}", "new" if after else "gone"))
    return found


def download(package: str, version: str, folder: Path) -> Path:
    """The folder of a package in one version, from its wheel."""
    target = folder / version
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(target),
    ]
    done = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{package} {version} cannot be downloaded:\n{done.stderr}")
    with zipfile.ZipFile(next(target.glob("*.whl"))) as wheel:
        wheel.extractall(target)
    return target / package


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a version, or the folder of an unpacked package")
    parser.add_argument("new", help="the same; the installed version's is site-packages/PACKAGE")
    parser.add_argument("--package", default="trl", choices=("trl", "transformers", "datasets"))
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        versions = [
            Path(given) if Path(given).is_dir() else download(args.package, given, Path(folder))
            for given in (args.old, args.new)
        ]
        found = changes(*(Sources(path) for path in versions), args.package)
    for change in found:
        print(f"{change.kind:<8} {change.name}")
        print(*(f"    {line}" for line in change.diff.splitlines()), sep="\n", end="\n" if change.diff else "")
    counts = {kind: sum(change.kind == kind for change in found) for kind in ("gone", "new", "changed")}
    print(", ".join(f"{number} {kind}" for kind, number in counts.items()))
    return int(counts["gone"] > 0)


if __name__ == "__main__":
    sys.exit(main())
