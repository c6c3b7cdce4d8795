"""Estimating a law's constants: squares or Huber's loss of ln L, from deterministic starts.

Intervals are made from a `Fit` in `intervals.py`; which law to believe is for `forecast.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from analysis.errors import InputError
from analysis.laws import NAMES, BoolArray, Law, log_loss_jacobian
from analysis.minimise import Minima, minimise
from analysis.observations import FloatArray, Observations
from analysis.problem import Data, collinearity, prepare
from analysis.scatter import Scatter, group_sums, scatter
from analysis.starts import starts

FitStatus = Literal["converged", "e_at_zero", "at_bound", "not_converged"]
Objective = Literal["squares", "huber"]

_GAMMA_STARTS = (0.15, 0.4, 1.0)
_LAST_TRY = 4000  # steps for the best start, where no valley led it to a minimum sooner
_SINGULAR = 1e-12
_BAND = 1.0  # standard deviations of the noise times n^(-1/5), the usual width for a density
_VANISHED = 1e-9  # of the loss: far below any measurement
_ILL = 1e6  # condition number; of four budgets of seven sizes it is 10 to 1e3
_NOTHING = 1e-100  # a column of the Jacobian this short is zero; its square must not overflow


@dataclass(frozen=True, kw_only=True)
class Method:
    """How constants are estimated."""

    objective: Objective = "squares"
    """Squares have the smaller error on clean points, Huber's loss where some are far off."""
    delta: float = 1e-3
    """Huber's threshold in ln L (Hoffmann et al. 2022, section 3.3); without effect on squares."""
    pinned: Mapping[str, float] = field(default_factory=dict)
    """Constants to hold, by name, in every law that has them free."""

    def __post_init__(self) -> None:
        if self.objective not in ("squares", "huber"):
            raise InputError(f"the objective is {self.objective!r}; it must be squares or huber")
        if not (np.isfinite(self.delta) and self.delta > 0):
            raise InputError(f"delta is {self.delta}; it must be a positive number, in ln L")
        for name in self.pinned:
            if name not in NAMES:
                raise InputError(f"no constant {name!r} to pin; choose among {', '.join(NAMES)}")

    @property
    def threshold(self) -> float:
        """Huber's delta; infinite for squares."""
        return self.delta if self.objective == "huber" else np.inf

    def of(self, law: Law) -> Law:
        """The law with those of its constants held that are pinned here."""
        return law.pin({k: v for k, v in self.pinned.items() if k in law.names})


LEAST_SQUARES = Method()


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """A law with estimated constants and their uncertainty."""

    law: Law
    method: Method
    theta: FloatArray
    """Estimate, shape (6,), laid out as `Law` says."""
    free: BoolArray
    """Shape (6,): which entries of theta have an uncertainty; the others are held, or ended at a
    bound."""
    own: FloatArray
    """Covariance of theta that unit variance of each row's own noise gives, shape (6, 6): for
    squares (J^T W J)^-1, for Huber's loss that of an M-estimator; zero where not free."""
    shared: FloatArray
    """The same for unit variance of what the rows of a budget, or a trunk, share."""
    scatter: Scatter
    """Both variances."""
    sigma: float
    """Residual standard deviation of ln L, for a row of weight 1; s^2 = rss / dof."""
    dof: int
    """Rows minus free constants."""
    n: int
    """Rows with a positive weight."""
    objective: float
    """Sum (never mean) of weighted losses of the residuals of ln L: half the square up to delta."""
    rss: float
    """Sum of weighted squared residuals of ln L."""
    weight: float
    """Sum of the rows' weights."""
    condition: float
    """Condition number of the Jacobian at the centre of the data, columns scaled to length 1."""
    status: FitStatus
    reason: str | None
    """Why the status is not `converged`."""
    warning: str | None
    """What weakens the estimate without making it wrong, else None."""
    at_zero: Fit | None = None
    """Where E ended at zero, the same estimate with E held there: what is known in the directions
    that E >= 0 forbids."""

    @property
    def sound(self) -> bool:
        """Whether it ended at a minimum that the data set; if not, `covariance` means nothing."""
        return self.status in ("converged", "e_at_zero")

    @property
    def rmse(self) -> float:
        """Root of the weighted mean of squared residuals of ln L."""
        return float(np.sqrt(self.rss / self.weight))

    @property
    def covariance(self) -> FloatArray:
        """Covariance of theta, shape (6, 6); zero where not free."""
        return self.scatter.own * self.own + self.scatter.shared * self.shared

    @property
    def new_run(self) -> tuple[float, float]:
        """Standard deviation of one new run's ln L about the mean, and its degrees of freedom.

        Of a run in a budget of its own.
        """
        variance, dof = self.scatter.variance(1.0, 1.0)
        return float(np.sqrt(variance)), dof

    def stderr(self, gradient: FloatArray) -> tuple[float, float]:
        """Standard error of a function of theta, and its degrees of freedom.

        Parameters
        ----------
        gradient
            The function's derivatives by theta, shape (6,).
        """
        own = float(gradient @ self.own @ gradient)
        shared = float(gradient @ self.shared @ gradient)
        variance, dof = self.scatter.variance(max(own, 0.0), max(shared, 0.0))
        return float(np.sqrt(variance)), dof

    @property
    def constants(self) -> dict[str, float]:
        """Constants by name; E in nats/token."""
        return self.law.constants(self.theta)


