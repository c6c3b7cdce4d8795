"""Approach 2 of Hoffmann et al. 2022: a parabola a budget, and the line through their vertices.

A look at the valley without any law. It reports beside a law's forecast, never instead of it: the
line is biased where alpha and beta differ or grids drift off centre.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from analysis.intervals import Interval, interval
from analysis.observations import FloatArray, Observations

VertexStatus = Literal["interior", "below_grid", "above_grid", "concave", "too_few_sizes"]

MIN_SIZES = 3
"""Distinct sizes that determine a parabola; from three alone its vertex has no standard error."""
VALLEY_WIDTH = 1.0
"""Standard deviation, in ln N, of the weight around the vertex; at least the mean spacing."""


@dataclass(frozen=True, kw_only=True)
class Vertex:
    """The lowest point of one budget's parabola."""

    budget: float
    """Nominal budget in exact FLOPs, which its trials share."""
    flops: float
    """C at the vertex under the observations' convention: the nominal budget where FLOPs are exact,
    `local_flops` where they are 6ND."""
    local_flops: float
    """What training took at the vertex, in FLOPs: the geometric mean of the budget's observations,
    which differ by rounding only; under 6ND interpolated in ln N between the sizes next to it."""
    n: int
    """Observations in the budget."""
    sizes: int
    """Distinct model sizes among them."""
    status: VertexStatus
    reason: str | None
    """Why the status is not `interior`."""
    params: float | None
    """N at the vertex; None where there is no vertex (`concave`, `too_few_sizes`)."""
    params_stderr: float | None
    """Standard error of ln N at the vertex; None without degrees of freedom."""
    tokens: float | None
    """D at the vertex, interpolated between the budget's own observations."""
    loss: float | None
    """L at the vertex, in nats/token; None unless `interior`."""
    loss_stderr: float | None
    """Standard error of ln L at the vertex, by the scatter around the parabola alone: what all runs
    of a budget share does not show there. None without degrees of freedom."""
    sigma: float | None
    """Residual standard deviation around the parabola, as a fraction of L."""
    dof: float
    """Effective degrees of freedom of `sigma` and of both standard errors; 0 without them."""

    def params_interval(self, level: float) -> Interval | None:
        """The t interval of N at the vertex; None without a vertex or a standard error."""
        if self.params is None or self.params_stderr is None:
            return None
        return interval(self.params, self.params_stderr, self.dof, level)


@dataclass(frozen=True, kw_only=True)
class IsoflopFit:
    """Vertices of all budgets and the power laws through the interior ones."""

    vertices: tuple[Vertex, ...]
    """In ascending order of budget."""
    exponent: Interval | None
    """The a in N_opt ~ C^a; its ends are infinite with only two interior vertices."""
    tokens_exponent: Interval | None
    """The b in D_opt ~ C^b, likewise."""
    reason: str | None
    """Why there is no exponent, else None."""
    level: float
    """Nominal coverage of the intervals."""

    def params_at(self, flops: float) -> Interval | None:
        """N_opt at C by the line, in parameters, with its t interval; None without a line."""
        return self._at(flops, [v.params for v in self.interior])

    def tokens_at(self, flops: float) -> Interval | None:
        """D_opt at C by the line, in tokens, likewise."""
        return self._at(flops, [v.tokens for v in self.interior])

    def _at(self, flops: float, optima: list[float | None]) -> Interval | None:
        if len(optima) < 2:
            return None
        x = np.log([vertex.local_flops for vertex in self.interior])
        y = np.log(np.array(optima, dtype=np.float64))
        line = _line(x, y)
        away = float(np.log(flops)) - float(x.mean())
        estimate = float(np.exp(y.mean() + line.slope * away))
        error = line.sigma * float(np.sqrt(1.0 / len(x) + away**2 / line.spread))
        return interval(estimate, error, line.dof, self.level)

    @property
    def interior(self) -> tuple[Vertex, ...]:
        """The vertices that the line goes through."""
        return tuple(vertex for vertex in self.vertices if vertex.status == "interior")

    @property
    def faults(self) -> tuple[str, ...]:
        """Which budgets have no interior vertex, and why."""
        return tuple(f"{v.flops:.4g} FLOPs: {v.reason}" for v in self.vertices if v.reason)


