"""The bootstrap against rows really drawn and fitted, and against published intervals."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.bootstrap import bootstrap
from analysis.errors import InputError
from analysis.fitting import Method, fit
from analysis.laws import GENERALISED, HOFFMANN, PUBLISHED
from analysis.optimum import exponent

TRUTH = PUBLISHED["besiroglu-2024"].constants
HUBER = Method(objective="huber", delta=1e-3)


def test_chinchilla_points_give_the_refitted_intervals(chinchilla_points):
    """95% of 4000 pairs replicates, from an independent implementation: reference/README.md.

    A and B within 8%, the others within 3%.
    """
    obs = chinchilla_points()
    found = bootstrap(fit(HOFFMANN, obs, method=HUBER), obs, replicates=4000, seed=0)
    assert found.theta.shape == (4000, 6)
    assert found.failed == 0
    ends = {name: (part.low, part.high) for name, part in found.constants(0.95).items()}
    assert ends["A"] == pytest.approx((290, 740), rel=0.08)
    assert ends["B"] == pytest.approx((1050, 5850), rel=0.08)
    assert ends["E"] == pytest.approx((1.770, 1.872), rel=0.03)
    assert ends["alpha"] == pytest.approx((0.318, 0.373), rel=0.03)
    assert ends["beta"] == pytest.approx((0.332, 0.416), rel=0.03)
    a = found.exponent(0.95)
    assert (a.low, a.high) == pytest.approx((0.481, 0.556), rel=0.03)
    assert a.estimate == pytest.approx(exponent(found.fit.theta), rel=1e-12)


@pytest.mark.parametrize("method", [Method(), HUBER], ids=lambda method: method.objective)
@pytest.mark.parametrize("law", [HOFFMANN, GENERALISED], ids=lambda law: law.name)
@pytest.mark.parametrize("by", ["pairs", "cluster"])
def test_a_replicate_is_a_fit_to_rows_really_drawn(sweep, law, method, by):
    """Drawn by the same generator, repeated as rows, and fitted from the fit's own starts.

    A fit in one go may end lower than one from the estimate of all rows, never much.
    """
    obs = sweep(law, {**TRUTH, "gamma": 0.7}, noise=0.003, budgets=6)
    found = bootstrap(fit(law, obs, method=method), obs, replicates=10, seed=3, by=by)
    rng = np.random.default_rng(3)
    size = len(obs) if by == "pairs" else 6
    counts = rng.multinomial(size, np.full(size, 1 / size), size=10)
    same = 0
    for r in range(10):
        times = counts[r] if by == "pairs" else np.repeat(counts[r], 7)
        drawn = fit(law, obs.select(np.repeat(np.arange(len(obs)), times)), method=method)
        assert found.objective[r] >= drawn.objective * (1 - 1e-8)
        same += found.objective[r] <= drawn.objective * (1 + 1e-6)
    assert same >= 9


def test_weights_of_observations_multiply_how_often_they_are_drawn(sweep):
    obs = sweep(HOFFMANN, TRUTH, noise=0.003)
    weight = np.random.default_rng(0).exponential(size=len(obs))
    weighted = replace(obs, weight=weight)
    found = bootstrap(fit(HOFFMANN, weighted), weighted, replicates=4, seed=1)
    counts = np.random.default_rng(1).multinomial(28, np.full(28, 1 / 28), size=4)
    for r in range(4):
        alone = fit(HOFFMANN, replace(obs, weight=weight * counts[r]))
        assert found.objective[r] == pytest.approx(alone.objective, rel=1e-8)


def test_rows_of_weight_zero_are_not_drawn(sweep):
    obs = sweep(HOFFMANN, TRUTH, noise=0.003)
    without = obs.select(np.arange(28) >= 3)
    weighted = replace(obs, weight=np.where(np.arange(28) < 3, 0.0, 1.0))
    one, two = (bootstrap(fit(HOFFMANN, item), item, replicates=5) for item in (without, weighted))
    assert np.array_equal(one.theta, two.theta)


def test_a_seed_gives_the_same_replicates_and_another_others(sweep):
    obs = sweep(HOFFMANN, TRUTH, noise=0.003)
    item = fit(HOFFMANN, obs)
    first, again, other = (bootstrap(item, obs, replicates=300, seed=s) for s in (5, 5, 6))
    assert np.array_equal(first.theta, again.theta)
    assert not np.allclose(first.theta, other.theta, rtol=1e-6)
    few = bootstrap(item, obs, replicates=20, seed=5)
    assert few.theta == pytest.approx(first.theta[:20], rel=1e-6, abs=1e-9)


def test_its_spread_is_that_of_the_covariance_where_rows_share_nothing(sweep):
    obs = sweep(HOFFMANN, TRUTH, noise=0.003, sizes=25, budgets=5)
    obs = replace(obs, budget=np.full(len(obs), np.nan))
    item = fit(HOFFMANN, obs)
    spread = bootstrap(item, obs, replicates=1000).theta.std(axis=0)[:5]
    assert spread == pytest.approx(np.sqrt(np.diag(item.covariance))[:5], rel=0.2)


def test_clusters_show_what_pairs_hide(sweep):
    """Whole budgets are off: E is known much less well than rows drawn apart would have it."""
    obs = sweep(HOFFMANN, TRUTH, noise=0.001, budgets=12, step=2.0)
    shift = 0.005 * np.random.default_rng(1).standard_normal(12)
    off = replace(obs, loss=obs.loss * np.exp(np.repeat(shift, 7)))
    item = fit(HOFFMANN, off)
    widths = {}
    for by in ("pairs", "cluster"):
        ends = bootstrap(item, off, replicates=500, by=by).constants()["E"]
        widths[by] = ends.high - ends.low
    assert widths["cluster"] > 1.3 * widths["pairs"]


def test_too_few_clusters_or_none_are_refused(sweep):
    obs = sweep(HOFFMANN, TRUTH, noise=0.003)
    item = fit(HOFFMANN, obs)
    with pytest.raises(InputError, match="at least 5 budgets or trunks, and there are 4"):
        bootstrap(item, obs, replicates=5, by="cluster")
    unplanned = replace(obs, budget=np.full(28, np.nan))
    with pytest.raises(InputError, match="at least 5 budgets or trunks, and there are 0"):
        bootstrap(item, unplanned, replicates=5, by="cluster")
    with pytest.raises(InputError, match="by 'rows'; it must be by pairs or cluster"):
        bootstrap(item, obs, replicates=5, by="rows")


def test_a_pinned_constant_has_no_interval_and_does_not_move(sweep):
    obs = sweep(GENERALISED, {**TRUTH, "gamma": 0.7}, noise=0.003)
    item = fit(GENERALISED, obs, method=Method(pinned={"E": 1.8, "gamma": 0.7}))
    found = bootstrap(item, obs, replicates=30)
    assert list(found.constants()) == ["A", "B", "alpha", "beta"]
    assert np.all(found.theta[:, 2] == 1.8)
    assert np.exp(found.theta[:, 5]) == pytest.approx(0.7, rel=1e-12)
