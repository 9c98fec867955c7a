"""Whether the names that are used are there: looked up before anything else of TRL's, so that what is gone is said by name."""

import pkgutil
from collections.abc import Iterable, Mapping

from trl_ext import upstream

from .names import ALL_TRAINERS


def require_names(names: Mapping[str, Iterable[str]]) -> None:
    """Raises the `ImportError` of `upstream` for the first name that its owner does not have."""
    for path, attributes in names.items():
        with upstream.names_explained():
            owner = pkgutil.resolve_name(path)
        for attribute in attributes:
            if not hasattr(owner, attribute):
                raise upstream.missing(f"{path.replace(':', '.')}.{attribute}")


require_names(ALL_TRAINERS)
upstream.warn_of_untested_versions()
