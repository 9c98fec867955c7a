"""A function of this package as a module of `evaluate`: it gathers batches, also over processes, and calls the function once."""

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import evaluate
from datasets import Features, Value
from datasets import Sequence as ListOf


def as_module(
    function: Callable[..., dict[str, float]], optional: Sequence[str] = (), lists: bool = False
) -> type[evaluate.Metric]:
    """
    The class that `evaluate.load` finds in a file of `trl_ext/metrics/modules`.

    Args:
        function (`Callable`):
            Its arguments without a default are columns, one number per row.
        optional (`Sequence[str]`, *optional*):
            Arguments with a default that are columns too. All others are options of `compute`.
        lists (`bool`, *optional*, defaults to `False`):
            Whether a row holds a list of numbers.
    """
    arguments = inspect.signature(function).parameters.values()
    required = [each.name for each in arguments if each.default is each.empty]
    kind = ListOf(Value("float64")) if lists else Value("float64")
    features = [
        Features(dict.fromkeys([*required, *some], kind))
        for count in range(len(optional) + 1)
        for some in itertools.combinations(optional, count)
    ]

    class Module(evaluate.Metric):
        __doc__ = function.__doc__

        def _info(self) -> evaluate.MetricInfo:
            description = inspect.getdoc(function) or ""
            return evaluate.MetricInfo(
                description=description.split("\n\n")[0],
                citation="",
                inputs_description=description,
                features=features if len(features) > 1 else features[0],
            )

        def add_batch(self, **columns: Any) -> None:
            """Add a batch; the columns of the first one are those of all."""
            if isinstance(self.info.features, list):  # `evaluate` takes the first kind alone
                self.info.features = next((each for each in features if set(each) == set(columns)), features[0])
            super().add_batch(**columns)

        def _compute(self, **given: Any) -> dict[str, float]:
            return function(**given)

    Module.__name__ = Module.__qualname__ = "".join(part.capitalize() for part in function.__name__.split("_"))
    return Module
