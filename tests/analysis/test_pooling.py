"""Millions of rows as thousands: the same fit, and nothing hidden from Huber's loss."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.fitting import fit
from analysis.laws import HOFFMANN, PUBLISHED, loss
from analysis.observations import Observations
from analysis.pooling import CELLS, pool, sample

TRUTH = PUBLISHED["besiroglu-2024"].theta


@pytest.fixture(scope="module")
def many():
    rng = np.random.default_rng(0)
    n = np.exp(rng.uniform(np.log(1e8), np.log(1e10), 60_000))
    d = np.exp(rng.uniform(np.log(1e9), np.log(1e12), 60_000))
    nan = np.full(len(n), np.nan)
    exact = loss(TRUTH, n, d)
    return Observations(
        params=n,
        tokens=d,
        flops=6 * n * d,
        loss=exact * np.exp(0.003 * rng.standard_normal(len(n))),
        loss_stderr=nan,
        budget=nan,
    )


def test_pooled_rows_give_the_fit_of_all_rows_and_their_scatter(many):
    pooled, width = pool(many, 10_000)
    assert width == 0.04  # 2% leaves more than were asked for
    assert (pooled.rows, pooled.weight.sum()) == (60_000, 60_000)
    assert len(pooled) < 0.8 * 60_000
    one, all_rows = fit(HOFFMANN, pooled), fit(HOFFMANN, many)
    error = np.sqrt(np.diag(all_rows.covariance))[:5]
    # Within a tenth of what noise does to either; the residual scatter is that of a single row.
    assert np.all(np.abs(one.theta[:5] - all_rows.theta[:5]) < 0.1 * error)
    assert one.sigma == pytest.approx(0.003, rel=0.02)
    assert np.sqrt(np.diag(one.covariance))[:5] == pytest.approx(error, rel=0.03)


def test_cells_are_small_and_never_span_budgets(many):
    half = np.where(np.arange(len(many)) % 2 == 0, 1e20, 2e20)
    pooled, _ = pool(replace(many, budget=half), 10_000)
    assert set(pooled.budget) == {1e20, 2e20}
    assert len(pooled) > len(pool(many, 10_000)[0])
    assert pooled.params.min() >= many.params.min()
    assert max(CELLS) < 0.05


def test_few_rows_are_left_alone(many):
    few = many.select(np.arange(len(many)) < 100)
    assert pool(few) == (few, 0.0)
    assert sample(few) is few


def test_a_sample_is_of_single_rows_and_always_the_same(many):
    drawn = sample(many, 5_000)
    assert (len(drawn), drawn.rows) == (5_000, 60_000)
    assert np.all(np.isin(drawn.loss, many.loss))
    assert np.array_equal(drawn.loss, sample(many, 5_000).loss)
