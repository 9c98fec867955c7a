"""
What can be known of options and losses from source files alone, nothing of which is imported: `import torch` takes seconds,
and a misspelt option should not.

Only the first look is here. What passes is looked at again by the classes themselves; what a source file does not say plainly
is left to them.
"""

import ast
import builtins
import dataclasses
import difflib
import importlib.util
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from trl_ext.reading import read_json
from trl_ext.upstream import untested


# The files that make up `trl_ext.DPOConfig`, a class after those that it derives from
DPO_CONFIG = (
    ("transformers", "training_args.py"),
    ("trl", "trainer/base_config.py"),
    ("trl", "trainer/dpo_config.py"),
    ("trl_ext", "trainers/arguments.py"),
    ("trl_ext", "trainers/dpo_config.py"),
)


def config_fields(files: Sequence[tuple[str, str]]) -> dict[str, dataclasses.Field]:
    """
    Fields of the dataclasses in some files, as their source has them.

    Args:
        files (`Sequence[tuple[str, str]]`):
            Package and path in it. A later file replaces what an earlier one says of a field.

    Returns:
        `dict[str, dataclasses.Field]`: By name, with its type, with its default where that is a literal (`None` elsewhere) and
            with its metadata but the help. Empty where a file cannot be read, or is one of a library in a version that the tests have
            not seen: another one may keep options elsewhere.
    """
    if {package for package, _ in files} & {*untested()}:
        return {}
    fields: dict[str, dataclasses.Field] = {}
    for package, path in files:
        tree = _parsed(package, path)
        if tree is None:
            return {}
        for cls in _dataclasses(tree):
            for statement in cls.body:
                if isinstance(statement, ast.AnnAssign) and _is_option(statement):
                    field = _field(statement)
                    fields[field.name] = field
    return fields


def stand_in(files: Sequence[tuple[str, str]]) -> type | None:
    """A dataclass with the fields that [`config_fields`] finds, for a parser of options; `None` where a file cannot be read."""
    fields = config_fields(files)
    return (
        dataclasses.make_dataclass("Options", [(name, each.type, each) for name, each in fields.items()])
        if fields
        else None
    )


def keyword_arguments(path: str, function: str) -> dict[str, Any] | None:
    """Types of the keyword-only arguments of a function of this package, by name; `None` where they cannot be read."""
    tree = _parsed("trl_ext", path)
    found = [each for each in ast.walk(tree or ast.Module([], [])) if getattr(each, "name", None) == function]
    if not found:
        return None
    return {each.arg: _type(each.annotation) for each in found[0].args.kwonlyargs}


@cache
def loss_classes() -> dict[str, tuple[str, tuple[str, ...]]]:
    """This package's losses by name and by alias, as the files in `losses/` have them: the name, and the hyper-parameters."""
    found = {}
    for path in sorted((Path(__file__).parent / "losses").glob("*.py")):
        for cls in (each for each in _parsed("trl_ext", f"losses/{path.name}").body if isinstance(each, ast.ClassDef)):
            for call in cls.decorator_list:
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "register_loss":
                    name, *aliases = [each.value for given in (*call.args, *call.keywords) for each in _strings(given)]
                    fields = [each for each in cls.body if isinstance(each, ast.AnnAssign) and _is_option(each)]
                    found |= dict.fromkeys((name, *aliases), (name, tuple(each.target.id for each in fields)))
    return found


@cache
def trl_loss_types() -> tuple[str, ...]:
    """TRL's loss types, as `losses/registry.py` lists them."""
    for each in _parsed("trl_ext", "losses/registry.py").body:
        if isinstance(each, ast.Assign) and getattr(each.targets[0], "id", "") == "TRL_LOSS_TYPES":
            return ast.literal_eval(each.value)
    raise AssertionError("losses/registry.py lists no TRL_LOSS_TYPES")


def refuse_unknown_losses(names: Iterable[Any], *, trl: bool) -> None:
    """
    Raise a `ValueError` for a name that is no loss, as the registry would; nothing where that is loaded already.

    Args:
        names (`Iterable[Any]`):
            What was given. Only text without commas is looked at.
        trl (`bool`):
            Whether TRL's own loss types are allowed.
    """
    if "trl_ext.losses.registry" in sys.modules:  # then it answers at once, and knows what was registered meanwhile
        return
    theirs = trl_loss_types()
    known = sorted({*loss_classes(), *(theirs if trl else ())})
    for name in names:
        if not isinstance(name, str) or "," in name or name in known:
            continue
        if entry_points(group="trl_ext.losses"):  # a plug-in may bring the name, which only loading it says
            return
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        if name in theirs:
            hint = " It is TRL's own loss type: pass it as `loss_type` to the trainer."
        raise ValueError(f"Unknown loss {name!r}.{hint} Known: {known}.")


