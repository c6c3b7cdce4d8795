"""Against brute force on grids and scipy's minimisers, closed forms, and published figures."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq, minimize

from analysis.errors import InputError
from analysis.laws import GENERALISED, HOFFMANN, KAPLAN, PUBLISHED, log_loss, loss
from analysis.optimum import FlopsPerToken, optimum
from analysis.tradeoffs import (
    needed_flops,
    served_optimum,
    within,
)

SIX_N = FlopsPerToken.six_n()
CORRECTED = PUBLISHED["besiroglu-2024"].theta
BENT = GENERALISED.theta(
    {"A": 60.0, "B": 130.0, "E": 0.3, "alpha": 0.45, "beta": 0.4, "gamma": 0.6}
)
STEEP = HOFFMANN.theta({"A": 30.0, "B": 60.0, "E": 0.3, "alpha": 0.35, "beta": 0.3})
KAPLANS = PUBLISHED["kaplan-2020"].theta
HOFFMANN_3_DIGITS = HOFFMANN.theta(
    {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.336, "beta": 0.283}
)
"""Hoffmann et al. 2022 with the digits that Sardana et al. 2023 give; the paper prints two."""
EVERY_LAW = [(HOFFMANN, CORRECTED), (HOFFMANN, STEEP), (GENERALISED, BENT), (KAPLAN, KAPLANS)]


def valley(law, theta, flops, cost, low, high, points=400_001):
    """Losses at `flops` on a dense grid of N."""
    x = np.linspace(math.log(low), math.log(high), points)
    y = math.log(flops) - cost.log_and_slope(x)[0]
    return np.exp(x), np.exp(log_loss(theta, x, y))


@pytest.mark.parametrize(("law", "theta"), EVERY_LAW)
@pytest.mark.parametrize("share", [0.001, 0.01])
def test_within_a_share_of_the_best_loss_agrees_with_a_dense_grid(mini_cost, law, theta, share):
    for flops, cost in ((1e21, SIX_N), (1e12, mini_cost)):
        low, high = within(law, theta, flops, cost, share)
        n, losses = valley(law, theta, flops, cost, low / 3, high * 3)
        inside = n[losses <= losses.min() * (1 + share)]
        assert (inside[0], inside[-1]) == pytest.approx((low, high), rel=1e-4)


def test_an_end_that_is_never_reached_is_open():
    """Exponents of a thousandth: the valley has no sides worth the name."""
    flat = HOFFMANN.theta({"A": 1e-3, "B": 1e-3, "E": 2.0, "alpha": 1e-3, "beta": 1e-3})
    assert within(HOFFMANN, flat, 1e21, SIX_N, 0.01) == (0.0, math.inf)


@pytest.mark.parametrize("share", [0.0, -0.1, math.nan, math.inf])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(InputError, match="must be positive"):
        within(HOFFMANN, CORRECTED, 1e21, SIX_N, share)


@pytest.mark.parametrize(("law", "theta"), EVERY_LAW)
@pytest.mark.parametrize("ratio", [0.1, 0.9, 1.0, 1.5, 20.0])
def test_the_need_of_a_size_off_the_optimum_has_a_closed_form_under_6nd(law, theta, ratio):
    """With N = r N_opt at the same C, and bracket ~ C^-(alpha beta / (alpha + beta)) at optima."""
    constants = law.constants(theta)
    alpha, beta = constants["alpha"], constants["beta"]
    flops = 1e21
    n = ratio * optimum(theta, flops, SIX_N).params
    taller = (beta * ratio**-alpha + alpha * ratio**beta) / (alpha + beta)
    expected = flops / taller ** ((alpha + beta) / (alpha * beta))
    assert needed_flops(law, theta, n, flops / 6 / n, SIX_N) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("law", "theta"), EVERY_LAW)
def test_what_is_needed_buys_the_same_loss_under_exact_flops_and_less_does_not(
    mini_cost, law, theta
):
    for n, d in ((1e4, 1e8), (3e5, 1e6), (5e7, 1e8)):
        target = float(loss(theta, np.array(n), np.array(d)))
        needed = needed_flops(law, theta, n, d, mini_cost)
        assert needed < mini_cost(n) * d
        for flops, sign in ((needed, 0.0), (0.99 * needed, 1.0)):
            _, losses = valley(law, theta, flops, mini_cost, n / 1e4, n * 1e4)
            difference = math.log(losses.min() / target)
            assert difference == pytest.approx(0.0, abs=1e-9) if sign == 0 else difference > 0


def test_need_is_told_apart_where_e_hides_it_from_the_loss():
    """At 1e40 FLOPs the loss is E to nine digits; what a doubled size costs is not."""
    n = 2.0 * optimum(CORRECTED, 1e40, SIX_N).params
    near = 2.0 * optimum(CORRECTED, 1e20, SIX_N).params
    far = needed_flops(HOFFMANN, CORRECTED, n, 1e40 / 6 / n, SIX_N) / 1e40
    assert far == pytest.approx(
        needed_flops(HOFFMANN, CORRECTED, near, 1e20 / 6 / near, SIX_N) / 1e20, rel=1e-9
    )


def budget_of(quantity, wanted):
    """The C at which a quantity that changes with it one way has a value."""
    return math.exp(brentq(lambda x: math.log(quantity(math.exp(x)) / wanted), 40.0, 80.0))


@pytest.mark.parametrize(
    ("params", "tokens", "flops"),
    [
        (400e6, 9.2e9, 2.21e19),
        (1e9, 27.1e9, 1.62e20),
        (10e9, 410.1e9, 2.46e22),
        (67e9, 4.1e12, 1.71e24),
        (280e9, 20.1e12, 3.52e25),
        (1e12, 94.1e12, 5.65e26),
    ],
)
def test_the_budget_of_a_size_is_that_of_hoffmanns_table_a3(params, tokens, flops):
    """Their Approach 3; the exponents to three digits put 1T parameters 6% higher."""
    found = budget_of(lambda c: optimum(HOFFMANN_3_DIGITS, c, SIX_N).params, params)
    assert optimum(HOFFMANN_3_DIGITS, found, SIX_N).tokens == pytest.approx(tokens, rel=0.1)
    assert found == pytest.approx(flops, rel=0.1)
    found = budget_of(lambda c: optimum(HOFFMANN_3_DIGITS, c, SIX_N).tokens, tokens)
    assert optimum(HOFFMANN_3_DIGITS, found, SIX_N).params == pytest.approx(params, rel=0.1)


@pytest.mark.parametrize(("law", "theta"), EVERY_LAW)
@pytest.mark.parametrize("served", [1e-3, 1.0, 1e3])
def test_the_served_optimum_is_the_best_split_of_the_budget(mini_cost, law, theta, served):
    """`served` times the tokens that the budget's own optimum trains on, by a minimiser."""
    for flops, cost in ((1e21, SIX_N), (1e13, mini_cost)):
        plain = optimum(theta, flops, cost)
        t = served * plain.tokens
        found = served_optimum(law, theta, flops, t, cost)

        def value(x, flops=flops, cost=cost, t=t):
            d = flops / cost(math.exp(x[0])) - t / 3
            return float(log_loss(theta, x[0], math.log(d))) if d > 0 else 1e3

        best = minimize(
            value, [math.log(found.params) - 0.3], method="Nelder-Mead", options={"xatol": 1e-9}
        )
        assert math.log(found.params) == pytest.approx(best.x[0], abs=1e-4)
        assert math.log(found.loss) == pytest.approx(best.fun, abs=1e-9)
        assert found.training_flops + found.serving_flops == pytest.approx(flops, rel=1e-9)
        assert found.params < plain.params


