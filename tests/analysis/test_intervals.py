import math
from dataclasses import replace

import numpy as np
import pytest

from analysis.errors import InputError
from analysis.fitting import Method, fit, fit_each
from analysis.forecast import forecast
from analysis.intervals import (
    NO_END,
    Interval,
    add_in_quadrature,
    constant_intervals,
    interval,
    standard_errors,
    t_quantile,
)
from analysis.laws import GENERALISED, HOFFMANN
from analysis.optimum import FlopsPerToken, log_optimal_params, optimum

SIX_N = FlopsPerToken.six_n()
TRUTH = {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658, "gamma": 0.7}
NO_E = {"A": 30.0, "B": 60.0, "E": 0.1, "alpha": 0.35, "beta": 0.3, "gamma": 1.0}


def coverage(sweep, law, truth_law, truth, *, noise, target, repetitions, **design):
    """Share of repetitions whose 90% interval holds the true ln N_opt, ln L and E."""
    best = optimum(truth_law.theta(truth), target, SIX_N)
    exact = sweep(truth_law, truth, **design)
    losses = [
        sweep(truth_law, truth, noise=noise, seed=seed, **design).loss
        for seed in range(repetitions)
    ]
    inside = np.zeros(3)
    for found in fit_each(law, exact, np.array(losses)):
        said = forecast(found, target, SIX_N)
        e = constant_intervals(found, 0.9)["E"]
        truths = ((said.params, best.params), (said.loss, best.loss), (e, truth["E"]))
        inside += [part.low <= value <= part.high for part, value in truths]
    return inside / repetitions


def test_t_quantiles_are_those_of_the_printed_tables():
    assert t_quantile(1, 0.9) == pytest.approx(6.314, abs=5e-4)
    assert t_quantile(23, 0.95) == pytest.approx(2.069, abs=5e-4)
    assert t_quantile(0, 0.9) == math.inf
    with pytest.raises(InputError, match="between 0 and 1"):
        t_quantile(10, 90)


def test_interval_of_a_positive_quantity_is_symmetric_in_its_logarithm():
    ends = interval(100.0, 0.1, 10, 0.9)
    assert math.log(ends.high / 100.0) == pytest.approx(0.1812, abs=1e-4)
    assert ends.low * ends.high == pytest.approx(1e4)
    assert interval(1.0, math.inf, 10, 0.9).high == math.inf
    assert interval(1.0, math.inf, 10, 0.9).low == 0.0
    assert interval(1.0, 1e4, 10, 0.9).high == math.inf  # rather than an overflow
    line = interval(0.5, 0.1, 10, 0.9, scale="linear")
    assert (line.low, line.high) == pytest.approx((0.3188, 0.6812), abs=1e-4)


def test_what_is_known_to_within_a_million_fold_is_not_known():
    """An interval of a million-fold is open on either scale, as is the sum of two half-widths."""
    near, far = 0.999 * math.log(1e6), 1.001 * math.log(1e6)
    t = t_quantile(10, 0.9)
    for half, ends in ((near, True), (far, False)):
        single = interval(1.0, half / t, 10, 0.9)
        both = add_in_quadrature(
            Interval(1.0, math.exp(-0.6 * half), math.exp(0.6 * half), 0.9), 0.8 * half
        )
        for part in (single, both):
            assert (part.low > 0.0, part.high < math.inf) == (ends, ends)
    line = [interval(0.5, size / t, 10, 0.9, scale="linear") for size in (0.99e6, 1.01e6)]
    assert [(part.low, part.high) == (-math.inf, math.inf) for part in line] == [False, True]
    assert NO_END == 1e6


def independent(obs):
    """Rows that share nothing: none is of a budget."""
    return replace(obs, budget=np.full(len(obs), np.nan))


def test_interval_of_a_constant_is_its_standard_error_times_t(sweep):
    found = fit(HOFFMANN, independent(sweep(HOFFMANN, TRUTH, noise=0.003, seed=1)))
    stderr = np.sqrt(np.diag(found.covariance))
    ends = constant_intervals(found, 0.9)
    half = t_quantile(23, 0.9) * stderr
    assert ends["E"].high - ends["E"].estimate == pytest.approx(half[2], rel=1e-9)
    for i, name in ((0, "A"), (1, "B")):
        assert math.log(ends[name].high / ends[name].estimate) == pytest.approx(half[i], rel=1e-9)
    for i, name in ((3, "alpha"), (4, "beta")):
        relative = half[i] / ends[name].estimate
        assert math.log(ends[name].high / ends[name].estimate) == pytest.approx(relative, rel=1e-9)


@pytest.mark.parametrize(
    "function",
    [
        lambda t: np.array([t[3] * t[4], t[2] ** 2]),
        lambda t: np.log([optimum(t, 1e21, SIX_N).params]),
    ],
)
def test_standard_errors_are_those_of_a_bundle_of_draws(sweep, function):
    """The function of thetas drawn from the fit's covariance, narrowed so that it is linear."""
    found = fit(HOFFMANN, independent(sweep(HOFFMANN, TRUTH, noise=0.003, seed=2)))
    narrow = 1e-4
    draws = np.random.default_rng(0).multivariate_normal(
        found.theta, narrow**2 * found.covariance, size=4000, method="eigh"
    )
    spread = np.std([function(theta) for theta in draws], axis=0) / narrow
    values, stderr, dof = standard_errors(found, function)
    assert values == pytest.approx(function(found.theta))
    assert stderr[:, 0] == pytest.approx(spread, rel=0.04)  # three Monte-Carlo errors
    assert np.array_equal(stderr[:, 0], stderr[:, 1])
    assert np.all(dof == 23)


