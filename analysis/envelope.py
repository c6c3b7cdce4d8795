"""Approach 1 of Hoffmann et al. 2022: the lower envelope of loss curves, and the line through it.

A look at the optimum without any law and without budgets. It reports beside a law's forecast, never
instead of it: its points share curves, and noise bends it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analysis.intervals import Interval, interval
from analysis.observations import FloatArray, Observations

EnvelopeStatus = Literal["ok", "biased", "no_curves", "no_crossings"]

GRID = 1500
"""Log-spaced C at which the best size is sought, as many as Hoffmann et al. 2022 take."""
SAME = math.log(1.01)
"""Sizes, and horizons of one size, closer than this are one: digitised N scatter by .1%."""
UNDECAYED = "training curves are not decayed: losses along them are too high"


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """How the loss of one size falls with compute; arrays of shape (m,), m >= 2, C ascending."""

    params: float
    """N, in parameters."""
    tokens: FloatArray
    """D, in tokens."""
    flops: FloatArray
    """C, in FLOPs."""
    loss: FloatArray
    """L, in nats/token."""


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Where the envelope passes from one size to another."""

    flops: float
    """C, in FLOPs, at which both have the same loss."""
    params: float
    """N_opt there: the geometric mean of both sizes."""
    tokens: float
    """D_opt there, likewise."""


@dataclass(frozen=True, kw_only=True)
class EnvelopeFit:
    """The envelope's crossings and the power laws through them."""

    status: EnvelopeStatus
    reason: str | None
    """Why the status is not `ok`."""
    sizes: int
    """Distinct sizes with a curve."""
    crossings: tuple[Crossing, ...]
    """What the lines go through, in ascending order of C."""
    exponent: Interval | None
    """The a in N_opt ~ C^a; None with fewer than two crossings."""
    tokens_exponent: Interval | None
    """The b in D_opt ~ C^b, likewise."""
    lines: tuple[tuple[float, float, float, float], ...]
    """(ln G, a, ln H, b) of ln N_opt = ln G + a ln C and ln D_opt = ln H + b ln C: of all sizes,
    then with each size left out in turn. NaN where too few crossings were left."""
    level: float
    """Nominal coverage of the intervals."""

    def params_at(self, flops: float) -> Interval | None:
        """N_opt at C by the line, in parameters; None without one."""
        if not self.lines:
            return None
        at = np.array(self.lines)[:, :2] @ np.array([1.0, math.log(flops)])
        return _jackknife(at, self.level, scale="log")

    def tokens_at(self, flops: float) -> Interval | None:
        """D_opt at C by the line, in tokens; None without one."""
        if not self.lines:
            return None
        at = np.array(self.lines)[:, 2:] @ np.array([1.0, math.log(flops)])
        return _jackknife(at, self.level, scale="log")


def envelope(
    obs: Observations, level: float = 0.9, curves: Sequence[Curve] | None = None
) -> EnvelopeFit:
    """The sizes that are best at some C, and the lines through where they take turns.

    Parameters
    ----------
    obs
        Observations, each a fully decayed horizon. Sizes with two or more horizons have a curve.
    level
        Nominal coverage of the jackknife intervals.
    curves
        Use these undecayed training curves instead. The result is then `biased`: before its decay a
        schedule shows a loss that the same C could have brought lower, the more so the longer the
        run was meant to be.

    Returns
    -------
    EnvelopeFit
        With status `no_curves` where fewer than two sizes have a curve, and `no_crossings` where
        fewer than two pairs of sizes take turns as the best one.

    Notes
    -----
    Hoffmann et al. 2022, section 3.1, fit a line through the best size at each of 1500 C: a
    staircase, whose line is too flat by 1/m^2 for m equal steps and which depends on where the
    first and last step are cut. Here the line goes through the crossings. Where two neighbouring
    sizes have the same loss the optimum lies between them; under their law and 6ND in the same
    place of every equal ratio of sizes, so that the slope is exact. Where the best curve begins or
    ends nothing crosses, and no point comes of it. Curves are straight in ln L over ln C: with
    few horizons a cubic bends curves of two horizons and of three differently (bias of a up to .03
    on four budgets, against .003).

    Measured on 200 synthetic sweeps each of six designs (constants of Besiroglu et al. 2024,
    a = .513; 6 to 20 sizes; noise .1, .3 and .6%): root mean square error of a .01 to .17, and
    nominal 90% intervals by jackknife over sizes, t with (sizes - 1) degrees of freedom, cover 92
    to 100%. But where neighbouring sizes differ by less than the noise the lowest of many is the
    luckiest: with 20 sizes over 100x, a is .005, .026 and .045 too low and intervals cover 94, 85
    and 62%.
    """
    taken = horizons(obs) if curves is None else tuple(curves)
    found = _Curves.of(taken)
    biased = curves is not None
    if len(found.log_n) < 2:
        what = "training curve" if biased else "curve of two or more horizons"
        reason = f"an envelope needs two sizes with a {what}, and there are {len(found.log_n)}"
        return _none("no_curves", reason, found, level)
    points = _crossings(found)
    if len(points) < 2:
        reason = (
            "two pairs of sizes must take turns as the best one within their curves' common "
            f"range of C, and {len(points)} do"
        )
        return _none("no_crossings", reason, found, level)
    everything = np.arange(len(found.log_n))
    lines = [_lines(points)]
    lines += [_lines(_crossings(found.only(everything != left_out))) for left_out in everything]
    stacked = np.array(lines)
    return EnvelopeFit(
        status="biased" if biased else "ok",
        reason=UNDECAYED if biased else None,
        sizes=len(found.log_n),
        crossings=tuple(
            Crossing(flops=math.exp(c), params=math.exp(n), tokens=math.exp(d))
            for c, n, d in points
        ),
        exponent=_jackknife(stacked[:, 1], level, scale="linear"),
        tokens_exponent=_jackknife(stacked[:, 3], level, scale="linear"),
        lines=tuple(lines),
        level=level,
    )