def isoflop(obs: Observations, level: float = 0.9) -> IsoflopFit:
    """Parabola of L in ln N for each nominal budget, and the line ln N_opt = ln G + a ln C.

    Parameters
    ----------
    obs
        Observations with a nominal budget; those without are left out.
    level
        Nominal coverage of the exponents' t intervals, with (interior vertices - 2) degrees of
        freedom.

    Notes
    -----
    Under 6ND the rows of a budget still share what they were planned with, exact FLOPs: their
    minimum is the optimum of that budget, and its C is 6 N D there.

    Hoffmann et al. 2022, section 3.2, fit one parabola to all points of a budget. Here each point
    is weighted by exp(-(ln N - vertex)^2 / 2) in a second pass, which keeps far points of a wide
    grid, where the valley is no parabola, from moving its bottom. Measured with 7 sizes and .5%
    noise, root mean square error of ln N_opt / bias of ln L at the vertex, grids centred:

    | truth, span of N      | all points  | weighted    | 5 nearest   |
    |-----------------------|-------------|-------------|-------------|
    | Hoffmann 2022, 16x    | .069, -.01% | .073, -.01% | .154, -.03% |
    | Hoffmann 2022, 28x    | .060, -.01% | .063, -.00% | .111, -.00% |
    | Hoffmann 2022, 150x   | .062, -.08% | .065, -.04% | .072, -.03% |
    | mini-like law, 16x    | .026, -.01% | .027, -.01% | .040, -.01% |
    | mini-like law, 28x    | .026, -.02% | .025, -.01% | .034, -.01% |
    | mini-like law, 150x   | .038, -.10% | .029, -.04% | .029, -.03% |

    Root mean square error of ln L is .28 to .33% everywhere. A cubic halves the bias of ln N again
    but doubles its error; parabolas of ln L instead of L are biased up to +.18% off centre.
    """
    budgets = obs.budgets()
    vertices = tuple(_vertex(obs.select(obs.budget == budget), float(budget)) for budget in budgets)
    found = IsoflopFit(
        vertices=vertices, exponent=None, tokens_exponent=None, reason=None, level=level
    )
    used = found.interior
    if len(used) < 2:
        reason = f"an exponent needs two budgets, and there are {len(budgets)}"
        if found.faults:
            faults = "; ".join(found.faults)
            reason = f"an exponent needs two budgets with their optimum inside the grid ({faults})"
        return replace(found, reason=reason)
    log_c = np.log([vertex.local_flops for vertex in used])
    return replace(
        found,
        exponent=_slope(log_c, np.log([float(v.params or 0.0) for v in used]), level),
        tokens_exponent=_slope(log_c, np.log([float(v.tokens or 0.0) for v in used]), level),
    )


def top_flops(obs: Observations, valleys: IsoflopFit | None = None) -> float:
    """C of the largest budget, or of the largest observation where there are no budgets.

    In FLOPs under the convention of `obs`.
    """
    vertices = (valleys or isoflop(obs)).vertices
    return vertices[-1].flops if vertices else float(obs.flops.max())


def distance_outside(obs: Observations, flops: float, valleys: IsoflopFit | None = None) -> float:
    """Return the distance of C above the largest budget or below the smallest, in ln C, else 0.

    Where there are no budgets, outside of the C of all observations.

    Parameters
    ----------
    obs
        What was measured.
    flops
        C, in FLOPs under the convention of `obs`.
    valleys
        Its parabolas, where the caller has them.
    """
    valleys = valleys or isoflop(obs)
    bottom = valleys.vertices[0].flops if valleys.vertices else float(obs.flops.min())
    return max(math.log(flops / top_flops(obs, valleys)), math.log(bottom / flops), 0.0)


class _Line(NamedTuple):
    slope: float
    spread: float
    """Sum of squares of x about its mean."""
    sigma: float
    """Residual standard deviation; infinite without degrees of freedom."""
    dof: int


def _line(x: FloatArray, y: FloatArray) -> _Line:
    """Least-squares line of y on x."""
    centred = x - x.mean()
    spread = float(centred @ centred)
    slope = float(centred @ y) / spread
    residual = y - y.mean() - slope * centred
    dof = len(x) - 2
    sigma = float(np.sqrt(residual @ residual / dof)) if dof > 0 else np.inf
    return _Line(slope, spread, sigma, dof)


