"""The discrepancy: the error of a law beyond noise, and its share of a forecast's interval.

Where the evidence comes from, a study's own back-tests, is `heldout.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import ndtri

from analysis.intervals import Interval, add_in_quadrature, require_level
from analysis.observations import FloatArray

Source = Literal["back-tests", "default"]

_TINIEST, _LARGEST, _STEPS = 1e-6, 10.0, 120
"""Range of standard deviations that are searched, and how many are tried before refining."""


@dataclass(frozen=True, kw_only=True)
class Discrepancy:
    """The error of a forecast beyond noise, for each unit of ln C away from the fitted budgets.

    The unit makes it the standard deviation of an exponent: of ln N_opt, by how much the exponent
    beyond the fitted budgets differs from the law's. On three public studies errors at 1 to 5
    budgets' distance grew in proportion to ln C (log likelihood 33.1), not to its root (30.7), and
    were not the same at every distance (24.6). Those were errors above the largest budget; below
    the smallest a law extrapolates as much, and the same is taken.
    """

    params: float
    """Standard deviation of ln N_opt, and of ln D_opt, for each unit of ln C."""
    loss: float
    """Standard deviation of ln L for each unit of ln C."""
    source: Source
    back_tests: int
    """Number of back-tests. The default is used where they are too few or too noisy."""

    def at(self, distance: float) -> Shares:
        """Standard deviations of ln N_opt and ln L at a distance in ln C; none where it is 0."""
        reach = max(distance, 0.0)
        return Shares(self.params * reach, self.loss * reach)


class Shares(NamedTuple):
    """One source's part of what N_opt and L may be off by, as standard deviations of logarithms."""

    params: float
    loss: float


DEFAULT = Discrepancy(params=0.11, loss=0.0, source="default", back_tests=0)
"""The discrepancy used where no back-test tells: the likeliest value over 15 back-tests of studies
of Hoffmann et al. 2022, Grattafiori et al. 2024 (Llama 3) and Marin 2026, points as collected by
Open-Athena, each budget predicted from two or more below it. In ln N_opt .114 (.175, .137 and 0 by
study; .101, .061 and .148 with each of them left out), in ln L none beyond noise."""


LEAST_INFORMATION = 0.25
"""Information that back-tests need to replace the default, in exact back-tests: that of one whose
noise is as large as the discrepancy that it is to see."""


class Miss(NamedTuple):
    """One prediction that was compared with a measurement."""

    error: float
    """ln predicted - ln measured."""
    noise: float
    """Standard deviation of that error, were the law true."""
    distance: float
    """ln C of the prediction above that of the largest budget fitted."""


def estimate(params: Sequence[Miss], loss: Sequence[Miss]) -> Discrepancy:
    """The discrepancy that a study's back-tests tell; the default where they are too few to tell.

    Parameters
    ----------
    params, loss
        Errors of ln N_opt and of ln L.

    Notes
    -----
    Zero by back-tests that could not have seen more is no evidence of none. By Llama 3's three
    lowest budgets, whose one back-test has a noise of .17 in ln N_opt, it would be zero, and the
    forecast of the fourth, .25 too high, have an interval of .09.
    """
    if information(params) < LEAST_INFORMATION:
        return replace(DEFAULT, back_tests=len(params))
    return Discrepancy(
        params=likeliest(params),
        loss=likeliest(loss),
        source="back-tests",
        back_tests=len(params),
    )


def information(misses: Sequence[Miss], expected: float = DEFAULT.params) -> float:
    """Return the number of exact back-tests that would tell as much of an expected discrepancy.

    The Fisher information of ln tau at the expected tau, in units of that of one back-test without
    noise.

    Examples
    --------
    >>> information([Miss(0.0, 0.0, 1.0), Miss(0.3, 0.11, 1.0), Miss(0.0, 9.0, 1.0)])
    1.25
    """
    terms = (((expected * m.distance) ** 2, m.noise**2) for m in misses)
    return round(sum((own / (own + noise)) ** 2 for own, noise in terms), 6)


def likeliest(misses: Sequence[Miss]) -> float:
    """The standard deviation for each unit of ln C under which the errors are likeliest.

    Errors are taken as normal about zero with variance noise^2 + (tau distance)^2, as the random
    effect of a meta-analysis is: a prediction that noise blurs counts little. Zero where noise
    alone explains the errors.

    Examples
    --------
    One exact prediction per unit of ln C that was off by .1 and one that was off by -.1:

    >>> round(likeliest([Miss(0.1, 0.0, 1.0), Miss(-0.1, 0.0, 1.0)]), 6)
    0.1
    >>> likeliest([Miss(0.1, 0.2, 1.0), Miss(-0.1, 0.2, 1.0)])
    0.0
    """
    if not misses:
        return 0.0
    error, noise, distance = np.array(misses, dtype=np.float64).T

    def surprise(tau: FloatArray | float) -> FloatArray:
        variance = noise**2 + np.square(np.expand_dims(tau, -1) * distance)
        return np.asarray(0.5 * np.sum(np.log(variance) + error**2 / variance, axis=-1))

    grid = np.geomspace(_TINIEST, _LARGEST, _STEPS)
    tried = surprise(grid)
    best = int(np.argmin(tried))
    if np.all(noise > 0.0) and float(surprise(0.0)) <= tried[best]:
        return 0.0
    around = np.log(grid[[max(best - 1, 0), min(best + 1, _STEPS - 1)]])
    found = minimize_scalar(
        lambda log_tau: float(surprise(math.exp(log_tau))),
        bounds=(float(around[0]), float(around[1])),
        method="bounded",
        options={"xatol": 1e-8},
    )
    return math.exp(float(found.x))


def widened(part: Interval, stderr: float) -> Interval:
    """An interval of a positive number, also for a normal error of its logarithm, in quadrature."""
    return part if stderr == 0.0 else add_in_quadrature(part, quantile(part.level) * stderr)


def quantile(level: float) -> float:
    """Half-width in standard deviations of a normal's interval of coverage `level`.

    Examples
    --------
    >>> round(quantile(0.9), 3)
    1.645
    """
    require_level(level)
    return float(ndtri(0.5 + 0.5 * level))