def test_interval_of_the_optimum_follows_from_its_closed_form(sweep):
    """By hand: ln N_opt = (ln(alpha A) - ln(beta B) + beta ln(C/6)) / (alpha + beta)."""
    found = fit(HOFFMANN, sweep(HOFFMANN, TRUTH, noise=0.003, seed=2))
    flops = 1e21
    alpha, beta = found.theta[3:5]
    x = log_optimal_params(found.theta, flops, SIX_N)
    gradient = np.array([1.0, -1.0, 0.0, 1 / alpha - x, math.log(flops / 6) - 1 / beta - x, 0.0])
    gradient /= alpha + beta
    expected = math.sqrt(gradient @ found.covariance @ gradient)
    centre, stderr, dof = standard_errors(
        found, lambda t: np.log([optimum(t, flops, SIX_N).params])
    )
    assert centre[0] == pytest.approx(x)
    assert stderr[0] == pytest.approx(expected, rel=1e-5)
    said = forecast(found, flops, SIX_N, 0.9).params
    half = t_quantile(dof[0, 1], 0.9) * expected
    assert math.log(said.high / said.estimate) == pytest.approx(half, rel=1e-6)


def test_wider_levels_give_wider_intervals_and_exact_data_none(sweep):
    found = fit(HOFFMANN, sweep(HOFFMANN, TRUTH, noise=0.003, seed=3))
    narrow, wide = (constant_intervals(found, level)["alpha"] for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high
    exact = fit(HOFFMANN, sweep(HOFFMANN, TRUTH, noise=0.0, seed=3))
    ends = constant_intervals(exact)["alpha"]
    assert ends.high - ends.low < 1e-6


def at_zero(sweep):
    """A sweep of a truth without E, and a fit to it that ends at E = 0."""
    truth = {**NO_E, "E": 0.0}
    for seed in range(20):
        obs = independent(sweep(HOFFMANN, truth, noise=0.005, seed=seed, base=1e10))
        found = fit(HOFFMANN, obs)
        if found.status == "e_at_zero":
            return obs, found
    raise AssertionError("no seed ends at zero")


def test_an_e_at_zero_has_an_upper_end_that_the_data_set(sweep):
    obs, found = at_zero(sweep)
    e = constant_intervals(found)["E"]
    assert (e.estimate, e.low) == (0.0, 0.0)
    assert 0.0 < e.high < 1.0
    # With E held there, and all else at its best, the residuals are plainly larger: F(1, dof)
    # beyond its 90% point is t beyond its two-sided one. It is curvature that leaves it inexact.
    held = fit(HOFFMANN, obs, method=Method(pinned={"E": e.high}))
    t = math.sqrt((held.rss - found.rss) / (found.rss / found.dof))
    assert t == pytest.approx(t_quantile(found.dof, 0.9), rel=0.35)


def test_an_e_at_zero_is_known_on_the_side_that_it_forbids(sweep):
    """Larger E goes with larger exponents: only downwards is alpha as if E were known to be 0."""
    obs, found = at_zero(sweep)
    known = fit(HOFFMANN, obs, method=Method(pinned={"E": 0.0}))
    assert known.theta == pytest.approx(found.theta, rel=1e-6, abs=1e-9)
    ends, held = (constant_intervals(item)["alpha"] for item in (found, known))
    below, above = (math.log(ends.estimate / ends.low), math.log(ends.high / ends.estimate))
    assert below < 0.8 * above
    assert below == pytest.approx(math.log(held.estimate / held.low), rel=0.01)
    assert above > 1.2 * math.log(held.high / held.estimate)


def test_a_constant_at_the_bound_of_its_search_has_no_ends(sweep):
    found = fit(HOFFMANN, sweep(HOFFMANN, TRUTH, noise=0.003, seed=4))
    stuck = replace(found, free=np.array([True, True, True, False, True, False]))
    ends = constant_intervals(stuck)
    assert (ends["alpha"].low, ends["alpha"].high) == (0.0, math.inf)
    assert "gamma" not in ends
    lost = constant_intervals(replace(found, status="not_converged"))
    assert {(ends.low, ends.high) for ends in lost.values()} == {(0.0, math.inf)}


@pytest.mark.parametrize(
    ("law", "truth", "design", "repetitions"),
    [
        (HOFFMANN, TRUTH, {}, 300),
        (HOFFMANN, TRUTH, {"centre": 60.0}, 200),
        (HOFFMANN, NO_E, {"base": 1e10}, 200),
        (GENERALISED, TRUTH, {}, 120),
        (GENERALISED, NO_E, {"base": 1e10}, 120),
    ],
)
def test_ninety_percent_intervals_hold_the_truth_about_nine_times_in_ten(
    sweep, law, truth, design, repetitions
):
    """At 100x the top budget; science: 88 to 94% measured, here less three Monte-Carlo errors."""
    base = design.get("base", 1e18)
    noise = 0.003
    inside = coverage(
        sweep, law, law, truth, noise=noise, target=6400 * base, repetitions=repetitions, **design
    )
    error = 3 * math.sqrt(0.9 * 0.1 / repetitions)
    assert np.all(inside > 0.89 - error), inside
    assert np.all(inside < min(0.94 + error, 0.999)), inside


def test_a_hoffmann_fit_to_another_truth_does_not_cover_its_loss(sweep):
    """Why a headline needs both laws: noise intervals know nothing of a wrong law."""
    inside = coverage(
        lambda *truth, **design: independent(sweep(*truth, **design)),
        HOFFMANN,
        GENERALISED,
        {**TRUTH, "gamma": 0.6},
        noise=0.001,
        target=6.4e21,
        repetitions=30,
    )
    assert inside[1] == 0.0
