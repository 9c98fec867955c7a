import copy
import inspect
import re
import sys
from dataclasses import dataclass

import pytest
import torch
import trl

from tests.losses.batches import pairs
from trl_ext import get_loss, list_losses, register_loss
from trl_ext.losses import TRL_LOSS_TYPES, Loss, list_aliases, loss_class, registry, resolve_name


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_classes", copy.copy(registry._classes))
    monkeypatch.setattr(registry, "_aliases", copy.copy(registry._aliases))


def test_names_and_aliases():
    assert list_losses() == [
        "anchored", "bias_variance", "inpo", "length_regularized", "margin_adaptive", "offset", "sppo_soft",
    ]  # fmt: skip
    for alias, name in {
        "odpo": "offset",
        "adpo": "anchored",
        "madpo": "margin_adaptive",
        "bvpo": "bias_variance",
        "ilr_dpo": "length_regularized",
        "r_dpo": "length_regularized",
        "gpo": "sppo_soft",
    }.items():
        assert type(get_loss(alias)) is loss_class(name)
        assert alias in list_aliases(name)


def test_trls_loss_types_are_those_of_trl():
    text = inspect.getsource(trl.DPOTrainer._compute_loss).split("Should be one of")[1]
    assert set(re.findall(r"'([a-z_]+)'", text)) == set(TRL_LOSS_TYPES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ofset", r"Unknown loss 'ofset'. Did you mean 'offset'\? Known: \['adpo', .*'sppo_soft'\]"),
        ("zzz", r"Unknown loss 'zzz'. Known"),
        ("sigmoid", "TRL's own loss type: pass it as `loss_type` to the trainer"),
        (None, "named by a string, got None"),
    ],
)
def test_unknown_name(name, message):
    with pytest.raises(ValueError, match=message):
        get_loss(name)


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        ("offset", {"alhpa": 1.0}, r"no hyper-parameter 'alhpa'. Did you mean 'alpha'\? It has: \['alpha', 'scaling'"),
        ("offset", {"alpha": "1"}, "`alpha='1'` is a str; expected float"),
        ("offset", {"alpha": float("nan")}, "`alpha=nan` is not finite"),
        ("offset", {"alpha": float("-inf")}, "`alpha=-inf` is not finite"),
        ("offset", {"alpha": True}, "`alpha=True` is a bool; expected float"),
        ("offset", {"alpha": None}, "`alpha=None` is a NoneType; expected float"),
        ("offset", {"alpha": -0.5}, "`alpha=-0.5` must be at least 0"),
        (
            "offset",
            {"scaling": "sqrt"},
            r"`scaling='sqrt'` is unknown; choose one of \['log', 'log_ratio', 'linear'\]",
        ),
        ("offset", {"scaling": 1}, "`scaling=1` is a int; expected str"),
        ("offset", {"margin_floor": 0.0}, "`margin_floor=0.0` must be positive"),
        ("offset", {"margin_floor": "0.1"}, "expected float or None"),
        ("anchored", {"tau": 0.0}, "`tau=0.0` must be positive"),
        ("anchored", {"beta_r": -1.0}, "`beta_r=-1.0` must be positive"),
        ("anchored", {"label_smoothing": 1.5}, r"`label_smoothing=1.5` must lie in \[0, 1\]"),
        ("anchored", {"standardize": 1}, "`standardize=1` is a int; expected bool"),
        ("margin_adaptive", {"c_min": 1.0}, r"`c_min=1.0` must lie in \(0, 1\)"),
        ("margin_adaptive", {"c_min": 0.0}, r"`c_min=0.0` must lie in \(0, 1\)"),
        ("margin_adaptive", {"c_max": 1.0}, "`c_max=1.0` must be above 1"),
        ("margin_adaptive", {"lmbda": 0.0}, "`lmbda=0.0` must be positive"),
        ("margin_adaptive", {"tau": -1.0}, "`tau=-1.0` must be positive"),
        ("bias_variance", {"alpha": 1.01}, r"`alpha=1.01` must lie in \[0, 1\]"),
        ("bias_variance", {"base": "sigmod"}, "Unknown loss 'sigmod'. Did you mean 'sigmoid'"),
        ("bias_variance", {"base": "bvpo"}, "cannot be 'bias_variance' itself"),
        ("length_regularized", {"alpha": -0.1}, "`alpha=-0.1` must be at least 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_hyperparameters(name, hyperparameters, message):
    with pytest.raises(ValueError, match=message):
        get_loss(name, **hyperparameters)


def test_integers_will_do():
    assert get_loss("offset", alpha=1) == get_loss("offset", alpha=1.0)
    assert get_loss("anchored", tau=2)(pairs([1.0])).isfinite()


def test_register_a_plain_dataclass():
    @register_loss("squared", aliases=["sq"])
    @dataclass
    class Squared:
        target: float = 1.0

        def __call__(self, batch):
            return (batch.delta - self.target) ** 2

    loss = get_loss("sq", target=3.0)
    assert loss(pairs([1.0])).item() == pytest.approx(4.0)
    assert (loss.columns, loss.optional_columns, loss.paper, loss.takes_groups) == ((), (), "", False)
    assert (loss.required_columns, loss.divides_by_beta, loss.column_help) == ((), False, "")
    assert loss.metrics(pairs([1.0])) == {}
    assert loss.check_columns({}) is None
    assert "squared" in list_losses()
    with pytest.raises(ValueError, match="not finite"):
        get_loss("squared", target=float("nan"))


def test_register_a_loss_with_columns():
    @register_loss("scored")
    @dataclass(frozen=True)
    class Scored(Loss):
        columns = ("score_chosen",)

        def __call__(self, batch):
            return batch.delta * batch.column("score_chosen")

    assert get_loss("scored").required_columns == ("score_chosen",)
    assert get_loss("scored")(pairs([2.0], score_chosen=[3.0])).item() == pytest.approx(6.0)


@pytest.mark.parametrize("name", ["sigmoid", "offset", "odpo"])
def test_a_name_that_is_taken_is_refused(name):
    owner = "TRL" if name == "sigmoid" else "trl_ext.losses.offset.OffsetLoss"
    for arguments in ({"name": name}, {"name": "new", "aliases": [name]}):
        with pytest.raises(ValueError, match=rf"'{name}' of .*Mine is taken: {owner} has it"):

            @register_loss(**arguments)
            @dataclass
            class Mine:
                def __call__(self, batch):
                    return batch.delta

    assert "new" not in list_losses()


def test_the_same_class_again_replaces_itself():
    def define():
        @register_loss("again")
        @dataclass
        class Again:
            def __call__(self, batch):
                return batch.delta

        return Again

    first, second = define(), define()
    assert first is not second
    assert loss_class("again") is second


@pytest.mark.parametrize("thing", [lambda batch: batch.delta, object, dataclass(type("NoCall", (), {}))])
def test_what_is_no_callable_dataclass_is_refused(thing):
    with pytest.raises(TypeError, match="needs a dataclass with a `__call__"):
        register_loss("thing")(thing)


PLUGIN = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Plugged:
    scale: float = 1.0

    def __call__(self, batch):
        return self.scale * batch.delta
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Install a package that offers losses: name to entry point."""

    def install(package="plugged", code=PLUGIN, **entries):
        (tmp_path / f"{package}.py").write_text(code)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {target}" for name, target in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[trl_ext.losses]", *lines]))
        if str(tmp_path) not in sys.path:
            monkeypatch.syspath_prepend(str(tmp_path))

    yield install
    for package in ("plugged", "other"):
        sys.modules.pop(package, None)


def test_plugin(plugin):
    plugin(plugged="plugged:Plugged")
    assert "plugged" not in sys.modules
    assert get_loss("offset")
    assert "plugged" not in sys.modules  # a known name looks nothing up
    assert "plugged" in list_losses()
    assert "plugged" not in sys.modules  # listing loads nothing
    assert get_loss("plugged", scale=2.0)(pairs([3.0])).item() == pytest.approx(6.0)
    assert "plugged" in list_losses()
    assert resolve_name("plugged") == "plugged"
    with pytest.raises(ValueError, match="Did you mean 'plugged'"):
        get_loss("pluged")


def test_plugin_that_registers_itself(plugin):
    code = "from trl_ext import register_loss\n" + PLUGIN.replace(
        "@dataclass", "@register_loss('plugged', aliases=['pl'])\n@dataclass"
    )
    plugin(code=code, plugged="plugged:Plugged")
    assert get_loss("plugged").scale == 1.0
    assert get_loss("pl").scale == 1.0
    assert "plugged" in list_losses()


def test_plugin_that_cannot_be_loaded(plugin):
    plugin(code="import no_such_module", plugged="plugged:Plugged")
    with pytest.raises(
        ValueError, match=r"plug-in plugged:Plugged that offers the loss 'plugged' cannot be loaded: No module"
    ):
        get_loss("plugged")


@pytest.mark.parametrize(("name", "owner"), [("ipo", "TRL"), ("offset", "trl_ext.losses.offset.OffsetLoss")])
def test_plugin_whose_name_is_taken(plugin, name, owner):
    plugin(**{name: "plugged:Plugged"})
    for look_up in (lambda: get_loss("unknown"), list_losses):
        with pytest.raises(ValueError, match=rf"'{name}' of the plug-in plugged:Plugged is taken: {owner} has it"):
            look_up()


def test_two_plugins_of_one_name(plugin):
    plugin(mine="plugged:Plugged")
    plugin(package="other", mine="other:Plugged")
    with pytest.raises(ValueError, match=r"'mine' is offered twice, by (plugged|other):Plugged and by"):
        get_loss("mine")


def test_half_precision_columns_are_widened():
    batch = pairs([0.0], score_chosen=torch.tensor([1.5], dtype=torch.bfloat16))
    assert batch.column("score_chosen").dtype == torch.float32
