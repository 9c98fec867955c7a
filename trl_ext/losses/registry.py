"""
Losses by name: ours, those that users register, and those that installed packages offer. No loss is known here: each file
of ours registers its own, as a user does.

A plug-in package offers a loss through the entry-point group `trl_ext.losses`; the group is looked up when a name is not
known here, not at import. A plug-in that cannot be used does not stand in the way of the others.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from .base import READABLE, Loss
from .hyperparameters import check_hyperparameters, checked_hyperparameters


ENTRY_POINT_GROUP = "trl_ext.losses"

# TRL's own `DPOConfig.loss_type` values: they keep their meaning, so no loss of ours may have their names. A test
# compares the list with the installed TRL.
TRL_LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)

LossClass = TypeVar("LossClass", bound=type)

_classes: dict[str, type] = {}
_aliases: dict[str, str] = {}


def _origin(name: str) -> str:
    if name in TRL_LOSS_TYPES:
        return "TRL"
    cls = _classes[_aliases.get(name, name)]
    return f"{cls.__module__}.{cls.__qualname__}"


def register_loss(name: str, *, aliases: Iterable[str] = ()) -> Callable[[LossClass], LossClass]:
    """
    Class decorator that makes a dataclass of hyper-parameters available as `loss_type=name`.

    The class must be callable with a [`PreferenceBatch`] and return one loss per pair, shape `(B,)`. It may derive from
    [`losses.Loss`] and state `paper`, `columns` and the other class attributes given there; what it leaves out has
    that class's defaults.

    Args:
        name (`str`):
            The loss type: not empty, without blanks and commas.
        aliases (`Iterable[str]`, *optional*, defaults to `()`):
            Other names for it.

    Raises:
        `ValueError`: If one of the names is none, or TRL, this package or another class already has it; if `reads` has an
            unknown name; if the class states `needs_reference`, one of `init_state` and `update` without the other, or that it
            takes neither pairs nor groups.
        `TypeError`: If the class is not a callable dataclass.

    Example:

    ```python
    >>> from dataclasses import dataclass
    >>> import torch
    >>> from trl_ext import register_loss

    >>> @register_loss("squared")
    ... @dataclass(frozen=True)
    ... class SquaredLoss:
    ...     target: float = 1.0
    ...
    ...     def __call__(self, batch):
    ...         return (batch.beta * batch.delta - self.target) ** 2
    ```
    """
    if isinstance(aliases, str):
        aliases = (aliases,)
    names = (name, *aliases)
    for given in names:
        if not isinstance(given, str) or not re.fullmatch(r"[^\s,]+", given):
            raise ValueError(
                f"@register_loss was given the name {given!r}; expected a string that is not empty and has no blanks or "
                'commas, as in @register_loss("my_loss").'
            )

    def register(cls: LossClass) -> LossClass:
        is_class = isinstance(cls, type) and dataclasses.is_dataclass(cls)
        if not is_class or not any("__call__" in vars(base) for base in cls.__mro__):
            raise TypeError(
                f"@register_loss({name!r}) needs a dataclass with a `__call__(batch)` method, got {cls!r}. Put "
                "`@dataclass(frozen=True)` below it."
            )
        origin = f"{cls.__module__}.{cls.__qualname__}"
        for taken in names:
            known = taken in TRL_LOSS_TYPES or taken in _classes or taken in _aliases
            # The same class registered again, as a reloaded notebook cell or module does, replaces itself
            if known and _origin(taken) != origin:
                raise ValueError(
                    f"The loss name {taken!r} of {origin} is taken: {_origin(taken)} has it. Choose another name."
                )
        for attribute, default in vars(Loss).items():
            if not attribute.startswith("_") and not hasattr(cls, attribute):
                setattr(cls, attribute, default)
        _check_statements(cls)
        if not hasattr(cls.reads, "__get__"):  # what is no property is known now
            cls.reads = _checked_reads(cls, cls.reads)
        _classes[name] = cls
        _aliases.update(dict.fromkeys(aliases, name))
        return cls

    return register


def _check_statements(cls: type) -> None:
    """Raise a `ValueError` for what a class states that would be ignored, or cannot be read."""
    for attribute in ("columns", "optional_columns"):
        names = getattr(cls, attribute)
        if not hasattr(names, "__get__") and not _are_texts(names):
            raise ValueError(
                f"The loss {cls.__qualname__} states `{attribute} = {names!r}`; expected a tuple of names, as in `{attribute} = "
                '("score_chosen", "score_rejected")`.'
            )
    for attribute in ("paper", "title", "citation", "evidence", "one_turn"):
        text = getattr(cls, attribute)
        if not hasattr(text, "__get__") and not isinstance(text, str):
            raise ValueError(f"The loss {cls.__qualname__} states `{attribute} = {text!r}`; expected text.")
    for attribute in ("update_first", "takes_groups", "takes_pairs", "takes_lists"):
        answer = getattr(cls, attribute)
        if not hasattr(answer, "__get__") and not isinstance(answer, bool):
            raise ValueError(f"The loss {cls.__qualname__} states `{attribute} = {answer!r}`; expected True or False.")
    if hasattr(cls, "needs_reference"):
        raise ValueError(
            f"The loss {cls.__qualname__} states `needs_reference`, which nothing reads. In its place write `reads = "
            "frozenset()` where it computes from the policy alone, and nothing where it needs the reference."
        )
    if (cls.init_state is Loss.init_state) != (cls.update is Loss.update):
        raise ValueError(
            f"The loss {cls.__qualname__} has one of `init_state` and `update` without the other. State has its names, shapes "
            "and first values from `init_state` and moves by `update`: give both."
        )
    if not cls.takes_pairs and not cls.takes_groups:
        raise ValueError(
            f"The loss {cls.__qualname__} states `takes_pairs = False` and does not take groups either. A loss on whole groups alone "
            "states `takes_groups = True` too."
        )


def _are_texts(names: Any) -> bool:
    return isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names)


def _checked_reads(cls: type, reads: Any) -> frozenset[str]:
    """The names in `reads` as a frozenset; a `ValueError` for an unknown one."""
    if not isinstance(reads, (frozenset, set, list, tuple)):
        raise ValueError(
            f"The loss {cls.__qualname__} states `reads = {reads!r}`; expected a set of names, as in `reads = "
            f'frozenset({{"ref_logps"}})`. Allowed: {list(READABLE)}.'
        )
    for name in reads:
        if name not in READABLE:
            near = difflib.get_close_matches(str(name), READABLE, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"The loss {cls.__qualname__} states that it reads {name!r}, which is unknown.{hint} Allowed: "
                f"{list(READABLE)}."
            )
    return frozenset(reads)


def _plugins() -> tuple[dict[str, EntryPoint], dict[str, str]]:
    """Entry points of the group by name, and why others are refused: their name is taken, or offered twice."""
    plugins: dict[str, EntryPoint] = {}
    refused: dict[str, str] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        name, other = entry.name, plugins.get(entry.name)
        taken = name in TRL_LOSS_TYPES or name in _classes or name in _aliases
        if other is not None and other.value != entry.value:
            refused[name] = (
                f"The loss name {name!r} is offered twice, by {other.value} and by {entry.value}. Uninstall one of the two "
                "packages."
            )
        # `_load` has registered it, or the package's import did: then the origin is its own package
        elif taken and _origin(name).split(".")[0] != re.split("[.:]", entry.value)[0]:
            refused[name] = (
                f"The loss name {name!r} of the plug-in {entry.value} is taken: {_origin(name)} has it. Rename it in the "
                "plug-in."
            )
        else:
            plugins[name] = entry
    return {name: entry for name, entry in plugins.items() if name not in refused}, refused


def _load(entry: EntryPoint) -> None:
    try:
        cls = entry.load()
        if entry.name not in _classes and entry.name not in _aliases:
            register_loss(entry.name)(cls)
    except (Exception, SystemExit) as error:  # a module that ends the process is no reason to end ours
        raise ValueError(
            f"The plug-in {entry.value} that offers the loss {entry.name!r} cannot be loaded: {str(error) or repr(error)}"
        ) from error


def plugin_errors() -> list[str]:
    """Load all plug-ins; why those that cannot be used cannot, one text each."""
    plugins, refused = _plugins()
    errors = list(refused.values())
    for entry in plugins.values():
        try:
            _load(entry)
        except ValueError as error:
            errors.append(str(error))
    return errors


def resolve_name(name: str, also: Collection[str] = ()) -> str:
    """
    Canonical name of a loss.

    Args:
        name (`str`):
            A registered name, an alias, or a name in `also`.
        also (`Collection[str]`, *optional*, defaults to `()`):
            Further names that are allowed, such as TRL's; returned as they are.

    Raises:
        `ValueError`: If there is no such loss; says the nearest name and all that are allowed.
    """
    if not isinstance(name, str):
        raise ValueError(f"A loss is named by a string, got {name!r}.")
    if name in also or name in _classes:
        return name
    if name in _aliases:
        return _aliases[name]
    plugins, refused = _plugins()
    if name in refused:
        raise ValueError(refused[name])
    if name in plugins:
        _load(plugins[name])
        return _aliases.get(name, name)
    errors = plugin_errors()  # loads all plug-ins, which may bring the name as an alias
    if name in _classes or name in _aliases:
        return _aliases.get(name, name)
    allowed = sorted({*also, *_classes, *_aliases, *plugins})
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if name in TRL_LOSS_TYPES:
        hint = " It is TRL's own loss type: pass it as `loss_type` to the trainer."
    raise ValueError(" ".join([f"Unknown loss {name!r}.{hint} Known: {allowed}.", *errors]))


def loss_class(name: str) -> type:
    """The class registered under a name or alias."""
    return _classes[resolve_name(name)]


def get_loss(name: str, **hyperparameters: Any) -> Any:
    """
    Build a loss by name.

    Args:
        name (`str`):
            Name or alias, see [`list_losses`].
        hyperparameters:
            Hyper-parameters of the method, by the paper's names; those left out have the catalogue's defaults.

    Returns:
        A frozen dataclass: `loss(batch)` is the unreduced loss, shape `(B,)`; `loss.metrics(batch)` what to plot.

    Raises:
        `ValueError`: For an unknown name or hyper-parameter, or a value of the wrong type or out of range.

    Example:

    ```python
    >>> from trl_ext import get_loss

    >>> get_loss("offset", alpha=0.5)
    OffsetLoss(alpha=0.5, scaling='log', margin_floor=None)
    ```
    """
    name = resolve_name(name)
    cls = _classes[name]
    allowed = [field.name for field in dataclasses.fields(cls) if field.init]
    for given in hyperparameters:
        if given not in allowed:
            near = difflib.get_close_matches(given, allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"The loss {name!r} has no hyper-parameter {given!r}.{hint} It has: {allowed}.")
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.name in allowed
        and field.name not in hyperparameters
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(
            f"The loss {name!r} has no default for {missing}: set them, in a config as `loss_kwargs`, or in the `base_kwargs` of a loss around it."
        )
    # Before the class sees them, so that it may compare them; and after, for defaults of a class that checks nothing itself
    loss = cls(**checked_hyperparameters(cls, hyperparameters))
    check_hyperparameters(loss)
    _checked_reads(cls, loss.reads)  # which may depend on them
    return loss


def list_losses() -> list[str]:
    """Names of all losses: ours, registered ones, and those of installed plug-ins. Aliases are left out."""
    plugins, _ = _plugins()
    return sorted({*_classes, *(name for name in plugins if name not in _aliases)})


def list_aliases(name: str) -> list[str]:
    """Aliases of a loss."""
    name = resolve_name(name)
    return sorted(alias for alias, target in _aliases.items() if target == name)
