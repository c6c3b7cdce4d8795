"""Approach 2 of Hoffmann et al. 2022: a parabola a budget, and the line through their vertices.

A look at the valley without any law. It reports beside a law's forecast, never instead of it: the
line is biased where alpha and beta differ or grids drift off centre.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from analysis.errors import InputError
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

    flops: float
    """Nominal budget in FLOPs."""
    mean_flops: float
    """Geometric mean of what the budget's observations really took, in FLOPs."""
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
    """L at the vertex, in nats/token."""
    curvature: float | None
    """Second derivative of L by ln N, in nats/token; what a wrong N costs."""


@dataclass(frozen=True, kw_only=True)
class IsoflopFit:
    """Vertices of all budgets and the power laws through the interior ones."""

    vertices: tuple[Vertex, ...]
    """In ascending order of budget."""
    exponent: Interval | None
    """The a in N_opt = G C^a; its ends are infinite with only two interior vertices."""
    tokens_exponent: Interval | None
    """The b in D_opt ~ C^b, likewise."""
    log_coefficient: float | None
    """ln G, with C in FLOPs and N in parameters."""
    reason: str | None
    """Why there is no exponent, else None."""

    @property
    def interior(self) -> tuple[Vertex, ...]:
        """The vertices that the line goes through."""
        return tuple(vertex for vertex in self.vertices if vertex.status == "interior")

    def params_at(self, flops: float) -> float:
        """N_opt on the line at `flops`, in parameters.

        Raises
        ------
        InputError
            If fewer than two interior vertices left no line.
        """
        if self.exponent is None or self.log_coefficient is None:
            raise InputError(self.reason or "there is no line through the vertices")
        return float(np.exp(self.log_coefficient + self.exponent.estimate * np.log(flops)))