def read_hyperparameters(given: Any) -> Any:
    """`loss_kwargs` as Python has them: text is read as JSON, and a `ValueError` where it is none; all else stays as it is."""
    if not isinstance(given, str):
        return given
    try:
        # Parsed here and not by transformers, which turns strings such as "0.5" into numbers
        return read_json(given)
    except ValueError as error:
        raise ValueError(
            f"`loss_kwargs={given!r:.300}` is not JSON ({error}). Quote it for the shell: --loss_kwargs '{{\"alpha\": 0.5}}'."
        ) from error


def refuse_unknown_hyperparameters(names: Iterable[Any], given: Any) -> None:
    """
    Raise a `ValueError` for a hyper-parameter that the loss does not have, as the registry would.

    Args:
        names (`Iterable[Any]`):
            Loss types of a run. Looked at is a run with one loss of this package.
        given (`Any`):
            Its `loss_kwargs`: a mapping, or one as JSON. What has mappings in it is left to the config.
    """
    ours = [loss_classes()[name] for name in names if isinstance(name, str) and name in loss_classes()]
    given = read_hyperparameters(given)
    if len(ours) != 1 or not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        return
    ((loss, allowed),) = ours
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(str(name), allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"The loss {loss!r} has no hyper-parameter {name!r}.{hint} It has: {list(allowed)}.")


def _parsed(package: str, path: str) -> ast.Module | None:
    """The syntax tree of a file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    try:
        return ast.parse((Path(spec.origin).parent / path).read_text(encoding="utf-8"))
    except (AttributeError, TypeError, OSError, SyntaxError):  # not there, not as source, or laid out in another way
        return None


def _dataclasses(tree: ast.Module) -> Iterator[ast.ClassDef]:
    for each in tree.body:
        if isinstance(each, ast.ClassDef) and any("dataclass" in ast.unparse(mark) for mark in each.decorator_list):
            yield each


def _is_option(statement: ast.AnnAssign) -> bool:
    """Whether a statement of a dataclass is a field that a parser makes an option of."""
    given = _call(statement.value)
    init = given.get("init")
    return "ClassVar" not in ast.unparse(statement.annotation) and not (init and ast.unparse(init) == "False")


def _field(statement: ast.AnnAssign) -> dataclasses.Field:
    given = _call(statement.value)
    default = given.get("default") if given else statement.value
    metadata = given.get("metadata")
    pairs = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
    known = {_literal(key): _literal(value) for key, value in pairs if _literal(key) != "help"}
    field = dataclasses.field(
        default=_literal(default), metadata={name: value for name, value in known.items() if value is not None}
    )
    field.name, field.type = statement.target.id, _type(statement.annotation)
    return field


def _call(value: ast.expr | None) -> dict[str | None, ast.expr]:
    """The arguments of a call of `field`."""
    is_call = isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "dataclasses.field")
    return {each.arg: each.value for each in value.keywords} if is_call else {}


def _literal(value: ast.expr | None) -> Any:
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None


def _type(annotation: ast.expr | None) -> Any:
    """
    The type that an annotation writes. Names are those of builtins and of `typing`; any other stands for what is given as text, as
    enums are. `Any` for what is written in another way.
    """
    match annotation:
        case ast.Constant(value=None):
            return None
        case ast.Constant(value=str() as text):
            return _type(ast.parse(text, mode="eval").body)
        case ast.Name(id=name):
            return getattr(builtins, name, getattr(typing, name, str))
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            return _type(left) | _type(right)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=values):
            return typing.Literal[ast.literal_eval(values)]
        case ast.Subscript(value=outer, slice=ast.Tuple(elts=inner)):
            return _type(outer)[tuple(map(_type, inner))]
        case ast.Subscript(value=outer, slice=inner):
            return _type(outer)[_type(inner)]
        case _:
            return Any


def _strings(tree: ast.AST) -> Iterator[ast.Constant]:
    return (each for each in ast.walk(tree) if isinstance(each, ast.Constant) and isinstance(each.value, str))
