"""Hoffmann's law and the generalised one, fitted to the same rows, and how much each counts.

What they say together at a budget is `headline.py`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import fdtrc

from analysis.errors import InputError
from analysis.fitting import LEAST_SQUARES, Fit, Method, fit
from analysis.laws import GENERALISED, HOFFMANN
from analysis.observations import Observations

RECENT_BUDGETS = 4
"""Budgets that N_opt is read from. Small models are the least well tuned, and bend the law: over
eight public studies Hoffmann's law missed the next budget's ln N_opt by .03 to .05 (median) when
fitted to the last four, and by more with all."""
_GAMMA = np.eye(6)[5]


@dataclass(frozen=True, kw_only=True)
class GammaTest:
    """Whether the generalised law's gamma differs from 1, which is Hoffmann's law."""

    statistic: float
    """F: the sum of squares that gamma saves, over the residual variance; divided by how much more
    uncertain ln gamma is for what budgets share."""
    p: float
    """Probability of a larger F, were gamma 1."""

    @property
    def weight(self) -> float:
        """Share of the generalised law in a forecast, F / (1 + F).

        The positive-part rule of Stein 1966 for one constant: no jump where a test just rejects.
        """
        return self.statistic / (1.0 + self.statistic) if math.isfinite(self.statistic) else 1.0


def gamma_test(hoffmann: Fit, generalised: Fit) -> GammaTest | None:
    """F test of gamma = 1, from both laws' fits to the same rows; Wald's for Huber's loss.

    None where gamma is pinned, or ended at a bound.

    Rows that share their budget's shift carry less evidence than their number: without the
    correction 11 to 31% of Hoffmann truths with shifts as large as the noise were rejected at 5%;
    with it 4 to 10%, and 2 to 6% of those without shifts.
    """
    if not generalised.free[5]:
        return None
    stderr, dof = generalised.stderr(_GAMMA)
    if np.isfinite(generalised.method.threshold):
        statistic = float(generalised.theta[5] / stderr) ** 2 if stderr > 0.0 else math.inf
        return GammaTest(statistic=statistic, p=float(fdtrc(1.0, dof, statistic)))
    saved = max(hoffmann.rss - generalised.rss, 0.0)
    alone = generalised.own[5, 5] * generalised.sigma**2
    inflation = stderr**2 / alone if alone > 0.0 else 1.0
    noise = generalised.sigma**2 * inflation
    statistic = saved / noise if noise > 0.0 else (math.inf if saved > 0.0 else 0.0)
    return GammaTest(statistic=statistic, p=float(fdtrc(1.0, dof, statistic)))


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Both laws fitted to the same rows, and how much each counts."""

    hoffmann: Fit
    generalised: Fit | None
    """None where there are too few rows for it."""
    test: GammaTest | None
    """None with one law only, or with gamma pinned or at a bound."""
    note: str | None
    """Why there is no generalised law, else None."""

    @property
    def fits(self) -> tuple[Fit, ...]:
        """Those that there are."""
        return (self.hoffmann, *([self.generalised] if self.generalised else []))

    @property
    def weight(self) -> float:
        """Share of the generalised law; none where its fit is not sound, all where only its is."""
        if self.generalised is None or not self.generalised.sound:
            return 0.0
        if self.test is None or not self.hoffmann.sound:  # gamma is pinned: nothing to weigh
            return 1.0
        return self.test.weight

    @property
    def leading(self) -> Fit:
        """The fit with the greater weight."""
        return self.generalised if self.generalised and self.weight > 0.5 else self.hoffmann


def fit_pair(obs: Observations, method: Method = LEAST_SQUARES) -> Pair:
    """Fit both laws to the same rows.

    Raises
    ------
    InputError
        If Hoffmann's law cannot be fitted.
    """
    hoffmann = fit(HOFFMANN, obs, method=method)
    try:
        generalised = fit(GENERALISED, obs, method=method)
    except InputError as error:
        return Pair(hoffmann=hoffmann, generalised=None, test=None, note=str(error))
    return Pair(
        hoffmann=hoffmann,
        generalised=generalised,
        test=gamma_test(hoffmann, generalised),
        note=None,
    )


def recent(obs: Observations, budgets: int = RECENT_BUDGETS) -> Observations:
    """Rows of the largest `budgets` nominal budgets, and others at least as expensive."""
    nominal = obs.budgets()
    if len(nominal) <= budgets:
        return obs
    smallest = nominal[-budgets]
    least = obs.flops[obs.budget == smallest].min()
    kept = np.where(np.isfinite(obs.budget), obs.budget >= smallest, obs.flops >= least)
    return obs.select(kept)


@dataclass(frozen=True, kw_only=True)
class Basis:
    """The fits that a headline at any budget rests on."""

    recent: Pair
    all: Pair


def fit_basis(obs: Observations, method: Method = LEAST_SQUARES) -> Basis:
    """Fit both laws to the recent budgets and to all; to all only where the recent are too few.

    Raises
    ------
    InputError
        If Hoffmann's law cannot be fitted to all rows.
    """
    everything = fit_pair(obs, method)
    last = recent(obs)
    if len(last) == len(obs):
        return Basis(recent=everything, all=everything)
    try:
        return Basis(recent=fit_pair(last, method), all=everything)
    except InputError:
        return Basis(recent=everything, all=everything)
