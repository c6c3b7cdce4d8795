import math
from dataclasses import replace

import numpy as np
import pytest

from analysis.errors import InputError
from analysis.fitting import Method, fit
from analysis.forecast import forecast
from analysis.laws import GENERALISED, HOFFMANN, KAPLAN, PUBLISHED
from analysis.optimum import FlopsPerToken, exponent, log_optimal_params, optimum

SIX_N = FlopsPerToken.six_n()
HOFFMANN_TRUTH = {"A": 30.0, "B": 60.0, "E": 0.3, "alpha": 0.35, "beta": 0.3}
BENT_TRUTH = {"A": 60.0, "B": 130.0, "E": 0.3, "alpha": 0.45, "beta": 0.4, "gamma": 0.6}
KAPLANS = PUBLISHED["kaplan-2020"].constants


@pytest.mark.parametrize(
    ("law", "truth"),
    [(HOFFMANN, HOFFMANN_TRUTH), (GENERALISED, BENT_TRUTH), (KAPLAN, KAPLANS)],
)
def test_a_forecast_from_exact_points_is_the_optimum_of_the_truth(
    mini_sweep, mini_cost, law, truth
):
    found = forecast(fit(law, mini_sweep(law, truth)), 1e13, mini_cost)
    best = optimum(law.theta(truth), 1e13, mini_cost)
    assert found.law == law.name
    assert found.params.estimate == pytest.approx(best.params, rel=1e-5)
    assert found.tokens.estimate == pytest.approx(best.tokens, rel=1e-5)
    assert found.loss.estimate == pytest.approx(best.loss, rel=1e-6)
    assert mini_cost(found.params.estimate) * found.tokens.estimate == pytest.approx(1e13, rel=1e-9)


def test_under_6nd_the_exponents_are_those_of_the_law_at_any_budget(sweep):
    fitted = fit(HOFFMANN, sweep(HOFFMANN, HOFFMANN_TRUTH, noise=0.003))
    a = exponent(fitted.theta)
    for flops in (1e19, 1e24):
        found = forecast(fitted, flops, SIX_N)
        assert found.exponent.estimate == pytest.approx(a, rel=1e-12)
        assert found.tokens_exponent.estimate == pytest.approx(1.0 - a, rel=1e-12)
        width = found.exponent.high - found.exponent.low
        assert found.tokens_exponent.high - found.tokens_exponent.low == pytest.approx(width)


def test_a_forecasts_ends_enclose_it_and_the_exponent_is_local(mini_sweep, mini_cost):
    fitted = fit(HOFFMANN, mini_sweep(HOFFMANN, HOFFMANN_TRUTH, noise=0.005, seed=1))
    near, far = forecast(fitted, 3e12, mini_cost, 0.9), forecast(fitted, 3e15, mini_cost, 0.9)
    for name in ("params", "tokens", "loss", "new_run", "exponent", "tokens_exponent"):
        ends = getattr(near, name)
        assert ends.low < ends.estimate < ends.high, name
        assert ends.level == 0.9
    assert far.loss.high / far.loss.low > near.loss.high / near.loss.low
    chord = log_optimal_params(fitted.theta, 6e12, mini_cost) - log_optimal_params(
        fitted.theta, 1.5e12, mini_cost
    )
    assert near.exponent.estimate == pytest.approx(chord / math.log(4), rel=1e-9)
    assert near.exponent.estimate != pytest.approx(far.exponent.estimate, abs=1e-3)


def test_a_new_run_scatters_around_the_mean(sweep):
    """In the middle of many points the mean is well known, and one run is off by the noise."""
    obs = sweep(HOFFMANN, HOFFMANN_TRUTH, noise=0.01, sizes=31, budgets=6, base=1e12)
    fitted = fit(HOFFMANN, replace(obs, budget=np.full(len(obs), np.nan)))
    found = forecast(fitted, 1e14, SIX_N, 0.9)
    assert math.log(found.loss.high / found.loss.estimate) < 0.005
    assert found.new_run.estimate == found.loss.estimate
    # 1.645 normal standard deviations, a little more for what is estimated
    half = math.log(found.new_run.high / found.new_run.estimate)
    assert half == pytest.approx(1.645 * 0.01, rel=0.12)


def test_one_run_is_never_better_known_than_the_mean(sweep):
    """Also where that is known from the four budgets' shifts, and noise from many points."""
    obs = sweep(HOFFMANN, HOFFMANN_TRUTH, noise=0.003, base=1e12)
    shifts = np.random.default_rng(0).normal(0.0, 0.002, 4)
    shifted = obs.loss * np.exp(shifts[np.unique(obs.budget, return_inverse=True)[1]])
    fitted = fit(GENERALISED, replace(obs, loss=shifted))
    for flops in (2e14, 1e15, 1e17):
        found = forecast(fitted, flops, SIX_N, 0.9)
        assert found.new_run.low < found.loss.low
        assert found.new_run.high > found.loss.high


@pytest.mark.parametrize("flops", [0.0, -1.0, math.inf, math.nan])
def test_a_forecast_at_no_budget_is_refused(mini_sweep, mini_cost, flops):
    fitted = fit(HOFFMANN, mini_sweep(HOFFMANN, HOFFMANN_TRUTH))
    with pytest.raises(InputError, match="positive number of FLOPs"):
        forecast(fitted, flops, mini_cost)


def test_a_fit_that_stopped_at_a_bound_forecasts_no_ends(mini_sweep, mini_cost):
    """Losses that rise with N everywhere: no law has a term for it."""
    obs = mini_sweep(HOFFMANN, HOFFMANN_TRUTH)
    rising = replace(obs, loss=1.0 + 0.02 * np.log(obs.params / obs.params.min()))
    fitted = fit(HOFFMANN, rising)
    assert fitted.status == "at_bound"
    assert not fitted.sound
    found = forecast(fitted, 1e13, mini_cost)
    for part in (found.params, found.tokens, found.loss, found.new_run):
        assert (part.low, part.high) == (0.0, math.inf)
    assert (found.exponent.low, found.exponent.high) == (-math.inf, math.inf)


def test_where_e_is_at_zero_the_loss_reaches_up_and_not_down(sweep):
    """E can only be larger, and with it L: downwards L is known as if E were known to be 0."""
    for seed in range(20):
        obs = sweep(HOFFMANN, {**HOFFMANN_TRUTH, "E": 0.0}, noise=0.005, seed=seed, base=1e10)
        obs = replace(obs, budget=np.full(len(obs), np.nan))
        fitted = fit(HOFFMANN, obs)
        if fitted.status == "e_at_zero":
            break
    known = fit(HOFFMANN, obs, method=Method(pinned={"E": 0.0}))
    free, held = (forecast(item, 1e14, SIX_N) for item in (fitted, known))
    assert free.loss.estimate == pytest.approx(held.loss.estimate, rel=1e-6)
    assert free.loss.low == pytest.approx(held.loss.low, rel=1e-3)
    assert free.loss.high / free.loss.estimate > 1.02 * held.loss.high / held.loss.estimate
    assert free.new_run.high >= free.loss.high
    assert free.new_run.low <= free.loss.low
