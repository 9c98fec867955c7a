"""Hyper-parameters that are lists, tuples and dicts of numbers."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Optional

import pytest

from tests.losses.batches import pairs
from trl_ext import DPOConfig, get_loss, register_loss
from trl_ext.losses import Loss
from trl_ext.losses.hyperparameters import check_hyperparameters, checked_hyperparameters
from trl_ext.trainers.loss_types import build_losses


NAN, INFINITE = float("nan"), float("inf")


@dataclass(frozen=True)
class Many(Loss):
    number: float = 1.0
    whole: int = 1
    name: str = "a"
    switch: bool = False
    numbers: list[float] = field(default_factory=list)
    fixed: tuple[float, ...] = (1.0, 2.0)
    two: tuple[int, float] = (1, 2.0)
    by_name: dict[str, float] = field(default_factory=dict)
    either: float | list[float] = 1.0
    either_dict: float | dict[str, float] = 1.0
    several: int | str = 1
    swapped: str | int = 1
    perhaps: list[float] | None = None
    perhaps_name: Optional[Literal["a", "b"]] = None  # noqa: UP045
    choice: Literal["a", "b", 1] = "a"
    nested: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    bare: list = field(default_factory=list)
    bare_dict: dict = field(default_factory=dict)
    sequence: Sequence[float] = ()
    mapping: Mapping[str, float] = field(default_factory=dict)
    anything: Any = None
    function: Callable[[float], float] | None = None

    def __call__(self, batch):
        return batch.delta * self.number


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("number", 2, 2),
        ("number", -1e308, -1e308),
        ("whole", -3, -3),
        ("switch", True, True),
        ("numbers", [1, 2.5], [1, 2.5]),
        ("numbers", [], []),
        ("numbers", (1.0,), [1.0]),
        ("fixed", [1, 2, 3], (1, 2, 3)),  # as JSON has a tuple
        ("fixed", (1.0,), (1.0,)),
        ("two", [3, 4], (3, 4)),
        ("by_name", {"a": 1, "b": 2.5}, {"a": 1, "b": 2.5}),
        ("either", 3.0, 3.0),
        ("either", [3.0], [3.0]),
        ("several", 3, 3),
        ("several", "x", "x"),
        ("perhaps", None, None),
        ("perhaps", [1.0], [1.0]),
        ("perhaps_name", "b", "b"),
        ("perhaps_name", None, None),
        ("choice", "b", "b"),
        ("choice", 1, 1),
        ("nested", {"a": [[1.0, 2.0]]}, {"a": [(1.0, 2.0)]}),
        ("bare", [1.0, "a"], [1.0, "a"]),
        ("bare_dict", {1: "a"}, {1: "a"}),
        ("sequence", [1.0], (1.0,)),
        ("mapping", {"a": 1.0}, {"a": 1.0}),
        ("anything", {"a": [1]}, {"a": [1]}),
        ("function", abs, abs),
    ],
    ids=lambda value: str(value)[:30],
)
def test_accepted(name, value, kept):
    for given in (getattr(Many(**{name: value}), name), checked_hyperparameters(Many, {name: value})[name]):
        assert given == kept
        assert type(given) is type(kept)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("number", NAN, "`number=nan` is not finite; expected a finite float."),
        ("number", 10**400, "is not finite; expected a finite float."),
        ("number", True, "`number=True` is a bool; expected float."),
        ("number", [1.0], "`number=[1.0]` is a list; expected float."),
        ("whole", 1.5, "`whole=1.5` is not a whole number; expected int."),
        ("whole", INFINITE, "`whole=inf` is not finite; expected a finite int."),
        ("whole", False, "`whole=False` is a bool; expected int."),
        ("name", 1, "`name=1` is a int; expected str."),
        ("name", NAN, "`name=nan` is a float; expected str."),
        ("switch", 1, "`switch=1` is a int; expected bool."),
        ("numbers", 1.0, "`numbers=1.0` is a float; expected list[float]."),
        ("numbers", "12", "`numbers='12'` is a str; expected list[float]."),
        ("numbers", {"a": 1.0}, "`numbers={'a': 1.0}` is a dict; expected list[float]."),
        ("numbers", [1.0, NAN], "`numbers[1]=nan` is not finite; expected a finite float."),
        ("numbers", [1.0, -INFINITE], "`numbers[1]=-inf` is not finite; expected a finite float."),
        ("numbers", ["1"], "`numbers[0]='1'` is a str; expected float."),
        ("numbers", [True], "`numbers[0]=True` is a bool; expected float."),
        ("numbers", None, "`numbers=None` is a NoneType; expected list[float]."),
        ("fixed", [1.0, None], "`fixed[1]=None` is a NoneType; expected float."),
        ("two", [1, 2.0, 3.0], "`two=[1, 2.0, 3.0]` has 3 entries; expected tuple[int, float]."),
        ("two", [1], "`two=[1]` has 1 entries; expected tuple[int, float]."),
        ("two", [1.5, 2.0], "`two[0]=1.5` is not a whole number; expected int."),
        ("by_name", [1.0], "`by_name=[1.0]` is a list; expected dict[str, float]."),
        ("by_name", {"a": 1.0, "b": INFINITE}, "`by_name['b']=inf` is not finite; expected a finite float."),
        ("by_name", {"a": "1"}, "`by_name['a']='1'` is a str; expected float."),
        ("by_name", {1: 1.0}, "the key 1 of `by_name` is a int; expected str."),
        ("either", "a", "`either='a'` is a str; expected float or list[float]."),
        ("either", NAN, "`either=nan` is not finite; expected a finite float or list[float]."),
        ("either", [1.0, NAN], "`either[1]=nan` is not finite; expected a finite float."),
        ("either_dict", {"a": NAN}, "`either_dict['a']=nan` is not finite; expected a finite float."),
        ("either_dict", {1: 1.0}, "the key 1 of `either_dict` is a int; expected str."),
        ("several", 1.5, "`several=1.5` is not a whole number; expected int or str."),
        ("swapped", 1.5, "`swapped=1.5` is not a whole number; expected str or int."),
        ("perhaps", 1.0, "`perhaps=1.0` is a float; expected list[float] or None."),
        ("perhaps", [None], "`perhaps[0]=None` is a NoneType; expected float."),
        ("perhaps_name", "c", "`perhaps_name='c'` is unknown; expected 'a' or 'b' or None."),
        ("choice", "c", "`choice='c'` is unknown; expected 'a' or 'b' or 1."),
        ("choice", True, "`choice=True` is unknown; expected 'a' or 'b' or 1."),
        ("nested", {"a": [[1.0, 2.0], [1.0, NAN]]}, "`nested['a'][1][1]=nan` is not finite; expected a finite float."),
        ("nested", {"a": [[1.0]]}, "`nested['a'][0]=[1.0]` has 1 entries; expected tuple[float, float]."),
        ("bare", [1.0, NAN], "`bare[1]=nan` is not finite; expected a finite number."),
        ("bare_dict", {"a": NAN}, "`bare_dict['a']=nan` is not finite; expected a finite number."),
        ("sequence", [NAN], "`sequence[0]=nan` is not finite; expected a finite float."),
        ("mapping", [1.0], "`mapping=[1.0]` is a list; expected collections.abc.Mapping[str, float]."),
        ("anything", NAN, "`anything=nan` is not finite; expected a finite number."),
        ("function", 3.0, "`function=3.0` is a float; expected collections.abc.Callable[[float], float] or None."),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused(name, value, message):
    with pytest.raises(ValueError, match=rf"^Many: .*{re.escape(message)}$"):
        Many(**{name: value})


def test_by_name_from_json():
    register_loss("many")(Many)
    kwargs = json.loads(
        '{"numbers": [1, 2], "fixed": [3], "by_name": {"a": 0.5}, "either": [0.1], "nested": {"b": [[1, 2]]}}'
    )
    loss = get_loss("many", **kwargs)
    assert (loss.numbers, loss.fixed, loss.either, loss.nested) == ([1, 2], (3,), [0.1], {"b": [(1, 2)]})
    assert json.loads(json.dumps(dataclasses.asdict(loss)))["nested"] == {"b": [[1, 2]]}
    assert loss == get_loss("many", **kwargs)
    assert dataclasses.replace(loss, number=2.0)(pairs([3.0])).item() == pytest.approx(6.0)
    assert loss.numbers is not kwargs["numbers"]  # what the config holds may change afterwards
    with pytest.raises(ValueError, match=r"^Many: `numbers\[1\]=nan` is not finite"):
        get_loss("many", numbers=[1.0, NAN])


def test_as_loss_kwargs_of_a_config():
    register_loss("many")(Many)
    for kwargs in ({"by_name": {"a": 0.5}}, {"fixed": [3.0], "nested": {"b": [[1.0, 2.0]]}}):
        for given in (kwargs, json.dumps(kwargs), {"many": kwargs}):
            args = DPOConfig(output_dir="unused", loss_type="many", loss_kwargs=given, bf16=False)
            loss = build_losses(args.loss_type, args.loss_kwargs)["many"]
            assert dataclasses.asdict(loss) == dataclasses.asdict(get_loss("many", **kwargs))
            assert json.loads(json.dumps(args.to_dict()))["loss_kwargs"] == args.loss_kwargs
    with pytest.raises(ValueError, match=r"`by_name\['a'\]='x'` is a str; expected float"):
        DPOConfig(output_dir="unused", loss_type="many", loss_kwargs={"by_name": {"a": "x"}}, bf16=False)


def test_a_class_that_compares_before_it_checks():
    """Types are checked before the class sees the values, and defaults afterwards."""

    @register_loss("comparing")
    @dataclass
    class Comparing:
        scale: float
        pair: tuple[float, ...] = (1.0,)
        bad: float = 1.0
        derived: float = field(init=False)

        def __post_init__(self):
            self.derived = 2 * self.scale if self.scale > 0 else NAN
            self.first = self.pair.index(1.0)

        def __call__(self, batch):
            return batch.delta

    assert get_loss("comparing", scale=1.0, pair=[1.0]).derived == 2.0
    with pytest.raises(ValueError, match="`scale='1'` is a str; expected float"):
        get_loss("comparing", scale="1")
    with pytest.raises(ValueError, match=r"The loss 'comparing' has no default for \['scale'\]: set them"):
        get_loss("comparing")
    with pytest.raises(ValueError, match="`bad=nan` is not finite"):
        check_hyperparameters(Comparing(1.0, bad=NAN))
    # What is no hyper-parameter is not looked at
    assert get_loss("comparing", scale=-1.0).derived != get_loss("comparing", scale=-1.0).derived
    with pytest.raises(ValueError, match="has no hyper-parameter 'derived'"):
        get_loss("comparing", scale=1.0, derived=2.0)
