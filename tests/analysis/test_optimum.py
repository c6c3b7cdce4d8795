"""Closed forms, minimisers and an exactly known cost, and published verdicts."""

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar

from analysis.errors import InputError
from analysis.laws import GENERALISED, HOFFMANN, KAPLAN, PUBLISHED, log_loss, loss
from analysis.observations import Observations
from analysis.optimum import (
    FlopsPerToken,
    exponent,
    local_exponents,
    log_optimal_params,
    log_optimum_jacobian,
    optimum,
)

SIX_N = FlopsPerToken.six_n()
CORRECTED = PUBLISHED["besiroglu-2024"].theta
BENT = GENERALISED.theta(
    {"A": 60.0, "B": 130.0, "E": 0.3, "alpha": 0.45, "beta": 0.4, "gamma": 0.6}
)
SMALL = HOFFMANN.theta({"A": 30.0, "B": 60.0, "E": 0.3, "alpha": 0.35, "beta": 0.3})
KAPLANS = PUBLISHED["kaplan-2020"].theta
EVERY_LAW = [(HOFFMANN, CORRECTED), (HOFFMANN, SMALL), (GENERALISED, BENT), (KAPLAN, KAPLANS)]
WIDTHS = np.array([12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128.0])


def mini_cost_at(width):
    """N and FLOPs per token of the mini shapes, depth 2, context 64, 256 symbols."""
    return 24.0 * width**2, 6 * (24.0 * width**2 + 256 * width) + 6 * 2 * 2 * width * 65 / 2


@pytest.mark.parametrize(("law", "theta"), EVERY_LAW)
def test_optimum_under_6nd_is_the_closed_form_of_hoffmann(law, theta):
    """Eq. 4: N_opt = G (C/6)^a, D_opt = (C/6)^b / G, G = (alpha A / (beta B))^(1/(alpha+beta))."""
    log_a, log_b, _, alpha, beta, _ = theta
    log_g = (np.log(alpha) + log_a - np.log(beta) - log_b) / (alpha + beta)
    a, b = beta / (alpha + beta), alpha / (alpha + beta)
    for flops in (1e18, 5.88e23, 1e28):
        best = optimum(theta, flops, SIX_N)
        assert best.params == pytest.approx(np.exp(log_g + a * np.log(flops / 6)), rel=1e-12)
        assert best.tokens == pytest.approx(np.exp(b * np.log(flops / 6) - log_g), rel=1e-12)
        assert best.loss == pytest.approx(loss(theta, best.params, best.tokens), rel=1e-12)


@pytest.mark.parametrize(("law", "theta"), EVERY_LAW)
def test_closed_form_is_where_a_minimiser_ends(law, theta):
    for flops in (1e18, 1e21, 1e25):
        found = minimize_scalar(
            lambda x, c=flops: log_loss(theta, x, np.log(c / 6) - x),
            bounds=(10, 40),
            method="bounded",
            options={"xatol": 1e-12},
        )
        assert log_optimal_params(theta, flops, SIX_N) == pytest.approx(found.x, abs=1e-5)


def test_kaplans_law_of_both_has_the_exponent_that_follows_from_its_table():
    """alpha_N = .076 and alpha_D = .103 under 6ND: a = 1 / (1 + .076/.103) = .575."""
    assert exponent(KAPLANS) == pytest.approx(0.575, abs=5e-4)
    ends = [optimum(KAPLANS, c, SIX_N).params for c in (1e20, 1e21)]
    assert np.log10(ends[1] / ends[0]) == pytest.approx(0.575, abs=5e-4)


def test_tabulated_six_n_gives_the_closed_form_to_1e_8():
    n = np.geomspace(1e5, 1e12, 30)
    tabulated = FlopsPerToken(n, 6 * n)
    for flops in (1e15, 3e19, 1e24, 1e29):  # the last lies beyond the table
        closed = log_optimal_params(CORRECTED, flops, SIX_N)
        found = log_optimal_params(CORRECTED, flops, tabulated)
        assert found == pytest.approx(closed, abs=1e-8)
        assert local_exponents(CORRECTED, flops, tabulated)[0] == pytest.approx(
            exponent(CORRECTED), abs=1e-8
        )