def _none(status: EnvelopeStatus, reason: str, found: _Curves, level: float) -> EnvelopeFit:
    return EnvelopeFit(
        status=status,
        reason=reason,
        sizes=len(found.log_n),
        crossings=(),
        exponent=None,
        tokens_exponent=None,
        lines=(),
        level=level,
    )


def horizons(obs: Observations) -> tuple[Curve, ...]:
    """One curve for each size with two or more horizons; replicates are averaged in ln L."""
    curves = []
    sizes = _pooled(np.log(obs.params))
    for size in range(sizes.max(initial=-1) + 1):
        mine = obs.select(sizes == size)
        step = _pooled(np.log(mine.flops))
        count = np.bincount(step)
        if len(count) < 2:
            continue
        columns = (mine.tokens, mine.flops, mine.loss)
        tokens, flops, loss = (np.exp(np.bincount(step, np.log(c)) / count) for c in columns)
        n = float(np.exp(np.log(mine.params).mean()))
        curves.append(Curve(params=n, tokens=tokens, flops=flops, loss=loss))
    return tuple(curves)


def _pooled(values: FloatArray) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """Index of the group of each value, ascending; a group spans no more than `SAME`."""
    order = np.argsort(values, kind="stable")
    group = np.zeros(len(values), dtype=np.intp)
    first, index = math.inf, -1
    for i in order:
        if abs(values[i] - first) > SAME:
            first, index = float(values[i]), index + 1
        group[i] = index
    return group


def training_curves(
    table: pa.Table, *, params: str = "non_embedding", flops: str = "exact"
) -> tuple[Curve, ...]:
    """The training curves of a ledger's complete rows, one for each row that has one.

    Parameters
    ----------
    table
        Rows with the columns of `analysis.observations.SCHEMA`.
    params, flops
        How N and C are counted; `6nd` multiplies by the N of `params`.

    Notes
    -----
    Losses are held-out ones if every curve has at least two, else training losses: a mean over the
    steps since the last point, and no mixture of the two, which differ by more than the envelope
    can bear.
    """
    complete = table.filter(pc.equal(table["status"], "complete"))
    columns = complete.select([f"params_{params}", "curve"]).to_pylist()
    rows = [(float(row[f"params_{params}"]), row["curve"] or []) for row in columns]
    heldout = [sum(p["heldout_loss"] is not None for p in points) for _, points in rows]
    column = "heldout_loss" if min(heldout, default=0) >= 2 else "train_loss"
    curves = []
    for n, points in rows:
        measured = [p for p in points if p[column] and math.isfinite(p[column]) and p["tokens"]]
        if len(measured) < 2:
            continue
        tokens = np.array([p["tokens"] for p in measured], dtype=np.float64)
        spent = np.array([p["flops"] for p in measured], dtype=np.float64)
        loss = np.array([p[column] for p in measured], dtype=np.float64)
        c = 6.0 * n * tokens if flops == "6nd" else spent
        curves.append(Curve(params=n, tokens=tokens, flops=c, loss=loss))
    return tuple(curves)


