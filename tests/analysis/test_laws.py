import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar

from analysis.errors import InputError
from analysis.laws import (
    GENERALISED,
    HOFFMANN,
    LAWS,
    PUBLISHED,
    FlopsPerToken,
    exponent,
    local_exponent,
    log_loss,
    log_loss_jacobian,
    log_optimal_params,
    loss,
    optimum,
)
from analysis.observations import Observations

SIX_N = FlopsPerToken.six_n()
CORRECTED = HOFFMANN.theta(PUBLISHED["besiroglu-2024"].constants)

thetas = st.tuples(
    st.floats(-3, 12),
    st.floats(-3, 12),
    st.floats(0.01, 4),
    st.floats(0.05, 2),
    st.floats(0.05, 2),
    st.floats(-1.5, 1),
).map(np.array)


def formula(theta, log_n, log_d):
    """The formula as printed, usable with complex numbers; an independent implementation."""
    gamma = np.exp(theta[5]) if len(theta) > 5 else 1.0
    terms = np.exp(theta[0]) * np.exp(log_n) ** -theta[3]
    terms = terms + np.exp(theta[1]) * np.exp(log_d) ** -theta[4]
    return np.log(theta[2] + terms**gamma)


def mini_cost(width):
    """N and FLOPs per token of the mini shapes, depth 2, context 64, 256 symbols."""
    return 24.0 * width**2, 6 * (24.0 * width**2 + 256 * width) + 6 * 2 * 2 * width * 65 / 2


WIDTHS = np.array([12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128.0])


@pytest.mark.parametrize("law", LAWS)
@given(theta=thetas, log_n=st.floats(2, 30), log_d=st.floats(2, 35))
@settings(max_examples=60, deadline=None)
def test_gradient_is_the_complex_step_derivative_of_the_printed_formula(law, theta, log_n, log_d):
    theta = theta[: len(law.names)]
    value, jacobian = log_loss_jacobian(law, theta, np.array([log_n]), np.array([log_d]))
    assert value[0] == pytest.approx(formula(theta, log_n, log_d), rel=1e-10, abs=1e-12)
    for i in range(len(theta)):
        nudged = theta.astype(complex)
        nudged[i] += 1e-30j
        expected = formula(nudged, log_n, log_d).imag / 1e-30
        assert jacobian[0, i] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_published_constants_give_the_loss_that_the_paper_expects_of_chinchilla():
    theta = HOFFMANN.theta(PUBLISHED["hoffmann-2022"].constants)
    # 1.69 + 406.4 / 70e9^.34 + 410.7 / 1.4e12^.28, by hand
    assert loss(HOFFMANN, theta, 70e9, 1.4e12) == pytest.approx(1.69 + 0.08327 + 0.16331, abs=2e-4)


def test_kaplans_law_is_the_generalised_one_without_e():
    alpha_n, alpha_d, n_c, d_c = 0.076, 0.103, 6.4e13, 1.8e13
    theta = GENERALISED.theta(
        {
            "A": n_c ** (alpha_n / alpha_d),
            "B": d_c,
            "E": 0.0,
            "alpha": alpha_n / alpha_d,
            "beta": 1.0,
            "gamma": alpha_d,
        }
    )
    n, d = np.array([1e6, 1e9]), np.array([1e9, 3e10])
    kaplan = ((n_c / n) ** (alpha_n / alpha_d) + d_c / d) ** alpha_d
    assert loss(GENERALISED, theta, n, d) == pytest.approx(kaplan, rel=1e-12)
    assert exponent(GENERALISED, theta) == pytest.approx(0.575, abs=5e-4)
    assert GENERALISED.constants(theta)["E"] == 0.0


@pytest.mark.filterwarnings("error")
def test_extreme_constants_neither_overflow_nor_warn():
    theta = np.array([600.0, -600.0, 0.0, 5.0, 5.0])
    value, jacobian = log_loss_jacobian(HOFFMANN, theta, np.array([1.0]), np.array([1.0]))
    assert value[0] == pytest.approx(595.0)
    assert jacobian[0, :2] == pytest.approx([1.0, 0.0])
    best = optimum(HOFFMANN, np.array([900.0, 0.0, 1.0, 0.001, 0.001]), 1e20, SIX_N)
    assert np.isfinite(best.params)


@pytest.mark.parametrize("law", LAWS)
def test_closed_form_is_where_a_minimiser_ends(law):
    constants = {**PUBLISHED["hoffmann-2022"].constants, "gamma": 0.6}
    theta = law.theta(constants)
    for flops in (1e18, 1e21, 1e25):
        found = minimize_scalar(
            lambda x, c=flops: log_loss(law, theta, x, np.log(c / 6) - x),
            bounds=(10, 40),
            method="bounded",
            options={"xatol": 1e-12},
        )
        assert log_optimal_params(law, theta, flops, SIX_N) == pytest.approx(found.x, abs=1e-5)


