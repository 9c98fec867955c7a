"""The catalogue says what the code does."""

import dataclasses
import re
from pathlib import Path

import pytest

import trl_ext.losses
from trl_ext import get_loss, list_losses
from trl_ext.losses import list_aliases, loss_class


README = Path(trl_ext.losses.__file__).with_name("README.md").read_text()
PRODUCT = (Path(__file__).resolve().parents[2] / "README.md").read_text()
ROWS = {
    cells[0].strip("`"): cells
    for cells in (
        [cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("| `")
    )
}


def section(name):
    return README.split(f"\n## {name}\n")[1].split("\n## ")[0]


def test_has_every_loss_and_no_other():
    assert sorted(ROWS) == list_losses()
    headings = re.findall(r"^## (.*)$", README, flags=re.MULTILINE)
    assert sorted(set(headings) - {"One of your own"}) == list_losses()


@pytest.mark.parametrize("name", list_losses())
def test_row(name):
    cls = loss_class(name)
    _, aliases, hyperparameters, columns, papers = ROWS[name]
    assert re.findall(r"`(\w+)`", aliases) == list_aliases(name)
    expected = [(field.name, repr(getattr(get_loss(name), field.name))) for field in dataclasses.fields(cls)]
    assert re.findall(r"`(\w+)` \(([^)]*)\)", hyperparameters) == expected
    optional = cls.optional_columns if isinstance(cls.optional_columns, tuple) else ()
    assert re.findall(r"`(\w+)`", columns) == [*cls.columns, *optional]
    assert columns.startswith("optional") == (not cls.columns and bool(optional))
    assert ", ".join(re.findall(r"\[([\d.]+)\]", papers)) == cls.paper


@pytest.mark.parametrize("name", list_losses())
def test_section(name):
    text = section(name)
    assert re.findall(r"^- `(\w+)`", text, flags=re.MULTILINE) == [
        f.name for f in dataclasses.fields(loss_class(name))
    ]
    for word in ("L ", "How sure:", "not"):
        assert word in text


@pytest.mark.parametrize("name", [name for name in list_losses() if loss_class(name).evidence])
def test_says_how_sure_a_formula_is(name):
    """In the catalogue with its own words, and in a sentence of the class."""
    how_sure = section(name).split("How sure:")[1].lower()
    evidence = loss_class(name).evidence
    words = [word for word in ("third part", "recalled", " ours") if word in evidence]
    assert words and all(word in how_sure for word in words)
    assert evidence.endswith(".")


@pytest.mark.parametrize("name", list_losses())
def test_readme_of_the_product(name):
    table = PRODUCT.split("| `loss_type` | aliases |")[1].split("\n\n")[0]
    (row,) = (line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
    assert re.findall(r"`(\w+)`", row.split("|")[2]) == list_aliases(name)
