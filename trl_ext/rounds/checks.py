"""What is refused before the first round, and settings read from YAML and from the command line."""

import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

import yaml
from datasets import Dataset
from transformers import AutoConfig

from trl_ext.data.load import load_preferences


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-6` is a number and only `true` and `false` are booleans, as its version 1.2 has it."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), "-+.0123456789"
)


def read_yaml(text: str, where: str) -> Any:
    """What a YAML text holds; one that cannot be read is a `ValueError` that says `where` it stands."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {error}") from error


def refuse_unknown(given: Collection[str], known: Collection[str], where: str) -> None:
    """Raise a `ValueError` for the names in `given` that are not `known`, with the nearest of those that are."""
    unknown = sorted(set(given) - set(known))
    if not unknown:
        return
    near = {name: difflib.get_close_matches(str(name), list(known), n=1) for name in unknown}
    hints = [f" Did you mean {found[0]!r} for {name!r}?" for name, found in near.items() if found]
    # The list of all names helps where it can be read; a training config has more than a hundred
    listed = f" Known: {sorted(known)}." if len(known) <= 40 else ""
    raise ValueError(f"{where}: unknown settings {unknown}.{''.join(hints)}{listed}")


def refuse_wrong_types(given: Mapping[str, Any], hints: Mapping[str, Any], where: str) -> None:
    """
    Raise a `ValueError` for a number or a boolean that is none.

    Args:
        given (`Mapping[str, Any]`):
            Settings by name.
        hints (`Mapping[str, Any]`):
            The type of each. Those that allow text are not looked at: they have meanings of their own.
        where (`str`):
            What is put before a name in the error.
    """
    for name, value in given.items():
        allowed = _classes(hints.get(name, Any))
        if not allowed & {int, float, bool} or str in allowed or (value is None and type(None) in allowed):
            continue
        # In Python, True is a whole number; in settings it is not
        kind = float if isinstance(value, int) and not isinstance(value, bool) and int not in allowed else type(value)
        if kind not in allowed:
            words = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
            expected = " or ".join(word for kind, word in words.items() if kind in allowed)
            raise ValueError(f"`{where}{name}={value!r}` is a {type(value).__name__}; expected {expected}.")


def _classes(hint: Any) -> set[Any]:
    """The classes that a type hint allows, without what they hold."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*(_classes(each) for each in typing.get_args(hint)))
    return {typing.get_origin(hint) or hint}


def keyword_arguments(function: Callable) -> dict[str, Any]:
    """Type hints of the keyword-only arguments of a function: what settings can be handed on to it."""
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return {each.name: hints.get(each.name, Any) for each in parameters if each.kind is each.KEYWORD_ONLY}


def refuse_unloadable_model(name: str, what: str) -> None:
    """Raise a `ValueError` for a model that is neither a folder with a model nor on the hub; reads its config alone."""
    try:
        AutoConfig.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"The {what} {name!r} cannot be loaded: {error}") from error


def load_rows(name: str, setting: str) -> Dataset:
    """A dataset with at least one row; another one, or one that cannot be read, is a `ValueError`."""
    try:
        data = load_preferences(name)
    except ValueError as error:
        raise ValueError(f"`{setting}`: {error}") from error
    if not len(data):
        raise ValueError(f"`{setting}={name!r}` has no rows.")
    return data
