"""Metrics against numbers worked by hand, or by another way."""

import csv
import math

import numpy as np
import pytest
import torch

from trl_ext.metrics import (
    calibration_error,
    gradient_variance,
    kl_to_reference,
    length_bias,
    length_controlled_win_rate,
    preference_accuracy,
    win_rate,
)
from trl_ext.metrics.intervals import bootstrap, mean_interval, wilson


def approx(value, tolerance=1e-9):
    return pytest.approx(value, abs=tolerance)


def test_accuracy_and_margin():
    found = preference_accuracy([3.0, 1.0, 2.0, 0.0], [1.0, 2.0, 2.0, -1.0])  # margins 2, -1, 0, 1
    assert found["preference_accuracy"] == 0.625 and found["ties"] == 0.25 and found["margin"] == 0.5
    # Standard deviation of 2, -1, 0, 1 with 3 in the denominator: sqrt(5 / 3); 1.959964 standard errors
    reach = 1.959963984540054 * math.sqrt(5 / 3) / 2
    assert found["margin_low"] == approx(0.5 - reach) and found["margin_high"] == approx(0.5 + reach)


def test_win_rate():
    found = win_rate([1.0, 0.0, 0.5, 1.0])
    assert found["win_rate"] == 0.625 and found["ties"] == 0.25
    assert (found["win_rate_low"], found["win_rate_high"]) == wilson(0.625, 4)
    assert set(found) == {"win_rate", "win_rate_low", "win_rate_high", "ties"}


def test_win_rate_of_probabilities_has_a_normal_interval():
    found = win_rate([0.8, 0.4, 0.6])  # standard deviation 0.2
    reach = 1.959963984540054 * 0.2 / math.sqrt(3)
    assert found["win_rate"] == approx(0.6)
    assert found["win_rate_low"] == approx(0.6 - reach) and found["win_rate_high"] == approx(0.6 + reach)


def test_win_rate_in_both_orders():
    # A judge that takes the first answer where it is unsure: won both, lost both, won only when first
    found = win_rate([1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0])
    assert found["win_rate"] == 0.5 and found["ties"] == 0.5
    assert found["position_bias"] == 0.5 and found["consistency"] == 0.5


def test_calibration():
    # Confidence 0.8 thrice, right twice; 0.6 twice, right once. Bins of 0.05: two are in use
    up, little = math.log(0.8 / 0.2), math.log(0.6 / 0.4)
    found = calibration_error([up, up, -up, little, -little])
    gap = (3 * (0.8 - 2 / 3) + 2 * (0.6 - 0.5)) / 5
    assert found["calibration_error"] == approx(gap)
    assert found["overconfidence"] == approx((3 * 0.8 + 2 * 0.6) / 5 - 3 / 5)
    assert found["log_loss"] == approx(-(2 * math.log(0.8) + math.log(0.2) + math.log(0.6) + math.log(0.4)) / 5)
    assert found["brier"] == approx((2 * 0.04 + 0.64 + 0.16 + 0.36) / 5)
    assert found["calibration_error_low"] <= gap <= found["calibration_error_high"]


def test_calibration_in_one_bin_and_with_errors_that_cancel():
    up, little = math.log(0.9 / 0.1), math.log(0.6 / 0.4)
    margins = [up, -up, little, little]  # too sure in one bin, too careful in the other
    assert calibration_error(margins)["calibration_error"] == approx((2 * 0.4 + 2 * 0.4) / 4)
    assert calibration_error(margins, bins=1)["calibration_error"] == approx(abs(0.75 - 0.75))
    # Bins of 0.25: 0.7, right, lies in the first, 0.9, wrong, in the second; 1, right, belongs to the last
    seven, nine = math.log(0.7 / 0.3), math.log(0.9 / 0.1)
    assert calibration_error([seven, -nine, 50.0], bins=2)["calibration_error"] == approx((0.3 + abs(1.9 - 1)) / 3)
    assert calibration_error([0.0, 0.0])["calibration_error"] == 0  # ties are half right, and surely so


def test_a_model_that_says_what_is_true_is_calibrated():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, generator=generator, dtype=torch.float64) * 2
    right = torch.rand(20_000, generator=generator, dtype=torch.float64) < logits.abs().sigmoid()
    margins = torch.where(right, logits.abs(), -logits.abs())
    assert calibration_error(margins)["calibration_error"] < 0.015
    assert calibration_error(margins * 3)["overconfidence"] > 0.1


def test_kl():
    found = kl_to_reference([-1.0, -2.0, -3.0], [-2.0, -2.0, -5.0], lengths=[2, 1, 3])
    assert found["kl_to_reference"] == 1.0 and found["kl_per_token"] == 0.5
    assert found["standard_error"] == approx(1 / math.sqrt(3))
    assert math.isnan(kl_to_reference([-1.0], [-2.0])["standard_error"])


