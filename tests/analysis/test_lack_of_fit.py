"""Lack of fit against the textbook's F test."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import f

from analysis.approaches import isoflop
from analysis.fitting import fit
from analysis.lack_of_fit import lack_of_fit
from analysis.laws import GENERALISED, HOFFMANN, PUBLISHED

BENT = {"A": 60.0, "B": 130.0, "E": 0.3, "alpha": 0.45, "beta": 0.4, "gamma": 0.4}


@pytest.mark.parametrize(("over", "warned"), [(1.3, True), (0.7, False)])
def test_misfit_counts_from_the_quantile_of_f_on(sweep, over, warned):
    """Draper and Smith 1998, section 2.1: lack of fit over pure error, here of four replicates.

    By hand, F = ((RSS - 3 s^2) / (dof - 3)) / s^2, and s is set so that F is `over` times its
    99.9% quantile.
    """
    obs = sweep(GENERALISED, BENT, base=1e12, step=30.0)
    rows = np.concatenate([np.arange(28), [10, 10, 10]])
    obs = obs.select(rows)
    spread = np.zeros(31)
    spread[[10, 28, 29, 30]] = [-1.5, -0.5, 0.5, 1.5]
    spread /= np.sqrt(np.sum(spread**2) / 3)
    misfit = fit(HOFFMANN, obs).rss
    dof = 31 - 5
    quantile = f.isf(0.001, dof - 3, 3)
    # RSS is that of the misfit and 3 s^2 of the replicates, which the law hardly follows.
    s = np.sqrt(misfit / (dof - 3) / (over * quantile))
    noisy = replace(obs, loss=obs.loss * np.exp(s * spread))
    found = fit(HOFFMANN, noisy)
    statistic = (found.rss - 3 * s**2) / (dof - 3) / s**2
    assert statistic == pytest.approx(over * quantile, rel=0.1)
    said = lack_of_fit(found, noisy, isoflop(noisy))
    assert (said is not None) == warned
    if said:
        assert f"{found.sigma / s:.1f} times the scatter of replicates" in said


def test_noise_alone_is_no_lack_of_fit(sweep):
    truth = PUBLISHED["besiroglu-2024"].constants
    for seed in range(20):
        obs = sweep(HOFFMANN, truth, noise=0.003, seed=seed, replicates=2)
        assert lack_of_fit(fit(HOFFMANN, obs), obs, isoflop(obs)) is None
