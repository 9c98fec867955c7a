"""What is refused before the first round, once libraries are loaded; what the settings alone say is in `settings.py`."""

import inspect
import typing
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import AutoConfig

from trl_ext.data.load import load_preferences
from trl_ext.rounds.settings import read_yaml, refuse_unknown, refuse_wrong_types


__all__ = [
    "keyword_arguments",
    "load_rows",
    "read_yaml",
    "refuse_unknown",
    "refuse_unloadable_model",
    "refuse_wrong_types",
]


def keyword_arguments(function: Callable) -> dict[str, Any]:
    """Type hints of the keyword-only arguments of a function: what settings can be handed on to it."""
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return {each.name: hints.get(each.name, Any) for each in parameters if each.kind is each.KEYWORD_ONLY}


def refuse_unloadable_model(name: str, what: str) -> None:
    """Raise a `ValueError` for a model that is neither a folder with a model nor on the hub; reads its config alone."""
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError, TypeError, KeyError) as error:  # not there, code of its own, or a config that is none
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
