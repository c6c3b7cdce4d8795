"""The engine against scipy's L-BFGS-B on the formula as printed."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

import analysis.minimise as engine
from analysis.laws import GENERALISED, HOFFMANN, KAPLAN, LAWS, PUBLISHED
from analysis.minimise import CHUNK, Rows, minimise
from analysis.problem import prepare
from analysis.starts import starts

TRUTHS = {
    "hoffmann": (HOFFMANN, PUBLISHED["besiroglu-2024"].constants),
    "generalised": (
        GENERALISED,
        {"A": 3e3, "B": 2e4, "E": 1.6, "alpha": 0.5, "beta": 0.52, "gamma": 0.6},
    ),
    "kaplan": (KAPLAN, PUBLISHED["kaplan-2020"].constants),
}


def printed_log_loss(theta, log_n, log_d):
    """ln(E + (A N^-alpha + B D^-beta)^gamma), for complex numbers too."""
    a, b, e, alpha, beta, log_gamma = theta
    bracket = np.exp(a - alpha * log_n) + np.exp(b - beta * log_d)
    return np.log(e + bracket ** np.exp(log_gamma))


def total(rows, theta, delta, replicate=0):
    """Sum of weighted Huber losses, from its textbook definition in two branches."""
    residual = rows.log_loss[replicate] - printed_log_loss(theta, rows.log_n, rows.log_d)
    size = np.abs(residual)
    with np.errstate(invalid="ignore", over="ignore"):
        far = delta * (size - delta / 2)
    return rows.weights[replicate] @ np.where(size <= delta, residual**2 / 2, far)


def rival(law, data, start, delta):
    """L-BFGS-B from `start`, restarted once where it stops, gradients by complex steps."""
    rows, free = data.rows, np.flatnonzero(law.free)
    bounds = list(zip(data.low[free], data.high[free], strict=True))

    def objective(x):
        theta = start.astype(complex)
        theta[free] = x
        residual = rows.log_loss[0] - printed_log_loss(theta.real, rows.log_n, rows.log_d)
        psi = rows.weights[0] * np.clip(residual, -delta, delta)
        gradient = np.empty(len(free))
        for k, i in enumerate(free):
            nudged = theta.copy()
            nudged[i] += 1e-30j
            gradient[k] = -psi @ printed_log_loss(nudged, rows.log_n, rows.log_d).imag / 1e-30
        return total(rows, theta.real, delta) / scale, gradient / scale

    scale = 1.0
    x = np.clip(start[free], *np.array(bounds).T)
    scale = objective(x)[0]
    options = {"maxiter": 3000, "maxfun": 6000, "ftol": 1e-16, "gtol": 1e-12, "maxcor": 30}
    for _ in range(2):
        found = minimize(objective, x, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        x = found.x
    return found.fun * scale


def problem(law, sweep, truth, seed):
    """A sweep of a truth with heavy-tailed noise and random weights, and where to start from."""
    obs = sweep(*TRUTHS[truth])
    rng = np.random.default_rng(seed)
    noisy = replace(obs, loss=obs.loss * np.exp(0.003 * rng.standard_t(3, len(obs))))
    data = prepare(law, replace(noisy, weight=rng.exponential(size=len(obs))))
    return data, starts(law, data.rows)


@pytest.mark.parametrize("delta", [np.inf, 0.01, 1e-3])
@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_no_minimum_is_above_an_independent_optimisers(sweep, law, truth, delta):
    """Of six starts the best; also where the truth is another law, and most rows beyond delta."""
    data, begin = problem(law, sweep, truth, seed=len(law.name))
    found = minimise(law, data.rows, begin, low=data.low, high=data.high, delta=delta)
    others = [rival(law, data, start, delta) for start in begin[:3]]
    assert found.objective.min() <= min(others) * (1 + 1e-8)
    best = int(np.argmin(found.objective))
    assert found.converged[best]
    again = total(data.rows, found.theta[best], delta)
    assert found.objective[best] == pytest.approx(again, rel=1e-10)


@pytest.mark.parametrize("delta", [np.inf, 1e-3])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_a_batch_gives_what_each_replicate_gives_alone(sweep, law, delta):
    """Losses and weights of their own, and more replicates than fit into one pass."""
    data, begin = problem(law, sweep, law.name, seed=1)
    rng = np.random.default_rng(2)
    size, n = CHUNK + 20, len(data.rows.log_n)
    many = Rows(
        data.rows.log_n,
        data.rows.log_d,
        data.rows.log_loss + 0.003 * rng.standard_normal((size, n)),
        rng.exponential(size=(size, n)),
    )
    limits = {"low": data.low, "high": data.high, "delta": delta}
    together = minimise(law, many, np.tile(begin[0], (size, 1)), **limits)
    for r in (0, 7, CHUNK - 1, CHUNK, size - 1):
        one = many._replace(log_loss=many.log_loss[[r]], weights=many.weights[[r]])
        alone = minimise(law, one, begin[:1], **limits)
        assert alone.objective[0] == pytest.approx(together.objective[r], rel=1e-10)
        assert alone.theta[0] == pytest.approx(together.theta[r], rel=1e-5, abs=1e-5)
        assert alone.converged[0] == together.converged[r]
        assert together.objective[r] == pytest.approx(
            total(many, together.theta[r], delta, r), rel=1e-10
        )


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_bounds_are_kept_and_the_other_constants_are_best_at_them(sweep, law):
    """Alpha may not be what the truth has; L-BFGS-B within the same bounds ends at the same."""
    data, begin = problem(law, sweep, law.name, seed=3)
    alpha = TRUTHS[law.name][1]["alpha"]
    for low, high in ((alpha * 1.5, alpha * 2), (alpha / 3, alpha / 1.5)):
        narrow = data._replace(low=data.low.copy(), high=data.high.copy())
        narrow.low[3], narrow.high[3] = low, high
        limits = {"low": narrow.low, "high": narrow.high}
        found = minimise(law, data.rows, begin, **limits)
        best = found.theta[np.argmin(found.objective)]
        assert best[3] == (low if low > alpha else high)
        assert np.all((best >= narrow.low)[law.free] & (best <= narrow.high)[law.free])
        others = [rival(law, narrow, start, np.inf) for start in begin[:2]]
        assert found.objective.min() == pytest.approx(min(others), rel=1e-6)
        assert found.objective.min() <= min(others) * (1 + 1e-8)


def test_an_e_that_would_be_negative_ends_at_exactly_zero(sweep):
    """The truth is E = -0.2, which the bound forbids; the rest is at the best for E = 0."""
    obs = sweep(HOFFMANN, {"A": 30.0, "B": 60.0, "E": 0.0, "alpha": 0.2, "beta": 0.25}, base=1e12)
    data = prepare(HOFFMANN, replace(obs, loss=obs.loss - 0.2))
    limits = {"low": data.low, "high": data.high}
    begin = starts(HOFFMANN, data.rows)
    begin[:, 2] = 0.1  # from above: it has to move to the bound, and to stay there
    found = minimise(HOFFMANN, data.rows, begin, **limits)
    best = int(np.argmin(found.objective))
    assert found.theta[best, 2] == 0.0
    assert found.converged[best]
    without = HOFFMANN.pin({"E": 0.0})
    pinned = minimise(without, data.rows, begin * [1, 1, 0, 1, 1, 1], **limits)
    assert found.objective[best] == pytest.approx(pinned.objective.min(), rel=1e-9)
    assert found.objective[best] > 1e-8  # nothing with E >= 0 gives these losses


def test_what_is_not_free_is_not_moved(sweep):
    data, begin = problem(GENERALISED, sweep, "generalised", seed=5)
    held = GENERALISED.pin({"beta": 0.5, "gamma": 0.7})
    begin[:, 4:] = [0.5, np.log(0.7)]
    found = minimise(held, data.rows, begin, low=data.low, high=data.high)
    assert np.array_equal(found.theta[:, 4:], begin[:, 4:])
    free = minimise(GENERALISED, data.rows, begin, low=data.low, high=data.high)
    assert free.objective.min() < found.objective.min()


def test_a_search_cut_short_says_so_and_is_no_worse_than_its_start(sweep):
    data, begin = problem(GENERALISED, sweep, "hoffmann", seed=6)
    limits = {"low": data.low, "high": data.high}
    short = minimise(GENERALISED, data.rows, begin, **limits, max_iterations=2)
    assert not short.converged.any()
    before = [total(data.rows, theta, np.inf) for theta in begin]
    assert np.all(short.objective <= np.array(before) * (1 + 1e-12))
    assert short.objective == pytest.approx(
        [total(data.rows, theta, np.inf) for theta in short.theta], rel=1e-10
    )


@pytest.mark.parametrize("delta", [np.inf, 0.01])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_second_derivatives_are_those_of_the_printed_objective(sweep, law, delta):
    """Complex steps of central differences; wrong ones would cost speed, and no minimum shows it.

    Inside the engine, because of that: H = J (rho'' + psi) J^T less `_curvature`.
    """
    data, begin = problem(law, sweep, "hoffmann", seed=7)
    rows, theta, free = data.rows, begin[0], np.flatnonzero(law.free)
    at = engine._evaluate(law, rows, theta[None], delta)
    psi = rows.weights * np.clip(at.residual, -delta, delta)
    inside = rows.weights * (np.abs(at.residual) <= delta)
    jacobian = engine._jacobian(law, rows, theta[None], at)[0]
    curved = engine._curvature(law, rows, theta[None], at, psi)[0][np.ix_(free, free)]
    found = (jacobian * (inside + psi)) @ jacobian.T - curved

    def slope(x, i):
        nudged = x.astype(complex)
        nudged[i] += 1e-30j
        residual = rows.log_loss[0] - printed_log_loss(x, rows.log_n, rows.log_d)
        by_i = printed_log_loss(nudged, rows.log_n, rows.log_d).imag / 1e-30
        return -(rows.weights[0] * np.clip(residual, -delta, delta)) @ by_i

    steps = 1e-6 * np.eye(6)
    expected = np.array(
        [
            [(slope(theta + steps[j], i) - slope(theta - steps[j], i)) / 2e-6 for j in free]
            for i in free
        ]
    )
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert found / scale == pytest.approx(expected / scale, abs=1e-6)
