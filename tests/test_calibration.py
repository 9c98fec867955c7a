"""How well scores explain labels, and the temperature that explains them best."""

import io
import math
import re

import pytest
import rich.console
import torch
from datasets import Dataset

from trl_ext.data import calibrate, fit_temperature


def test_temperature_recovers_the_unit():
    torch.manual_seed(0)
    logits = torch.randn(20_000, dtype=torch.float64) * 2
    labels = torch.rand(20_000, dtype=torch.float64) < torch.sigmoid(logits)
    margins = torch.where(labels, logits, -logits) * 3.0
    assert fit_temperature(margins.tolist()) == pytest.approx(3.0, rel=0.05)
    report = calibrate(margins.tolist())
    assert report.nll_fitted < report.nll and report.accuracy == pytest.approx((margins > 0).double().mean().item())


def test_temperature_is_the_minimum():
    # sigmoid(1 / T) = 3 / 4
    assert fit_temperature([1.0, 1.0, 1.0, -1.0]) == pytest.approx(1 / math.log(3), rel=1e-9)
    assert fit_temperature([50.0, 50.0, 50.0, -50.0]) == pytest.approx(50 / math.log(3), rel=1e-9)
    margins = [2.0, 1.0, -0.5, 3.0]
    fitted = fit_temperature(margins)
    nll = lambda t: sum(math.log1p(math.exp(-m / t)) for m in margins)  # noqa: E731
    assert nll(fitted) < min(nll(fitted * 1.01), nll(fitted / 1.01))


def test_calibration():
    report = calibrate([2.0, 0.0, -1.0, 0.0, 1.0])
    assert (report.pairs, report.accuracy, report.contradicted, report.ties) == (5, pytest.approx(0.6), 0.2, 0.4)
    assert report.margin_mean == pytest.approx(0.4) and report.margin_std == pytest.approx(math.sqrt(6 / 5 - 0.16))
    expected = [math.log1p(math.exp(-m)) for m in (2.0, 0.0, -1.0, 0.0, 1.0)]
    assert report.nll == pytest.approx(sum(expected) / 5) and report.margins == [2.0, 0.0, -1.0, 0.0, 1.0]
    report = calibrate([1.0, 1.0, 1.0, -1.0])
    assert report.nll_fitted == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert report.remark == "" and "margins=" not in repr(report) and len(repr(calibrate([1.0, -2.0] * 999))) < 500
    # Float32 would lose the second margin beside the first
    assert calibrate([1.0, 1e-9, -1.0]).margin_mean == pytest.approx(1e-9 / 3, rel=1e-6)
    scored = Dataset.from_list(
        [{"score_chosen": 3.0, "score_rejected": 1.0}, {"score_chosen": 0.0, "score_rejected": 1.0}]
    )
    assert calibrate(scored).margins == [2.0, -1.0]
    with pytest.raises(ValueError, match=r"lacks \['score_rejected'\]"):
        calibrate(scored.remove_columns("score_rejected"))
    for bad in ([], [1.0, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="at least one pair, and finite scores"):
            calibrate(bad)


def test_the_table_of_a_calibration():
    console = rich.console.Console(record=True, width=100, file=io.StringIO())
    console.print(calibrate([1.0, 1.0, 1.0, -1.0]).table())
    console.print(calibrate([1.0, 2.0]).table())
    lines = [re.sub(r"[│ ]+", " ", line).strip() for line in console.export_text().split("\n")]
    for line in (
        "pairs 4", "chosen scores more 75.0%", "labels contradicted 25.0%", "equal scores 0.0%", "margin 0.500 ± 0.866",
        "temperature of best fit 0.9102", "nats per pair, as they are 0.5633", "nats per pair, fitted 0.5623",
        "nats per pair, a coin 0.6931", "temperature of best fit -", "nats per pair, fitted -",
    ):  # fmt: skip
        assert line in lines, line
    assert any("No temperature fits" in line for line in lines)


def test_where_no_temperature_fits(tmp_path):
    for margins, message in (
        ([1.0, 2.0], "no label is contradicted"),
        ([0.0, 0.5], "no label is contradicted"),
        ([-1.0, 0.5], "no better than a coin"),
        ([-1.0, 1.0], "no better than a coin"),
        ([-1e-3, 5e-4], "no better than a coin"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_temperature(margins)
        report = calibrate(margins)
        assert report.temperature is report.nll_fitted is None and message in report.remark
    report.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


def test_what_is_drawn(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    calibrate([1.0, 2.0, -1.0, 0.5]).plot(tmp_path / "plot.png")
    (axes,) = drawn[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == (
        "score of the chosen minus that of the rejected completion",
        "pairs",
        "75% of the labels agree",
    )
    assert len(axes.patches) == 40 and sum(bar.get_height() for bar in axes.patches) == 4
    assert axes.get_lines()[0].get_xdata() == [0, 0] and (tmp_path / "plot.png").exists()
