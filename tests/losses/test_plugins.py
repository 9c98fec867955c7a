"""Losses that installed packages offer."""

import re
import sys

import pytest

from tests.losses.batches import pairs
from tests.losses.conftest import PLUGIN, REGISTERED
from tests.losses.test_registry import OURS
from trl_ext import get_loss, list_losses
from trl_ext.losses import list_aliases, loss_class, plugin_errors, registry, resolve_name


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
    plugin(code=REGISTERED, plugged="plugged:Plugged")
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
    taken = rf"'{name}' of the plug-in plugged:Plugged is taken: {owner} has it"
    with pytest.raises(ValueError, match=rf"Unknown loss 'unknown'. Known: .*{taken}"):
        get_loss("unknown")
    assert len(plugin_errors()) == 1
    assert re.search(taken, plugin_errors()[0])
    assert list_losses() == OURS  # the others are there
    if name == "ipo":
        with pytest.raises(ValueError, match=taken):
            get_loss(name)
    else:
        assert type(get_loss(name)) is loss_class("odpo")


def test_two_plugins_of_one_name(plugin):
    plugin(mine="plugged:Plugged")
    plugin(package="other", mine="other:Plugged")
    with pytest.raises(ValueError, match=r"'mine' is offered twice, by (plugged|other):Plugged and by"):
        get_loss("mine")
    assert list_losses() == OURS
    assert [text.split(",")[0] for text in plugin_errors()] == ["The loss name 'mine' is offered twice"]


def test_the_same_plugin_found_twice(plugin, tmp_path, monkeypatch):
    """As where a folder stands on the path twice."""
    plugin(plugged="plugged:Plugged")
    entries = list(registry.entry_points(group="trl_ext.losses"))
    monkeypatch.setattr(registry, "entry_points", lambda group: entries * 2)
    assert get_loss("plugged").scale == 1.0
    assert plugin_errors() == []


def test_alias_of_a_plugin_before_its_name(plugin):
    plugin(code=REGISTERED, plugged="plugged:Plugged")
    plugin(package="other", code="import no_such_module", broken="other:Plugged")
    assert get_loss("pl", scale=2.0).scale == 2.0
    assert list_aliases("plugged") == ["pl"]
    with pytest.raises(
        ValueError, match=r"Unknown loss 'plg'. Did you mean 'pl'\? .* The plug-in other:Plugged .*No module"
    ):
        get_loss("plg")


def test_plugin_whose_class_stands_in_another_module(plugin, tmp_path, monkeypatch):
    plugin(package="other", code=PLUGIN)
    plugin(plugged="plugged:Plugged", code="from plugged_inner.losses import Plugged")
    (tmp_path / "plugged_inner").mkdir()
    (tmp_path / "plugged_inner" / "losses.py").write_text(PLUGIN)
    (tmp_path / "plugged_inner" / "__init__.py").write_text("from .losses import Plugged")
    plugin(package="third", inner="plugged_inner:Plugged")
    assert get_loss("inner").scale == 1.0
    assert plugin_errors() == []  # the name is its own, although the class calls itself plugged_inner.losses.Plugged
    assert {"inner", "plugged"} <= set(list_losses())


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_module", "No module named 'no_such_module'"),
        ("assert False", r"AssertionError\(\)"),
        ("Plugged = 3", "needs a dataclass with a `__call__"),
        ("", "has no attribute 'Plugged'"),
    ],
)
def test_a_broken_plugin_is_named_and_the_others_are_there(plugin, code, reason):
    plugin(code=code, broken="plugged:Plugged")
    plugin(package="other", code=PLUGIN, whole="other:Plugged")
    (error,) = plugin_errors()
    assert re.search(rf"The plug-in plugged:Plugged that offers the loss 'broken' cannot be loaded: .*{reason}", error)
    assert get_loss("whole").scale == 1.0
    with pytest.raises(ValueError, match=f"cannot be loaded: .*{reason}"):
        get_loss("broken")


def test_plugin_that_is_offered_by_an_alias(plugin):
    """Its import registers the class under the name; the alias stays an alias."""
    plugin(code=REGISTERED, pl="plugged:Plugged")
    assert resolve_name("pl") == "plugged"
    assert type(get_loss("pl")) is loss_class("plugged")
    assert list_losses() == sorted([*OURS, "plugged"])
    assert list_aliases("plugged") == ["pl"]
    assert plugin_errors() == []
