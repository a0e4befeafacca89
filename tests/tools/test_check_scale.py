"""What the tool that compares runs says of numbers that are none."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import check_scale  # noqa: E402
from check_scale import gap, largest, written  # noqa: E402

NAN = float("nan")


@pytest.mark.parametrize(
    ("ours", "theirs"), [([1.0, NAN], [1.0, 2.0]), ([NAN, 1.0], [NAN, 1.0]), ([1.0], []), ([], [])]
)
def test_values_that_are_no_numbers_or_are_missing_are_a_gap(ours, theirs):
    assert math.isnan(gap(ours, theirs)) and written(gap(ours, theirs)) == "nan"


@pytest.mark.parametrize("differences", [[0.5, NAN], [NAN, 0.5]])
def test_a_gap_that_is_no_number_is_the_largest_wherever_it_stands(differences):
    assert math.isnan(largest(differences))
    assert largest([0.5, 0.25]) == 0.5


def test_every_case_has_a_config_of_the_tests():
    from tests.tiny_runs import METHODS

    assert {method for method, _ in check_scale.CASES.values()} <= {*METHODS, "moe1", "moe2"}