def _slope(x: FloatArray, y: FloatArray, level: float) -> Interval:
    """Slope of the line with its t interval."""
    line = _line(x, y)
    error = line.sigma / float(np.sqrt(line.spread))
    return interval(line.slope, error, line.dof, level, scale="linear")


class _Bottom(NamedTuple):
    """Where a budget's parabola is lowest, as far as it is."""

    status: VertexStatus
    reason: str | None
    log_n: float | None = None
    log_n_stderr: float | None = None
    loss: float | None = None
    log_loss_stderr: float | None = None
    sigma: float | None = None
    dof: float = 0.0


class _Parabola(NamedTuple):
    coefficients: FloatArray
    """Of 1, x and x^2, shape (3,)."""
    covariance: FloatArray
    """Shape (3, 3); zero without degrees of freedom."""
    variance: float
    """Of the residuals, in the unit of y squared."""
    dof: float


def _vertex(obs: Observations, budget: float) -> Vertex:
    bottom = _bottom(obs)
    # exp(): a nearly straight parabola has its vertex anywhere, and it is only reported.
    log_n = None if bottom.log_n is None else float(np.clip(bottom.log_n, -700.0, 700.0))
    local = _log_flops(obs, log_n)
    return Vertex(
        budget=budget,
        flops=budget if obs.flops_convention == "exact" else float(np.exp(local)),
        local_flops=float(np.exp(local)),
        n=len(obs),
        sizes=len(np.unique(obs.params)),
        status=bottom.status,
        reason=bottom.reason,
        params=None if log_n is None else float(np.exp(log_n)),
        params_stderr=bottom.log_n_stderr,
        tokens=None if log_n is None else _tokens(obs, log_n, local),
        loss=bottom.loss if bottom.status == "interior" else None,
        loss_stderr=bottom.log_loss_stderr if bottom.status == "interior" else None,
        sigma=bottom.sigma,
        dof=bottom.dof,
    )


def _bottom(obs: Observations) -> _Bottom:
    sizes = len(np.unique(obs.params))
    if sizes < MIN_SIZES:
        return _Bottom("too_few_sizes", f"{sizes} distinct sizes, a parabola needs {MIN_SIZES}")
    log_n = np.log(obs.params)
    origin = float(log_n.mean())
    x = log_n - origin
    fitted = _parabola(x, obs.loss, obs.weight, _nearness(x, obs, sizes))
    c0, c1, c2 = (float(value) for value in fitted.coefficients)
    if c2 <= 0.0:
        reason = "the loss does not curve upwards with ln N: no optimum in sight"
        return _Bottom("concave", reason)
    at = -c1 / (2.0 * c2)
    loss = c0 + c1 * at + c2 * at * at
    if loss <= 0.0:
        return _Bottom("concave", "the parabola's bottom is no positive loss: no optimum in sight")
    status, reason_outside = _place(obs, origin + at)
    gradient = np.array([0.0, -1.0 / (2.0 * c2), c1 / (2.0 * c2**2)])
    # The vertex moves along a flat bottom: to first order only the parabola's height counts.
    height = np.array([1.0, at, at * at])
    known = fitted.dof > 0.0
    return _Bottom(
        status,
        reason_outside,
        log_n=origin + at,
        log_n_stderr=float(np.sqrt(gradient @ fitted.covariance @ gradient)) if known else None,
        loss=loss,
        log_loss_stderr=float(np.sqrt(height @ fitted.covariance @ height)) / loss
        if known
        else None,
        sigma=float(np.sqrt(fitted.variance) / obs.loss.mean()) if known else None,
        dof=fitted.dof,
    )


def _nearness(x: FloatArray, obs: Observations, sizes: int) -> FloatArray:
    """Weight of each row: less with distance from the bottom of a plain parabola."""
    y = obs.loss
    _, c1, c2 = _parabola(x, y, obs.weight, np.ones(len(x))).coefficients
    inside = c2 > 0.0 and x.min() <= -c1 / (2.0 * c2) <= x.max()
    # With no bottom inside the grid to weight around, weight around the best observation.
    around = -c1 / (2.0 * c2) if inside else x[np.argmin(y)]
    width = max(VALLEY_WIDTH, float(np.ptp(x)) / (sizes - 1))
    return np.asarray(np.exp(-0.5 * ((x - around) / width) ** 2), dtype=np.float64)


