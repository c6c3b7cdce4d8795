"""Other ways to fit Hoffmann's law, each as good as it can honestly be made; for `benchmarks.fit`.

theta = (a, b, e, alpha, beta) = (ln A, ln B, ln E, alpha, beta), the published log-sum-exp layout.
Nothing of isoflop's own engine is used here: these functions also judge it.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

FloatArray = NDArray[np.float64]
Indices = NDArray[np.intp]
Objective = Callable[[FloatArray], float]
Gradient = Callable[[FloatArray], tuple[float, FloatArray]]

DELTA = 1e-3
"""Huber's threshold in ln L (Hoffmann et al. 2022, arXiv 2203.15556, section 3.3)."""
PUBLISHED_GRID = {
    "alpha": np.arange(0, 2.5, 0.5),
    "beta": np.arange(0, 2.5, 0.5),
    "e": np.arange(-1, 1.5, 0.5),
    "a": np.arange(0, 30, 5.0),
    "b": np.arange(0, 30, 5.0),
}
"""The 4500 starts of Hoffmann et al. 2022, Appendix D.2."""
HOFFMANN_THETA = np.array([6.0073404, 6.0179186, 0.5267228, 0.33917084, 0.2849083])
"""Hoffmann's unrounded constants, at which Besiroglu et al. 2024 start every replicate."""
PACKAGE_GRID = {
    "E": np.linspace(1, 2, 5),
    "a": np.linspace(1, 10, 5),
    "b": np.linspace(1, 10, 5),
    "alpha": np.linspace(0.1, 0.7, 5),
    "beta": np.linspace(0.1, 0.7, 5),
}
"""The 3125 starts that the README of the package `chinchilla` gives for these very points."""
PACKAGES = ("chinchilla", "autograd")
"""What some rivals need; those are left out where it is not installed."""
_SILENT = 60  # above every logging level
_FTOL, _GTOL = 1e-15, 1e-12
# SciPy's ftol is relative to max(|f|, 1), and f is 1e-3 here: its default of 2.2e-9 stops where a
# step gains 2 parts in 1e6, 1e-15 where it gains 1 in 1e12. At 0 it costs half as much again
# and nothing is gained beyond rounding.


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """What is fitted, in logarithms; each of shape (n,)."""

    log_params: FloatArray
    """ln N."""
    log_tokens: FloatArray
    """ln D."""
    log_loss: FloatArray
    """ln L, L in nats/token."""

    def rows(self, chosen: Indices) -> Points:
        """Those rows, some of them repeatedly."""
        return Points(
            log_params=self.log_params[chosen],
            log_tokens=self.log_tokens[chosen],
            log_loss=self.log_loss[chosen],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """Where a rival ended."""

    theta: FloatArray
    """Shape (5,)."""
    objective: float
    """Huber's loss of the residuals of ln L, summed, whatever the rival itself minimised."""


def objective(points: Points) -> Objective:
    """Huber's loss of ln L, summed; what is published, with logarithms taken once, not every time.

    Overflow in a leap of the optimiser is left to it, as published.
    """
    x, z, y = points.log_params, points.log_tokens, points.log_loss

    def value(theta: FloatArray) -> float:
        a, b, e, alpha, beta = theta
        size = np.abs(y - np.log(np.exp(a - alpha * x) + np.exp(b - beta * z) + np.exp(e)))
        within = np.minimum(size, DELTA)
        return float(within @ (size - 0.5 * within))

    return value


def gradient(points: Points) -> Gradient:
    """The same with its analytic gradient, shape (5,).

    All three terms in one product with their design matrix: a fifth faster than one by one.
    """
    n, y = len(points.log_loss), points.log_loss
    by_term = np.zeros((3, n, 5))
    by_term[0, :, 0], by_term[0, :, 3] = 1.0, -points.log_params
    by_term[1, :, 1], by_term[1, :, 4] = 1.0, -points.log_tokens
    by_term[2, :, 2] = 1.0
    design = by_term.reshape(3 * n, 5)

    def value_and_gradient(theta: FloatArray) -> tuple[float, FloatArray]:
        terms = np.exp(design @ theta).reshape(3, n)
        loss = terms[0] + terms[1] + terms[2]
        residual = y - np.log(loss)
        psi = np.minimum(np.maximum(residual, -DELTA), DELTA)
        terms *= psi / loss
        return float(psi @ (residual - 0.5 * psi)), -(terms.reshape(-1) @ design)

    return value_and_gradient


def published_starts() -> FloatArray:
    """All of `PUBLISHED_GRID`, shape (4500, 5)."""
    grid = np.array(list(product(*PUBLISHED_GRID.values())))
    return grid[:, [3, 4, 2, 0, 1]]


def numerical_point(points: Points, starts: FloatArray) -> Found:
    """The published procedure: L-BFGS-B with numerical gradients and SciPy's own tolerances."""
    function = objective(points)
    return best_of(points, [minimize(function, start, method="L-BFGS-B").x for start in starts])


def analytic_point(points: Points, starts: FloatArray) -> Found:
    """The published procedure with an analytic gradient."""
    function = gradient(points)
    return best_of(
        points, [minimize(function, start, jac=True, method="L-BFGS-B").x for start in starts]
    )


def best_of(points: Points, candidates: Sequence[FloatArray]) -> Found:
    """The theta of lowest objective; one at which it is not a number loses to any other."""
    function = objective(points)
    values = np.array([function(theta) for theta in candidates])
    best = int(np.argmin(np.where(np.isfinite(values), values, np.inf)))
    return Found(theta=candidates[best], objective=float(values[best]))


def projected_point(points: Points) -> Found:
    """Variable projection: a 32 x 32 grid of (alpha, beta), then Nelder-Mead from its best cell.

    It minimises squares of L, for which E, A and B have a closed form; Huber's loss of ln L has
    none. So its answer is another, and what `objective` says of it is no verdict on its optimiser.
    """
    centre_n, centre_d = points.log_params.mean(), points.log_tokens.mean()
    x, z = points.log_params - centre_n, points.log_tokens - centre_d
    losses = np.exp(points.log_loss)
    start = _best_cell(x, z, losses)

    def linear(exponents: FloatArray) -> tuple[FloatArray, float]:
        design = np.stack([np.ones(len(x)), np.exp(-exponents[0] * x), np.exp(-exponents[1] * z)])
        constants = np.linalg.solve(design @ design.T, design @ losses)
        residual = losses - constants @ design
        # A negative constant has no logarithm; the minimum is far from there.
        return constants, float(residual @ residual) if constants.min() > 0 else np.inf

    options = {"xatol": 1e-9, "fatol": 1e-15}
    exponents = minimize(lambda at: linear(at)[1], start, method="Nelder-Mead", options=options).x
    e, a, b = np.log(linear(exponents)[0])
    theta = [a + exponents[0] * centre_n, b + exponents[1] * centre_d, e, *exponents]
    return best_of(points, [np.array(theta)])


def _best_cell(x: FloatArray, z: FloatArray, losses: FloatArray) -> FloatArray:
    """The (alpha, beta) of least squares on a grid, all cells by matrix products."""
    exponents = np.linspace(0.05, 1.5, 32)
    k = len(exponents)
    by_n, by_d = np.exp(-np.outer(exponents, x)), np.exp(-np.outer(exponents, z))
    gram, moment = np.empty((k, k, 3, 3)), np.empty((k, k, 3))
    gram[..., 0, 0] = len(x)
    gram[..., 0, 1] = gram[..., 1, 0] = by_n.sum(axis=1)[:, None]
    gram[..., 0, 2] = gram[..., 2, 0] = by_d.sum(axis=1)
    gram[..., 1, 1] = np.sum(by_n**2, axis=1)[:, None]
    gram[..., 2, 2] = np.sum(by_d**2, axis=1)
    gram[..., 1, 2] = gram[..., 2, 1] = by_n @ by_d.T
    moment[..., 0] = losses.sum()
    moment[..., 1], moment[..., 2] = (by_n @ losses)[:, None], by_d @ losses
    linear = np.linalg.solve(gram, moment[..., None])[..., 0]
    explained = np.where(np.all(linear > 0, axis=-1), np.sum(linear * moment, axis=-1), -np.inf)
    i, j = np.unravel_index(int(np.argmax(explained)), explained.shape)
    return exponents[[i, j]]


def installed(package: str) -> str | None:
    """Version of an optional package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def package_point(points: Points, grid: dict[str, FloatArray], *, tuned: bool) -> Found:
    """The package `chinchilla`: BFGS with numerical gradients from every start of `grid`.

    As it comes it averages the loss, so that BFGS' absolute tolerance stops it early, and computes
    in long doubles. Tuned, `loss_fn` makes the mean a sum again and numbers are doubles: a more
    exact answer, and sooner than with long doubles. Its figure is not drawn, its pool stays idle.
    """
    core: Any = importlib.import_module("chinchilla.core")
    core.DTYPE = np.double if tuned else np.longdouble
    scale = float(len(points.log_loss)) if tuned else 1.0

    def huber(true: FloatArray, predicted: FloatArray) -> FloatArray:
        size = np.abs(np.log(true) - np.log(predicted))
        within = np.minimum(size, DELTA)
        scaled: FloatArray = scale * within * (size - 0.5 * within)
        return scaled

    with tempfile.TemporaryDirectory(prefix="isoflop-rival-") as directory:
        _write_package_points(points, Path(directory))
        rival: Any = core.Chinchilla(directory, param_grid=grid, loss_fn=huber, log_level=_SILENT)
        rival.visualizer.optim = lambda *_, **__: None
        rival.fit(parallel=False)
        found = rival.params
    theta = [*np.log([found["A"], found["B"], found["E"]]), found["alpha"], found["beta"]]
    return best_of(points, [np.array(theta)])


def _write_package_points(points: Points, directory: Path) -> None:
    n, d = np.exp(points.log_params), np.exp(points.log_tokens)
    rows = np.stack([6 * n * d, n, d, np.exp(points.log_loss)], axis=1)
    lines = ("C,N,D,loss", *(",".join(repr(float(v)) for v in row) for row in rows))
    (directory / "df.csv").write_text("\n".join(lines) + "\n")


def published_replicate(points: Points) -> Found:
    """BFGS from Hoffmann's constants with SciPy's tolerances, the gradient by `autograd`.

    So are the intervals of Besiroglu et al. 2024 (arXiv 2404.10102) made in their notebook.
    """
    anp = importlib.import_module("autograd.numpy")
    x, z, y = points.log_params, points.log_tokens, points.log_loss

    def value(theta: Any) -> Any:
        a, b, e, alpha, beta = theta
        residual = y - anp.log(anp.exp(a - alpha * x) + anp.exp(b - beta * z) + anp.exp(e))
        size = anp.abs(residual)
        inside, outside = 0.5 * residual**2, DELTA * (size - 0.5 * DELTA)
        return anp.sum(anp.where(size <= DELTA, inside, outside))

    by_theta = importlib.import_module("autograd").grad(value)
    return best_of(points, [minimize(value, HOFFMANN_THETA, jac=by_theta, method="BFGS").x])


def numerical_replicate(points: Points, start: FloatArray) -> Found:
    """BFGS with numerical gradients and SciPy's tolerances, from the point fit."""
    return best_of(points, [minimize(objective(points), start, method="BFGS").x])


def tight_replicate(points: Points, start: FloatArray, whitening: FloatArray) -> Found:
    """L-BFGS-B with analytic gradients from the point fit, run again until that gains nothing.

    Parameters
    ----------
    points
        The resampled rows.
    start
        The point fit, shape (5,).
    whitening
        theta = start + whitening q is searched in q; shape (5, 5). The identity leaves theta as
        published, `whitening` makes the curvature at the point fit about the identity.
    """
    function = gradient(points)

    def at(q: FloatArray) -> tuple[float, FloatArray]:
        value, slope = function(start + whitening @ q)
        return value, slope @ whitening

    options = {"ftol": _FTOL, "gtol": _GTOL, "maxiter": 10_000, "maxfun": 100_000}
    q, lowest = np.zeros(5), np.inf
    while True:
        result = minimize(at, q, jac=True, method="L-BFGS-B", options=options)
        if not result.fun < lowest * (1.0 - 1e-12):
            break
        q, lowest = result.x, result.fun
    return Found(theta=start + whitening @ q, objective=float(lowest))


def whitening(points: Points, theta: FloatArray) -> FloatArray:
    """W with W^T H W = I, H the reweighted Gauss-Newton Hessian at theta; shape (5, 5)."""
    a, b, e, alpha, beta = theta
    x, z = points.log_params, points.log_tokens
    terms = np.exp(np.stack([a - alpha * x, b - beta * z, np.full(len(x), e)]))
    loss = terms.sum(axis=0)
    by_a, by_b, by_e = terms / loss
    jacobian = np.stack([by_a, by_b, by_e, -x * by_a, -z * by_b], axis=1)
    size = np.abs(points.log_loss - np.log(loss))
    weight = DELTA / np.maximum(size, DELTA)
    hessian = jacobian.T @ (jacobian * weight[:, None])
    return np.asarray(np.linalg.inv(np.linalg.cholesky(hessian)).T)
