"""Many robust least-squares problems at once: one law, one set of (N, D), a batch of replicates.

Replicates differ in weights, in losses or in where they start. Which law, which start and what a
minimum means is for `fitting.py` and `bootstrap.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from analysis.laws import BoolArray, Law
from analysis.observations import FloatArray

CHUNK = 128
"""Replicates a pass: their arrays then stay in the cache, and with the allocator."""
TOLERANCE = 1e-11
"""Relative decrease still to be had, as the step promises it, at which a replicate is done."""
MAX_ITERATIONS = 200
_STEP = 2.0  # largest change of any constant in one step: ln A by more than this is a leap
_EASY, _HARD, _STUCK = 0.2, 4.0, 1e8
_NEWTON = 0.05  # relative decrease below which the true Hessian takes over
_NOTHING = 1e-300
_LOWER = np.tril_indices(6, -1)
FreeIndex = np.ndarray[tuple[int], np.dtype[np.intp]]


class Rows(NamedTuple):
    """What every replicate is fitted to. `log_n` and `log_d`, shape (n,), are best centred."""

    log_n: FloatArray
    log_d: FloatArray
    log_loss: FloatArray
    """Shape (1, n), or (R, n) where replicates have losses of their own."""
    weights: FloatArray
    """Shape (1, n) or (R, n); each multiplies a row's term of the objective."""


@dataclass(frozen=True)
class Minima:
    """One minimum a replicate."""

    theta: FloatArray
    """Shape (R, 6)."""
    objective: FloatArray
    """Sum of weights times Huber's loss of the residuals of ln L, shape (R,)."""
    converged: BoolArray
    """Shape (R,)."""


def minimise(
    law: Law,
    rows: Rows,
    start: FloatArray,
    *,
    low: FloatArray,
    high: FloatArray,
    delta: float = np.inf,
    max_iterations: int = MAX_ITERATIONS,
) -> Minima:
    """Minimise sum_i w_i rho(ln L_i - ln L(N_i, D_i)) for every replicate.

    rho is Huber's loss, r^2/2 up to |r| = delta and delta (|r| - delta/2) beyond.

    Parameters
    ----------
    law
        Which constants are free.
    rows
        The data.
    start
        Shape (R, 6).
    low, high
        Bounds of theta, shape (6,).
    delta
        In ln L; infinite for least squares.
    max_iterations
        Steps, taken or rejected, before a replicate is given up.

    Notes
    -----
    Levenberg-Marquardt with the analytic Jacobian, scaled by the diagonal of J^T J. At first
    Huber's loss is treated by reweighting. Where that makes less than 5% progress the true Hessian
    takes over, with second derivatives of the law: at delta = 1e-3 most residuals are beyond delta,
    the objective is nearly L1, and reweighting alone crawls. Bounds are kept by projection: a
    constant at its bound that would leave it is held for that step (Bertsekas 1982).
    """
    parts = [
        _minimise_chunk(
            law,
            rows._replace(
                log_loss=_rows_of(rows.log_loss, chunk), weights=_rows_of(rows.weights, chunk)
            ),
            start[chunk],
            (low, high),
            delta,
            max_iterations,
        )
        for chunk in (slice(i, i + CHUNK) for i in range(0, len(start), CHUNK))
    ]
    return Minima(
        np.concatenate([part.theta for part in parts]),
        np.concatenate([part.objective for part in parts]),
        np.concatenate([part.converged for part in parts]),
    )


def _rows_of(values: FloatArray, chunk: slice | BoolArray) -> FloatArray:
    """Those of a batch, or the one row that the whole batch shares."""
    return values if len(values) == 1 else values[chunk]


class _Values(NamedTuple):
    """The law at every row of every replicate: `objective` of shape (R,), the others (R, n)."""

    objective: FloatArray
    residual: FloatArray
    inverse_loss: FloatArray
    share_n: FloatArray
    """A N^-alpha over the bracket; for gamma = 1 over the loss."""
    share_d: FloatArray
    log_bracket: FloatArray | None
    """None where gamma is 1."""
    reducible: FloatArray | None
    """(L - E) / L; None where gamma is 1."""


