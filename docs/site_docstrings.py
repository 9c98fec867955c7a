"""Docstrings in TRL's format, as MkDocs shows them: types without marks, and what the signature says of defaults left to it."""

import re
from typing import Any

from griffe import Extension, Object


CLASS = re.compile(r"\[`(?:~(?:\w+\.)*)?([\w.]+)`\]")  # [`~datasets.Dataset`] is `Dataset`
# Several arguments on several lines
NAMES = re.compile(r"^( +\w+(?:, \w+)*,)\n +(?=\w+(?:, \w+)*:$)", flags=re.MULTILINE)
RAISED = re.compile(r"^( +)`(\w+)`:", flags=re.MULTILINE)
SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+)( \(.*\))?:\n((?:\1 +\S.*\n)+)", flags=re.MULTILINE)
ARGUMENT = re.compile(r"^( +[\w*]+) \(([^()]*(?:\([^()]*\))?[^()]*)\):(?=\s)", flags=re.MULTILINE)


def _each(match: re.Match) -> str:
    """Arguments that share a description, each with it: the site looks up the default of each by its name."""
    indent, names, kind, text = match.groups("")
    return "".join(f"{indent}{name}{kind}:\n{text}" for name in names.split(", "))


def _argument(match: re.Match) -> str:
    kind = re.sub(r",? ?\*optional\*(, defaults to `.*`)?$", "", match[2]).replace("`", "")
    return f"{match[1]} ({kind}):" if kind else f"{match[1]}:"


class TRLDocstrings(Extension):
    """Before they are parsed as Google's format, which TRL's is nearly."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = CLASS.sub(r"`\1`", obj.docstring.value)
            text = re.sub("^( *)Class attributes:$", r"\1Attributes:", text, flags=re.MULTILINE)
            text = RAISED.sub(r"\1\2:", NAMES.sub(r"\1 ", text))
            obj.docstring.value = ARGUMENT.sub(_argument, SEVERAL.sub(_each, text))
