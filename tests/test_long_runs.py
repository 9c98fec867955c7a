"""The benchmark of long runs: its lines by hand, and each of its parts at the smallest size."""

import pytest

from tests.benchmark_modules import module
from trl_ext.demo import data, world


@pytest.fixture
def long_runs():
    return module("long_runs")


def test_a_line_by_hand(long_runs):
    """The first fifth does not count; of ten more values, each its own block, the line is that of least squares."""
    values = [99.0, 0.0, *range(100, 108)]
    found = long_runs.slope([float(value) for value in values])
    # One more per step: of ten steps 10, in per cent of the median, 103.5
    assert found == pytest.approx({"level": 103.5, "change": 1000 / 103.5, "low": 1000 / 103.5, "high": 1000 / 103.5})
    assert long_runs.verdict(found, 2.0) == "rises" and long_runs.verdict(found, 10.0) == "flat"
    assert long_runs.verdict({"change": -3.0, "low": -4.0, "high": -1.0}, 2.0) == "falls"
    assert long_runs.verdict({"change": 1.0, "low": -1.0, "high": 3.0}, 2.0) == "undecided"
    # Slope -1/5, of the sum of squares 4/5 is left: a standard error of sqrt(4/5 / 2 / 5); the level is 1/2, t of two degrees 4.3027
    found = long_runs.slope([7.0, 1.0, 0.0, 1.0, 0.0])
    reach = 4.302653 * (0.8 / 2 / 5) ** 0.5
    assert found["change"] == pytest.approx(-0.2 * 1000) and found["high"] == pytest.approx(
        (-0.2 + reach) * 1000, rel=1e-5
    )
    assert long_runs.verdict(found, 2.0) == "undecided"


def test_neighbours_are_one_block(long_runs):
    """A hundred steps after the warm-up are sixteen medians: one slow step in a block says nothing."""
    values = [5.0] * 125
    values[60] = 1e6
    assert long_runs.slope(values) == {"level": 5.0, "change": 0.0, "low": 0.0, "high": 0.0}
    # Of seconds the fastest tenth, also where most of a block is slow; one that grows is seen in it
    values = [5.0 if i % 3 else 1.0 for i in range(125)]
    assert long_runs.slope(values, long_runs.fastest_tenth) == {"level": 1.0, "change": 0.0, "low": 0.0, "high": 0.0}
    assert long_runs.slope([value + i for i, value in enumerate(values)], long_runs.fastest_tenth)["low"] > 0
    with pytest.raises(ValueError, match="2 steps are too few for a line"):
        long_runs.slope([1.0, 2.0])


def test_too_few_steps_are_refused(long_runs, capsys):
    with pytest.raises(SystemExit):
        long_runs.arguments(["--rounds", "3"])
    assert "{'rounds': 3} are too few for a line; give at least 4." in capsys.readouterr().err


@pytest.mark.parametrize(("part", "length"), [("offline", 3), ("online", 2), ("rounds", 2)])
def test_each_part_is_measured_at_each_step(part, length, long_runs, tmp_path, monkeypatch):
    for name, value in {"FINE_TUNING_STEPS": 1, "PAIRS": 16, "HELD_OUT_PAIRS": 4}.items():
        monkeypatch.setattr(data, name, value)
    if part == "rounds":
        monkeypatch.setattr("trl_ext.demo.world.PROMPTS", world.PROMPTS[:6])
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "cache"))
    points = long_runs.PARTS[part](length, tmp_path)
    assert len(points) == length
    assert all(50 < point["memory"] < 1e5 and point["threads"] >= 1 and point["files"] >= 3 for point in points)
    assert all(point["seconds"] > 0 for point in points)
