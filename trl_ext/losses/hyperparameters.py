"""Hyper-parameters against the types that their dataclass states: numbers, names, and lists, tuples and dicts of them."""

import collections.abc
import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any


class _Misfit(Exception):
    """
    A value that its type does not allow.

    Args:
        subject (`str`): What was given, and where.
        problem (`str`): What is wrong with it.
        expected (`str`): What would be right.
        depth (`int`): How many lists, tuples and dicts it stands in.
        near (`bool`): Whether it is of the right kind, so that this is the complaint to show where several types are allowed.
    """

    def __init__(self, subject: str, problem: str, expected: str, depth: int, near: bool = False):
        super().__init__(f"{subject} {problem}; expected {expected}.")
        self.problem, self.depth, self.near = problem, depth, near


def check_hyperparameters(loss: object) -> None:
    """
    Raise a `ValueError` for a hyper-parameter of the wrong type, or one that is NaN or infinite.

    A list where the type says tuple, as JSON has it, is made a tuple, and the other way round.
    """
    values = {field.name: getattr(loss, field.name) for field in dataclasses.fields(loss) if field.init}
    for name, value in checked_hyperparameters(type(loss), values).items():
        if value is not values[name]:
            object.__setattr__(loss, name, value)  # the dataclass may be frozen


def checked_hyperparameters(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` by field name as the types of the dataclass `cls` have them; a `ValueError` names the first misfit."""
    hints = typing.get_type_hints(cls)
    try:
        return {name: _fitted(value, hints[name], name, f"`{name}={value!r}`", 0) for name, value in values.items()}
    except _Misfit as misfit:
        raise ValueError(f"{cls.__name__}: {misfit}") from None


def _fitted(value: Any, hint: Any, place: str, subject: str, depth: int) -> Any:
    """`value` as the type `hint` has it, or a `_Misfit`; `place` is how one would write where it stands."""
    origin, arguments, expected = typing.get_origin(hint), typing.get_args(hint), _described(hint)
    kind = origin or hint
    wrong_kind = _Misfit(subject, f"is a {type(value).__name__}", expected, depth)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)  # to Python a bool is an int
    # False for NaN, infinity, and whole numbers that no float holds
    finite = number and abs(value) <= sys.float_info.max

    if origin in (typing.Union, types.UnionType):
        return _fitted_to_one(value, hint, place, subject, depth)
    if hint in (int, float):
        if not number:
            raise wrong_kind
        if not finite:
            raise _Misfit(subject, "is not finite", f"a finite {expected}", depth, near=True)
        if hint is int and not isinstance(value, int):
            raise _Misfit(subject, "is not a whole number", expected, depth, near=True)
        return value
    if origin is typing.Literal:
        if not any(type(value) is type(option) and value == option for option in arguments):
            raise _Misfit(subject, "is unknown", expected, depth, near=True)
        return value
    if kind in (list, tuple, collections.abc.Sequence):
        if not isinstance(value, (list, tuple)):
            raise wrong_kind
        kinds = _kinds(kind, arguments, len(value))
        if len(kinds) != len(value):
            raise _Misfit(subject, f"has {len(value)} entries", expected, depth, near=True)
        entries = [
            _fitted(entry, of, f"{place}[{index}]", f"`{place}[{index}]={entry!r}`", depth + 1)
            for index, (entry, of) in enumerate(zip(value, kinds, strict=True))
        ]
        return entries if kind is list else tuple(entries)
    if kind in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise wrong_kind
        of_keys, of_values = arguments or (Any, Any)
        return {
            _fitted(key, of_keys, place, f"the key {key!r} of `{place}`", depth + 1): _fitted(
                entry, of_values, f"{place}[{key!r}]", f"`{place}[{key!r}]={entry!r}`", depth + 1
            )
            for key, entry in value.items()
        }
    # What is no class, such as a type variable, cannot be looked at
    if kind is not Any and isinstance(kind, type) and not isinstance(value, kind):
        raise wrong_kind
    if number and not finite:
        raise _Misfit(subject, "is not finite", "a finite number", depth, near=True)
    return value


def _fitted_to_one(value: Any, hint: Any, place: str, subject: str, depth: int) -> Any:
    """The same for a type that allows several; the complaint is that about the type which came nearest."""
    misfits = []
    for kind in typing.get_args(hint):
        try:
            return _fitted(value, kind, place, subject, depth)
        except _Misfit as misfit:
            misfits.append(misfit)
    nearest = max(misfits, key=lambda misfit: (misfit.depth, misfit.near))
    if nearest.depth > depth:
        raise nearest
    finite = "a finite " if nearest.problem == "is not finite" else ""
    raise _Misfit(subject, nearest.problem, finite + _described(hint), depth, nearest.near)


def _kinds(container: type, arguments: tuple, count: int) -> list:
    """The types of the `count` entries of a list or tuple; of as many as there should be where the type says that."""
    if not arguments:
        return [Any] * count
    if container is not tuple or arguments[1:] == (Ellipsis,):
        return [arguments[0]] * count
    return list(arguments)


def _described(hint: Any) -> str:
    """A type in words."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_described(kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
