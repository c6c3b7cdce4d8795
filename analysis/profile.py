"""Profile-likelihood intervals: how far a quantity can go before the fit gets worse than noise.

Slower than the t intervals of `intervals.py`, right also where the law bends within the interval.
Rows count as independent here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import brentq, least_squares

from analysis.fitting import Fit
from analysis.intervals import Interval, errors, t_quantile
from analysis.laws import log_loss_jacobian
from analysis.observations import FloatArray, Observations
from analysis.problem import Data, prepare

Quantity = Callable[[FloatArray], tuple[float, FloatArray]]
"""From theta, shape (6,), to a value and its derivatives, shape (6,)."""

_STIFF = 1e4  # of the quantity's standard error: how closely a profile holds its value
_JUMP = 0.01  # of the rise allowed, within a millionth of the way
_REACH = 40.0  # standard errors; beyond, the data set no end


def profile(fit: Fit, obs: Observations, quantity: Quantity, level: float = 0.9) -> Interval:
    """Values of `quantity` at which the best fit's sum of squares stays within F-calibrated reach.

    Parameters
    ----------
    fit
        By squares; see Raises.
    obs
        What it was fitted to.
    quantity
        On the scale on which its interval is to be read: ln N_opt rather than N_opt.
    level
        Nominal coverage.

    Returns
    -------
    Interval
        Ends where min RSS = RSS (1 + t^2 / dof), t the two-sided quantile; infinite where the sum
        of squares never rises so far before a constant reaches the end of its range.

    Raises
    ------
    ValueError
        If the fit is by Huber's loss, which has no likelihood of this kind, or is not sound.

    Notes
    -----
    Bates and Watts 1988, section 6.1. The minimum at a given value is found by a further residual
    that holds the quantity there.
    """
    if np.isfinite(fit.method.threshold) or not fit.sound:
        raise ValueError("a profile needs a sound least-squares fit")
    data = prepare(fit.law, obs)
    centre, gradient = quantity(fit.theta)
    stderr = float(errors(fit, np.array([centre]), gradient[None]).stderr.max())
    allowed = fit.rss * t_quantile(fit.dof, level) ** 2 / fit.dof
    if allowed == 0.0 or stderr == 0.0:
        return Interval(centre, centre, centre, level)

    def end(side: float) -> float:
        def excess(distance: float) -> float:
            held = centre + side * distance * stderr
            return _least(fit, data, quantity, held, stderr) - fit.rss - allowed

        reach = 2.0
        while excess(reach) < 0.0:
            reach *= 2.0
            if reach > _REACH:
                return side * math.inf
        found = float(brentq(excess, 0.0, reach, rtol=1e-9))
        # A jump is where the search ends, not where the fit gets worse.
        if excess(found * (1.0 - 1e-6)) < -_JUMP * allowed:
            return side * math.inf
        return centre + side * stderr * found

    return Interval(centre, end(-1.0), end(1.0), level)


def _least(fit: Fit, data: Data, quantity: Quantity, held: float, stderr: float) -> float:
    """The smallest sum of squares with the quantity held."""
    rows, free = data.rows, np.flatnonzero(fit.free)
    root_weight = np.sqrt(rows.weights[0])
    stiff = _STIFF * fit.sigma / stderr
    full = fit.theta.copy()
    full[0] -= full[3] * data.centre_n
    full[1] -= full[4] * data.centre_d

    def at(x: FloatArray) -> tuple[FloatArray, FloatArray]:
        theta = full.copy()
        theta[free] = x
        value, jacobian = log_loss_jacobian(theta, rows.log_n, rows.log_d)
        there, slope = quantity(data.uncentred(theta))
        residual = np.append(root_weight * (value - rows.log_loss[0]), stiff * (there - held))
        weighted = root_weight[:, None] * jacobian[:, free]
        return residual, np.vstack([weighted, stiff * (slope @ data.uncentring)[free]])

    low, high = data.low[free], data.high[free]
    begin = np.clip(full[free], low + 1e-12, high - 1e-12)
    found = least_squares(
        lambda x: at(x)[0], begin, lambda x: at(x)[1], bounds=(low, high), x_scale="jac"
    )
    return 2.0 * float(found.cost)