def test_serving_costs_2nt_where_training_costs_6nd():
    found = served_optimum(HOFFMANN, CORRECTED, 1e23, 1e12, SIX_N)
    assert found.serving_flops == pytest.approx(2 * found.params * 1e12, rel=1e-12)
    assert found.training_flops == pytest.approx(6 * found.params * found.tokens, rel=1e-12)


def test_nothing_served_is_the_plain_optimum(mini_cost):
    for law, theta in EVERY_LAW:
        for flops, cost in ((1e21, SIX_N), (1e13, mini_cost)):
            best = optimum(theta, flops, cost)
            for served in (0.0, 1e-6):
                found = served_optimum(law, theta, flops, served, cost)
                assert found.params == pytest.approx(best.params, rel=1e-9)
                assert found.tokens == pytest.approx(best.tokens, rel=1e-9)
                assert found.loss == pytest.approx(best.loss, rel=1e-12)


def test_a_13b_model_that_serves_two_trillion_tokens_had_better_be_a_7b_one():
    """Sardana et al. 2023, Figure 1: 7B parameters instead save 1.7e22 FLOPs, 17% of the total."""
    theta, served = HOFFMANN_3_DIGITS, 2e12
    training = budget_of(lambda c: optimum(theta, c, SIX_N).params, 13e9)
    plain = optimum(theta, training, SIX_N)
    total = training + 2 * 13e9 * served
    least = budget_of(lambda c: served_optimum(HOFFMANN, theta, c, served, SIX_N).loss, plain.loss)
    best = served_optimum(HOFFMANN, theta, least, served, SIX_N)
    assert best.params == pytest.approx(7e9, rel=0.01)
    assert best.loss == pytest.approx(plain.loss, rel=1e-9)
    assert total - least == pytest.approx(1.7e22, rel=0.01)
    assert 1 - least / total == pytest.approx(0.17, abs=0.005)


@pytest.mark.parametrize(
    ("flops", "served", "message"),
    [
        (1e21, -1.0, "served tokens are -1.0"),
        (1e21, math.nan, "served tokens are nan"),
        (0.0, 1e9, "C is 0.0"),
        (1e12, 1e16, "cannot train a model that serves 1e[+]16 tokens"),
    ],
)
def test_a_service_that_cannot_be_is_refused(flops, served, message):
    with pytest.raises(InputError, match=message):
        served_optimum(HOFFMANN, CORRECTED, flops, served, SIX_N)


@pytest.mark.parametrize("name", ["kaplan-2020-params", "kaplan-2020-tokens", "kaplan-2020-flops"])
def test_a_law_of_one_variable_has_no_optimum_to_leave(name):
    paper = PUBLISHED[name]
    for question in (
        lambda: within(paper.law, paper.theta, 1e21, SIX_N),
        lambda: needed_flops(paper.law, paper.theta, 1e9, 1e10, SIX_N),
        lambda: served_optimum(paper.law, paper.theta, 1e21, 0.0, SIX_N),
    ):
        with pytest.raises(InputError, match="has no compute-optimal model"):
            question()
