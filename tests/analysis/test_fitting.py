import csv
import time
from dataclasses import replace

import numpy as np
import pytest

from analysis.errors import InputError
from analysis.fitting import fit
from analysis.laws import GENERALISED, HOFFMANN, LAWS, exponent, log_loss
from analysis.observations import Observations

TRUTH = {"A": 480.0, "B": 2080.0, "E": 1.82, "alpha": 0.348, "beta": 0.366, "gamma": 0.7}
MINI = {"A": 30.0, "B": 60.0, "E": 0.3, "alpha": 0.35, "beta": 0.3}


def chinchilla_points(reference):
    path = reference / "chinchilla_figure4_points.csv"
    if not path.exists():
        pytest.skip(f"no reference points at {reference}")
    with path.open() as lines:
        rows = list(csv.DictReader(lines))
    params, flops, losses = (
        np.array([float(row[name]) for row in rows])
        for name in ("Model Size", "Training FLOP", "loss")
    )
    kept = losses < np.sort(losses)[-5]  # as Besiroglu et al. 2024 do: 240 of 245
    nan = np.full(len(rows), np.nan)
    return Observations(
        params=params,
        tokens=flops / (6 * params),
        flops=flops,
        loss=losses,
        loss_stderr=nan,
        budget=nan,
    ).select(kept)


@pytest.mark.parametrize("law", LAWS)
def test_noise_free_points_give_the_truth_back(sweep, law):
    found = fit(law, sweep(law, TRUTH))
    assert found.status == "converged"
    assert found.objective < 1e-16
    for name, value in found.constants.items():
        assert value == pytest.approx(TRUTH[name], rel=1e-6), name


@pytest.mark.parametrize("law", LAWS)
def test_truths_with_unlike_exponents_and_no_e_come_back_too(sweep, law):
    truth = {"A": 900.0, "B": 40.0, "E": 0.0, "alpha": 0.6, "beta": 0.25, "gamma": 0.45}
    found = fit(law, sweep(law, truth, base=1e12))
    assert found.constants["E"] == pytest.approx(0.0, abs=1e-6)
    assert found.constants["alpha"] == pytest.approx(0.6, rel=1e-5)
    assert found.constants["beta"] == pytest.approx(0.25, rel=1e-5)


def test_chinchilla_points_give_exponents_inside_the_published_intervals(reference):
    obs = chinchilla_points(reference)
    assert len(obs) == 240
    found = fit(HOFFMANN, obs)
    # 95% intervals of 4000 pairs-bootstrap replicates, reference/README.md
    assert 0.318 < found.constants["alpha"] < 0.373
    assert 0.332 < found.constants["beta"] < 0.416
    assert 1.770 < found.constants["E"] < 1.872
    assert 0.481 < exponent(HOFFMANN, found.theta) < 0.556
    # The Huber optimum is another point of the same valley: least squares must not be above it.
    published = {"A": 477.83, "B": 2143.42, "E": 1.81722, "alpha": 0.34731, "beta": 0.36717}
    residual = np.log(obs.loss) - log_loss(
        HOFFMANN, HOFFMANN.theta(published), np.log(obs.params), np.log(obs.tokens)
    )
    assert found.objective <= residual @ residual
    # An independent optimiser, derivative-free, from there ends no lower.
    from scipy.optimize import minimize

    def objective(x):
        value = x[2] + np.exp(x[0] - x[3] * np.log(obs.params))
        value = value + np.exp(x[1] - x[4] * np.log(obs.tokens))
        return np.sum((np.log(obs.loss) - np.log(value)) ** 2)

    other = minimize(
        objective,
        HOFFMANN.theta(published),
        method="Nelder-Mead",
        options={"maxiter": 4000, "maxfev": 4000, "fatol": 1e-14, "xatol": 1e-9, "adaptive": True},
    )
    assert found.objective <= other.fun * (1 + 1e-9)
    assert found.objective == pytest.approx(other.fun, rel=0.02)


def test_e_that_the_data_push_below_zero_is_zero_and_says_so(sweep):
    truth = {**MINI, "E": 0.0}
    zeros = [fit(HOFFMANN, sweep(HOFFMANN, truth, noise=0.01, seed=s, base=1e10)) for s in range(8)]
    assert {found.status for found in zeros} == {"converged", "e_at_zero"}
    for found in zeros:
        assert (found.status == "e_at_zero") == (found.theta[2] == 0.0)
        assert np.all(np.isfinite(found.covariance))
    stopped = next(found for found in zeros if found.status == "e_at_zero")
    assert "E is not identified" in stopped.reason
    assert stopped.free.all()
    assert stopped.covariance[2, 2] > 0


def test_covariance_is_that_of_repeated_sweeps(sweep):
    fits = [fit(HOFFMANN, sweep(HOFFMANN, TRUTH, noise=0.002, seed=s)) for s in range(150)]
    for i in (2, 3, 4):
        spread = np.std([found.theta[i] for found in fits])
        claimed = np.median([np.sqrt(found.covariance[i, i]) for found in fits])
        assert claimed == pytest.approx(spread, rel=0.2)
    assert np.median([found.sigma for found in fits]) == pytest.approx(0.002, rel=0.05)