def test_kl_of_samples_is_the_kl():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    true = (policy * (policy / reference).log()).sum().item()
    drawn = torch.multinomial(policy, 4000, replacement=True, generator=torch.Generator().manual_seed(0))
    found = kl_to_reference(policy.log()[drawn], reference.log()[drawn])
    assert found["kl_to_reference_low"] < true < found["kl_to_reference_high"]
    assert found["standard_error"] < 0.02


def test_length_bias():
    found = length_bias([5, 2, 3, 8], [3, 4, 3, 4], margins=[1.0, -1.0, 0.5, 3.0])  # gaps 2, -2, 0, 4
    assert found["longer_chosen"] == 0.625 and found["length_gap"] == 1.0
    # Signs of gap times margin: 1, 1, 0, 1
    assert found["longer_preferred"] == 0.875
    assert found["length_correlation"] == approx(np.corrcoef([2, -2, 0, 4], [1, -1, 0.5, 3])[0, 1])
    assert found["length_correlation_low"] <= found["length_correlation"] <= found["length_correlation_high"]
    assert math.isnan(length_bias([1, 2], [1, 2], margins=[1.0, 2.0])["length_correlation"])
    # Of equal values that are not their own mean to the last bit
    assert math.isnan(length_bias([1, 2, 3], [1, 1, 1], margins=[0.1] * 3)["length_correlation"])


def test_gradient_variance():
    # Around the mean (2, 1): squared distances 1 + 1, 0 + 4, 1 + 1; variance 8 / 2
    found = gradient_variance(iter([torch.tensor([1.0, 0.0]), torch.tensor([2.0, 3.0]), torch.tensor([3.0, 0.0])]))
    assert found["gradient_variance"] == approx(4.0) and found["count"] == 3
    assert found["gradient_norm"] == approx(math.sqrt(5))
    assert found["noise_scale"] == approx(4 / (5 - 4 / 3))
    assert gradient_variance([torch.tensor([1.0]), torch.tensor([-1.0])])["noise_scale"] == math.inf
    large = [torch.tensor([1e8 + each], dtype=torch.float64) for each in (0.0, 1.0, 2.0)]
    assert gradient_variance(large)["gradient_variance"] == approx(1.0)  # no difference of large squares


def test_bootstrap_of_a_mean_is_its_normal_interval():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, low, high = mean_interval(values)
    found = bootstrap(lambda column: column.mean(dim=-1), [values])
    assert found == (approx(low, 0.02), approx(high, 0.02))
    assert found == bootstrap(lambda column: column.mean(dim=-1), [values])  # the same each time


# Length-controlled win rate


def test_lengths_that_say_nothing_leave_the_win_rate():
    found = length_controlled_win_rate([1.0, 0.0, 0.5, 0.9], [5, 5, 5, 5], [5, 5, 5, 5])
    assert found["length_controlled_win_rate"] == approx(0.6) and found["length_weight"] == 0


def test_two_lengths_worked_by_hand():
    """Half of the answers are longer by one, half shorter: two logits, whose mean is that of equal length."""
    preferences = [0.8] * 4 + [0.4] * 4
    found = length_controlled_win_rate(preferences, [11] * 4 + [9] * 4, [10] * 8)
    spread = math.sqrt(8 / 7)  # the standard deviation of four -1 and four 1
    long, short = math.log(0.8 / 0.2), math.log(0.4 / 0.6)
    assert found["length_controlled_win_rate"] == approx(1 / (1 + math.exp(-(long + short) / 2)), 1e-7)
    assert found["length_weight"] == approx((short - long) / 2 / math.tanh(1 / spread), 1e-6)
    assert found["win_rate"] == approx(0.6) and found["average_length"] == 10


def test_swapping_the_two_sides_gives_the_rest():
    generator = np.random.default_rng(0)
    preferences, ours, theirs = generator.random(60), generator.integers(1, 50, 60), generator.integers(1, 50, 60)
    difficulty = generator.normal(size=60)
    there = length_controlled_win_rate(preferences, ours, theirs, difficulty)["length_controlled_win_rate"]
    back = length_controlled_win_rate(1 - preferences, theirs, ours, -difficulty)["length_controlled_win_rate"]
    assert there + back == approx(1.0, 1e-7)


