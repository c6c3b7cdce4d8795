"""What the fits say at a budget: N_opt, D_opt and L with intervals, and how such forecasts did.

A headline draws on both laws and names the one behind every number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from analysis.approaches import Vertex, isoflop
from analysis.errors import InputError
from analysis.fitting import Fit, fit
from analysis.intervals import Interval, interval, standard_errors
from analysis.laws import (
    GENERALISED,
    HOFFMANN,
    LAWS,
    FlopsPerToken,
    Law,
    LawName,
    local_exponent,
    log_loss,
    log_optimal_params,
)
from analysis.observations import FloatArray, Observations

RECENT_BUDGETS = 4
"""Budgets that Hoffmann's law is fitted to for N_opt: over eight public studies its median error at
the next budget is then .03 to .05 in ln N, less than with all budgets or any other law."""
TESTED_REACH = 100.0
"""How far above the top budget the intervals' coverage was measured, see `Interval`."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What one fit says at one budget."""

    law: LawName
    flops: float
    """The budget C, in FLOPs."""
    params: Interval
    """N_opt, in parameters."""
    tokens: Interval
    """D_opt, in tokens."""
    loss: Interval
    """L at (N_opt, D_opt), in nats/token."""
    exponent: Interval
    """The local d ln N_opt / d ln C."""


def forecast(fit: Fit, flops: float, cost: FlopsPerToken, level: float = 0.9) -> Forecast:
    """N_opt, D_opt, L and the local exponent at `flops`, with Gauss-Newton t intervals.

    A fit that is not sound, stopped at a bound or short of a minimum, has open ends everywhere: its
    covariance speaks of the constants that were left free only.

    Parameters
    ----------
    fit
        The law and its uncertainty.
    flops
        Budget C in FLOPs.
    cost
        FLOPs per token as a function of N, under the convention of the fit's observations.
    level
        Nominal coverage; what it covers is noise, not a law that does not hold.
    """
    if not (math.isfinite(flops) and flops > 0):
        raise InputError(f"a forecast needs a positive number of FLOPs, not {flops}")

    def quantities(theta: FloatArray) -> FloatArray:
        log_n = log_optimal_params(fit.law, theta, flops, cost)
        log_d = math.log(flops) - float(cost.log_and_slope(log_n)[0])
        value = float(log_loss(fit.law, theta, np.array(log_n), np.array(log_d)))
        return np.array([log_n, log_d, value, local_exponent(fit.law, theta, flops, cost)])

    if fit.sound:
        centre, stderr = standard_errors(fit, quantities)
    else:
        centre, stderr = quantities(fit.theta), np.full(4, math.inf)
    # exp() of more than 700 overflows; an unidentified exponent may put N_opt there.
    natural = np.exp(np.clip(centre[:3], -700.0, 700.0))
    params, tokens, loss = (
        interval(float(x), float(s), fit.dof, level)
        for x, s in zip(natural, stderr[:3], strict=True)
    )
    exponent = interval(float(centre[3]), float(stderr[3]), fit.dof, level, scale="linear")
    return Forecast(
        law=fit.law.name, flops=flops, params=params, tokens=tokens, loss=loss, exponent=exponent
    )


@dataclass(frozen=True, kw_only=True)
class HeldoutError:
    """How one law, fitted to the smaller budgets, did at the top one."""

    law: LawName
    loss_error: float | None
    """ln L predicted - ln L measured."""
    params_error: float | None
    """ln N predicted - ln N measured, at the vertex of the top budget's parabola."""
    predicted: Forecast | None
    """The forecast at the top budget; None where the law could not be fitted."""
    n_fitted: int
    """Observations that the law was fitted to."""
    reason: str | None
    """Why an error is None."""


@dataclass(frozen=True, kw_only=True)
class Heldout:
    """Forecasts of the top budget from all others, against what was measured there."""

    budget: float
    """The top nominal budget, in FLOPs."""
    flops: float
    """What training took at its vertex, in FLOPs: the C of the forecasts."""
    n_fitted: int
    """Observations below the top budget: the laws were fitted to these."""
    vertex: Vertex
    """The top budget's IsoFLOP parabola."""
    errors: tuple[HeldoutError, ...]
    """One for each law."""