def test_order_of_rows_and_a_repeated_fit_change_nothing(sweep):
    obs = sweep(GENERALISED, TRUTH, noise=0.005)
    first = fit(GENERALISED, obs)
    assert np.array_equal(first.theta, fit(GENERALISED, obs).theta)
    order = np.random.default_rng(3).permutation(len(obs))
    shuffled = replace(
        obs, params=obs.params[order], tokens=obs.tokens[order], loss=obs.loss[order]
    )
    assert fit(GENERALISED, shuffled).objective == pytest.approx(first.objective, rel=1e-6)


def test_a_weight_of_two_is_a_row_twice_and_a_weight_of_zero_no_row(sweep):
    obs = sweep(HOFFMANN, TRUTH, noise=0.005)
    n = len(obs)
    weights = np.where(np.arange(n) < 3, 2.0, np.where(np.arange(n) < 5, 0.0, 1.0))
    rows = np.concatenate([[0, 1, 2], [0, 1, 2], np.arange(5, n)])
    repeated = fit(HOFFMANN, obs.select(rows))
    weighted = fit(HOFFMANN, obs, weights=weights)
    assert weighted.theta == pytest.approx(repeated.theta, rel=1e-5)
    assert weighted.objective == pytest.approx(repeated.objective, rel=1e-9)
    assert (weighted.n, weighted.dof) == (n - 2, n - 7)
    with pytest.raises(InputError, match="weights"):
        fit(HOFFMANN, obs, weights=-weights)


def test_too_few_rows_are_refused_by_name(sweep):
    obs = sweep(HOFFMANN, TRUTH)
    few = obs.select(np.arange(len(obs)) % 6 == 0)
    assert len(few) == 5
    with pytest.raises(
        InputError, match="5 observations cannot determine the 5 constants of the hoffmann law"
    ):
        fit(HOFFMANN, few)
    with pytest.raises(InputError, match="6 constants of the generalised law"):
        fit(GENERALISED, obs.select(np.arange(len(obs)) % 5 == 0))


def test_one_budget_is_refused_by_name(sweep):
    with pytest.raises(InputError, match="one budget only: all 9"):
        fit(HOFFMANN, sweep(HOFFMANN, TRUTH, budgets=1, sizes=9))
    unplanned = sweep(HOFFMANN, TRUTH, budgets=1, sizes=9)
    with pytest.raises(InputError, match="one budget only: all 9"):
        fit(HOFFMANN, replace(unplanned, budget=np.full(9, np.nan)))


def test_a_fixed_tokens_per_parameter_ladder_is_refused_and_a_narrow_one_warned_of(sweep):
    obs = sweep(HOFFMANN, TRUTH, budgets=9, sizes=1, span=1.0)
    with pytest.raises(InputError, match=r"collinear.*20 tokens a parameter"):
        fit(HOFFMANN, obs)
    narrow = fit(HOFFMANN, sweep(HOFFMANN, TRUTH, noise=1e-3, budgets=6, sizes=3, span=1.3))
    assert "nearly collinear" in narrow.warning
    wide = fit(HOFFMANN, sweep(HOFFMANN, TRUTH, noise=1e-3))
    assert wide.warning is None
    # What the warning is about: alpha per unit of noise is known several times less well.
    blur = [np.sqrt(found.covariance[3, 3]) / found.sigma for found in (narrow, wide)]
    assert blur[0] > 3 * blur[1]
    assert narrow.condition > 2 * wide.condition


@pytest.mark.parametrize("bad", [np.nan, 0.0, -1.0, np.inf])
def test_values_that_are_no_positive_numbers_are_refused(sweep, bad):
    obs = sweep(HOFFMANN, TRUTH)
    losses = obs.loss.copy()
    losses[3] = bad
    with pytest.raises(InputError, match="1 of 28 observations have a L that is not a positive"):
        fit(HOFFMANN, replace(obs, loss=losses))


def test_a_law_that_the_data_do_not_follow_stops_at_a_bound_and_says_where(sweep):
    obs = sweep(HOFFMANN, TRUTH)
    rng = np.random.default_rng(0)
    shuffled = replace(obs, loss=2.0 + 0.1 * rng.random(len(obs)))
    found = fit(GENERALISED, shuffled)
    assert found.status in ("at_bound", "not_converged")
    assert found.reason
    if found.status == "at_bound":
        assert not found.free.all()
        stuck = np.flatnonzero(~found.free)
        assert "end of its range" in found.reason
        assert np.all(np.isfinite(found.covariance))
        assert np.all(found.covariance[stuck, stuck] >= 0)


def test_a_fit_of_28_points_takes_well_under_a_third_of_a_second(sweep):
    obs = sweep(GENERALISED, TRUTH, noise=0.005)
    fit(GENERALISED, obs)
    started = time.perf_counter()
    fit(GENERALISED, obs)
    assert time.perf_counter() - started < 0.3
