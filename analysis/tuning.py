"""The best learning rate and batch of a model, and how they scale, from losses of probes.

Each model's losses are a quadratic form in (ln rate, ln batch) near their minimum; the minima of
several models lie on power laws, as in Li et al. (2025, arXiv 2503.04715, section 3). Which probes
to train is not decided here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from analysis.errors import InputError
from analysis.intervals import Interval, interval, t_quantile
from analysis.observations import FloatArray

Place = Literal["interior", "below", "above"]
"""Where an optimum lies in what was probed; at an end it may lie beyond it."""

MIN_RATES = 3
"""Distinct values that tell a curvature."""
REACH = 1.5 * math.log(2)
"""Standard deviation, in ln rate and ln batch, of the weight around the best probe: further out a
valley is no parabola, and climbs to divergence on the side of high rates."""
LEAST_OPTIMA = 2
"""That a law goes through."""
DRAWS = 2000
ONE_SIGMA = 0.1587
"""Share of a normal distribution that is below minus one standard deviation."""
LEAST_ERROR = 0.01
"""Of ln rate and ln batch: how well at best a quadratic form places a minimum."""


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """Where one model's loss is lowest, of a rate or a batch."""

    value: Interval
    """In its own unit, at the level asked for; it ends where the probes end."""
    log_stderr: float
    """Standard error of its logarithm; of a bound it says nothing."""
    place: Place


@dataclass(frozen=True, kw_only=True)
class Bowl:
    """The quadratic form of one model's losses, and its minimum in the box that was probed."""

    rate: Optimum
    batch: Optimum
    """Tokens a step; with `fixed_batch` the one that all probes had."""
    rate_at_usual: Optimum
    """The best rate at the usual batch, if one was named; else `rate`."""
    fixed_batch: bool
    loss: float
    """At the minimum, nats/token."""
    sigma: float
    """Residual standard deviation, nats/token."""
    dof: float
    """Degrees of freedom of `sigma`."""
    n: int
    """Probes that it goes through."""

    @property
    def at_usual(self) -> Bowl:
        """The same for whom keeps the usual batch: with the best rate there."""
        return replace(self, rate=self.rate_at_usual)


def bowl(
    rate: FloatArray,
    batch: FloatArray,
    loss: FloatArray,
    level: float = 0.9,
    *,
    usual_batch: float | None = None,
) -> Bowl:
    """Fit a quadratic form to losses of probes of one model on equal tokens.

    Parameters
    ----------
    rate, batch, loss
        Peak rate, tokens a step and held-out loss in nats/token, shape (n,); finite.
    level
        Nominal coverage of intervals.
    usual_batch
        Tokens a step at which the best rate is wanted too.

    Raises
    ------
    InputError
        If there are fewer than three rates, or no more probes than the form has constants.

    Notes
    -----
    Least squares with weights exp(-d^2 / 2 REACH^2), d the distance from the best probe in
    (ln rate, ln batch). Intervals are quantiles of the minimum in the box over draws of the form's
    constants from their t distribution, so that they stay valid where a minimum is at an edge.
    """
    x, y = np.log(rate), np.log(batch)
    best = int(np.argmin(loss))
    u, v = x - x[best], y - y[best]
    powers = _powers(u, v)
    weight = np.exp(-0.5 * (u**2 + v**2) / REACH**2)
    form, covariance, sigma, dof = _weighted(_columns(u, v, powers), loss, weight)
    box = (u.min(), u.max(), v.min(), v.max())
    forms = _full(form[None], powers)
    rng = np.random.default_rng(0)
    t = np.sqrt(dof / rng.chisquare(dof, DRAWS))[:, None]
    noise = rng.standard_normal((DRAWS, len(form))) @ _root(covariance).T
    drawn = _full(form + t * noise, powers)

    def optima(box: Box) -> list[Optimum]:
        at, draws = _lowest(forms, box)[0], _lowest(drawn, box)
        return [
            _optimum(at[i], draws[:, i], box[2 * i : 2 * i + 2], origin, level)
            for i, origin in ((0, x[best]), (1, y[best]))
        ]

    rates, batches = optima(box)
    usual = None if usual_batch is None else math.log(usual_batch) - y[best]
    return Bowl(
        rate=rates,
        batch=batches,
        rate_at_usual=rates if usual is None else optima((*box[:2], usual, usual))[0],
        fixed_batch=bool(np.ptp(y) == 0.0),
        loss=float(_value(forms, _lowest(forms, box))[0]),
        sigma=sigma,
        dof=dof,
        n=len(loss),
    )


