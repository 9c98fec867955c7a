"""
What a function computes, as a key for results that are kept.

The key covers the function's own code, defaults and closure, the object it belongs to, the values it reads from its module,
and the source of each of the user's modules that it can reach, so an edit anywhere there gives another key. Libraries count by
their version. Where a source cannot be had there is no key: nobody could say later whether the function is still the same.
"""

import functools
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from datasets.fingerprint import Hasher
from torch import nn
from trl.trainer.utils import hash_module

from trl_ext.data.cache import content_key


_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()
_PLAIN = (str, bytes, int, float, complex, type(None))

Seen = dict[int, tuple[int, Any]]  # what was met, by its id: when, and the object itself, which keeps the id its own


class NoSource(Exception):
    """The source of a function, or the state of an object, cannot be had."""


def function_key(function: Callable, version: str | None, kind: str) -> str | None:
    """
    A key of what a function computes.

    Args:
        function (`Callable`):
            A function, method, `functools.partial`, class or object that can be called.
        version (`str`, *optional*):
            The user's own name for what the function computes, in place of its source.
        kind (`str`):
            Written before the key.

    Returns:
        `str` or `None`: the key; `None` where the source cannot be had and no version is given.
    """
    if version is not None:
        inner = function.func if isinstance(function, functools.partial) else function
        return f"{kind}-{content_key(getattr(inner, '__qualname__', type(inner).__qualname__), version)}"
    try:
        return f"{kind}-{content_key(_described(function, {}))}"
    except (NoSource, RecursionError):
        return None


def _described(value: Any, seen: Seen) -> Any:
    """What a value is, in a form that `content_key` takes."""
    if isinstance(value, _PLAIN):
        return [type(value).__name__, repr(value)]
    if id(value) in seen:
        return ["met", seen[id(value)][0]]
    seen[id(value)] = (len(seen), value)
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, [_described(each, seen) for each in value]]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(_described(each, {})) for each in value)
    if isinstance(value, dict):
        return [[_described(name, seen), _described(each, seen)] for name, each in value.items()]
    if isinstance(value, functools.partial):
        return ["partial", _described([value.func, value.args, value.keywords], seen)]
    if isinstance(value, MethodType):
        return ["method", _described([value.__func__, value.__self__], seen)]
    if isinstance(value, FunctionType):
        return _function(value, seen)
    if isinstance(value, ModuleType):
        return _module(vars(value), seen)
    if isinstance(value, type):
        return [value.__module__, value.__qualname__, _module(_namespace(value), seen)]
    return _object(value, seen)


def _function(function: FunctionType, seen: Seen) -> Any:
    code, namespace = function.__code__, function.__globals__
    state = [function.__defaults__, function.__kwdefaults__, [_content(cell) for cell in function.__closure__ or ()]]
    if not _installed(namespace):
        state += [namespace[name] for name in sorted(_names(code)) if name in namespace]
    return [function.__qualname__, _code(code), _described(state, seen), _module(namespace, seen)]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None


def _object(value: Any, seen: Seen) -> Any:
    kind = type(value)
    described = _described(kind, seen)
    if isinstance(value, nn.Module):
        return [described, hash_module(value), repr(value)]
    if hasattr(value, "__wrapped__"):  # as what `functools.lru_cache` makes
        return [described, _described(value.__wrapped__, seen)]
    if not _installed(_namespace(kind)) and hasattr(value, "__dict__"):
        return [described, _described(vars(value), seen)]
    try:
        return [described, Hasher.hash(value)]
    except Exception as error:  # whatever pickling an unknown object may raise
        raise NoSource(f"{value!r} cannot be pickled") from error


def _namespace(kind: type) -> dict[str, Any]:
    module = sys.modules.get(kind.__module__)
    return {"__name__": kind.__module__} if module is None else vars(module)


def _installed(namespace: dict[str, Any]) -> bool:
    """Whether a module belongs to Python, to an installed package or to this one."""
    package, file = str(namespace.get("__name__")).split(".")[0], namespace.get("__file__")
    if package in sys.builtin_module_names or package == "trl_ext":
        return True
    path = Path(file or "").resolve()
    return bool({"site-packages", "dist-packages"} & {*path.parts}) or path.is_relative_to(_STANDARD_LIBRARY)


def _module(namespace: dict[str, Any], seen: Seen) -> Any:
    """Source and code of a module, and of the user's modules that it has taken names from."""
    if id(namespace) in seen:
        return ["met", seen[id(namespace)][0]]
    seen[id(namespace)] = (len(seen), namespace)
    name, file = str(namespace.get("__name__")), namespace.get("__file__")
    if _installed(namespace):
        return [name, str(getattr(sys.modules.get(name.split(".")[0]), "__version__", ""))]
    if file is None and "__path__" in namespace:  # a folder without code of its own
        return name
    if file is None or not Path(file).is_file():
        raise NoSource(f"{name} has no file")
    # The file may have been edited since it was imported: the code that runs counts too
    codes = [_code(function.__code__) for function in _functions(namespace, name)]
    return [
        name,
        Path(file).read_text(errors="replace"),
        codes,
        [_module(other, seen) for other in _others(namespace)],
    ]


def _functions(namespace: dict[str, Any], name: str) -> Iterator[FunctionType]:
    """Functions and methods that a module defines."""
    for value in namespace.values():
        if isinstance(value, (FunctionType, type)) and value.__module__ == name:
            members = vars(value).values() if isinstance(value, type) else [value]
            yield from (each for each in members if isinstance(each, FunctionType))


def _others(namespace: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The user's other modules that a module names, or took functions and classes from."""
    for value in list(namespace.values()):
        module = sys.modules.get(value.__module__) if isinstance(value, (FunctionType, type)) else value
        if isinstance(module, ModuleType) and vars(module) is not namespace and not _installed(vars(module)):
            yield vars(module)


def _names(code: CodeType) -> set[str]:
    """Global names and attributes that a code object reads, nested functions included."""
    nested = (_names(each) for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*nested)


def _code(code: CodeType) -> Any:
    """A code object without its place in a file."""
    constants = [_code(each) if isinstance(each, CodeType) else _constant(each) for each in code.co_consts]
    return [code.co_name, code.co_code.hex(), constants, code.co_names, code.co_freevars]


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)
