"""Intervals of a fit's constants and exponents, of whichever kind was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from analysis.bootstrap import bootstrap, percentile
from analysis.errors import InputError
from analysis.fitting import Fit
from analysis.forecast import Forecast
from analysis.intervals import Interval, constant_intervals
from analysis.laws import NAMES
from analysis.observations import FloatArray, Observations
from analysis.optimum import FlopsPerToken, local_exponents, log_optimum_jacobian
from analysis.profile import profile

IntervalKind = Literal["t", "profile", "bootstrap", "cluster"]
"""Gauss-Newton t with what budgets share; profile likelihood; bootstrap by pairs or by cluster."""

REPLICATES = 4000
_MOST_FAILED = 0.05  # of the replicates; the percentiles at 95% are made of that many


@dataclass(frozen=True, kw_only=True)
class LawIntervals:
    """How well one law's constants and exponents are known."""

    constants: Mapping[str, Interval]
    """Of the free constants, by name."""
    exponent: Interval
    """The local a of N_opt ~ C^a."""
    tokens_exponent: Interval
    """The local b of D_opt ~ C^b."""
    note: str | None = None
    """What weakens them, else None."""


def law_intervals(
    fit: Fit,
    obs: Observations,
    said: Forecast,
    cost: FlopsPerToken,
    kind: IntervalKind = "t",
) -> LawIntervals:
    """Intervals of constants and exponents at the level, and at the C, of a forecast.

    Parameters
    ----------
    fit
        The law; where it is not sound all intervals are open, of whatever kind.
    obs
        What it was fitted to.
    said
        Its forecast at the C for which exponents hold.
    cost
        Training FLOPs per token as a function of N.
    kind
        See `IntervalKind`.

    Raises
    ------
    InputError
        If there is no such kind, for a profile of Huber's loss, or as `bootstrap` does.
    """
    if kind not in get_args(IntervalKind):
        raise InputError(f"intervals are {', '.join(get_args(IntervalKind))}, not {kind!r}")
    level = said.loss.level
    if kind == "t" or not fit.sound:
        constants = constant_intervals(fit, level)
        return LawIntervals(
            constants=constants, exponent=said.exponent, tokens_exponent=said.tokens_exponent
        )
    if kind == "profile":
        return _profiled(fit, obs, said, cost)
    if obs.rows > len(obs):
        raise InputError(
            f"{obs.rows} observations are too many for a bootstrap: take t intervals, or select "
            "some with --where"
        )
    found = bootstrap(fit, obs, replicates=REPLICATES, by="pairs" if kind == "bootstrap" else kind)
    if found.failed > _MOST_FAILED * REPLICATES:
        raise InputError(
            f"{found.failed} of {REPLICATES} bootstrap replicates of the {fit.law.name} law found "
            "no minimum: the observations are too few for it; take t intervals"
        )
    a, b = np.array([local_exponents(theta, said.flops, cost) for theta in found.theta]).T
    note = f"{found.failed} of {REPLICATES} bootstrap replicates found no minimum"
    return LawIntervals(
        constants=found.constants(level),
        exponent=percentile(said.exponent.estimate, a, level),
        tokens_exponent=percentile(said.tokens_exponent.estimate, b, level),
        note=note if found.failed else None,
    )


def _profiled(fit: Fit, obs: Observations, said: Forecast, cost: FlopsPerToken) -> LawIntervals:
    if fit.method.objective != "squares":
        raise InputError(
            "profile intervals need the objective squares, Huber's loss has no such likelihood: "
            "take bootstrap intervals"
        )
    level = said.loss.level

    def constant(name: str) -> Interval:
        i = NAMES.index(name)
        found = profile(fit, obs, lambda theta: (float(theta[i]), np.eye(len(NAMES))[i]), level)
        if name == "E":
            return replace(found, low=max(found.low, 0.0))
        if name not in ("A", "B", "gamma"):
            return found
        with np.errstate(over="ignore"):  # an end beyond what a double holds is an open one
            estimate, low, high = np.exp([found.estimate, found.low, found.high])
        return Interval(float(estimate), float(low), float(high), level)

    def exponent(row: int) -> Interval:
        def quantity(theta: FloatArray) -> tuple[float, FloatArray]:
            values, gradient = log_optimum_jacobian(theta, said.flops, cost)
            return float(values[row]), gradient[row]

        return profile(fit, obs, quantity, level)

    return LawIntervals(
        constants={name: constant(name) for name in fit.law.names},
        exponent=exponent(3),
        tokens_exponent=exponent(4),
    )
