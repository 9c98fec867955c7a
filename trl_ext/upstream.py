"""
The versions of TRL and of what it stands on that this package is tested with, and what is said about others.

Imports nothing heavy: what is said must not depend on what is broken.
"""

import contextlib
import logging
import re
from collections.abc import Iterator
from importlib import metadata
from types import ModuleType


logger = logging.getLogger(__name__)

# The versions that the tests run with (`constraints.txt` pins them), of the libraries whose private names are used
TESTED = {"datasets": "5.2", "transformers": "5.23", "trl": "1.16"}
# Another version of these is worth a warning
CLOSE = ("trl", "transformers")


def untested() -> list[str]:
    """Those of the two closest libraries whose installed versions the tests have not seen."""
    return [name for name in CLOSE if not f"{_installed(name)}.".startswith(f"{TESTED[name]}.")]


def warn_of_untested_versions() -> None:
    """Says once which installed versions the tests have not seen. Call it where it runs once per process."""
    others = untested()
    if others:
        found = " and ".join(f"{name} {_installed(name)}" for name in others)
        tested = " and ".join(f"{name} {TESTED[name]}" for name in CLOSE)
        logger.warning(
            f"trl_ext is tested with {tested}; installed: {found}. It may well work. If something fails, or numbers differ from "
            f"TRL's, install what is tested: {_command(others)}"
        )


def missing(name: str) -> ImportError:
    """The error for a name of another library, with its whole path, that the installed version does not have."""
    library = name.split(".")[0]
    return ImportError(
        f"trl_ext needs `{name}`, which {library} {_installed(library)} does not have. It is tested with {library} "
        f"{TESTED[library]}: {_command([library])}",
        name=library,
    )


def explained(error: BaseException) -> ImportError | None:
    """The error of [`missing`] for one that says that a name of these libraries is not there; `None` for all others."""
    owner = error.name if isinstance(error, ImportError) else _path(getattr(error, "obj", None))
    if not owner or (owner in TESTED and isinstance(error, ModuleNotFoundError)):  # not installed at all says enough
        return None
    if owner.split(".")[0] not in TESTED:
        return None
    if isinstance(error, AttributeError):
        return missing(f"{owner}.{error.name}")
    if isinstance(error, ModuleNotFoundError):
        return missing(owner)
    found = re.match(r"cannot import name '(\w+)'", str(error))
    return missing(f"{owner}.{found[1]}") if found else None


@contextlib.contextmanager
def names_explained() -> Iterator[None]:
    """While open, an error about a name that is not there is raised as [`missing`] would have it."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        clear = explained(error)
        if clear is None:
            raise
        raise clear from error


def _path(value: object) -> str:
    """The dotted path of a module or class."""
    if isinstance(value, ModuleType):
        return value.__name__
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else ""


def _installed(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:  # a checkout on the path
        return "of an unknown version"


def _command(libraries: list[str]) -> str:
    return "pip install " + " ".join(f'"{name}=={TESTED[name]}.*"' for name in libraries)