Power = tuple[int, int]
Box = tuple[float, float, float, float]
"""Lowest and highest ln rate, lowest and highest ln batch."""


def _powers(u: FloatArray, v: FloatArray) -> list[Power]:
    """Terms of the form that the probes determine, as powers of ln rate and ln batch."""
    rates, batches = len(np.unique(u)), len(np.unique(v))
    if rates < MIN_RATES:
        raise InputError(
            f"{rates} learning rates do not tell where the best one is, and {MIN_RATES} would"
        )
    powers: list[Power] = [(0, 0), (1, 0), (2, 0)]
    powers += [(0, 1), (1, 1)] if batches > 1 else []
    powers += [(0, 2)] if batches >= MIN_RATES else []
    if len(u) <= len(powers):
        raise InputError(
            f"{len(u)} probes do not tell the {len(powers)} constants of a quadratic form: "
            "it needs one more at least"
        )
    return powers


def _columns(u: FloatArray, v: FloatArray, powers: Sequence[Power]) -> FloatArray:
    return np.stack([u**i * v**j for i, j in powers], axis=1)


def _weighted(
    x: FloatArray, y: FloatArray, weight: FloatArray
) -> tuple[FloatArray, FloatArray, float, float]:
    """Weighted least squares where all errors are alike: constants, covariance, sigma, dof."""
    inverse = np.linalg.pinv(x.T @ (weight[:, None] * x))
    constants = inverse @ (x.T @ (weight * y))
    spread = inverse @ (x.T @ (weight[:, None] ** 2 * x)) @ inverse
    dof = float(weight.sum() - np.trace(inverse @ (x.T @ (weight[:, None] ** 2 * x))))
    variance = float(weight @ (y - x @ constants) ** 2) / dof
    return constants, variance * spread, math.sqrt(variance), max(1.0, dof)


def _root(covariance: FloatArray) -> FloatArray:
    """A matrix whose product with its transpose is the covariance, which may be singular."""
    values, vectors = np.linalg.eigh(covariance)
    root: FloatArray = vectors * np.sqrt(np.maximum(values, 0.0))
    return root


def _full(forms: FloatArray, powers: Sequence[Power]) -> FloatArray:
    """Forms, shape (k, terms), as (k, 6): 1, u, v, u^2, uv, v^2; terms that they lack are zero."""
    order = [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]
    full = np.zeros((len(forms), len(order)))
    full[:, [order.index(power) for power in powers]] = forms
    return full


def _value(forms: FloatArray, at: FloatArray) -> FloatArray:
    u, v = at[..., 0], at[..., 1]
    terms = np.stack([np.ones_like(u), u, v, u**2, u * v, v**2], axis=-1)
    value: FloatArray = (forms * terms).sum(-1)
    return value


def _lowest(forms: FloatArray, box: Box) -> FloatArray:
    """Where each form, shape (k, 6), is lowest in a box, shape (k, 2): inside or on an edge."""
    _, b, c, d, e, f = forms.T
    low_u, high_u, low_v, high_v = box
    corners = [(u, v) for u in (low_u, high_u) for v in (low_v, high_v)]
    found = [np.broadcast_to(np.array(corner), (len(forms), 2)) for corner in corners]
    with np.errstate(divide="ignore", invalid="ignore"):
        determinant = 4 * d * f - e**2
        inner = np.stack([e * c - 2 * f * b, e * b - 2 * d * c], axis=1) / determinant[:, None]
        found.append(np.where((determinant > 0)[:, None], inner, np.nan))
        for edge in (low_v, high_v):
            found.append(np.stack([-(b + e * edge) / (2 * d), np.full(len(d), edge)], axis=1))
        for edge in (low_u, high_u):
            found.append(np.stack([np.full(len(d), edge), -(c + e * edge) / (2 * f)], axis=1))
    at = np.stack(found, axis=1)
    low, high = np.array([low_u, low_v]), np.array([high_u, high_v])
    outside = ~np.all((at >= low) & (at <= high), axis=2)
    values = _value(forms[:, None], np.where(outside[..., None], 0.0, at))
    values = np.where(outside, np.inf, values)
    lowest: FloatArray = at[np.arange(len(forms)), np.argmin(values, axis=1)]
    return lowest


