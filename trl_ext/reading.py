"""
Text of files and of the command line as values: UTF-8, YAML, JSON. What could be read in two ways, or not to an end, is a `ValueError`.
"""

import json
import math
import numbers
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml


# Settings have a few hundred values; aliases that stand in aliases make millions of a few lines
MOST_VALUES = 20_000


def is_finite_number(value: Any) -> bool:
    """Whether a value is a number other than NaN and infinity, which a float can hold; a boolean is none."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False


def read_text(path: str | Path) -> str:
    """The text of a file; a `ValueError` that says where it is no UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: the byte at position {error.start} is not UTF-8.") from error


def read_yaml(text: str, where: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """
    What a YAML text holds, without tags that make objects.

    Args:
        text (`str`):
            The text.
        where (`str`):
            Where it stands, for errors.
        loader (`type[yaml.SafeLoader]`, *optional*):
            What is a number and what a boolean.

    Raises:
        `ValueError`: For what is not YAML, has a name twice in one mapping, nests too deeply, or stands within itself.
    """
    if not issubclass(loader, yaml.SafeLoader):
        raise TypeError(f"{loader!r} is no safe loader.")
    try:
        tree = yaml.compose(text, loader)
        if tree is not None:
            _refuse_repeated_names(tree, where)
        value = yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {error}") from error
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:  # such as the date 2020-13-40
        raise ValueError(f"{where} cannot be read as YAML: {error}") from error
    except RecursionError:
        raise ValueError(f"{where} nests lists or mappings too deeply to be read.") from None
    _refuse_endless(value, where)
    return value


def read_json(text: str) -> Any:
    """What a JSON text holds; a `ValueError` for what is none, has a name twice in one object, or nests too deeply."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it nests lists or objects too deeply to be read") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = _repeated(name for name, _ in pairs)
    if twice is not None:
        raise ValueError(f"an object has the name {twice!r} twice")
    return dict(pairs)


def _repeated(names: Iterable[str]) -> str | None:
    seen = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _refuse_repeated_names(tree: yaml.Node, where: str) -> None:
    """The last of two values of one name would be taken in silence."""
    todo, seen = [tree], set()
    while todo:
        node = todo.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif isinstance(node, yaml.MappingNode):
            names = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = _repeated(names)
            if twice is not None:
                line = 1 + max(key.start_mark.line for key, _ in node.value if (key.tag, key.value) == twice)
                raise ValueError(f"it has the name {twice[1]!r} twice, the second time in line {line}")
            todo += [part for pair in node.value for part in pair]


def _refuse_endless(value: Any, where: str) -> None:
    """Aliases can put a list into itself, and make of a few lines more values than there is memory for once they are written out."""
    todo, count = [value], 0
    while todo:
        each = todo.pop()
        count += 1
        if count > MOST_VALUES:
            raise ValueError(
                f"{where} holds more than {MOST_VALUES} values, or a list or mapping that stands within itself (an alias `*name` "
                "inside of its own anchor `&name`)."
            )
        if isinstance(each, dict):
            todo += [*each, *each.values()]
        elif isinstance(each, (list, tuple, set)):
            todo += each
