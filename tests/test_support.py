"""docs/support.md says what the tests say."""

import ast
import functools
import re
from collections import Counter
from pathlib import Path

import pytest

import trl_ext
from tests import support
from tests.distributed.runs import CASES, CORE, PLACES, REFUSED
from tests.helpers import build
from tests.online.runs import online
from tests.test_rounds import prompts, settings  # noqa: F401  (a fixture)
from trl_ext.rounds import IterativeDPO, RoundsConfig
from trl_ext.trainers.reward import RewardConfig


ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "support.md").read_text()
FOUND = [
    (heading, row, column, found)
    for heading, rows in support.ALONE.items()
    for row, cells in rows.items()
    for column, found in cells.items()
]
REFUSALS = [entry for entry in FOUND if isinstance(entry[3], support.Refusal)]


@pytest.mark.parametrize("heading", support.tables())
def test_tables_are_those_of_the_tests(heading):
    """To write them anew: `python -m tests.support`."""
    section = re.search(rf"^### {heading}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]
    assert [line for line in section.splitlines() if line.startswith("|")] == support.tables()[heading].splitlines()


def test_every_case_has_one_row_and_every_row_its_cases():
    named = Counter(name for rows in support.SEVERAL.values() for cases in rows.values() for name in cases)
    assert named == dict.fromkeys(CASES, 1)
    assert all(set(names) <= set(CASES) for names in (*PLACES.values(), *CORE.values()))
    assert all(len(names) == len(set(names)) for names in (*PLACES.values(), *CORE.values()))
    assert all(set(names) <= set(PLACES[place]) for place, names in CORE.items())


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_where_a_row_is_tested_its_cases_run(place):
    for rows in support.SEVERAL.values():
        for row, cases in rows.items():
            here = [name for name in cases if name in PLACES[place]]
            said = support.cell(cases, place)
            assert said == (
                support.UNTRIED if not here else support.REFUSED_CELL if here[0] in REFUSED else support.TESTED
            )
            assert len({name in REFUSED for name in here}) < 2, f"{row} is both tested and refused"


@functools.cache
def functions(path: str) -> set[str]:
    return {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_is_named_exists():
    named = [found for *_, found in FOUND if isinstance(found, str) and found != support.NONE]
    assert len(named) > 30
    for found in named:
        path, _, function = found.partition("::")
        assert function in functions(path), found


@pytest.mark.parametrize(
    ("heading", "row", "trainer", "refusal"), REFUSALS, ids=[f"{r}-{c}" for _, r, c, _ in REFUSALS]
)
def test_what_is_refused(heading, row, trainer, refusal, tiny_model_dir, tmp_path, prompts):  # noqa: F811
    options = dict(refusal.options)
    with pytest.raises(ValueError, match=re.escape(refusal.message)):
        if trainer == "rounds":
            grouped = {"pairing": "group"} if "trpa" in options.values() else {}
            IterativeDPO(
                RoundsConfig(**settings(tiny_model_dir, prompts, tmp_path / "run", training=options, **grouped))
            )
        elif trainer == "`DPOTrainer`":
            build(trl_ext.DPOTrainer, trl_ext.DPOConfig, tiny_model_dir, tmp_path, **options)
        else:
            online(tiny_model_dir, tmp_path, **options)
    assert refusal.message in PAGE, f"docs/support.md does not say: {refusal.message}"


def test_trainers_without_a_backend_have_none():
    for config in (RewardConfig, trl_ext.SFTConfig):
        assert not hasattr(config, "logprob_backend")