def _evaluate(law: Law, rows: Rows, theta: FloatArray, delta: float) -> _Values:
    a, b, e, alpha, beta, log_gamma = theta.T[:, :, None]
    term_n = np.exp(a - alpha * rows.log_n)
    term_d = np.exp(b - beta * rows.log_d)
    bracket = term_n + term_d
    log_bracket = reducible = None
    if law.unit_gamma:
        value = bracket + e
        inverse = 1.0 / value
        term_n *= inverse
        term_d *= inverse
    else:
        log_bracket = np.log(bracket)
        reducible = np.exp(np.exp(log_gamma) * log_bracket)
        value = reducible + e
        inverse = 1.0 / value
        reducible *= inverse
        term_n /= bracket
        term_d /= bracket
    residual = rows.log_loss - np.log(value)
    size = np.abs(residual)
    within = np.minimum(size, delta)
    objective = np.sum(rows.weights * (within * (size - 0.5 * within)), axis=1)
    # Where a leap overflowed, the step is no improvement, and is rejected.
    objective = np.where(np.isfinite(objective), objective, np.inf)
    return _Values(objective, residual, inverse, term_n, term_d, log_bracket, reducible)


def _jacobian(law: Law, rows: Rows, theta: FloatArray, at: _Values) -> FloatArray:
    """Derivatives of ln L by the free constants, shape (R, p, n)."""
    by_a, by_b = at.share_n, at.share_d
    if at.reducible is not None:
        slope = np.exp(theta[:, 5:]) * at.reducible
        by_a, by_b = slope * by_a, slope * by_b
    jacobian = np.empty((len(theta), int(law.free.sum()), len(rows.log_n)))
    columns = iter(range(jacobian.shape[1]))
    free = law.free
    if free[0]:
        jacobian[:, next(columns)] = by_a
    if free[1]:
        jacobian[:, next(columns)] = by_b
    if free[2]:
        jacobian[:, next(columns)] = at.inverse_loss
    if free[3]:
        np.multiply(by_a, -rows.log_n, out=jacobian[:, next(columns)])
    if free[4]:
        np.multiply(by_b, -rows.log_d, out=jacobian[:, next(columns)])
    if free[5]:
        assert at.log_bracket is not None
        np.multiply(slope, at.log_bracket, out=jacobian[:, next(columns)])
    return jacobian


def _curvature(law: Law, rows: Rows, theta: FloatArray, at: _Values, psi: FloatArray) -> FloatArray:
    """What second derivatives of the law take from the Hessian, less -psi J J^T; shape (R, 6, 6).

    With w the logarithm of the reducible loss, q = (L - E)/L and F = ln L, the second derivative
    F_ij is q (w_i w_j + w_ij) - F_i F_j, and E has no part in the first term.
    """
    x, z = rows.log_n, rows.log_d
    found = np.zeros((len(theta), 6, 6))
    if at.reducible is None or at.log_bracket is None:
        aa, bb, ab = psi * at.share_n, psi * at.share_d, None
    else:
        gamma = np.exp(theta[:, 5:])
        scale = psi * at.reducible * gamma
        s, t = at.share_n, at.share_d
        aa, bb = scale * s * (gamma * s + t), scale * t * (gamma * t + s)
        ab = scale * (gamma - 1.0) * s * t
        if law.free[5]:
            gv = gamma * at.log_bracket
            ag, bg = scale * s * (gv + 1.0), scale * t * (gv + 1.0)
            found[:, 0, 5], found[:, 3, 5] = ag.sum(axis=1), -(ag @ x)
            found[:, 1, 5], found[:, 4, 5] = bg.sum(axis=1), -(bg @ z)
            found[:, 5, 5] = (scale * at.log_bracket * (gv + 1.0)).sum(axis=1)
    found[:, 0, 0], found[:, 0, 3], found[:, 3, 3] = aa.sum(axis=1), -(aa @ x), aa @ (x * x)
    found[:, 1, 1], found[:, 1, 4], found[:, 4, 4] = bb.sum(axis=1), -(bb @ z), bb @ (z * z)
    if ab is not None:
        found[:, 0, 1], found[:, 0, 4] = ab.sum(axis=1), -(ab @ z)
        found[:, 1, 3], found[:, 3, 4] = -(ab @ x), ab @ (x * z)
    found[:, _LOWER[0], _LOWER[1]] = found[:, _LOWER[1], _LOWER[0]]
    return found


