"""Profile-likelihood intervals: how far a quantity can go before the fit gets worse than noise.

Slower than the t intervals of `intervals.py`, right also where the law bends within the interval.
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
from analysis.scatter import group_sums

Quantity = Callable[[FloatArray], tuple[float, FloatArray]]
"""From theta, shape (6,), to a value and its derivatives, shape (6,)."""

_STIFF = 1e4  # of the quantity's standard error: how closely a profile holds its value
_JUMP = 0.01  # of the rise allowed, within a millionth of the way
_EXACT = 1e-12  # residuals of ln L that are rounding: nothing is uncertain
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
        Ends where the least sum of squares has risen by s^2 t^2, t the two-sided quantile and s^2
        the variance of a row's own noise; infinite where it never rises so far before a constant
        reaches the end of its range.

    Raises
    ------
    ValueError
        If the fit is by Huber's loss, which has no likelihood of this kind, or is not sound.

    Notes
    -----
    Bates and Watts 1988, section 6.1. The minimum at a given value is found by a further residual
    that holds the quantity there. Where groups of rows share noise, residuals are first made
    independent with the fit's own variances: the profile is then about the generalised
    least-squares value, and reaches to the fit's.
    """
    if np.isfinite(fit.method.threshold) or not fit.sound:
        raise ValueError("a profile needs a sound least-squares fit")
    data = prepare(fit.law, obs)
    estimate, gradient = quantity(fit.theta)
    known = errors(fit, np.array([estimate]), gradient[None])
    stderr, dof = float(known.stderr.max()), float(known.dof.min())
    allowed = fit.scatter.own * t_quantile(dof, level) ** 2
    if fit.sigma < _EXACT or stderr == 0.0:
        return Interval(estimate, estimate, estimate, level)
    if fit.scatter.shared > 0.0:
        centre, lowest = _least(fit, data, quantity, None, stderr)
    else:
        centre, lowest = fit.rss, estimate

    def end(side: float) -> float:
        def excess(distance: float) -> float:
            held = lowest + side * distance * stderr
            return _least(fit, data, quantity, held, stderr)[0] - centre - allowed

        reach = 2.0
        while excess(reach) < 0.0:
            reach *= 2.0
            if reach > _REACH:
                return side * math.inf
        found = float(brentq(excess, 0.0, reach, rtol=1e-9))
        # A jump is where the search ends, not where the fit gets worse.
        if excess(found * (1.0 - 1e-6)) < -_JUMP * allowed:
            return side * math.inf
        return lowest + side * stderr * found

    return Interval(estimate, min(end(-1.0), estimate), max(end(1.0), estimate), level)


def _least(
    fit: Fit, data: Data, quantity: Quantity, held: float | None, stderr: float
) -> tuple[float, float]:
    """The smallest sum of squares, and the quantity there, held or not."""
    rows, free = data.rows, np.flatnonzero(fit.free)
    stiff = _STIFF * math.sqrt(fit.scatter.own) / stderr
    full = data.centred(fit.theta)

    def at(x: FloatArray) -> tuple[FloatArray, FloatArray]:
        theta = full.copy()
        theta[free] = x
        value, jacobian = log_loss_jacobian(theta, rows.log_n, rows.log_d)
        both = np.column_stack([value - rows.log_loss[0], jacobian[:, free]])
        both = _independent(fit, data, both)
        if held is None:
            return both[:, 0], both[:, 1:]
        there, slope = quantity(data.uncentred(theta))
        residual = np.append(both[:, 0], stiff * (there - held))
        return residual, np.vstack([both[:, 1:], stiff * (slope @ data.uncentring)[free]])

    low, high = data.low[free], data.high[free]
    begin = np.clip(full[free], low + 1e-12, high - 1e-12)
    found = least_squares(
        lambda x: at(x)[0], begin, lambda x: at(x)[1], bounds=(low, high), x_scale="jac"
    )
    theta = full.copy()
    theta[free] = found.x
    return 2.0 * float(found.cost), quantity(data.uncentred(theta))[0]


def _independent(fit: Fit, data: Data, columns: FloatArray) -> FloatArray:
    """Columns over rows, shape (n, m), scaled to equal noise and freed of what groups share.

    With V = I + r w w^T in a group, w the roots of its weights, V^(-1/2) takes from each column
    the share 1 - (1 + r w^T w)^(-1/2) of its part along w.
    """
    root_weight = np.sqrt(data.rows.weights[0])
    scaled: FloatArray = root_weight[:, None] * columns
    if fit.scatter.shared == 0.0 or data.groups is None:
        return scaled
    total = np.bincount(data.groups, root_weight**2)
    share = (1.0 - (1.0 + fit.scatter.shared / fit.scatter.own * total) ** -0.5) / total
    along = group_sums(scaled, data.groups, root_weight)
    freed: FloatArray = scaled - root_weight[:, None] * (share * along)[:, data.groups].T
    return freed
