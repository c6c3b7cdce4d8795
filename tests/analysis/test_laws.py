import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from analysis.errors import InputError
from analysis.laws import (
    GENERALISED,
    HOFFMANN,
    KAPLAN,
    KAPLAN_FLOPS,
    KAPLAN_PARAMS,
    KAPLAN_TOKENS,
    LAWS,
    NAMES,
    PUBLISHED,
    log_loss,
    log_loss_jacobian,
    loss,
)
from analysis.numerals import PF_DAY

ONE_VARIABLE = (KAPLAN_PARAMS, KAPLAN_TOKENS, KAPLAN_FLOPS)
PRINTED = {
    "hoffmann": lambda t, n, d: t["E"] + t["A"] / n ** t["alpha"] + t["B"] / d ** t["beta"],
    "generalised": lambda t, n, d: (
        t["E"] + (t["A"] * n ** -t["alpha"] + t["B"] * d ** -t["beta"]) ** t["gamma"]
    ),
    # (N_c/N)^(alpha_N/alpha_D) with N_c = A^(1/alpha), D_c = B, alpha_D = gamma.
    "kaplan": lambda t, n, d: (
        ((t["A"] ** (1 / t["alpha"]) / n) ** t["alpha"] + t["B"] / d) ** t["gamma"]
    ),
    **dict.fromkeys(
        (law.name for law in ONE_VARIABLE),
        lambda t, n, d: (t["A"] ** (1 / t["alpha"]) / n) ** t["alpha"],
    ),
}
"""Each law as its paper prints it, for real and complex constants."""

thetas = st.tuples(
    st.floats(-3, 12),
    st.floats(-3, 12),
    st.floats(0.01, 4),
    st.floats(0.05, 2),
    st.floats(0.05, 2),
    st.floats(-1.5, 1),
).map(np.array)


def held(law, theta):
    """Theta with what the law holds."""
    return law.theta(dict(zip(NAMES, natural(theta), strict=True)))


def natural(theta):
    """A, B, E, alpha, beta, gamma; complex where theta is."""
    return [np.exp(theta[0]), np.exp(theta[1]), theta[2], theta[3], theta[4], np.exp(theta[5])]


def printed_log_loss(law, theta, log_n, log_d):
    constants = dict(zip(NAMES, natural(theta), strict=True))
    return np.log(PRINTED[law.name](constants, np.exp(log_n), np.exp(log_d)))


@pytest.mark.parametrize("law", [*LAWS, *ONE_VARIABLE], ids=lambda law: law.name)
@given(theta=thetas, log_n=st.floats(2, 30), log_d=st.floats(2, 35))
@settings(max_examples=60, deadline=None)
def test_gradient_is_the_complex_step_derivative_of_the_printed_formula(law, theta, log_n, log_d):
    theta = held(law, theta)
    value, jacobian = log_loss_jacobian(theta, np.array([log_n]), np.array([log_d]))
    assert value[0] == pytest.approx(printed_log_loss(law, theta, log_n, log_d), abs=1e-10)
    assert jacobian.shape == (1, 6)
    for i in np.flatnonzero(law.free):
        nudged = theta.astype(complex)
        nudged[i] += 1e-30j
        expected = printed_log_loss(law, nudged, log_n, log_d).imag / 1e-30
        assert jacobian[0, i] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("law", [*LAWS, *ONE_VARIABLE], ids=lambda law: law.name)
def test_gradient_is_the_slope_of_the_value_itself(law):
    constants = {"A": 60.0, "B": 130.0, "E": 0.3, "alpha": 0.45, "beta": 0.4, "gamma": 0.6}
    theta = law.theta(constants)
    log_n, log_d = np.array([12.0, 18.0, 25.0]), np.array([20.0, 19.0, 27.0])
    jacobian = log_loss_jacobian(theta, log_n, log_d)[1]
    for i in np.flatnonzero(law.free):
        step = 1e-6 * np.eye(6)[i]
        above, below = (log_loss(theta + s * step, log_n, log_d) for s in (1, -1))
        assert jacobian[:, i] == pytest.approx((above - below) / 2e-6, rel=1e-7, abs=1e-9)


def test_published_constants_give_the_loss_that_the_paper_expects_of_chinchilla():
    theta = PUBLISHED["hoffmann-2022"].theta
    # 1.69 + 406.4 / 70e9^.34 + 410.7 / 1.4e12^.28, by hand
    assert loss(theta, 70e9, 1.4e12) == pytest.approx(1.69 + 0.08327 + 0.16331, abs=2e-4)


@pytest.mark.parametrize(
    ("name", "critical", "exponent"),
    [
        ("kaplan-2020-params", 8.8e13, 0.076),
        ("kaplan-2020-tokens", 5.4e13, 0.095),
        ("kaplan-2020-flops", 3.1e8 * 8.64e19, 0.050),
    ],
)
def test_kaplans_laws_of_one_variable_are_one_nat_at_their_critical_scale(name, critical, exponent):
    """(N_c/N)^alpha_N is 1 at N_c, 10^alpha_N a decade below; Kaplan et al. 2020, 1.1 to 1.3."""
    theta = PUBLISHED[name].theta
    at = np.array([critical, critical / 10])
    assert loss(theta, at, np.ones(2)) == pytest.approx([1.0, 10**exponent], rel=1e-12)