def heldout(obs: Observations, cost: FlopsPerToken, level: float = 0.9) -> Heldout:
    """Fit every law to all but the top nominal budget and compare at the top one.

    Parameters
    ----------
    obs
        Observations over at least two nominal budgets.
    cost
        FLOPs per token as a function of N, known before training: that it covers the top budget's
        sizes gives nothing away.
    level
        Nominal coverage of the forecasts' intervals.

    Raises
    ------
    InputError
        If there are fewer than two nominal budgets.

    Notes
    -----
    What is tested is what a headline uses: Hoffmann's law is fitted to the last four of the smaller
    budgets, the generalised law to all of them.

    Both sides are read through the same parabola: the law's losses at the top budget's own (N, D)
    against the measured ones, so that the parabola's bias is no error of the law. Where either
    vertex is not inside the grid, loss is compared at the (N, D) of the best observation instead,
    and N not at all.
    """
    budgets = obs.budgets()
    if len(budgets) < 2:
        raise InputError(f"holding out the top budget needs two nominal ones, not {len(budgets)}")
    top = obs.select(obs.budget == budgets[-1])
    # Rows without a nominal budget, but as large as the top one, would give it away.
    small = obs.flops < 0.99 * top.flops.min()
    rest = obs.select(np.where(np.isfinite(obs.budget), obs.budget < budgets[-1], small))
    (vertex,) = isoflop(top, level).vertices
    return Heldout(
        budget=float(budgets[-1]),
        flops=vertex.local_flops,
        n_fitted=len(rest),
        vertex=vertex,
        errors=tuple(_heldout_error(law, rest, top, vertex, cost, level) for law in LAWS),
    )


def _heldout_error(
    law: Law,
    rest: Observations,
    top: Observations,
    vertex: Vertex,
    cost: FlopsPerToken,
    level: float,
) -> HeldoutError:
    try:
        fitted = _fit_recent(rest) if law is HOFFMANN else fit(law, rest)
    except InputError as error:
        return HeldoutError(
            law=law.name,
            loss_error=None,
            params_error=None,
            predicted=None,
            n_fitted=0,
            reason=str(error),
        )
    predicted = forecast(fitted, vertex.local_flops, cost, level)
    law_there = np.exp(log_loss(law, fitted.theta, np.log(top.params), np.log(top.tokens)))
    (valley,) = isoflop(replace(top, loss=law_there), level).vertices
    if (
        vertex.status == valley.status == "interior"
        and vertex.params and vertex.loss and valley.params and valley.loss
    ):  # fmt: skip
        return HeldoutError(
            law=law.name,
            loss_error=math.log(valley.loss / vertex.loss),
            params_error=math.log(valley.params / vertex.params),
            predicted=predicted,
            n_fitted=fitted.n,
            reason=None,
        )
    best = int(np.argmin(top.loss))
    there = np.log([top.params[best]]), np.log([top.tokens[best]])
    return HeldoutError(
        law=law.name,
        loss_error=float(log_loss(law, fitted.theta, *there)[0] - np.log(top.loss[best])),
        params_error=None,
        predicted=predicted,
        n_fitted=fitted.n,
        reason=f"no valley to compare, {vertex.reason or valley.reason}; "
        "loss compared at the top budget's best observation",
    )


@dataclass(frozen=True, kw_only=True)
class Headline:
    """One answer from both laws: every number with the law behind it.

    An interval covers noise under its own law and reaches to the other law's estimate.
    """

    flops: float
    """The budget C, in FLOPs."""
    params: Interval
    """N_opt, in parameters."""
    params_law: LawName
    tokens: Interval
    """D_opt = C / c(N_opt), in tokens."""
    tokens_law: LawName
    loss: Interval
    """L at the optimum, in nats/token."""
    loss_law: LawName
    exponent: Interval
    """The local d ln N_opt / d ln C."""
    exponent_law: LawName
    forecasts: tuple[Forecast, ...]
    """What each law says by itself, as it was used here."""
    fits: tuple[Fit, ...]
    """The fits behind `forecasts`, in the same order."""
    over_top_budget: float
    """C over that of the largest budget measured."""
    notes: tuple[str, ...]
    """Which observations each law was fitted to, and what weakens it."""


def recent(obs: Observations, budgets: int = RECENT_BUDGETS) -> Observations:
    """Rows of the largest `budgets` nominal budgets, and others at least as expensive."""
    nominal = obs.budgets()
    if len(nominal) <= budgets:
        return obs
    smallest = nominal[-budgets]
    least = obs.flops[obs.budget == smallest].min()
    kept = np.where(np.isfinite(obs.budget), obs.budget >= smallest, obs.flops >= least)
    return obs.select(kept)


def _fit_recent(obs: Observations) -> Fit:
    """Hoffmann's law on the last budgets; on all where those cannot determine it."""
    try:
        return fit(HOFFMANN, recent(obs))
    except InputError:
        return fit(HOFFMANN, obs)


