"""The F test of gamma = 1 against scipy's, its size and power, and what its weight does."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.stats import binom, f

from analysis.errors import InputError
from analysis.fitting import Method, fit, fit_each
from analysis.laws import GENERALISED, HOFFMANN, KAPLAN, PUBLISHED
from analysis.pair import GammaTest, Pair, fit_basis, fit_pair, gamma_test, recent

TRUTH = PUBLISHED["besiroglu-2024"].constants
BENT = {"A": 3e3, "B": 2e4, "E": 1.6, "alpha": 0.5, "beta": 0.52, "gamma": 0.6}
KAPLANS = PUBLISHED["kaplan-2020"].constants


def independent(obs):
    """Rows that share nothing: none is of a budget."""
    return replace(obs, budget=np.full(len(obs), np.nan))


def smallest_rss(obs, gamma):
    """By scipy's own least squares from the truth, gamma held or free (None)."""
    log_n, log_d, target = np.log(obs.params), np.log(obs.tokens), np.log(obs.loss)

    def residual(x):
        bracket = np.exp(x[0] - x[3] * log_n) + np.exp(x[1] - x[4] * log_d)
        return np.log(x[2] + bracket ** (x[5] if gamma is None else gamma)) - target

    x = np.array([np.log(TRUTH["A"]), np.log(TRUTH["B"]), 1.8, 0.35, 0.37, 1.0])
    x = x if gamma is None else x[:5]
    options = {"x_scale": "jac", "xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-15, "max_nfev": 20000}
    return 2 * least_squares(residual, x, **options).cost


def test_on_independent_rows_it_is_the_f_test_of_any_textbook(sweep):
    obs = independent(sweep(HOFFMANN, TRUTH, noise=0.003, seed=8))
    found = fit_pair(obs).test
    narrow, wide = smallest_rss(obs, 1.0), smallest_rss(obs, None)
    statistic = (narrow - wide) / (wide / (28 - 6))
    assert found.statistic == pytest.approx(statistic, rel=1e-4)
    assert found.p == pytest.approx(f.sf(statistic, 1, 22), rel=1e-4)
    assert found.weight == pytest.approx(statistic / (1 + statistic), rel=1e-4)


def rejected(sweep, law, truth, *, shift, repetitions, level=0.05):
    """How many of the repetitions reject gamma = 1."""
    obs = sweep(law, truth, budgets=5)
    rng = np.random.default_rng(1)
    noise = 0.003 * rng.standard_normal((repetitions, 35))
    noise += shift * np.repeat(rng.standard_normal((repetitions, 5)), 7, axis=1)
    pairs = (fit_each(item, obs, obs.loss * np.exp(noise)) for item in (HOFFMANN, GENERALISED))
    return sum(gamma_test(*pair).p < level for pair in zip(*pairs, strict=True))


@pytest.mark.parametrize(("shift", "size"), [(0.0, 0.06), (0.003, 0.10)])
def test_hoffmann_truths_are_rejected_as_rarely_as_the_docstring_says(sweep, shift, size):
    """At most the stated size, less what 200 repetitions leave to luck one time in a thousand."""
    found = rejected(sweep, HOFFMANN, TRUTH, shift=shift, repetitions=200)
    assert found <= binom.isf(0.001, 200, size)


@pytest.mark.parametrize(
    ("law", "truth", "shift", "power"),
    [
        (GENERALISED, BENT, 0.0, 0.9),
        (GENERALISED, BENT, 0.003, 0.4),
        (KAPLAN, KAPLANS, 0.0, 0.95),
        (KAPLAN, KAPLANS, 0.003, 0.9),
    ],
)
def test_truths_that_are_bent_are_mostly_rejected(sweep, law, truth, shift, power):
    found = rejected(sweep, law, truth, shift=shift, repetitions=60)
    assert found >= binom.ppf(0.001, 60, power)


def test_shifts_of_whole_budgets_count_less_than_their_rows(sweep):
    """The same losses: where budgets are known to share shifts, less is made of gamma."""
    obs = sweep(HOFFMANN, TRUTH, noise=0.001, budgets=5)
    shift = 0.006 * np.array([1.0, -1.0, -0.5, -1.0, 1.0])  # bent upwards along the budgets
    obs = replace(obs, loss=obs.loss * np.exp(np.repeat(shift, 7)))
    known, unknown = fit_pair(obs), fit_pair(independent(obs))
    assert unknown.test.p < 0.01
    assert known.test.statistic < 0.3 * unknown.test.statistic


def test_hubers_loss_is_tested_by_the_estimate_over_its_error(sweep):
    obs = independent(sweep(GENERALISED, BENT, noise=0.002, seed=2))
    pair = fit_pair(obs, Method(objective="huber", delta=0.002))
    stderr = math.sqrt(pair.generalised.covariance[5, 5])
    t = pair.generalised.theta[5] / stderr
    assert pair.test.statistic == pytest.approx(t**2, rel=1e-9)
    assert pair.test.p == pytest.approx(f.sf(t**2, 1, 22), rel=1e-9)


def test_the_weight_has_no_jump_and_ends_at_the_generalised_law():
    assert [GammaTest(statistic=s, p=0.0).weight for s in (0.0, 1.0, 3.0)] == [0.0, 0.5, 0.75]
    assert GammaTest(statistic=math.inf, p=0.0).weight == 1.0


def test_a_fit_that_is_not_sound_counts_for_nothing(sweep):
    good = fit_pair(sweep(HOFFMANN, TRUTH, noise=0.003))
    assert good.weight == good.test.weight
    lost = {"status": "not_converged"}
    assert replace(good, generalised=replace(good.generalised, **lost)).weight == 0.0
    assert replace(good, hoffmann=replace(good.hoffmann, **lost)).weight == 1.0


def test_with_too_few_rows_for_gamma_there_is_one_law_and_a_note(sweep):
    obs = sweep(HOFFMANN, TRUTH, noise=0.003)
    six = obs.select(np.isin(np.arange(28), [0, 3, 6, 21, 24, 27]))
    pair = fit_pair(six)
    assert (pair.generalised, pair.test, pair.weight) == (None, None, 0.0)
    assert pair.fits == (pair.hoffmann,)
    assert pair.note.startswith("6 observations cannot determine the 6 constants")
    with pytest.raises(InputError, match="5 constants of the hoffmann law"):
        fit_pair(six.select(np.arange(6) > 0))


def test_recent_keeps_the_largest_budgets_and_what_is_as_large(mini_sweep):
    obs = mini_sweep(HOFFMANN, TRUTH)
    assert len(recent(obs)) == 28
    assert set(recent(obs, 2).budget) == {3.6e11, 1.08e12}
    without = np.where(np.isin(np.arange(28), [0, 27]), np.nan, obs.budget)
    last = recent(replace(obs, budget=without), 2)
    assert len(last) == 14
    assert last.flops[np.isnan(last.budget)] == pytest.approx(1.08e12, rel=1e-3)
    unplanned = replace(obs, budget=np.full(28, np.nan))
    assert len(recent(unplanned, 2)) == 28


def test_n_is_fitted_to_the_recent_budgets_and_l_to_all(sweep):
    obs = sweep(HOFFMANN, TRUTH, noise=0.003, budgets=6)
    basis = fit_basis(obs)
    last = fit(HOFFMANN, obs.select(np.arange(42) >= 14))
    assert np.array_equal(basis.recent.hoffmann.theta, last.theta)
    assert np.array_equal(basis.all.hoffmann.theta, fit(HOFFMANN, obs).theta)
    few = fit_basis(obs.select(np.arange(42) < 28))
    assert few.recent is few.all


def test_where_the_recent_budgets_are_too_few_rows_all_are_used(sweep):
    """The last four budgets have a row each; the two before have seven."""
    obs = sweep(HOFFMANN, TRUTH, noise=0.003, budgets=6)
    kept = obs.select((np.arange(42) < 14) | (np.arange(42) % 7 == np.arange(42) // 7))
    assert len(recent(kept)) == 4
    basis = fit_basis(kept)
    assert isinstance(basis.recent, Pair)
    assert basis.recent is basis.all
