"""The studies' arithmetic, against values known from elsewhere."""

import math

import numpy as np
import pytest

from experiments.intervals import (
    Curve,
    difference,
    interval,
    largest_rise,
    mean_curve,
    paired,
    student_cdf,
    student_quantile,
)


@pytest.mark.parametrize(
    ("df", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216), (30, 2.04227)]
)
def test_quantiles_are_those_of_the_tables(df, quantile):
    assert student_quantile(0.975, df) == pytest.approx(quantile, rel=1e-5)
    assert student_cdf(-quantile, df) == pytest.approx(0.025, abs=1e-6)


def test_interval_of_known_values():
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])  # mean 3, deviation √2.5, half width 2.77645·√2.5/√5
    assert (found.mean, found.n) == (3.0, 5)
    assert found.high - 3 == pytest.approx(2.776445 * math.sqrt(0.5), rel=1e-6)
    assert found.low + found.high == pytest.approx(6)


def test_interval_covers_the_mean_95_times_in_100():
    generator = np.random.default_rng(0)
    found = [interval(list(row)) for row in generator.standard_normal((4000, 5))]
    assert 0.94 < np.mean([i.low < 0 < i.high for i in found]) < 0.96


def test_verdicts():
    assert interval([-1.0, -1.1, -0.9]).verdict == "better"
    assert interval([1.0, 1.1, 0.9]).verdict == "worse"
    assert interval([1.0, -1.1, 0.4]).verdict == "undecided"
    assert interval([-1.0]).verdict == "undecided"
    assert interval([-1.0, math.inf]).verdict == "undecided"


def test_pairs_use_common_seeds_and_cancel_common_noise():
    found = paired({0: 1.0, 1: 11.0, 7: 99.0}, {0: 2.0, 1: 12.0, 3: -5.0})
    assert (found.mean, found.low, found.high, found.n) == (-1.0, -1.0, -1.0, 2)
    with pytest.raises(ValueError, match="no seed"):
        paired({0: 1.0}, {1: 1.0})


def line(updates, losses, passes=1, seconds=1.0):
    """A curve with `passes` and `seconds` per update."""
    return Curve(tuple(updates), tuple(passes * u for u in updates), tuple(seconds * u for u in updates), tuple(losses))


def test_curves_are_read_on_straight_lines():
    found = line((0, 10, 20), (5.0, 3.0, 2.0), passes=2)
    assert [found.at("updates", u) for u in (0, 5, 10, 15, 20)] == [5.0, 4.0, 3.0, 2.5, 2.0]
    assert [found.at("passes", p) for p in (0, 10, 20, 30, 40)] == [5.0, 4.0, 3.0, 2.5, 2.0]
    with pytest.raises(ValueError, match="outside"):
        found.at("updates", 21)
    assert line((0, 10), (1.0, math.inf)).at("updates", 0) == 1.0
    # Of two validations at one cost the last counts.
    assert Curve((0, 1, 2), (0, 3, 3), (0, 1, 2), (5.0, 4.0, 3.0)).at("passes", 3) == 3.0


def test_equal_budgets():
    variant, baseline = line((0, 50, 100), (9.0, 3.0, 2.0), 2, 3.0), line((0, 100, 200), (9.0, 2.5, 1.5), 1, 1.5)
    found = {b: difference({0: variant}, {0: baseline}, b) for b in ("updates", "passes", "seconds")}
    assert (found["updates"][0], found["updates"][1].mean) == (100, -0.5)
    assert (found["passes"][0], found["passes"][1].mean) == (200, 0.5)
    assert (found["seconds"][0], found["seconds"][1].mean) == (300, 0.5)
    # A baseline that ends at 100 gradients: the variant is read at 50 updates.
    short = line((0, 100), (9.0, 2.5))
    assert difference({0: variant}, {0: short}, "passes")[1].mean == pytest.approx(0.5)


def test_a_rise_is_measured_from_the_lowest_loss_before():
    assert largest_rise([3.0, 2.0, 2.5, 1.0, 1.2]) == 0.5
    assert largest_rise([3.0, 2.0, 1.0]) == 0.0
    assert largest_rise([3.0, math.inf]) == math.inf


def test_the_update_at_which_a_loss_is_reached():
    curve = Curve((0, 50, 100, 150), (0, 50, 100, 150), (0, 1, 2, 3), (5.0, 3.0, 3.5, 2.0))
    assert [curve.reached(loss) for loss in (6.0, 5.0, 4.0, 3.0)] == [0, 0, 25, 50]
    assert curve.reached(2.75) == 125  # after the rise; 3.5 to 2.0 in 50 updates
    assert curve.reached(1.9) == math.inf
    assert curve.reached(curve.at("updates", 30)) == pytest.approx(30)


def test_mean_curve():
    curves = [Curve((0, 50), (0, 99), (0, s), (5.0, 2.0 + s)) for s in (1.0, 2.0)]
    assert mean_curve(curves) == Curve((0, 50), (0, 99), (0, 1.5), (5.0, 3.5))