class _Curves(NamedTuple):
    """All sizes on one grid of C; arrays of shape (sizes,), (points,) and (sizes, points)."""

    log_n: FloatArray
    log_c: FloatArray
    log_d: FloatArray
    log_loss: FloatArray
    """Infinite where the size has no curve."""

    @classmethod
    def of(cls, curves: Sequence[Curve]) -> _Curves:
        """Each size at every C: the best of its curves there."""
        if not curves:
            empty = np.empty((0, GRID))
            return cls(np.empty(0), np.zeros(GRID), empty, empty)
        ends = np.log([end for curve in curves for end in (curve.flops[0], curve.flops[-1])])
        log_c = np.linspace(ends.min(), ends.max(), GRID)
        logs = np.log([curve.params for curve in curves])
        size = _pooled(logs)
        log_n = np.bincount(size, logs) / np.bincount(size)
        log_loss = np.full((len(log_n), GRID), np.inf)
        log_d = np.zeros((len(log_n), GRID))
        for i, curve in zip(size, curves, strict=True):
            at = np.log(curve.flops)
            value = np.interp(log_c, at, np.log(curve.loss), left=np.inf, right=np.inf)
            better = value < log_loss[i]
            log_loss[i, better] = value[better]
            log_d[i, better] = np.interp(log_c, at, np.log(curve.tokens))[better]
        return cls(log_n, log_c, log_d, log_loss)

    def only(self, kept: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> _Curves:
        """These sizes alone."""
        return self._replace(
            log_n=self.log_n[kept], log_d=self.log_d[kept], log_loss=self.log_loss[kept]
        )


def _crossings(found: _Curves) -> list[tuple[float, float, float]]:
    """(ln C, ln N, ln D) of each pair of sizes that take turns as the best, ascending in C.

    A pair that noise makes take turns several times counts once, at the mean.
    """
    best = np.argmin(found.log_loss, axis=0)
    pairs: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
    for j in np.flatnonzero(best[1:] != best[:-1]):
        one, other = int(best[j]), int(best[j + 1])
        losses = found.log_loss[[one, other], j : j + 2]
        if not np.all(np.isfinite(losses)):
            continue  # a curve begins or ends here: nothing crosses
        behind, ahead = losses[1] - losses[0]
        part = behind / (behind - ahead) if behind > ahead else 0.5
        log_d = found.log_d[[one, other], j : j + 2].mean(axis=0)
        at = (
            found.log_c[j] + part * (found.log_c[j + 1] - found.log_c[j]),
            0.5 * (found.log_n[one] + found.log_n[other]),
            log_d[0] + part * (log_d[1] - log_d[0]),
        )
        pairs.setdefault((min(one, other), max(one, other)), []).append(at)
    return sorted(_mean(turns) for turns in pairs.values())


def _mean(turns: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    c, n, d = np.mean(turns, axis=0)
    return float(c), float(n), float(d)


def _lines(points: list[tuple[float, float, float]]) -> tuple[float, float, float, float]:
    """Least-squares lines of ln N and ln D in ln C; NaN with fewer than two distinct C."""
    if len(points) < 2:
        return (math.nan,) * 4
    x, *ys = np.array(points).T
    centred = x - x.mean()
    spread = float(centred @ centred)
    if spread < 1e-12:
        return (math.nan,) * 4
    slopes = [float(centred @ y) / spread for y in ys]
    (g, a), (h, b) = (
        (float(y.mean() - slope * x.mean()), slope) for y, slope in zip(ys, slopes, strict=True)
    )
    return g, a, h, b


def _jackknife(values: FloatArray, level: float, *, scale: Literal["log", "linear"]) -> Interval:
    """Interval of `values[0]` from the others, in each of which one size was left out."""
    m = len(values) - 1
    deviations = values[1:] - values[1:].mean()
    stderr = math.sqrt((m - 1) / m * float(deviations @ deviations))
    if not math.isfinite(stderr):
        stderr = math.inf  # some size is indispensable: no telling what another would have said
    estimate = float(values[0])
    centre = math.exp(min(estimate, 700.0)) if scale == "log" else estimate
    return interval(centre, stderr, m - 1, level, scale=scale)
