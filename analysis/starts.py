"""Where a fit begins: variable projection on grids of the constants that enter nonlinearly.

For given exponents the other constants enter linearly (Golub and Pereyra 1973), so that a grid of
24 x 24 exponents costs a few matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from analysis.laws import NAMES, Law
from analysis.minimise import Rows
from analysis.observations import FloatArray

MAX_STARTS = 6
_SINGULAR = 1e-12
_GAMMAS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.5)
_E_FRACTIONS = (0.0, 0.3, 0.6, 0.8, 0.95)
_TYPICAL = np.array([np.log(0.3), np.log(0.3), 0.5, 0.4, 0.4, np.log(0.7)])

_Start = tuple[float, FloatArray]
"""Approximate objective, and theta."""


def starts(law: Law, rows: Rows) -> FloatArray:
    """Up to six starts, the best local minima of variable projection, shape (s, 6).

    Parameters
    ----------
    law
        Constants that it holds are held in the starts too.
    rows
        Centred data with one row of losses and of weights.
    """
    log_loss, weight = rows.log_loss[0], rows.weights[0]
    if law.variables[1] is None:
        found = [_line(rows.log_n, log_loss, weight)]
    elif law.unit_gamma and "E" in law.names:
        found = list(_sums(law, rows, log_loss, np.sqrt(weight)))
    else:
        found = list(_brackets(law, rows, log_loss, np.sqrt(weight)))
    found.sort(key=lambda pair: pair[0])
    # Nothing positive on the whole grid: begin at typical values and let the refinement judge.
    typical = _TYPICAL + np.array([log_loss.mean(), log_loss.mean(), 0.0, 0.0, 0.0, 0.0])
    chosen = np.array([theta for _, theta in found[:MAX_STARTS]] or [typical])
    held = law.theta(dict.fromkeys(NAMES, 1.0))
    return np.where(law.free, chosen, held)


def _exponents(law: Law, name: str, low: float, high: float) -> FloatArray:
    return np.array([law.held[name]]) if name in law.held else np.geomspace(low, high, 24)


def _powers(log_x: FloatArray, exponents: FloatArray) -> FloatArray:
    return np.exp(-np.outer(exponents, log_x))


def _line(log_x: FloatArray, log_loss: FloatArray, weight: FloatArray) -> _Start:
    """One variable: ln L = ln A - alpha ln x."""
    slope, intercept = np.polyfit(log_x, log_loss, 1, w=np.sqrt(weight))
    return 0.0, np.array([intercept, -np.inf, 0.0, -slope, 1.0, 0.0])


def _sums(law: Law, rows: Rows, log_loss: FloatArray, root_weight: FloatArray) -> Iterator[_Start]:
    """L = E + A N^-alpha + B D^-beta. Weights 1/L turn residuals of L into those of ln L."""
    alphas, betas = (_exponents(law, name, 0.05, 2.0) for name in ("alpha", "beta"))
    by_loss = root_weight * np.exp(-log_loss)
    a = _powers(rows.log_n, alphas) * by_loss
    b = _powers(rows.log_d, betas) * by_loss
    target = root_weight
    gram = np.empty((len(alphas), len(betas), 3, 3))
    gram[..., 0, 0] = by_loss @ by_loss
    gram[..., 0, 1] = gram[..., 1, 0] = (a @ by_loss)[:, None]
    gram[..., 0, 2] = gram[..., 2, 0] = (b @ by_loss)[None, :]
    gram[..., 1, 1] = np.sum(a * a, axis=1)[:, None]
    gram[..., 2, 2] = np.sum(b * b, axis=1)[None, :]
    gram[..., 1, 2] = gram[..., 2, 1] = a @ b.T
    moment = np.empty((len(alphas), len(betas), 3))
    moment[..., 0] = by_loss @ target
    moment[..., 1] = (a @ target)[:, None]
    moment[..., 2] = (b @ target)[None, :]
    linear = _solve(gram, moment)
    without_e = linear[..., 0] < 0.0
    linear[without_e, 0] = 0.0
    linear[without_e, 1:] = _solve(gram[..., 1:, 1:], moment[..., 1:])[without_e]
    objective = target @ target - 2.0 * np.sum(linear * moment, axis=-1)
    objective += np.einsum("ijk,ijkl,ijl->ij", linear, gram, linear)
    objective[np.any(linear[..., 1:] <= 0.0, axis=-1)] = np.inf
    for i, j in _local_minima(objective):
        e, a_ij, b_ij = linear[i, j]
        theta = np.array([np.log(a_ij), np.log(b_ij), e, alphas[i], betas[j], 0.0])
        yield float(objective[i, j]), theta


def _brackets(
    law: Law, rows: Rows, log_loss: FloatArray, root_weight: FloatArray
) -> Iterator[_Start]:
    """For given gamma and E, (L - E)^(1/gamma) is linear in A and B; the best of each gamma."""
    alphas, betas = (_exponents(law, name, 0.1, 3.0) for name in ("alpha", "beta"))
    powers_n, powers_d = _powers(rows.log_n, alphas), _powers(rows.log_d, betas)
    losses = np.exp(log_loss)
    lowest = float(losses.min())
    held_e = law.held.get("E")
    candidates = [f * lowest for f in _E_FRACTIONS] if held_e is None else [held_e]
    for gamma in [law.held["gamma"]] if "gamma" in law.held else _GAMMAS:
        cells: list[_Start] = []
        for e in candidates:
            rest = losses - min(e, 0.999 * lowest)
            y = rest ** (1.0 / gamma)
            # d ln L = gamma (L - E) / L * d y / y
            slope = root_weight * gamma * rest / (losses * y)
            a, b, target = powers_n * slope, powers_d * slope, y * slope
            # Where losses are far from 1 some of these products are beyond a double: no start.
            with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
                aa, bb = np.sum(a * a, axis=1)[:, None], np.sum(b * b, axis=1)[None, :]
                ab, ay, by = a @ b.T, (a @ target)[:, None], (b @ target)[None, :]
                determinant = np.maximum(aa * bb - ab * ab, _SINGULAR * aa * bb)
                first = (bb * ay - ab * by) / determinant
                second = (aa * by - ab * ay) / determinant
                objective = target @ target - first * ay - second * by
            objective[~((first > 0.0) & (second > 0.0) & np.isfinite(objective))] = np.inf
            i, j = np.unravel_index(int(np.argmin(objective)), objective.shape)
            if np.isfinite(objective[i, j]):
                theta = [np.log(first[i, j]), np.log(second[i, j]), e, alphas[i], betas[j]]
                cells.append((float(objective[i, j]), np.array([*theta, np.log(gamma)])))
        if cells:
            yield min(cells, key=lambda pair: pair[0])


def _solve(gram: FloatArray, moment: FloatArray) -> FloatArray:
    # A ridge at rounding level: with both exponents small all columns are nearly one column.
    size = gram.shape[-1]
    ridge = 1e-13 * np.trace(gram, axis1=-2, axis2=-1)[..., None, None] * np.eye(size)
    solution: FloatArray = np.linalg.solve(gram + ridge, moment[..., None])[..., 0]
    return solution


def _local_minima(objective: FloatArray) -> list[tuple[int, int]]:
    padded = np.pad(objective, 1, constant_values=np.inf)
    rows, columns = objective.shape
    neighbours = np.min(
        [
            padded[1 + i : 1 + i + rows, 1 + j : 1 + j + columns]
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
            if (i, j) != (0, 0)
        ],
        axis=0,
    )
    lowest = np.isfinite(objective) & (objective <= neighbours)
    return [(int(i), int(j)) for i, j in np.argwhere(lowest)]