def test_optimum_under_exact_flops_is_where_the_loss_is_least():
    n, cost = mini_cost_at(WIDTHS)
    c = FlopsPerToken(n, cost)
    for flops in (4e10, 1.08e12):
        best = optimum(BENT, flops, c)
        assert c(best.params) * best.tokens == pytest.approx(flops, rel=1e-12)
        around = best.params * np.array([0.5, 0.99, 0.999, 1.001, 1.01, 2.0])
        others = [loss(BENT, x, flops / c(x)) for x in around]
        assert min(others) > best.loss
        # The derivative vanishes: a step of 1e-4 either way costs the same to second order.
        low, high = (loss(BENT, x, flops / c(x)) for x in best.params * np.exp([-1e-4, 1e-4]))
        assert abs(high - low) < 1e-2 * (low + high - 2 * best.loss)


def test_optimum_and_its_exponent_agree_with_the_true_cost_between_and_beyond_the_points():
    """With c(N) known exactly, d ln bracket / d ln N = 0 solved independently."""
    n, cost = mini_cost_at(WIDTHS)
    c = FlopsPerToken(n, cost)

    def exact(flops):
        def slope(width, h=1e-4):
            (n1, c1), (n2, c2) = mini_cost_at(width * (1 - h)), mini_cost_at(width * (1 + h))
            one = log_loss(SMALL, np.log(n1), np.log(flops / c1))
            two = log_loss(SMALL, np.log(n2), np.log(flops / c2))
            return two - one

        return np.log(mini_cost_at(brentq(slope, 2, 2e4, xtol=1e-10))[0])

    for flops, tolerance in ((4e10, 5e-3), (1.08e12, 5e-3), (1e16, 0.02)):
        assert log_optimal_params(SMALL, flops, c) == pytest.approx(exact(flops), abs=tolerance)
    true_exponent = (exact(6e11) - exact(1.5e11)) / np.log(4)
    assert local_exponents(SMALL, 3e11, c)[0] == pytest.approx(true_exponent, abs=5e-3)
    assert true_exponent < exponent(SMALL) - 0.01  # what 6 N D would have missed


@pytest.mark.parametrize(("law", "theta"), EVERY_LAW)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("reach", [1.0, 3.7, 100.0])
def test_gradients_of_the_optimum_are_its_finite_differences(mini_cost, law, theta, exact, reach):
    """N, D and L as `optimum` finds them, a and b as chords from half to twice C."""
    cost, flops = (mini_cost, 2e11 * reach) if exact else (SIX_N, 1e20 * reach)

    def implied(theta):
        here, low, high = (optimum(theta, flops * f, cost) for f in (1.0, 0.5, 2.0))
        slopes = np.log([high.params / low.params, high.tokens / low.tokens]) / np.log(4.0)
        return np.append(np.log([here.params, here.tokens, here.loss]), slopes)

    values, gradient = log_optimum_jacobian(theta, flops, cost)
    assert (values.shape, gradient.shape) == ((5,), (5, 6))
    assert values == pytest.approx(implied(theta), rel=1e-10, abs=1e-12)
    for i in np.flatnonzero(law.free):
        step = 1e-5 * np.eye(6)[i]
        found = (implied(theta + step) - implied(theta - step)) / 2e-5
        assert gradient[:, i] == pytest.approx(found, rel=2e-4, abs=1e-5)


def test_what_is_left_of_a_budget_goes_to_tokens(mini_cost):
    """Under c(N) D = C the exponents of N and D are related by the slope of c: b = 1 - a d ln c."""
    values, gradient = log_optimum_jacobian(BENT, 1e11, mini_cost)
    assert values[0] == pytest.approx(log_optimal_params(BENT, 1e11, mini_cost))
    ends = [log_optimal_params(BENT, c, mini_cost) for c in (5e10, 2e11)]
    log_c = [np.log(mini_cost(np.exp(x))) for x in ends]
    assert values[4] == pytest.approx(1.0 - (log_c[1] - log_c[0]) / np.log(4.0), rel=1e-9)
    assert values[3] + values[4] > 1.01  # which they would not exceed under 6ND
    assert gradient[2, 2] == pytest.approx(1.0 / np.exp(values[2]), rel=1e-12)  # d ln L / d E


