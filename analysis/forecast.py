"""What a fitted law says at a budget: N_opt, D_opt, L and the local exponent, with intervals.

Which law to act on is for `headline.py`, whether it held before for `heldout.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.errors import InputError
from analysis.fitting import Fit
from analysis.intervals import (
    Errors,
    Interval,
    add_in_quadrature,
    errors,
    interval,
    t_quantile,
)
from analysis.laws import LawName
from analysis.observations import FloatArray
from analysis.optimum import FlopsPerToken, log_optimum_jacobian

TESTED_REACH = 100.0
"""How far above the top budget the intervals' coverage was measured, see `Interval`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Forecast:
    """What one fit says at one budget."""

    law: LawName
    flops: float
    """The budget C, in FLOPs."""
    params: Interval
    """N_opt, in parameters."""
    tokens: Interval
    """D_opt, in tokens."""
    loss: Interval
    """L at (N_opt, D_opt), in nats/token: the mean over runs."""
    new_run: Interval
    """L of one new run there, whose own noise and budget's shift are in the interval too."""
    exponent: Interval
    """The local a = d ln N_opt / d ln C."""
    tokens_exponent: Interval
    """The local b = d ln D_opt / d ln C."""
    errors: Errors
    """Of ln N_opt, ln D_opt, ln L, a and b, arrays of shape (5,)."""


def forecast(fit: Fit, flops: float, cost: FlopsPerToken, level: float = 0.9) -> Forecast:
    """N_opt, D_opt, L and the local exponents at `flops`, with Gauss-Newton t intervals.

    A fit that is not sound, stopped at a bound or short of a minimum, has open ends everywhere: its
    covariance speaks of the constants that were left free only.

    Parameters
    ----------
    fit
        The law and its uncertainty.
    flops
        Budget C in FLOPs.
    cost
        FLOPs per token as a function of N, under the convention of the fit's observations.
    level
        Nominal coverage; what it covers is noise, not a law that does not hold.

    Raises
    ------
    InputError
        If `flops` is not a positive number, or the law is not one of N and D.
    """
    if not (math.isfinite(flops) and flops > 0):
        raise InputError(f"a forecast needs a positive number of FLOPs, not {flops}")
    if fit.law.variables[1] is None:
        raise InputError(f"{fit.law.formula} does not weigh N against D: it has no optimum at C")
    values, gradient = log_optimum_jacobian(fit.theta, flops, cost)
    found = errors(fit, values, gradient)
    params, tokens, loss, a, b = intervals(found, level)
    return Forecast(
        law=fit.law.name,
        flops=flops,
        params=params,
        tokens=tokens,
        loss=loss,
        new_run=_with_noise(loss, fit),
        exponent=a,
        tokens_exponent=b,
        errors=found,
    )


def _with_noise(mean: Interval, fit: Fit) -> Interval:
    """The interval of one new run of that mean.

    Its own noise and its budget's shift are added in quadrature to either end. One t interval of
    both may be narrower than that of the mean: together they have more degrees of freedom.
    """
    noise, dof = fit.new_run
    return add_in_quadrature(mean, t_quantile(dof, mean.level) * noise)


def intervals(found: Errors, level: float) -> tuple[Interval, ...]:
    """Of N_opt, D_opt, L, a and b, from the errors of their logarithms and of a and b."""
    natural = natural_values(found.values)
    ends = zip(natural, found.stderr, found.dof, strict=True)
    return tuple(
        interval(
            float(x),
            float(stderr[1]),
            float(dof[1]),
            level,
            scale="log" if i < 3 else "linear",
            below=(float(stderr[0]), float(dof[0])),
        )
        for i, (x, stderr, dof) in enumerate(ends)
    )


def natural_values(values: FloatArray) -> FloatArray:
    """Of (ln N, ln D, ln L, a, b) those of N, D, L, a and b, each of shape (5,)."""
    # exp() of more than 700 overflows; an unidentified exponent may put N_opt there.
    return np.append(np.exp(np.clip(values[:3], -700.0, 700.0)), values[3:])