def fit(
    law: Law,
    obs: Observations,
    *,
    method: Method = LEAST_SQUARES,
) -> Fit:
    """Estimate the law's free constants, best of several deterministic starts.

    Parameters
    ----------
    law
        Which formula.
    obs
        At least one more row than the law has free constants, over several budgets and D/N. Its
        weights multiply the rows' terms.
    method
        Objective, and constants to hold.

    Raises
    ------
    InputError
        If the rows cannot determine the law: too few, one budget only, N and D collinear, one and
        the same loss, or values that are not positive numbers.

    Notes
    -----
    Starts by variable projection (`starts.py`), refined together by Levenberg-Marquardt and Newton
    steps (`minimise.py`) on centred ln N and ln D; for Huber's loss from the minima of squares, and
    at once: approaching delta in steps changed none of 420 fits. Hoffmann et al. 2022 (section 3.3)
    minimise from 4500 L-BFGS-B starts.

    Where E ends at zero it stays in the covariance, the loss being linear in E. Left out as if it
    were known, 90% intervals of L from the generalised law covered 83% of a truth with E = 0.1 on a
    sweep like the mini one; with it they cover 94%.

    Examples
    --------
    >>> from analysis.laws import HOFFMANN, loss
    >>> n, c = np.meshgrid([1e6, 2e6, 4e6], [1e15, 4e15])
    >>> n, d = n.ravel(), (c / (6 * n)).ravel()
    >>> truth = {"A": 400.0, "B": 1000.0, "E": 1.7, "alpha": 0.35, "beta": 0.36}
    >>> nan = np.full(6, np.nan)
    >>> obs = Observations(params=n, tokens=d, flops=6 * n * d, loss_stderr=nan, budget=nan,
    ...                    loss=loss(HOFFMANN.theta(truth), n, d))
    >>> round(fit(HOFFMANN, obs).constants["E"], 4)
    1.7
    """
    law = method.of(law)
    data = prepare(law, obs)
    low, high = data.low, data.high
    found = minimise(law, data.rows, starts(law, data.rows), low=low, high=high)
    if np.isfinite(method.threshold):
        delta = method.threshold
        found = minimise(law, data.rows, _distinct(found), low=low, high=high, delta=delta)
    best = int(np.argmin(found.objective))
    if not found.converged[best]:
        found = minimise(
            law,
            data.rows,
            found.theta[[best]],
            low=low,
            high=high,
            delta=method.threshold,
            max_iterations=_LAST_TRY,
        )
        best = 0
    return _describe(law, method, data, found.theta[best], bool(found.converged[best]))


def fit_each(law: Law, obs: Observations, losses: FloatArray) -> list[Fit]:
    """Least-squares fits to many sets of losses at the same N and D, solved together.

    Parameters
    ----------
    law
        Which formula.
    obs
        N, D, C, budgets and weights, and losses that the others scatter around.
    losses
        Nats/token, shape (R, n).

    Raises
    ------
    InputError
        As `fit` does for `obs`.

    Notes
    -----
    For simulation: every replicate starts from the minima of `obs` itself, and with gamma free from
    its best fits at several fixed gammas, and the lowest end counts.
    """
    data = prepare(law, obs)
    low, high = data.low, data.high
    begin = [_distinct(minimise(law, data.rows, starts(law, data.rows), low=low, high=high))]
    for gamma in _GAMMA_STARTS if "gamma" in law.names else ():
        held = law.pin({"gamma": gamma})
        found = minimise(held, data.rows, starts(held, data.rows), low=low, high=high)
        begin.append(found.theta[[np.argmin(found.objective)]])
    rows = data.rows._replace(log_loss=np.log(losses))
    tries = [
        minimise(law, rows, np.tile(theta, (len(losses), 1)), low=low, high=high)
        for theta in np.concatenate(begin)
    ]
    best = np.argmin([item.objective for item in tries], axis=0)
    return [
        _describe(
            law,
            LEAST_SQUARES,
            data._replace(rows=rows._replace(log_loss=rows.log_loss[[r]])),
            tries[k].theta[r],
            bool(tries[k].converged[r]),
        )
        for r, k in enumerate(best)
    ]


def _distinct(found: Minima) -> FloatArray:
    """One theta for each of the different minima, the lowest first, shape (k, 6)."""
    order = np.argsort(found.objective)
    _, first = np.unique(np.round(np.log(found.objective[order] + _NOTHING), 6), return_index=True)
    return found.theta[order[np.sort(first)]]


