"""Where a law has its optimum: the N, D and L that a FLOP budget buys, and their gradients.

Closed form where C = 6 N D, numerical where FLOPs a token are any rising function of N.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq, minimize_scalar

from analysis.errors import InputError
from analysis.laws import log_loss, log_loss_jacobian
from analysis.observations import FloatArray, Observations

_DECAY = 0.5
_POOL = np.log(1.25)
_STEEPEST, _FLATTEST = 3.0, 0.1
_LOG_4 = float(np.log(4.0))
_GRID = 513
_MARGIN = 2.0  # in ln N: the last slope of c may bend a valley beyond the points
_FLAT = 1e-9
_BEND = 1e-4  # in ln N, for the slope of the slope of c


@dataclass(frozen=True, eq=False)
class FlopsPerToken:
    """c(N), training FLOPs per token, so that C = c(N) D.

    Between its points ln c - ln 6N is a monotone cubic (PCHIP) in ln N: c then has a continuous
    slope, without which the optimum would stick to the points. Beyond the largest N the slope of
    ln c - ln 6N decays as N^-1/2, as the share of attention and head does where width grows: an
    end slope of .94 held for 100x in N would put c 20% below 6N. Below the smallest N the slope is
    kept.

    Attributes
    ----------
    params
        N, ascending, shape (m,). A single point means that c is proportional to N.
    flops_per_token
        c in FLOPs per token, ascending, shape (m,).
    """

    params: FloatArray
    flops_per_token: FloatArray

    def __post_init__(self) -> None:
        if len(self.params) == 0 or self.params.shape != self.flops_per_token.shape:
            raise InputError("FLOPs per token need one value for each of at least one model size")
        if not (np.all(np.diff(self.params) > 0) and np.all(np.diff(self.flops_per_token) > 0)):
            raise InputError("FLOPs per token must rise with the number of parameters")

    @classmethod
    def six_n(cls) -> FlopsPerToken:
        """C = 6 N D: 2 FLOPs a parameter a token forward, twice that backward."""
        return cls(np.array([1.0]), np.array([6.0]))

    @classmethod
    def from_observations(cls, observations: Observations) -> FlopsPerToken:
        """C/D of the observations, sizes closer than a factor 1.25 averaged in logarithms.

        Averaging keeps the rounding of D in somebody's CSV from becoming a slope. Where c still
        does not rise plausibly with N (a slope d ln c / d ln N outside 0.1 to 3), c is taken as
        proportional to N.

        Examples
        --------
        >>> from analysis.observations import Observations
        >>> n, d, nan = np.array([1e6, 1e8]), np.array([1e9, 1e9]), np.full(2, np.nan)
        >>> obs = Observations(
        ...     params=n, tokens=d, flops=6 * n * d, loss=nan, loss_stderr=nan, budget=nan)
        >>> bool(np.isclose(FlopsPerToken.from_observations(obs)(1e7), 6e7, rtol=1e-12))
        True
        """
        log_n = np.log(observations.params)
        ratio = np.log(observations.flops / observations.tokens) - log_n
        order = np.argsort(log_n, kind="stable")
        log_n, ratio = log_n[order], ratio[order]
        group = np.zeros(len(log_n), dtype=np.intp)
        first = log_n[0]
        for i in range(1, len(log_n)):
            same = log_n[i] - first < _POOL
            first = first if same else log_n[i]
            group[i] = group[i - 1] + (0 if same else 1)
        count = np.bincount(group)
        log_n = np.bincount(group, log_n) / count
        ratio = np.bincount(group, ratio) / count
        slope = 1.0 + np.diff(ratio) / np.diff(log_n)
        if np.ptp(ratio) < 1e-9 or np.any((slope < _FLATTEST) | (slope > _STEEPEST)):
            log_n, ratio = log_n[:1], np.array([ratio.mean()])
        return cls(np.exp(log_n), np.exp(log_n + ratio))

    @property
    def proportional(self) -> bool:
        """Whether c is proportional to N, so that the optimum has a closed form."""
        return len(self.params) == 1

    @cached_property
    def _spline(self) -> tuple[PchipInterpolator, PchipInterpolator, FloatArray]:
        log_n = np.log(self.params)
        ratio = PchipInterpolator(log_n, np.log(self.flops_per_token) - np.log(6.0) - log_n)
        return ratio, ratio.derivative(), log_n

    def log_and_slope(self, log_params: FloatArray | float) -> tuple[FloatArray, FloatArray]:
        """Both ln c and d ln c / d ln N at ln N, each of the shape of `log_params`."""
        log_params = np.asarray(log_params, dtype=np.float64)
        if self.proportional:
            offset = np.log(self.flops_per_token[0] / self.params[0])
            return offset + log_params, np.ones_like(log_params)
        ratio, derivative, knots = self._spline
        inside = np.clip(log_params, knots[0], knots[-1])
        below = np.minimum(log_params - knots[0], 0.0)
        decayed = np.exp(-_DECAY * np.maximum(log_params - knots[-1], 0.0))
        slope = derivative(inside)
        beyond = slope * (1.0 - decayed) / _DECAY
        log_c = np.log(6.0) + log_params + ratio(inside) + slope * below + beyond
        return log_c, 1.0 + slope * decayed

    def __call__(self, params: float) -> float:
        """FLOPs per token at N parameters."""
        return float(np.exp(self.log_and_slope(np.log(params))[0]))


@dataclass(frozen=True)
class Optimum:
    """The compute-optimal model at one budget."""

    params: float
    """N_opt, in parameters."""
    tokens: float
    """D_opt, in tokens."""
    loss: float
    """L at (N_opt, D_opt), in nats/token."""


def exponent(theta: FloatArray) -> float:
    """The a in N_opt ~ C^a where C = 6 N D: beta / (alpha + beta), Hoffmann et al. 2022, Eq. 4.

    Raising the bracket to gamma moves no minimum, so it holds for every law here.
    """
    alpha, beta = theta[3], theta[4]
    return float(beta / (alpha + beta))


def log_optimal_params(theta: FloatArray, flops: float, cost: FlopsPerToken) -> float:
    """The ln N that minimises L(N, C/c(N)), accurate to 1e-10.

    The loss is flat at its minimum, where a minimiser finds N to 1e-8 at best; this solves
    d ln bracket / d ln N = 0 instead. For c proportional to N that is Hoffmann et al. 2022, Eq. 4.
    """
    log_a, log_b, _, alpha, beta, _ = theta
    log_c = np.log(flops)
    balance = log_a + np.log(alpha) - log_b - np.log(beta)
    offset = float(cost.log_and_slope(0.0)[0]) if cost.proportional else np.log(6.0)
    closed = float((balance + beta * (log_c - offset)) / (alpha + beta))
    if cost.proportional:
        return closed

    def gain(x: float) -> float:
        """Log of what N still gains over what fewer tokens cost: positive below the optimum."""
        log_cost, slope = cost.log_and_slope(x)
        # Between uneven points c may stop rising: more N is then free, and the gain all the larger.
        return float(
            balance - alpha * x + beta * (log_c - log_cost) - np.log(max(float(slope), _FLAT))
        )

    low, high, step = closed, closed, 1.0
    while gain(low) <= 0.0:
        low, step = low - step, 2.0 * step
    step = 1.0
    while gain(high) >= 0.0:
        high, step = high + step, 2.0 * step
    # A c(N) averaged from noisy rows may have several stationary points: take the lowest.
    first, last = np.log(cost.params[[0, -1]])
    grid = np.linspace(min(low, first) - _MARGIN, max(high, last) + _MARGIN, _GRID)

    def bracket(x: FloatArray) -> FloatArray:
        tokens = log_c - cost.log_and_slope(x)[0]
        return np.asarray(np.logaddexp(log_a - alpha * x, log_b - beta * tokens))

    best = int(np.argmin(bracket(grid)))
    left, right = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, _GRID - 1)])
    if gain(left) > 0.0 > gain(right):
        low, high = left, right
    elif 0 < best < _GRID - 1:  # several stationary points within one step of the grid
        return float(minimize_scalar(bracket, bounds=(left, right), method="bounded").x)
    return float(brentq(gain, low, high, xtol=1e-12, rtol=1e-14))


_LARGEST_LOG = 700.0


def optimum(theta: FloatArray, flops: float, cost: FlopsPerToken) -> Optimum:
    """The compute-optimal N, D and L at `flops` under C = c(N) D.

    Examples
    --------
    Hoffmann's published law puts Chinchilla's 5.88e23 FLOPs at 32 billion parameters, not the 70
    billion it has.

    >>> from analysis.laws import PUBLISHED
    >>> paper = PUBLISHED["hoffmann-2022"]
    >>> best = optimum(paper.theta, 5.88e23, FlopsPerToken.six_n())
    >>> round(best.params / 1e9), round(best.tokens / 1e12)
    (32, 3)
    """
    x = log_optimal_params(theta, flops, cost)
    y = float(np.log(flops) - cost.log_and_slope(x)[0])
    value = float(log_loss(theta, np.array(x), np.array(y)))
    # An unidentified exponent may send the optimum beyond what a double holds.
    n, d, best = np.exp(np.minimum([x, y, value], _LARGEST_LOG))
    return Optimum(float(n), float(d), float(best))


def local_exponents(theta: FloatArray, flops: float, cost: FlopsPerToken) -> tuple[float, float]:
    """The slopes a = d ln N_opt / d ln C and b = d ln D_opt / d ln C, as chords from C/2 to 2C.

    beta/(alpha+beta) and the rest to 1 where c is proportional to N. Chords, because the second
    derivative of the interpolated c is only piecewise right (.03 off for the mini shapes), and
    N_opt is read off over such a range anyway.
    """
    if cost.proportional:
        a = exponent(theta)
        return a, 1.0 - a
    at = np.array([log_optimal_params(theta, factor * flops, cost) for factor in (0.5, 2.0)])
    log_cost = cost.log_and_slope(at)[0]
    return float(at[1] - at[0]) / _LOG_4, 1.0 - float(log_cost[1] - log_cost[0]) / _LOG_4


def log_optimum_jacobian(
    theta: FloatArray, flops: float, cost: FlopsPerToken
) -> tuple[FloatArray, FloatArray]:
    """The values (ln N_opt, ln D_opt, ln L, a, b), shape (5,), and their gradients, shape (5, 6).

    a and b are the local exponents of N_opt and D_opt, see `local_exponents`. Gradients are by the
    implicit function theorem on the condition that `log_optimal_params` solves; the loss has no
    slope along the budget there, so that its gradient is that of L at fixed (N, D).
    """
    at = _point(theta, flops, cost)
    value, by_loss = log_loss_jacobian(theta, np.array(at.log_n), np.array(at.log_d))
    if cost.proportional:
        alpha, beta = theta[3], theta[4]
        a = exponent(theta)
        by_a = np.zeros(6)
        by_a[3:5] = np.array([-beta, alpha]) / (alpha + beta) ** 2
        b, by_b = 1.0 - a, -by_a
    else:
        above, below = _point(theta, 2.0 * flops, cost), _point(theta, flops / 2, cost)
        a, b = (np.array(above[:2]) - np.array(below[:2])) / _LOG_4
        by_a, by_b = (above.by_n - below.by_n) / _LOG_4, (above.by_d - below.by_d) / _LOG_4
    values = np.array([at.log_n, at.log_d, float(value), a, b])
    return values, np.stack([at.by_n, at.by_d, by_loss, by_a, by_b])


class _Point(NamedTuple):
    """An optimum and its gradients by theta, each of shape (6,)."""

    log_n: float
    log_d: float
    by_n: FloatArray
    by_d: FloatArray


def _point(theta: FloatArray, flops: float, cost: FlopsPerToken) -> _Point:
    alpha, beta = theta[3], theta[4]
    at = log_optimal_params(theta, flops, cost)
    log_cost, slope = (float(part) for part in cost.log_and_slope(at))
    log_d = float(np.log(flops)) - log_cost
    bend = 0.0
    if not cost.proportional:
        below, above = cost.log_and_slope(at + np.array([-_BEND, _BEND]))[1]
        bend = float(above - below) / (2.0 * _BEND)
    by_condition = np.array([1.0, -1.0, 0.0, 1.0 / alpha - at, log_d - 1.0 / beta, 0.0])
    by_n = by_condition / (alpha + beta * slope + bend / slope)
    return _Point(at, log_d, by_n, -slope * by_n)