def test_kaplans_law_of_both_is_that_of_one_where_the_other_does_not_matter():
    theta = PUBLISHED["kaplan-2020"].theta
    n, d = np.array([1e6, 1e9]), np.array([1e9, 3e10])
    plenty = np.full(2, 1e40)
    assert loss(theta, n, plenty) == pytest.approx((6.4e13 / n) ** 0.076, rel=1e-9)
    assert loss(theta, plenty, d) == pytest.approx((1.8e13 / d) ** 0.103, rel=1e-9)
    both = ((6.4e13 / n) ** (0.076 / 0.103) + 1.8e13 / d) ** 0.103
    assert loss(theta, n, d) == pytest.approx(both, rel=1e-12)


def test_kaplans_laws_contradict_each_other_where_the_paper_says():
    """Kaplan et al. 2020, section 6.3: L(D(C_min)) meets L(C_min) at about 1e4 PF-days, L 1.7."""
    by_data, by_compute = PUBLISHED["kaplan-2020-tokens"], PUBLISHED["kaplan-2020-flops"]

    def gap(log_days):
        data, flops = 2e10 * np.exp(0.27 * log_days), PF_DAY * np.exp(log_days)
        least = loss(by_data.theta, data, 1.0)
        return np.log(least / loss(by_compute.theta, flops, 1.0))

    days = np.exp(brentq(gap, 0.0, 20.0))
    assert days == pytest.approx(1.1e4, rel=0.05)
    at = loss(by_compute.theta, PF_DAY * days, 1.0)
    assert at == pytest.approx(1.7, abs=0.05)


@pytest.mark.parametrize(
    ("name", "printed", "params"),
    [
        ("hoffmann-2022", (406.4, 410.7, 1.69, 0.34, 0.28), "total"),
        ("besiroglu-2024", (482.01, 2085.43, 1.8172, 0.3478, 0.3658), "total"),
    ],
)
def test_published_constants_are_the_printed_ones_with_paper_and_convention(name, printed, params):
    found = PUBLISHED[name]
    constants = found.law.constants(found.theta)
    assert list(constants) == ["A", "B", "E", "alpha", "beta"]
    assert tuple(constants.values()) == pytest.approx(printed, rel=1e-12)
    assert found.params_convention == params


def test_every_published_law_names_its_paper_and_equation():
    names = {found.law.name for found in PUBLISHED.values()}
    assert names >= {law.name for law in (HOFFMANN, KAPLAN, *ONE_VARIABLE)}
    for found in PUBLISHED.values():
        assert re.search(r"arXiv \d{4}\.\d{5}", found.source), found.cite
        assert re.search(r"et al\. 20\d\d", found.cite)


def test_kaplans_law_is_the_generalised_one_without_e():
    theta = PUBLISHED["kaplan-2020"].theta
    assert GENERALISED.theta(GENERALISED.constants(theta)) == pytest.approx(theta)
    assert (theta[2], theta[4]) == (0.0, 1.0)
    assert KAPLAN.names == ("A", "B", "alpha", "gamma")


@pytest.mark.filterwarnings("error")
def test_extreme_constants_neither_overflow_nor_warn():
    theta = np.array([600.0, -600.0, 0.0, 5.0, 5.0, 0.0])
    value, jacobian = log_loss_jacobian(theta, np.array([1.0]), np.array([1.0]))
    assert value[0] == pytest.approx(595.0)
    assert jacobian[0, :2] == pytest.approx([1.0, 0.0])
    bent = np.array([600.0, -600.0, 1.0, 5.0, 5.0, np.log(0.1)])
    assert log_loss(bent, np.array(1.0), np.array(1.0)) == pytest.approx(59.5)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_theta_and_constants_are_one_anothers_inverse(law):
    constants = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28, "gamma": 0.6}
    theta = law.theta(constants)
    assert theta.shape == (6,)
    expected = {**constants, **law.held}
    if law is HOFFMANN:
        del expected["gamma"]  # a plain sum has none to speak of
    assert law.constants(theta) == pytest.approx(expected, rel=1e-12)
    assert tuple(np.array(NAMES)[law.free]) == law.names


def test_a_pinned_constant_is_held_and_no_longer_free():
    pinned = GENERALISED.pin({"gamma": 1.0, "E": 0.0})
    assert pinned.names == ("A", "B", "alpha", "beta")
    assert pinned.pinned == {"gamma", "E"}
    assert pinned.unit_gamma
    theta = pinned.theta({"A": 1.0, "B": 1.0, "E": 9.0, "alpha": 0.3, "beta": 0.3, "gamma": 9.0})
    assert (theta[2], theta[5]) == (0.0, 0.0)
    assert pinned.constants(theta)["gamma"] == 1.0  # somebody asked for it, so it is reported
    assert GENERALISED.names == NAMES  # the law that it was made from is as it was
    assert HOFFMANN.pin({}) is HOFFMANN


@pytest.mark.parametrize(
    ("law", "constants", "message"),
    [
        (HOFFMANN, {"gamma": 0.5}, "hoffmann law has no free constant 'gamma' to pin; it has A, B"),
        (KAPLAN, {"E": 1.0}, "kaplan law has no free constant 'E'"),
        (HOFFMANN, {"delta": 1.0}, "no free constant 'delta'"),
        (HOFFMANN, {"alpha": 0.0}, "alpha cannot be pinned at 0.0: it must be positive"),
        (HOFFMANN, {"E": -0.1}, "E cannot be pinned at -0.1"),
        (HOFFMANN, {"A": float("nan")}, "A cannot be pinned at nan"),
        (HOFFMANN, {"B": float("inf")}, "B cannot be pinned at inf"),
    ],
)
def test_a_constant_that_cannot_be_pinned_is_refused_by_name(law, constants, message):
    with pytest.raises(InputError, match=message):
        law.pin(constants)
