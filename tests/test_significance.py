"""The paired t-test, against printed tables and worked examples."""

from __future__ import annotations

import pytest

from td3_fast.significance import paired_t_test, two_sided

# percentage points of Student's t as they are printed: freedom, two-sided 5 % and 1 %
PRINTED = [
    (1, 12.706, 63.657),
    (2, 4.303, 9.925),
    (3, 3.182, 5.841),
    (4, 2.776, 4.604),
    (5, 2.571, 4.032),
    (6, 2.447, 3.707),
    (7, 2.365, 3.499),
    (8, 2.306, 3.355),
    (9, 2.262, 3.250),
    (30, 2.042, 2.750),
]


@pytest.mark.parametrize(("freedom", "five", "one"), PRINTED)
def test_probabilities_are_those_of_printed_tables(freedom: int, five: float, one: float) -> None:
    assert two_sided(five, freedom) == pytest.approx(0.05, rel=2e-3)
    assert two_sided(-one, freedom) == pytest.approx(0.01, rel=2e-3)
    assert two_sided(0.0, freedom) == 1.0


def test_two_degrees_of_freedom_have_a_closed_form() -> None:
    # P(|t| >= x) = 1 - x / sqrt(x² + 2)
    assert two_sided(1.5, 2) == pytest.approx(1 - 1.5 / (1.5**2 + 2) ** 0.5, abs=1e-15)
    assert 0 <= two_sided(1e9, 5) < 1e-12


def test_a_worked_example() -> None:
    # differences 1, 2, 3: mean 2, variance 1, t = 2 √3, and the closed form for two degrees of freedom
    found = paired_t_test([5.0, 7.0, 9.0], [4.0, 5.0, 6.0])
    assert found is not None
    assert (found.difference, found.pairs) == (2.0, 3)
    assert found.p_value == pytest.approx(1 - 12**0.5 / 14**0.5, abs=1e-15)


def test_sides_may_be_exchanged() -> None:
    first, second = [0.1, 0.4, 0.35, 0.8], [0.2, 0.1, 0.3, 0.7]
    there, back = paired_t_test(first, second), paired_t_test(second, first)
    assert there is not None
    assert back is not None
    assert there.difference == -back.difference
    assert there.p_value == back.p_value


def test_differences_that_are_all_alike() -> None:
    same = paired_t_test([1.0, 2.0], [1.0, 2.0])
    shifted = paired_t_test([1.0, 2.0, 4.0], [0.5, 1.5, 3.5])
    assert same is not None
    assert shifted is not None
    assert (same.p_value, shifted.p_value) == (1.0, 0.0)


def test_one_pair_says_nothing_and_unequal_sides_are_refused() -> None:
    assert paired_t_test([1.0], [2.0]) is None
    with pytest.raises(ValueError, match="in pairs, got 2 and 1"):
        paired_t_test([1.0, 2.0], [2.0])
    with pytest.raises(ValueError, match="at least 1 degree"):
        two_sided(1.0, 0)