def isoflop(obs: Observations, level: float = 0.9) -> IsoflopFit:
    """Parabola of L in ln N for each nominal budget, and ln N_opt = ln G + a ln C.

    Parameters
    ----------
    obs
        Observations with a nominal budget; those without are left out.
    level
        Nominal coverage of the exponents' t intervals, with (interior vertices - 2) degrees of
        freedom.

    Raises
    ------
    InputError
        If no observation has a nominal budget.

    Notes
    -----
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
    if len(budgets) == 0:
        raise InputError("IsoFLOP parabolas need nominal budgets, and no observation has one")
    vertices = tuple(_vertex(obs.select(obs.budget == budget), float(budget)) for budget in budgets)
    used = [vertex for vertex in vertices if vertex.status == "interior"]
    if len(used) < 2:
        faults = "; ".join(
            f"{vertex.flops:.3g} FLOPs: {vertex.reason}" for vertex in vertices if vertex.reason
        )
        reason = f"an exponent needs two budgets with their optimum inside the grid ({faults})"
        if not faults:
            reason = "an exponent needs two budgets, and there is one"
        return IsoflopFit(
            vertices=vertices,
            exponent=None,
            tokens_exponent=None,
            log_coefficient=None,
            reason=reason,
        )
    log_c = np.log([vertex.mean_flops for vertex in used])
    exponent, coefficient = _line(log_c, np.log([float(v.params or 0.0) for v in used]), level)
    tokens_exponent, _ = _line(log_c, np.log([float(v.tokens or 0.0) for v in used]), level)
    return IsoflopFit(
        vertices=vertices,
        exponent=exponent,
        tokens_exponent=tokens_exponent,
        log_coefficient=coefficient,
        reason=None,
    )


def _line(x: FloatArray, y: FloatArray, level: float) -> tuple[Interval, float]:
    """Slope with its t interval, and intercept, of the least-squares line."""
    centred = x - x.mean()
    spread = float(centred @ centred)
    slope = float(centred @ y) / spread
    residual = y - y.mean() - slope * centred
    dof = len(x) - 2
    stderr = np.sqrt(residual @ residual / dof / spread) if dof > 0 else np.inf
    ends = interval(slope, float(stderr), dof, level, scale="linear")
    return ends, float(y.mean() - slope * x.mean())


def _vertex(obs: Observations, budget: float) -> Vertex:
    log_n = np.log(obs.params)
    sizes = len(np.unique(obs.params))
    log_c = float(np.mean(np.log(obs.flops)))

    def without(status: VertexStatus, reason: str) -> Vertex:
        return Vertex(
            flops=budget,
            mean_flops=float(np.exp(log_c)),
            n=len(obs),
            sizes=sizes,
            status=status,
            reason=reason,
            params=None,
            params_stderr=None,
            tokens=None,
            loss=None,
            curvature=None,
        )

    if sizes < MIN_SIZES:
        return without("too_few_sizes", f"{sizes} distinct sizes, a parabola needs {MIN_SIZES}")
    origin = float(log_n.mean())
    x = log_n - origin
    first, _ = _parabola(x, obs.loss, np.ones(len(x)))
    inside = first[2] > 0.0 and x.min() <= -first[1] / (2.0 * first[2]) <= x.max()
    # With no bottom inside the grid to weight around, weight around the best observation.
    around = -first[1] / (2.0 * first[2]) if inside else x[np.argmin(obs.loss)]
    width = max(VALLEY_WIDTH, float(np.ptp(x)) / (sizes - 1))
    weight = np.exp(-0.5 * ((x - around) / width) ** 2)
    coefficients, covariance = _parabola(x, obs.loss, weight)
    c0, c1, c2 = (float(value) for value in coefficients)
    if c2 <= 0.0:
        return without("concave", "the loss does not curve upwards with ln N: no optimum in sight")
    at = -c1 / (2.0 * c2)
    status: VertexStatus = "interior"
    reason = None
    # exp(): a nearly straight parabola has its vertex anywhere, and it is only reported.
    params = float(np.exp(np.clip(origin + at, -700.0, 700.0)))
    if at < x.min():
        status = "below_grid"
        reason = f"the optimum, {params:.3g}, is below the smallest size, {obs.params.min():.3g}"
    elif at > x.max():
        status = "above_grid"
        reason = f"the optimum, {params:.3g}, is above the largest size, {obs.params.max():.3g}"
    gradient = np.array([0.0, -1.0 / (2.0 * c2), c1 / (2.0 * c2**2)])
    stderr = None if covariance is None else float(np.sqrt(gradient @ covariance @ gradient))
    return Vertex(
        flops=budget,
        mean_flops=float(np.exp(log_c)),
        n=len(obs),
        sizes=sizes,
        status=status,
        reason=reason,
        params=params,
        params_stderr=stderr,
        tokens=_tokens_at(obs, origin + at, log_c),
        loss=c0 + c1 * at + c2 * at * at if status == "interior" else None,
        curvature=2.0 * c2,
    )


def _parabola(
    x: FloatArray, y: FloatArray, weight: FloatArray
) -> tuple[FloatArray, FloatArray | None]:
    """Weighted least squares of c0 + c1 x + c2 x^2, and the coefficients' covariance.

    The weights localise, they do not describe the noise, which is the same for every row: hence the
    sandwich, with the residual variance of effective degrees of freedom sum(1 - leverage).
    """
    design = np.stack([np.ones_like(x), x, x * x], axis=1)
    bread = np.linalg.inv(design.T @ (weight[:, None] * design))
    onto = bread @ (design * weight[:, None]).T
    coefficients = onto @ y
    residual = y - design @ coefficients
    leverage = np.einsum("ij,ji->i", design, onto)
    dof = float(weight @ (1.0 - leverage))
    if dof < 1e-6:
        return coefficients, None
    variance = float(weight @ residual**2) / dof
    return coefficients, variance * (onto @ onto.T)


def _tokens_at(obs: Observations, log_n: float, log_c: float) -> float:
    """D at the vertex: C / c(N), with ln c = ln(C/D) interpolated linearly between sizes.

    Interpolating ln c, not ln D, leaves out the rows' small departures from the nominal budget.
    """
    sizes, index = np.unique(obs.params, return_inverse=True)
    log_cost = np.bincount(index, np.log(obs.flops / obs.tokens)) / np.bincount(index)
    knots = np.log(sizes)
    # c/N changes slowly: hold it beyond the grid, where D is only reported.
    per_param = float(np.interp(log_n, knots, log_cost - knots))
    return float(np.exp(np.clip(log_c - per_param - log_n, -700.0, 700.0)))