def _place(obs: Observations, log_n: float) -> tuple[VertexStatus, str | None]:
    """Whether smaller and larger models were both seen to be worse, and if not, why."""
    sizes, mean_loss = _by_size(obs.params, obs.loss)
    bottom = f"{np.exp(np.clip(log_n, -700.0, 700.0)):.3g}"
    if log_n < np.log(sizes[0]):
        return "below_grid", f"the optimum, {bottom}, is below the smallest size, {sizes[0]:.3g}"
    if log_n > np.log(sizes[-1]):
        return "above_grid", f"the optimum, {bottom}, is above the largest size, {sizes[-1]:.3g}"
    # A parabola turns up between its last sizes even where the loss falls all the way.
    if mean_loss[0] <= mean_loss[1:].min():
        best = f"the smallest size, {sizes[0]:.3g}, is the best"
        return "below_grid", f"{best}: the optimum may lie below it"
    if mean_loss[-1] <= mean_loss[:-1].min():
        best = f"the largest size, {sizes[-1]:.3g}, is the best"
        return "above_grid", f"{best}: the optimum may lie above it"
    return "interior", None


def _by_size(params: FloatArray, values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Distinct N, ascending, and the mean of `values` at each."""
    sizes, index = np.unique(params, return_inverse=True)
    return sizes, np.bincount(index, values) / np.bincount(index)


def _parabola(x: FloatArray, y: FloatArray, weight: FloatArray, near: FloatArray) -> _Parabola:
    """Least squares of c0 + c1 x + c2 x^2, weighted by `weight` and, near the bottom, by `near`.

    `weight` tells the noise of the rows apart; `near` localises and tells nothing of noise: hence
    the sandwich. With rows scaled to equal noise and Q = W (I - H) the sum of squared residuals
    weighted by W = diag(near) has mean s^2 tr Q and as many degrees of freedom as tr(Q)^2 / tr(Q^2)
    (Satterthwaite 1946).
    """
    root = np.sqrt(weight)
    design = root[:, None] * np.stack([np.ones_like(x), x, x * x], axis=1)
    first, second, third = (design.T @ (near[:, None] ** k * design) for k in (1, 2, 3))
    bread = np.linalg.inv(first)
    coefficients = bread @ (design.T @ (near * root * y))
    residual = root * y - design @ coefficients
    meat = bread @ second
    trace = float(near.sum() - np.trace(meat))
    if trace < 1e-6:
        return _Parabola(coefficients, np.zeros((3, 3)), 0.0, 0.0)
    variance = float(near @ residual**2) / trace
    square = float(near @ near - 2.0 * np.trace(bread @ third) + np.trace(meat @ meat))
    dof = max(trace**2 / square, 1.0)  # below 1 by rounding only
    return _Parabola(coefficients, variance * (meat @ bread), variance, dof)


def _log_flops(obs: Observations, log_n: float | None) -> float:
    """C, as a logarithm, of a model of N parameters at the budget that `obs` share."""
    if obs.flops_convention == "exact" or log_n is None:
        return float(np.mean(np.log(obs.flops)))
    sizes, log_c = _by_size(obs.params, np.log(obs.flops))
    return float(np.interp(log_n, np.log(sizes), log_c))


def _tokens(obs: Observations, log_n: float, log_c: float) -> float:
    """D at the vertex: C / c(N), with ln c = ln(C/D) interpolated linearly between sizes.

    Interpolating ln c, not ln D, leaves out the rows' small departures from the nominal budget.
    """
    sizes, log_cost = _by_size(obs.params, np.log(obs.flops / obs.tokens))
    knots = np.log(sizes)
    # c/N changes slowly: hold it beyond the grid, where D is only reported.
    per_param = float(np.interp(log_n, knots, log_cost - knots))
    return float(np.exp(np.clip(log_c - per_param - log_n, -700.0, 700.0)))