def headline(obs: Observations, flops: float, cost: FlopsPerToken, level: float = 0.9) -> Headline:
    """The forecast to act on: L from the generalised law, N_opt from Hoffmann's.

    On eight public studies the generalised law predicted the next budget's loss within .28 to .45%
    (median), Hoffmann's over-predicted it by about 1%; Hoffmann's on the last four budgets was best
    for N_opt. Between laws E and the loss differ by more than noise explains, so that each interval
    is widened to reach the other law's estimate.

    Parameters
    ----------
    obs
        What to fit.
    flops
        Budget C in FLOPs.
    cost
        FLOPs per token as a function of N.
    level
        Nominal coverage before widening.

    Raises
    ------
    InputError
        If Hoffmann's law cannot be fitted, or puts N_opt or D_opt below 1. Without the generalised
        law (which needs one more observation) Hoffmann's answers alone, and a note says so.
    """
    narrow = _fit_recent(obs)
    notes = []
    if narrow.n < len(obs):
        notes.append(
            f"N_opt by the hoffmann law on the last {RECENT_BUDGETS} budgets, "
            f"{narrow.n} of {len(obs)} observations"
        )
    by_hoffmann = forecast(narrow, flops, cost, level)
    fits, forecasts = [narrow], [by_hoffmann]
    try:
        fits.append(fit(GENERALISED, obs))
        forecasts.append(forecast(fits[-1], flops, cost, level))
    except InputError as error:
        notes.append(f"loss by the hoffmann law alone, which tends to over-predict it: {error}")
    _require_a_model(by_hoffmann)
    notes += [note for fitted in fits for note in _weaknesses(fitted)]
    over_top, distance = _reach(obs, flops, level)
    # A fit that stopped at a bound may put its optimum anywhere: noted, but it widens nothing.
    sound = [said for said, fitted in zip(forecasts, fits, strict=True) if fitted.sound]
    by_loss = sound[-1] if sound else by_hoffmann
    params = _reaching(by_hoffmann.params, [other.params for other in sound])
    return Headline(
        flops=flops,
        params=params,
        params_law=by_hoffmann.law,
        tokens=_tokens(params, flops, cost),
        tokens_law=by_hoffmann.law,
        loss=_reaching(by_loss.loss, [other.loss for other in sound]),
        loss_law=by_loss.law,
        exponent=_reaching(by_hoffmann.exponent, [other.exponent for other in sound]),
        exponent_law=by_hoffmann.law,
        forecasts=tuple(forecasts),
        fits=tuple(fits),
        over_top_budget=over_top,
        notes=(*notes, *distance),
    )


def _require_a_model(said: Forecast) -> None:
    for name, part, unit in (("N", said.params, "parameters"), ("D", said.tokens, "tokens")):
        if part.estimate < 1.0:
            raise InputError(
                f"at {said.flops:.3g} FLOPs the {said.law} law puts {name}_opt at "
                f"{part.estimate:.3g} {unit}, less than one: ask for a budget nearer to those "
                "measured, or measure more budgets"
            )


def _weaknesses(fitted: Fit) -> list[str]:
    found = [fitted.reason, fitted.warning]
    if not fitted.sound:
        found.append("its forecast has no interval, and its estimate is not to be relied on")
    return [f"{fitted.law.name} law: {note}" for note in found if note]


def _reach(obs: Observations, flops: float, level: float) -> tuple[float, list[str]]:
    """C over the largest budget's, and in what the forecast leaves what was seen."""
    planned = len(obs.budgets()) > 0
    valleys = isoflop(obs, level) if planned else None
    seen = [v.flops for v in valleys.vertices] if valleys else [obs.flops.min(), obs.flops.max()]
    over_top = float(flops / seen[-1])
    notes = list(valleys.faults) if valleys else []
    if valleys and not valleys.interior:
        notes.append("no budget's optimum was seen inside its grid: the forecast extrapolates in N")
    if over_top > TESTED_REACH:
        notes.append(
            f"C is {over_top:.3g} times the largest budget, {seen[-1]:.3g} FLOPs: "
            f"intervals were tested up to {TESTED_REACH:g} times"
        )
    if flops < 0.99 * seen[0]:
        notes.append(f"C is below the smallest budget, {seen[0]:.3g} FLOPs")
    return over_top, notes


def _reaching(own: Interval, others: list[Interval]) -> Interval:
    estimates = [other.estimate for other in others]
    return replace(own, low=min([own.low, *estimates]), high=max([own.high, *estimates]))


def _tokens(params: Interval, flops: float, cost: FlopsPerToken) -> Interval:
    """Interval of C / c(N) from that of N: c rises with N, so that the ends change places."""

    def tokens(n: float) -> float:
        if n == 0.0 or math.isinf(n):
            return math.inf if n == 0.0 else 0.0
        return flops / cost(n)

    return Interval(tokens(params.estimate), tokens(params.high), tokens(params.low), params.level)