def _optimum(
    at: float, draws: FloatArray, ends: tuple[float, ...], origin: float, level: float
) -> Optimum:
    tail = 0.5 * (1.0 - level)
    # Draws end where the box does, so that the side away from its edge tells the error.
    down, up = np.quantile(draws, [ONE_SIGMA, 1.0 - ONE_SIGMA])
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    estimate, low, high = np.exp(origin + np.array([at, min(low, at), max(high, at)])).tolist()
    place: Place = "interior"
    if at <= ends[0] or at >= ends[1]:
        place = "below" if at <= ends[0] else "above"
    return Optimum(
        value=Interval(estimate, low, high, level),
        log_stderr=max(LEAST_ERROR, float(at - down), float(up - at)),
        place=place,
    )


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """y = c prod x_i^e_i, through several models' optima."""

    exponents: Mapping[str, Interval]
    """By variable, those that were fitted and those that were given, which have no width."""
    log_coefficient: float
    """ln c."""
    centre: Mapping[str, float]
    """Geometric mean of each variable."""
    at_centre: Interval
    """y there, which is known better than c."""
    scatter: float
    """Root mean square of the residuals in ln y."""

    def at(self, **values: float) -> float:
        """The law at one point."""
        sums = (e.estimate * math.log(values[name]) for name, e in self.exponents.items())
        return math.exp(self.log_coefficient + sum(sums))

    def coefficient(self, **reference: float) -> float:
        """The coefficient where the variables named are taken over a reference value."""
        return self.at(**dict.fromkeys(self.exponents, 1.0) | reference)


def power_law(
    optima: Sequence[Optimum],
    variables: Mapping[str, FloatArray],
    *,
    dof: float,
    level: float = 0.9,
    given: Mapping[str, float] | None = None,
) -> PowerLaw:
    """The power law through models' optima, weighted by how well each is known.

    Parameters
    ----------
    optima
        Of k models. Those at an edge of what was probed are bounds, which no law goes through.
    variables
        What they are to depend on, by name, each of shape (k,) and positive.
    dof
        Degrees of freedom of the optima's own errors.
    level
        Nominal coverage of intervals.
    given
        Exponents that are held, by the name of their variable.

    Raises
    ------
    InputError
        If fewer than two optima are no bounds, or none where all exponents are given, or they do
        not tell the exponents apart.

    Notes
    -----
    Errors are the optima's own, or, where the residuals are larger than these, the residuals'.
    """
    inside = [i for i, optimum in enumerate(optima) if optimum.place == "interior"]
    held = dict(given or {})
    free = [name for name in variables if name not in held]
    least = LEAST_OPTIMA if free else 1
    if len(inside) < least:
        places = {optimum.place for optimum in optima}
        sides = {"below": "lower", "above": "higher"}
        beyond = " and ".join(way for place, way in sides.items() if place in places)
        raise InputError(
            f"{len(inside)} of {len(optima)} models have their best value within what was probed, "
            f"and a law goes through {least} at least: probe {beyond} ones"
        )
    optima = [optima[i] for i in inside]
    variables = {name: x[inside] for name, x in variables.items()}
    log_y = np.log([optimum.value.estimate for optimum in optima])
    centred = {name: np.log(x) - np.log(x).mean() for name, x in variables.items()}
    for name, exponent in held.items():
        log_y = log_y - exponent * centred[name]
    x = np.stack([np.ones(len(log_y)), *(centred[name] for name in free)], axis=1)
    if np.linalg.matrix_rank(x, tol=1e-2 * math.sqrt(len(log_y))) < x.shape[1]:
        raise InputError(
            f"{len(log_y)} probed models do not tell the exponents of {' and '.join(free)} apart: "
            "probe more sizes, or several tokens a parameter"
        )
    root = 1.0 / np.array([optimum.log_stderr for optimum in optima])
    inverse = np.linalg.inv((root[:, None] * x).T @ (root[:, None] * x))
    constants = inverse @ (x.T @ (root**2 * log_y))
    residuals = log_y - x @ constants
    left = len(log_y) - x.shape[1]
    excess = float((root * residuals) @ (root * residuals)) / left if left else 0.0
    if excess > 1.0:
        dof = left
    errors = np.sqrt(np.diag(inverse) * max(1.0, excess))
    t = t_quantile(dof, level)
    exponents = {
        name: Interval(float(e), float(e - t * error), float(e + t * error), level)
        for name, e, error in zip(free, constants[1:], errors[1:], strict=True)
    }
    exponents |= {name: Interval(e, e, e, level) for name, e in held.items()}
    centre = {name: float(np.exp(np.log(v).mean())) for name, v in variables.items()}
    away = sum(e.estimate * math.log(centre[name]) for name, e in exponents.items())
    return PowerLaw(
        exponents={name: exponents[name] for name in variables},
        log_coefficient=float(constants[0]) - away,
        centre=centre,
        at_centre=interval(math.exp(constants[0]), float(errors[0]), dof, level),
        scatter=float(np.sqrt(np.mean(residuals**2))),
    )