def test_tabulated_six_n_gives_the_closed_form_to_1e_8():
    n = np.geomspace(1e5, 1e12, 30)
    tabulated = FlopsPerToken(n, 6 * n)
    for flops in (1e15, 3e19, 1e24, 1e29):  # the last lies beyond the table
        closed = log_optimal_params(HOFFMANN, CORRECTED, flops, SIX_N)
        found = log_optimal_params(HOFFMANN, CORRECTED, flops, tabulated)
        assert found == pytest.approx(closed, abs=1e-8)
        assert local_exponent(HOFFMANN, CORRECTED, flops, tabulated) == pytest.approx(
            exponent(HOFFMANN, CORRECTED), abs=1e-8
        )


def test_optimum_under_exact_flops_is_where_the_loss_is_least():
    n, cost = mini_cost(WIDTHS)
    c = FlopsPerToken(n, cost)
    theta = GENERALISED.theta(
        {"A": 60.0, "B": 130.0, "E": 0.3, "alpha": 0.45, "beta": 0.4, "gamma": 0.6}
    )
    for flops in (4e10, 1.08e12):
        best = optimum(GENERALISED, theta, flops, c)
        assert c(best.params) * best.tokens == pytest.approx(flops, rel=1e-12)
        around = best.params * np.array([0.5, 0.99, 0.999, 1.001, 1.01, 2.0])
        others = [loss(GENERALISED, theta, x, flops / c(x)) for x in around]
        assert min(others) > best.loss
        # The derivative vanishes: a step of 1e-4 either way costs the same to second order.
        low, high = (
            loss(GENERALISED, theta, x, flops / c(x)) for x in best.params * np.exp([-1e-4, 1e-4])
        )
        assert abs(high - low) < 1e-2 * (low + high - 2 * best.loss)


def test_optimum_and_its_exponent_agree_with_the_true_cost_between_and_beyond_the_points():
    """With c(N) known exactly, d ln bracket / d ln N = 0 solved independently."""
    n, cost = mini_cost(WIDTHS)
    c = FlopsPerToken(n, cost)
    theta = HOFFMANN.theta({"A": 30.0, "B": 60.0, "E": 0.3, "alpha": 0.35, "beta": 0.3})

    def exact(flops):
        def slope(width, h=1e-4):
            (n1, c1), (n2, c2) = mini_cost(width * (1 - h)), mini_cost(width * (1 + h))
            one = log_loss(HOFFMANN, theta, np.log(n1), np.log(flops / c1))
            two = log_loss(HOFFMANN, theta, np.log(n2), np.log(flops / c2))
            return two - one

        return np.log(mini_cost(brentq(slope, 2, 2e4, xtol=1e-10))[0])

    for flops, tolerance in ((4e10, 5e-3), (1.08e12, 5e-3), (1e16, 0.02)):
        assert log_optimal_params(HOFFMANN, theta, flops, c) == pytest.approx(
            exact(flops), abs=tolerance
        )
    true_exponent = (exact(6e11) - exact(1.5e11)) / np.log(4)
    assert local_exponent(HOFFMANN, theta, 3e11, c) == pytest.approx(true_exponent, abs=5e-3)
    assert true_exponent < exponent(HOFFMANN, theta) - 0.01  # what 6 N D would have missed


def test_flops_per_token_are_exact_at_the_points_and_within_1_percent_far_above():
    n, cost = mini_cost(WIDTHS)
    c = FlopsPerToken(n, cost)
    assert [c(x) for x in n] == pytest.approx(cost, rel=1e-12)
    far, far_cost = mini_cost(1280.0)  # 100x in N
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
    reached = loss(HOFFMANN, theta, params, tokens)
    enough = brentq(
        lambda x: optimum(HOFFMANN, theta, np.exp(x), SIX_N).loss - reached, 40, 70, xtol=1e-12
    )
    took = 6 * params * tokens / np.exp(enough) - 1
    assert took == pytest.approx(excess, abs=0.005, rel=0.005), name


def test_printed_exponents_of_hoffmann_give_the_exponent_of_its_approach_3():
    theta = HOFFMANN.theta(PUBLISHED["hoffmann-2022"].constants)
    assert exponent(HOFFMANN, theta) == pytest.approx(0.452, abs=5e-4)
    ratio = np.log(
        optimum(HOFFMANN, theta, 1e22, SIX_N).tokens / optimum(HOFFMANN, theta, 1e21, SIX_N).tokens
    )
    assert ratio / np.log(10) == pytest.approx(1 - 0.452, abs=5e-4)