def test_a_preference_that_is_missing_counts_in_the_average_alone():
    known, difficulty = [0.9, 0.7, 0.8, 0.8, 0.5, 0.3, 0.4, 0.4], [1.0, -1.0, 0.0, 0.0] * 2
    full = length_controlled_win_rate(known, [11] * 4 + [9] * 4, [10] * 8, difficulty)
    with_hole = length_controlled_win_rate(
        [*known, math.nan], [11] * 4 + [9] * 4 + [10], [10] * 9, [*difficulty, 99.0]
    )
    assert with_hole["win_rate"] == approx(0.6)
    # Of the easiest instruction the fitted probability is 1. (One length more changes the spread, and with it the fit, a little.)
    assert with_hole["length_controlled_win_rate"] == approx((8 * full["length_controlled_win_rate"] + 1) / 9, 1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_model_that_always_wins_or_never(value):
    found = length_controlled_win_rate([value] * 5, [1, 2, 3, 4, 5], [3] * 5)
    assert found["length_controlled_win_rate"] == approx(value, 1e-6)


def alpaca(shared_data):
    folder = shared_data / "alpaca_eval_lengths"

    def table(name):
        with open(folder / name) as file:
            return list(csv.DictReader(file))

    def columns(rows, *names):
        return [[float(row[name]) for row in rows] for name in names]

    names = ("len_output", "len_baseline", "instruction_difficulty")
    steered = table("reference/steered_baselines.csv")
    baselines = [
        dict(zip(("preferences", *names), columns(rows, "expected_preference", *names), strict=True))
        for variant in sorted({row["variant"] for row in steered})
        if (rows := [row for row in steered if row["variant"] == variant])
    ]
    for published in table("leaderboard.csv"):
        yield published, columns(table(f"{published['model']}.csv"), "preference", *names), baselines


def test_alpaca_evals_own_results(shared_data):
    off = {}
    for published, judged, baselines in alpaca(shared_data):
        found = length_controlled_win_rate(*judged, steered_baselines=baselines)
        off[published["model"]] = 100 * found["length_controlled_win_rate"] - float(
            published["length_controlled_win_rate"]
        )
        assert 100 * found["win_rate"] == approx(float(published["win_rate"]), 0.01)
        assert int(found["average_length"]) == int(published["avg_length"])
        assert 100 * win_rate(judged[0])["win_rate"] == approx(float(published["win_rate"]), 0.01)
    assert len(off) == 8 and max(map(abs, off.values())) < 0.5, off


def test_without_the_steered_baselines_it_is_another_number(shared_data):
    off = [
        abs(
            100 * length_controlled_win_rate(*judged)["length_controlled_win_rate"]
            - float(published["length_controlled_win_rate"])
        )
        for published, judged, _ in alpaca(shared_data)
    ]
    assert max(off) > 1


# What is refused

JUDGED = {"preferences": [0.5, 0.5], "len_output": [1, 2], "len_baseline": [2, 2]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: preference_accuracy([1.0, 2.0], [1.0]),
            r"different numbers of rows: \{'chosen_rewards': 2, 'rejected_rewards': 1\}",
        ),
        (lambda: preference_accuracy([1.0, math.nan], [1.0, 1.0]), "`chosen_rewards` is nan in row 1"),
        (lambda: preference_accuracy([], []), "at least one row"),
        (lambda: preference_accuracy([[1.0]], [[1.0]]), "one number per row"),
        (lambda: preference_accuracy(["a"], [1.0]), "`chosen_rewards` must be numbers"),
        (lambda: preference_accuracy(["a"] * 999, [1.0]), r"got \['a', 'a', 'a', 'a', 'a', 'a', \.\.\.\]\."),
        (lambda: preference_accuracy([1.0], [0.0], confidence=95), "between 0 and 1"),
        (lambda: win_rate([0.2, 1.2]), r"`preferences` is 1.2 in row 1; expected finite numbers in \[0, 1\]"),
        (lambda: win_rate([0.2, 0.1], [0.2]), "different numbers of rows"),
        (lambda: win_rate([0.2], [-1.0]), "`swapped_preferences` is -1.0 in row 0"),
        (lambda: calibration_error([1.0], bins=0), "`bins=0` must be a whole number"),
        (lambda: calibration_error([math.inf]), "is inf in row 0"),
        (lambda: kl_to_reference([-1.0], [-1.0], lengths=[1, 2]), "different numbers of rows"),
        (lambda: length_bias([1, 2], [1, 2], margins=[1.0]), "different numbers of rows"),
        (lambda: gradient_variance([torch.ones(2)]), "at least two gradients; got 1"),
        (lambda: gradient_variance([torch.ones(2), torch.ones(3)]), "Gradient 1 has 3 values"),
        (
            lambda: gradient_variance([torch.ones(2), torch.tensor([1.0, math.nan])]),
            "Gradient 1 holds a value that is not finite",
        ),
        (lambda: length_controlled_win_rate(**JUDGED | {"preferences": [math.nan] * 2}), "all rows are NaN"),
        (lambda: length_controlled_win_rate(**JUDGED | {"preferences": [0.5, 1.5]}), "`preferences` is 1.5 in row 1"),
        (lambda: length_controlled_win_rate(**JUDGED | {"len_output": [1]}), "different numbers of rows"),
        (lambda: length_controlled_win_rate(**JUDGED | {"preferences": [0.5]}), "`preferences` has 1 rows"),
        (
            lambda: length_controlled_win_rate(**JUDGED, instruction_difficulty=[1, 2], steered_baselines=[JUDGED]),
            "for the model and for all steered baselines, or for none",
        ),
        (
            lambda: length_controlled_win_rate(**JUDGED, steered_baselines=[JUDGED | {"len_output": [1, math.inf]}]),
            r"`steered_baselines\[0\].len_output` is inf in row 1",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
