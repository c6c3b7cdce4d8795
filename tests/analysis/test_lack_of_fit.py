"""Lack of fit against the textbook's F test."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import f

from analysis.approaches import isoflop
from analysis.fitting import Method, fit
from analysis.lack_of_fit import lack_of_fit, strays
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


def test_the_strays_of_the_chinchilla_points_are_told(chinchilla_points):
    """Besiroglu et al. 2024 leave out the five largest losses, which squares would follow."""
    every = chinchilla_points(drop_largest=0)
    said = strays([fit(HOFFMANN, every)], every)
    assert said is not None
    assert said.startswith("5 observations are off by more than 6 times the usual scatter (0.62%)")
    assert "the worst by +28.1% at N = 2.98e+09, D = 5.16e+08" in said
    huber = Method(objective="huber")
    assert strays([fit(HOFFMANN, every, method=huber)], every) is None


@pytest.mark.parametrize("study", ["chinchilla", "llama3", "marin-dclm"])
def test_published_studies_without_their_outliers_have_no_strays(reference_study, study):
    obs = reference_study(study)
    assert strays([fit(GENERALISED, obs)], obs) is None


def test_one_stray_of_a_sweep_is_told_and_noise_is_none(sweep):
    truth = PUBLISHED["besiroglu-2024"].constants
    for seed in range(20):
        obs = sweep(HOFFMANN, truth, noise=0.003, seed=seed)
        assert strays([fit(GENERALISED, obs)], obs) is None
        loss = obs.loss.copy()
        loss[seed] *= 1.05
        pulled = replace(obs, loss=loss)
        said = strays([fit(GENERALISED, pulled)], pulled)
        assert said is not None
        assert said.startswith("1 observation is off by more than 6 times")
        assert f"at N = {obs.params[seed]:.3g}, D = {obs.tokens[seed]:.3g}:" in said


def test_weights_are_those_of_residuals(sweep):
    """A row without weight is in no fit; one of a hundredth scatters ten times as much."""
    truth = PUBLISHED["besiroglu-2024"].constants
    for seed in range(12):
        obs = sweep(HOFFMANN, truth, noise=0.003, seed=seed)
        weight, loss = np.ones(28), obs.loss.copy()
        weight[seed], loss[seed] = 0.0, 1.3 * loss[seed]
        noisy = np.delete(np.arange(28), seed)[::4]
        weight[noisy] = 0.01
        loss[noisy] *= np.exp(0.03 * np.random.default_rng(seed).standard_normal(len(noisy)))
        weighted = replace(obs, loss=loss, weight=weight)
        assert strays([fit(GENERALISED, weighted)], weighted) is None


def test_a_stray_that_breaks_the_generalised_law_is_told_by_the_other(sweep):
    truth = PUBLISHED["besiroglu-2024"].constants
    broken = 0
    for row in range(28):
        obs = sweep(HOFFMANN, truth, noise=0.003)
        loss = obs.loss.copy()
        loss[row] *= 1.3
        pulled = replace(obs, loss=loss)
        fits = [fit(law, pulled) for law in (HOFFMANN, GENERALISED)]
        broken += not fits[1].sound
        assert strays(fits, pulled) is not None
    assert broken
