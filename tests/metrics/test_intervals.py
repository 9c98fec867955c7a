"""Intervals of a share, and of a few values."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext.metrics.intervals import student_interval, student_quantile, wilson


def test_wilsons_interval():
    # Textbook values (Newcombe 1998, table I): 81 of 263 and 0 of 20
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1.0, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200), st.floats(0, 1), st.floats(0.5, 0.999))
def test_wilsons_interval_holds_the_share(count, share, confidence):
    low, high = wilson(share, count, confidence)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1


@pytest.mark.parametrize(
    ("confidence", "freedom", "expected"),
    # Tables of Student's t, two-sided
    [
        (0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 3, 3.182), (0.95, 4, 2.776), (0.95, 5, 2.571), (0.95, 9, 2.262),
        (0.95, 10, 2.228), (0.95, 30, 2.042), (0.95, 100, 1.984), (0.99, 3, 5.841), (0.9, 4, 2.132),
    ],
)  # fmt: skip
def test_quantiles_of_student(confidence, freedom, expected):
    assert student_quantile(confidence, freedom) == pytest.approx(expected, abs=5e-4)


def test_an_interval_is_that_of_student():
    mean, low, high = student_interval([1.0, 2.0, 3.0])
    # The standard deviation is 1, and t for two degrees of freedom 4.303
    assert mean == 2.0
    assert (low, high) == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4)
    assert student_interval([1.0]) == (1.0, -math.inf, math.inf)
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        student_interval([1.0, 2.0], confidence=95)
