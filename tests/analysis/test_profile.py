"""Profiles against the t interval where a law is linear, and against constrained minima."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import least_squares

from analysis.fitting import Method, fit, fit_each
from analysis.intervals import constant_intervals, t_quantile
from analysis.laws import GENERALISED, HOFFMANN, KAPLAN_FLOPS, PUBLISHED
from analysis.optimum import FlopsPerToken, log_optimal_params, log_optimum_jacobian
from analysis.profile import profile

SIX_N = FlopsPerToken.six_n()
TRUTH = PUBLISHED["besiroglu-2024"].constants
TARGET = 6.4e21


def independent(obs):
    """Rows that share nothing: none is of a budget."""
    return replace(obs, budget=np.full(len(obs), np.nan))


def constant(i):
    return lambda theta: (float(theta[i]), np.eye(6)[i])


def log_optimal(theta):
    values, gradient = log_optimum_jacobian(theta, TARGET, SIX_N)
    return float(values[0]), gradient[0]


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_a_law_that_is_linear_has_its_t_interval(sweep, level):
    """ln L = ln A - alpha ln C is a straight line: Student's interval is exact there."""
    obs = independent(sweep(HOFFMANN, TRUTH, noise=0.01))
    found = fit(KAPLAN_FLOPS, obs)
    slope, covariance = np.polyfit(np.log(obs.flops), np.log(obs.loss), 1, cov=True)
    half = t_quantile(26, level) * math.sqrt(covariance[0, 0])
    said = profile(found, obs, constant(3), level)
    assert said.estimate == pytest.approx(-slope[0], rel=1e-8)
    assert (said.low, said.high) == pytest.approx((-slope[0] - half, -slope[0] + half), rel=1e-4)
    assert said.level == level


@pytest.mark.parametrize("law", [HOFFMANN, GENERALISED], ids=lambda law: law.name)
@pytest.mark.parametrize("name", ["E", "alpha", "A"])
def test_at_its_ends_the_best_fit_is_worse_by_the_quantile(sweep, law, name):
    """Pinned there, the rest free, RSS is RSS (1 + t^2 / dof); a fit, from its own starts."""
    obs = independent(sweep(law, {**TRUTH, "gamma": 0.7}, noise=0.004, seed=3))
    found = fit(law, obs)
    said = profile(found, obs, constant({"A": 0, "E": 2, "alpha": 3}[name]), 0.9)
    expected = found.rss * (1 + t_quantile(found.dof, 0.9) ** 2 / found.dof)
    for end in (said.low, said.high):
        value = math.exp(end) if name == "A" else end
        held = fit(law, obs, method=Method(pinned={name: value}))
        assert held.rss == pytest.approx(expected, rel=1e-4)
    assert said.low < said.estimate < said.high


def test_at_the_ends_of_the_optimum_a_constrained_minimum_is_worse_by_the_quantile(sweep):
    """ln A follows from ln N_opt by the closed form; scipy minimises over the other four."""
    obs = independent(sweep(HOFFMANN, TRUTH, noise=0.01, seed=5))
    found = fit(HOFFMANN, obs)
    said = profile(found, obs, log_optimal, 0.9)
    log_n, log_d = np.log(obs.params), np.log(obs.tokens)

    def residual(x, held):
        log_b, e, alpha, beta = x
        balance = (alpha + beta) * held - beta * math.log(TARGET / 6)
        log_a = balance + log_b + math.log(beta / alpha)
        terms = np.exp(log_a - alpha * log_n) + np.exp(log_b - beta * log_d)
        return np.log(obs.loss / (e + terms))

    expected = found.rss * (1 + t_quantile(found.dof, 0.9) ** 2 / found.dof)
    for held, rss in ((said.estimate, found.rss), (said.low, expected), (said.high, expected)):
        options = {"args": (held,), "x_scale": "jac", "xtol": 1e-14, "ftol": 1e-14}
        best = least_squares(residual, found.theta[1:5], max_nfev=5000, **options)
        assert 2 * best.cost == pytest.approx(rss, rel=1e-4)
    assert said.estimate == pytest.approx(log_optimal_params(found.theta, TARGET, SIX_N), rel=1e-12)


def test_on_the_chinchilla_points_it_is_nearly_the_t_interval(chinchilla_points):
    """With 240 points the law hardly bends within the interval."""
    obs = chinchilla_points()
    found = fit(HOFFMANN, obs)
    said, by_t = profile(found, obs, constant(2)), constant_intervals(found)["E"]
    width = by_t.high - by_t.low
    assert said.low == pytest.approx(by_t.low, abs=0.03 * width)
    assert said.high == pytest.approx(by_t.high, abs=0.03 * width)


def test_where_noise_is_large_the_interval_of_e_reaches_further_down_than_up(sweep):
    """Small exponents trade against E without limit, large ones do not."""
    obs = independent(sweep(HOFFMANN, TRUTH, noise=0.02, seed=1))
    found = fit(HOFFMANN, obs)
    assert found.status == "converged"
    said, by_t = profile(found, obs, constant(2)), constant_intervals(found)["E"]
    below, above = said.estimate - said.low, said.high - said.estimate
    assert below > 1.2 * above
    assert said.low < by_t.low
    assert said.high < by_t.high


def test_an_end_that_the_data_do_not_set_is_infinite(sweep):
    """D hardly matters: with beta near 0 its term is a constant that E gives way to."""
    obs = independent(sweep(HOFFMANN, {**TRUTH, "B": 20.0}, noise=0.003, seed=2))
    found = fit(HOFFMANN, obs)
    said = profile(found, obs, constant(2))
    assert said.low == -math.inf
    assert said.estimate < said.high < 2.0
    reached = found.rss * (1 + t_quantile(found.dof, 0.9) ** 2 / found.dof)
    for e in (1.7, 1.4, 1.0):  # forty standard errors below the estimate, and more
        assert fit(HOFFMANN, obs, method=Method(pinned={"E": e})).rss < reached


def test_the_interval_of_e_covers(sweep):
    """Nominally 90%; science: 88 to 94% measured, here less three Monte-Carlo errors."""
    repetitions = 120
    exact = independent(sweep(HOFFMANN, TRUTH))
    losses = [sweep(HOFFMANN, TRUTH, noise=0.003, seed=s).loss for s in range(repetitions)]
    inside = []
    for found, values in zip(fit_each(HOFFMANN, exact, np.array(losses)), losses, strict=True):
        said = profile(found, replace(exact, loss=values), constant(2))
        inside.append(said.low <= TRUTH["E"] <= said.high)
    error = 3 * math.sqrt(0.9 * 0.1 / repetitions)
    assert 0.88 - error < np.mean(inside) < min(0.94 + error, 0.999)


def test_exact_points_leave_no_interval(sweep):
    obs = sweep(HOFFMANN, TRUTH)
    found = replace(fit(HOFFMANN, obs), rss=0.0)
    said = profile(found, obs, constant(2))
    assert said.low == said.estimate == said.high


def test_hubers_loss_and_unsound_fits_have_no_profile(sweep):
    obs = sweep(HOFFMANN, TRUTH, noise=0.003)
    huber = fit(HOFFMANN, obs, method=Method(objective="huber"))
    lost = replace(fit(HOFFMANN, obs), status="not_converged")
    for found in (huber, lost):
        with pytest.raises(ValueError, match="a profile needs a sound least-squares fit"):
            profile(found, obs, constant(2))