def test_flops_per_token_are_exact_at_the_points_and_within_1_percent_far_above():
    n, cost = mini_cost_at(WIDTHS)
    c = FlopsPerToken(n, cost)
    assert [c(x) for x in n] == pytest.approx(cost, rel=1e-12)
    far, far_cost = mini_cost_at(1280.0)  # 100x in N
    assert c(far) == pytest.approx(far_cost, rel=0.01)
    assert c.log_and_slope(np.log(far))[1] == pytest.approx(1.0, abs=0.01)


def test_flops_per_token_of_observations_average_what_is_nearly_one_size():
    n = np.array([1e6, 1.01e6, 1e7, 1e7])
    d = np.array([1e9, 1e9, 1e8, 2e8])
    ratio = np.array([1.1, 1.3, 1.0, 1.0])
    nan = np.full(4, np.nan)
    c = FlopsPerToken.from_observations(
        Observations(
            params=n, tokens=d, flops=6 * n * d * ratio, loss=nan, loss_stderr=nan, budget=nan
        )
    )
    assert len(c.params) == 2
    at = np.sqrt(1e6 * 1.01e6)
    assert c(at) / (6 * at) == pytest.approx(np.sqrt(1.1 * 1.3), rel=1e-9)


def test_flops_per_token_that_fall_with_size_are_taken_as_noise():
    n, nan = np.array([1e6, 2e6, 4e6]), np.full(3, np.nan)
    noisy = 6 * n * 1e9 * np.array([1.0, 0.3, 1.0])
    c = FlopsPerToken.from_observations(
        Observations(
            params=n, tokens=np.full(3, 1e9), flops=noisy, loss=nan, loss_stderr=nan, budget=nan
        )
    )
    assert c.proportional
    with pytest.raises(InputError, match="must rise"):
        FlopsPerToken(np.array([1.0, 2.0]), np.array([3.0, 2.0]))


@pytest.mark.parametrize("flops", np.geomspace(1e17, 1e24, 15))
@pytest.mark.parametrize("excess", [1.15, 2.0])
def test_where_a_noisy_cost_makes_several_valleys_the_lowest_is_taken(flops, excess):
    """Every other size costs more; against a dense grid. The last valleys lie beyond all sizes."""
    n = np.geomspace(1e6, 1e11, 11)
    cost = FlopsPerToken(n, 6 * n * np.where(np.arange(11) % 2, excess, 1.0))
    x = np.linspace(np.log(1e5), np.log(1e13), 400_001)
    losses = log_loss(CORRECTED, x, np.log(flops) - cost.log_and_slope(x)[0])
    best = log_optimal_params(CORRECTED, flops, cost)
    assert best == pytest.approx(x[np.argmin(losses)], abs=1e-4)


@pytest.mark.filterwarnings("error")
def test_exponents_near_zero_neither_overflow_nor_warn():
    best = optimum(np.array([900.0, 0.0, 1.0, 0.001, 0.001, 0.0]), 1e20, SIX_N)
    assert np.isfinite(best.params)


@pytest.mark.parametrize(
    ("name", "params", "tokens", "excess"),
    [
        ("Gopher", 280e9, 300e9, 0.99),
        ("GPT-3", 175e9, 300e9, 0.63),
        ("Chinchilla", 70e9, 1.4e12, 0.001),
    ],
)
def test_refitted_law_says_how_much_more_than_needed_known_models_took(
    name, params, tokens, excess
):
    """FLOPs over those of the optimum of equal loss; constants as refitted in the reference."""
    refitted = {"A": 477.83, "B": 2143.42, "E": 1.81722, "alpha": 0.34731, "beta": 0.36717}
    theta = HOFFMANN.theta(refitted)
    reached = loss(theta, params, tokens)
    enough = brentq(lambda x: optimum(theta, np.exp(x), SIX_N).loss - reached, 40, 70, xtol=1e-12)
    took = 6 * params * tokens / np.exp(enough) - 1
    assert took == pytest.approx(excess, abs=0.005, rel=0.005), name


def test_printed_exponents_of_hoffmann_give_the_exponent_of_its_approach_3():
    theta = PUBLISHED["hoffmann-2022"].theta
    assert exponent(theta) == pytest.approx(0.452, abs=5e-4)
    ratio = np.log(optimum(theta, 1e22, SIX_N).tokens / optimum(theta, 1e21, SIX_N).tokens)
    assert ratio / np.log(10) == pytest.approx(1 - 0.452, abs=5e-4)
