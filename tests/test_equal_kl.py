"""Paths of trainings read at equal KL."""

import math

import pytest

from trl_ext.demo.equal_kl import at_equal_kl, at_kl, common_kl


def path(*points):
    return [{"kl": kl, "reward": reward, "length": 10 * reward} for kl, reward in points]


def test_a_path_is_read_between_its_points_in_the_root_of_kl():
    points = path((0, 0), (4, 3), (1, 1))
    assert at_kl(points, 2.25) == pytest.approx(2.0)  # root 1.5, half way from 1 to 2
    assert at_kl(points, 0.25) == pytest.approx(0.5)
    assert at_kl(points, 0.25, "length") == pytest.approx(5.0)
    assert at_kl(path((0, 0), (4, 3), (9, 5)), 6.25) == pytest.approx(4.0)
    assert (at_kl(points, 0), at_kl(points, 1), at_kl(points, 4)) == (0, 1, 3)
    assert at_kl(points, 4.01) is None


def test_a_kl_that_sampling_makes_negative_counts_as_none():
    assert at_kl(path((-0.1, 1), (4, 3)), 1) == pytest.approx(2.0)
    assert common_kl([path((-0.2, 0), (-0.1, 1))]) == 0


def test_the_common_kl_is_the_largest_that_every_path_reaches():
    assert common_kl([path((0, 0), (5, 1), (3, 2)), path((0, 0), (4, 1)), path((0, 0), (9, 1))]) == 4


def test_at_equal_kl_is_the_mean_of_a_quarter_a_half_and_all():
    # Of 4: root 1, root 1.4142 and root 2, on a line of slope 3
    assert at_equal_kl(path((0, 0), (9, 9)), 4) == pytest.approx(3 * (1 + math.sqrt(2) + 2) / 3)