def _describe(law: Law, method: Method, data: Data, theta: FloatArray, converged: bool) -> Fit:
    rows, weight = data.rows, data.rows.weights[0]
    margin = 1e-6 * (data.high - data.low)
    on_bound = law.free & ((theta <= data.low + margin) | (theta >= data.high - margin))
    on_bound[2] = False  # at zero E keeps its uncertainty, see `fit`
    value, jacobian = log_loss_jacobian(theta, rows.log_n, rows.log_d)
    # A term on its way to nothing has no slope left to take its coefficient to the bound.
    on_bound[:2] |= law.free[:2] & np.all(jacobian[:, :2] < _VANISHED, axis=0)
    free = law.free & ~on_bound
    residual = rows.log_loss[0] - value
    dof = len(residual) - int(free.sum())
    rss = float(weight @ residual**2)
    size = np.abs(residual)
    within = np.minimum(size, method.threshold)
    status, reason = _status(law, data.uncentred(theta), converged, on_bound)
    uncertainty = _uncertainty(data, jacobian, residual, free, method.threshold)
    at_zero = None
    if status == "e_at_zero":
        at_zero = _describe(law.pin({"E": 0.0}), method, data, theta, converged)
    return Fit(
        law=law,
        method=method,
        theta=data.uncentred(theta),
        free=free,
        own=uncertainty.own,
        shared=uncertainty.shared,
        scatter=uncertainty.scatter,
        sigma=float(np.sqrt(rss / dof)),
        dof=dof,
        n=len(residual),
        objective=float(weight @ (within * (size - 0.5 * within))),
        rss=rss,
        weight=float(weight.sum()),
        condition=uncertainty.condition,
        status=status,
        reason=reason,
        warning=_warning(law, data, uncertainty.condition),
        at_zero=at_zero,
    )


def _warning(law: Law, data: Data, condition: float) -> str | None:
    """What of the design weakens the estimate."""
    if law.variables[1] is not None and (found := collinearity(data.rows)):
        return found
    if condition > _ILL:
        return (
            f"its constants are hardly told apart (condition number {condition:.1g}): measure more "
            "distinct N and D"
        )
    return None


class _Uncertainty(NamedTuple):
    own: FloatArray
    shared: FloatArray
    scatter: Scatter
    condition: float


def _uncertainty(
    data: Data, jacobian: FloatArray, residual: FloatArray, free: BoolArray, delta: float
) -> _Uncertainty:
    """What noise of unit variance, and of the variance seen, does to theta.

    For Huber's loss psi takes the place of residuals, the clipped residuals times K/m, with m the
    share of them within delta and K = 1 + (p/n)(1 - m)/m: for independent rows that is Huber and
    Ronchetti 2009, Eq. 7.81, K^2 (sum psi^2 / dof) / m^2 (J^T J)^-1.
    """
    root_weight = np.sqrt(data.rows.weights[0])
    weighted = root_weight[:, None] * jacobian[:, free]
    n, p = weighted.shape
    scale = np.maximum(np.linalg.norm(weighted, axis=0), _NOTHING)
    basis, singular, right = np.linalg.svd(weighted / scale, full_matrices=False)
    singular = np.maximum(singular, _SINGULAR * singular[0])
    root = right.T / singular / scale[:, None]  # theta moves by root @ basis.T @ residual
    if np.isfinite(delta):
        # At a delta far below the noise few residuals lie within: count in a wider band, as the
        # density of residuals is flat there.
        band = max(delta, _BAND * 1.4826 * float(np.median(np.abs(residual))) * n**-0.2)
        inside = max(delta / band * float(np.mean(np.abs(residual) <= band)), 1.0 / n)
        clipped = root_weight * np.clip(residual, -delta, delta)
        factor = (1.0 + p / n * (1.0 - inside) / inside) / inside
        found = scatter(factor * clipped, basis, data.groups, root_weight)
    else:
        found = scatter(root_weight * residual, basis, data.groups, root_weight)
    sums = np.zeros((p, 1))
    if found.shared > 0.0 and data.groups is not None:
        sums = group_sums(basis, data.groups, root_weight)
    own, shared = np.zeros((6, 6)), np.zeros((6, 6))
    own[np.ix_(free, free)] = root @ root.T
    shared[np.ix_(free, free)] = (root @ sums) @ (root @ sums).T
    shift = data.uncentring
    return _Uncertainty(
        shift @ own @ shift.T,
        shift @ shared @ shift.T,
        found,
        float(singular[0] / singular[-1]),
    )


def _status(
    law: Law, theta: FloatArray, converged: bool, on_bound: BoolArray
) -> tuple[FitStatus, str | None]:
    if not converged:
        return "not_converged", "the search found no minimum"
    if on_bound.any():
        constants = Law.constants(law, theta)
        where = ", ".join(
            f"{name} = {constants[name]:.4g}"
            for name, stuck in zip(NAMES, on_bound, strict=True)
            if stuck
        )
        return "at_bound", f"the data push {where} to the end of its range: it is not identified"
    if law.free[2] and theta[2] == 0.0:
        return "e_at_zero", "the data prefer E = 0: at these budgets E is not identified"
    return "converged", None