def _minimise_chunk(
    law: Law,
    rows: Rows,
    start: FloatArray,
    bounds: tuple[FloatArray, FloatArray],
    delta: float,
    max_iterations: int,
) -> Minima:
    free = np.flatnonzero(law.free)
    low, high = bounds[0][free], bounds[1][free]
    theta = start.copy()
    theta[:, free] = np.clip(theta[:, free], low, high)
    at = _evaluate(law, rows, theta, delta)
    done_theta, done_objective = theta.copy(), at.objective.copy()
    converged = np.zeros(len(start), dtype=bool)
    index = np.arange(len(start))
    damping = np.full(len(start), 1e-3)
    newton = np.zeros(len(start), dtype=bool)
    for _ in range(max_iterations):
        step, expected = _step(law, rows, theta, at, free, (low, high), delta, damping, newton)
        trial = theta.copy()
        trial[:, free] = np.clip(theta[:, free] + step, low, high)
        there = _evaluate(law, rows, trial, delta)
        better = there.objective < at.objective
        gained = np.where(better, at.objective - there.objective, 0.0)
        finished = newton & (expected <= TOLERANCE * at.objective + _NOTHING)
        small = better & (gained <= _NEWTON * at.objective)
        theta = np.where(better[:, None], trial, theta)
        at = _chosen(better, there, at)
        damping = np.where(better, np.maximum(damping * _EASY, 1e-14), damping * _HARD)
        # A step refused at every damping: reweighting has nothing left, the Hessian may.
        stuck = damping > _STUCK
        finished |= stuck & newton
        damping = np.where(stuck, 1e-3, damping)
        newton |= small | stuck
        if finished.any():
            ended = index[finished]
            done_theta[ended], done_objective[ended] = theta[finished], at.objective[finished]
            converged[ended] = True
            keep = ~finished
            if not keep.any():
                break
            index, theta, damping, newton = index[keep], theta[keep], damping[keep], newton[keep]
            at = _kept(keep, at)
            rows = rows._replace(
                log_loss=_rows_of(rows.log_loss, keep), weights=_rows_of(rows.weights, keep)
            )
    else:
        done_theta[index], done_objective[index] = theta, at.objective
    return Minima(done_theta, done_objective, converged)


def _kept(keep: BoolArray, at: _Values) -> _Values:
    return at._replace(**{k: v[keep] for k, v in at._asdict().items() if v is not None})


def _chosen(better: BoolArray, there: _Values, here: _Values) -> _Values:
    if better.all():
        return there
    for old, new in zip(here, there, strict=True):
        if old is not None and new is not None:
            old[better] = new[better]
    return here


def _step(
    law: Law,
    rows: Rows,
    theta: FloatArray,
    at: _Values,
    free: FreeIndex,
    bounds: tuple[FloatArray, FloatArray],
    delta: float,
    damping: FloatArray,
    newton: BoolArray,
) -> tuple[FloatArray, FloatArray]:
    """The step of the free constants, shape (R, p), and the decrease that it promises, (R,)."""
    jacobian = _jacobian(law, rows, theta, at)
    if np.isinf(delta):
        psi = rows.weights * at.residual
        reweighted = inside = np.broadcast_to(rows.weights, psi.shape)
    else:
        size = np.abs(at.residual)
        psi = rows.weights * np.clip(at.residual, -delta, delta)
        reweighted = rows.weights * (delta / np.maximum(size, delta))
        inside = rows.weights * (size <= delta)
    scale = np.matmul(jacobian * jacobian, reweighted[:, :, None])[:, :, 0]
    gradient = np.matmul(jacobian, psi[:, :, None])[:, :, 0]
    weight = np.where(newton[:, None], inside + psi, reweighted)
    hessian = np.matmul(jacobian * weight[:, None, :], jacobian.transpose(0, 2, 1))
    if newton.any():
        bent = _curvature(law, rows, theta, at, psi * newton[:, None])[:, free[:, None], free]
        hessian -= bent
    here = theta[:, free]
    held = ((here <= bounds[0]) & (gradient < 0.0)) | ((here >= bounds[1]) & (gradient > 0.0))
    if held.any():
        gradient = np.where(held, 0.0, gradient)
        hessian *= ~(held[:, :, None] | held[:, None, :])
        scale = np.where(held, 1.0, scale)
    diagonal = np.arange(len(free))
    hessian[:, diagonal, diagonal] += damping[:, None] * scale + _NOTHING
    if held.any():
        hessian[:, diagonal, diagonal] += held
    step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
    expected = np.sum(step * gradient, axis=1)
    # No way down where the Hessian is indefinite: more damping makes it a descent.
    step *= (expected > 0.0)[:, None]
    largest = np.max(np.abs(step), axis=1)
    step *= np.where(largest > _STEP, _STEP / np.maximum(largest, _NOTHING), 1.0)[:, None]
    return step, np.where(expected >= 0.0, 0.5 * expected, np.inf)
