"""Settings of rounds as YAML and the command line give them: read, put together, and refused where they alone show a mistake."""

import difflib
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trl_ext import reading, sources
from trl_ext.data.paths import refuse_missing_path, refuse_unwritable_folder


# Settings that name a model or data, and what each is called in errors
PATHS = (
    ("model", "model"),
    ("prompts", "dataset of prompts"),
    ("replay", "dataset to replay"),
    ("implicit_reference", "implicit reference"),
)


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
    """What a YAML text of settings holds, as [`trl_ext.reading.read_yaml`] does, with this module's numbers and booleans."""
    return reading.read_yaml(text, where, _Loader)


def refuse_unknown(given: Collection[str], known: Collection[str], where: str) -> None:
    """Raise a `ValueError` for the names in `given` that are not `known`, with the nearest of those that are."""
    unknown = sorted(set(given) - set(known), key=str)
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


def merged(path: str | Path, overrides: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """
    Settings of a file under those that replace them.

    Args:
        path (`str` or `Path`):
            A YAML file.
        overrides (`Mapping[str, Any]`):
            Settings by name, with dots into dictionaries.
        known (`Sequence[str]`):
            The names there are.

    Raises:
        `ValueError`: For a file that is no YAML or holds no settings, for unknown names, and where a setting is missing that has no
            default.
    """
    settings = read_yaml(reading.read_text(path), str(path))
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} holds no settings; expected YAML with model, prompts, output_dir, and reward_funcs or judge."
        )
    for key, value in overrides.items():
        *outer, inner = key.split(".")
        where = settings
        for name in outer:
            if where.get(name) is None:
                where[name] = {}
            where = where[name]
            if not isinstance(where, dict):
                raise ValueError(f"--{key}: {name!r} is {where!r} and holds no settings of its own.")
        where[inner] = value
    refuse_unknown(settings, known, str(path))
    # An empty entry of the file, or --name null, is the default
    settings = {name: value for name, value in settings.items() if value is not None}
    required = [name for name in ("model", "prompts", "output_dir") if name not in settings]
    if required:
        raise ValueError(f"{path}: {required} missing. Add them, or give them as --{required[0]} VALUE.")
    return settings


def given_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Settings from the command line, `--name value` or `--name=value`, values as YAML."""
    given = [part for each in arguments for part in (each.split("=", 1) if each.startswith("--") else [each])]
    names, values = given[::2], given[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        raise ValueError(f"Settings are given as --name value; got {list(arguments)}.")
    return {name[2:]: read_yaml(value, name) for name, value in zip(names, values, strict=True)}


def check_early(path: str, overrides: Mapping[str, Any]) -> None:
    """
    Raise a `ValueError` for what the settings alone show to be wrong: names, types, paths and losses. [`RoundsConfig`] looks at
    everything again; this needs none of the libraries that it does.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"There is no file {path!r}. A config is a file on this machine, and may name code that is run: one from the hub or the web is "
            "downloaded and read first. Recipes lie in examples/rounds."
        )
    fields = sources.config_fields([("trl_ext", "rounds/config.py")])
    if not fields:
        return
    settings = merged(path, overrides, list(fields))
    refuse_wrong_types(settings, {name: field.type for name, field in fields.items()}, "")
    training = {name: field.type for name, field in sources.config_fields(sources.DPO_CONFIG).items()}
    known = {
        "sampling": sources.keyword_arguments("data/sampling.py", "sample_completions"),
        "scoring": sources.keyword_arguments("data/scores.py", "score_preferences"),
        "training": training,
    }
    for name, hints in known.items():
        given = settings.get(name)
        if hints and isinstance(given, dict):
            refuse_unknown(given, hints, f"`{name}`")
            refuse_wrong_types(given, hints, f"{name}.")
    given = settings.get("training")
    if isinstance(given, dict):
        losses = given.get("loss_type") or ()
        losses = losses if isinstance(losses, (list, tuple)) else [losses]
        sources.refuse_unknown_losses(losses, trl=True)
        sources.refuse_unknown_hyperparameters(losses, given.get("loss_kwargs"))
    for name, what in PATHS:
        refuse_missing_path(settings.get(name), what)
    refuse_unwritable_folder(settings["output_dir"], "output_dir")
