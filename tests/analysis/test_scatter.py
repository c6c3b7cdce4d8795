"""Variance components against one-way analysis of variance, REML and simulation."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from analysis.fitting import Method, fit, fit_each
from analysis.forecast import forecast
from analysis.laws import HOFFMANN, PUBLISHED
from analysis.optimum import FlopsPerToken, optimum
from analysis.scatter import scatter

SIX_N = FlopsPerToken.six_n()
TRUTH = PUBLISHED["besiroglu-2024"].constants
K, M = 6, 5
"""Groups, and rows in each, of the balanced one-way layout."""


def one_way(seed, own=1.0, shared=4.0):
    rng = np.random.default_rng(seed)
    y = 7.0 + math.sqrt(shared) * rng.standard_normal((K, 1))
    return y + math.sqrt(own) * rng.standard_normal((K, M))


def of_the_mean(y):
    """Components about the overall mean, a fit of one constant."""
    n = y.size
    basis = np.full((n, 1), 1 / math.sqrt(n))
    groups = np.repeat(np.arange(len(y)), y.shape[1])
    return scatter(y.ravel() - y.mean(), basis, groups, np.ones(n))


def mean_squares(y):
    """Between and within groups, as in any textbook."""
    between = y.shape[1] * np.sum((y.mean(axis=1) - y.mean()) ** 2) / (len(y) - 1)
    within = np.sum((y - y.mean(axis=1, keepdims=True)) ** 2) / (y.size - len(y))
    return between, within


@pytest.mark.parametrize("seed", range(5))
def test_components_of_a_one_way_layout_are_those_of_its_analysis_of_variance(seed):
    y = one_way(seed)
    between, within = mean_squares(y)
    found = of_the_mean(y)
    assert found.own == pytest.approx(within, rel=1e-9)
    assert found.shared == pytest.approx((between - within) / M, rel=1e-9)


def test_components_are_where_the_restricted_likelihood_is_greatest():
    """Of balanced data, REML by brute force: the density of contrasts orthogonal to the mean."""
    y = one_way(11)
    n = y.size
    contrasts = np.linalg.qr(np.column_stack([np.ones(n), np.eye(n)[:, 1:]]))[0][:, 1:]
    same = np.kron(np.eye(K), np.ones((M, M)))

    def minus_log_likelihood(logs):
        own, shared = np.exp(logs)
        covariance = contrasts.T @ (own * np.eye(n) + shared * same) @ contrasts
        return -multivariate_normal(np.zeros(n - 1), covariance).logpdf(contrasts.T @ y.ravel())

    best = minimize(minus_log_likelihood, [0.0, 0.0], method="Nelder-Mead", tol=1e-10)
    found = of_the_mean(y)
    assert [found.own, found.shared] == pytest.approx(np.exp(best.x), rel=1e-3)


def test_degrees_of_freedom_of_a_one_way_layout_are_the_textbooks():
    """Satterthwaite 1946, with mean squares B of k - 1 and W of k (m - 1) degrees of freedom.

    The mean has variance B / n exactly. A new row of a new group has variance
    own + shared = (B + (m - 1) W) / m.
    """
    y = one_way(2, shared=0.5)
    between, within = mean_squares(y)
    found = of_the_mean(y)
    variance, dof = found.variance(1 / y.size, 1 / K)
    assert variance == pytest.approx(between / y.size, rel=1e-9)
    assert dof == pytest.approx(K - 1, rel=1e-9)
    variance, dof = found.variance(1.0, 1.0)
    parts = between / M, (M - 1) * within / M
    assert variance == pytest.approx(sum(parts), rel=1e-9)
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (K - 1) + parts[1] ** 2 / (K * (M - 1)))
    assert dof == pytest.approx(freedom, rel=1e-9)


def unbalanced(rng):
    """Fifteen groups of 2 to 9 rows, and the basis of a line whose x drifts by group."""
    groups = np.repeat(np.arange(15), [2, 3, 9, 4, 6] * 3)
    x = groups + 5 * rng.random(len(groups))
    return groups, np.linalg.qr(np.column_stack([np.ones(len(x)), x]))[0]


def test_components_and_their_freedom_are_right_on_the_average_of_unbalanced_sweeps():
    """Of simulated regressions; freedom is 2 V^2 / var(V), V the estimated variance."""
    rng = np.random.default_rng(5)
    groups, basis = unbalanced(rng)
    own, shared = 1.0, 1.0
    weights = np.sqrt(rng.uniform(0.5, 2.0, len(groups)))
    basis = np.linalg.qr(weights[:, None] * basis)[0]
    drawn = []
    for _ in range(2000):
        noise = math.sqrt(own) * rng.standard_normal(len(groups)) / weights
        noise += math.sqrt(shared) * rng.standard_normal(15)[groups]
        weighted = weights * noise
        drawn.append(scatter(weighted - basis @ (basis.T @ weighted), basis, groups, weights))
    estimates = np.array([[found.own, found.shared] for found in drawn])
    error = estimates.std(axis=0) / math.sqrt(len(drawn))
    assert np.all(np.abs(estimates.mean(axis=0) - [own, shared]) < 4 * error)
    true = replace(drawn[0], own=own, shared=shared)
    for parts in ([1.0, 1.0], [0.1, 0.4]):
        variance, dof = true.variance(*parts)
        simulated = np.var(estimates @ parts)
        assert variance == pytest.approx(np.dot(parts, [own, shared]))
        assert dof == pytest.approx(2 * variance**2 / simulated, rel=0.15)


def test_groups_that_share_nothing_leave_the_plain_variance():
    y = one_way(1, shared=0.0)
    y -= y.mean(axis=1, keepdims=True)  # groups more alike than chance has it
    found = of_the_mean(y)
    assert (found.shared, found.dof) == (0.0, K * M - 1)
    assert found.own == pytest.approx(np.var(y) * y.size / (y.size - 1))
    variance, dof = found.variance(0.3, 0.7)
    assert (variance, dof) == (pytest.approx(0.3 * found.own), K * M - 1)


def test_groups_as_fine_as_rows_or_a_single_one_tell_nothing():
    y = one_way(3).ravel()
    basis = np.full((len(y), 1), 1 / math.sqrt(len(y)))
    for groups in (None, np.arange(len(y)), np.zeros(len(y), dtype=int)):
        assert scatter(y - y.mean(), basis, groups, np.ones(len(y))).shared == 0.0


def shifted(obs, seed, size=None, own=0.003, shared=0.003):
    """Losses with noise of each row and a shift of each budget, shape (size, n)."""
    rng = np.random.default_rng(seed)
    budget = np.unique(obs.budget, return_inverse=True)[1]
    shape = (size or 1, len(obs))
    noise = own * rng.standard_normal(shape)
    noise += shared * rng.standard_normal((shape[0], budget.max() + 1))[:, budget]
    return obs.loss * np.exp(noise)


def test_covariance_of_a_fit_is_what_both_components_do_to_it(sweep):
    """(J^T J)^-1 J^T (own I + shared Z Z^T) J (J^T J)^-1, with J by finite differences."""
    obs = sweep(HOFFMANN, TRUTH, budgets=5)
    found = fit(HOFFMANN, replace(obs, loss=shifted(obs, 3)[0]))
    assert found.scatter.shared > 0.0

    def log_losses(theta):
        terms = np.exp(theta[0] - theta[3] * np.log(obs.params))
        terms = terms + np.exp(theta[1] - theta[4] * np.log(obs.tokens))
        return np.log(theta[2] + terms)

    steps = 1e-6 * np.eye(6)[:5]
    jacobian = np.stack(
        [(log_losses(found.theta + s) - log_losses(found.theta - s)) / 2e-6 for s in steps], axis=1
    )
    same = obs.budget[:, None] == obs.budget
    noise = found.scatter.own * np.eye(len(obs)) + found.scatter.shared * same
    onto = np.linalg.pinv(jacobian)
    expected = onto @ noise @ onto.T
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert found.covariance[:5, :5] / scale == pytest.approx(expected / scale, abs=1e-4)


def test_a_new_run_adds_its_own_noise_and_its_budgets_shift(sweep):
    obs = sweep(HOFFMANN, TRUTH, budgets=5)
    found = fit(HOFFMANN, replace(obs, loss=shifted(obs, 3)[0]))
    added = found.scatter.own + found.scatter.shared
    assert found.new_run[0] ** 2 == pytest.approx(added, rel=1e-9)


def coverage(obs, losses, seed):
    """How often nominal 90% intervals at 100x hold ln N_opt, ln L, and the loss of a new run."""
    target = 100 * obs.flops.max()
    best = optimum(HOFFMANN.theta(TRUTH), target, SIX_N)
    rng = np.random.default_rng(seed)
    inside = []
    for found in fit_each(HOFFMANN, obs, losses):
        said = forecast(found, target, SIX_N)
        run = best.loss * np.exp(0.003 * rng.standard_normal(2).sum())
        truths = ((said.params, best.params), (said.loss, best.loss), (said.new_run, run))
        inside.append([part.low <= truth <= part.high for part, truth in truths])
    return np.mean(inside, axis=0)


def test_intervals_cover_where_budgets_are_off_together_and_plain_counting_would_not(sweep):
    """Shifts as large as the noise; within three Monte-Carlo errors of 88 to 92%."""
    repetitions = 400
    obs = sweep(HOFFMANN, TRUTH, budgets=5)
    losses = shifted(obs, 0, repetitions)
    error = 3 * math.sqrt(0.9 * 0.1 / repetitions)
    found = coverage(obs, losses, seed=1)
    assert np.all((found > 0.88 - error) & (found < 0.92 + error)), found
    counted = replace(obs, budget=np.full(len(obs), np.nan))
    plain = coverage(counted, losses, seed=1)
    assert plain[1] < 0.7
    assert plain[2] < 0.75


def test_intervals_cover_where_branches_of_a_trunk_are_off_together(sweep):
    """Four horizons to each of ten models; budgets say nothing, trunks do."""
    repetitions = 300
    n = np.repeat(np.geomspace(1e7, 1e9, 10), 4)
    d = n * np.tile([5.0, 10.0, 20.0, 40.0], 10)
    obs = sweep(HOFFMANN, TRUTH, budgets=5, sizes=8)
    obs = replace(
        obs,
        params=n,
        tokens=d,
        flops=6 * n * d,
        budget=np.full(40, np.nan),
        trunk=np.repeat(np.arange(10), 4),
    )
    exact = 1.8172 + 482.01 * n**-0.3478 + 2085.43 * d**-0.3658
    rng = np.random.default_rng(8)
    noise = 0.001 * rng.standard_normal((repetitions, 40))
    noise += 0.003 * rng.standard_normal((repetitions, 10))[:, obs.trunk]
    obs = replace(obs, loss=exact)
    losses = exact * np.exp(noise)
    error = 3 * math.sqrt(0.9 * 0.1 / repetitions)
    found = coverage(obs, losses, seed=1)[:2]
    assert np.all((found > 0.88 - error) & (found < 0.94 + error)), found
    plain = coverage(replace(obs, trunk=np.arange(40)), losses, seed=1)
    assert plain[1] < 0.8


def test_hubers_loss_knows_of_shared_shifts_too(sweep):
    """With delta beyond every residual it is least squares, and so are its components."""
    obs = sweep(HOFFMANN, TRUTH, budgets=5)
    noisy = replace(obs, loss=shifted(obs, 3)[0])
    squares = fit(HOFFMANN, noisy)
    wide = fit(HOFFMANN, noisy, method=Method(objective="huber", delta=1.0))
    narrow = fit(HOFFMANN, noisy, method=Method(objective="huber", delta=0.003))
    assert wide.scatter.shared == pytest.approx(squares.scatter.shared, rel=1e-6)
    assert wide.covariance == pytest.approx(squares.covariance, rel=1e-6)
    assert narrow.scatter.shared > 0.0
