"""The forecast to act on: the generalised law, drawn towards Hoffmann's as far as data allow.

What one law says by itself is `forecast.py`'s; how such forecasts did is `heldout.py`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.optimize import brentq

from analysis.approaches import IsoflopFit, distance_outside, isoflop, top_flops
from analysis.combined import combine, noise_of, with_discrepancy
from analysis.discrepancy import DEFAULT, Discrepancy, Shares
from analysis.errors import InputError
from analysis.fitting import LEAST_SQUARES, Method
from analysis.forecast import TESTED_REACH, Forecast
from analysis.heldout import discrepancy_of, predictions
from analysis.intervals import Interval
from analysis.lack_of_fit import lack_of_fit, strays
from analysis.observations import Observations
from analysis.optimum import FlopsPerToken, log_optimal_params
from analysis.pair import RECENT_BUDGETS, Basis, Pair, fit_basis


@dataclass(frozen=True, kw_only=True)
class Headline:
    """One answer from both laws.

    N_opt, D_opt and the exponents come from the recent budgets, L from all. Intervals are the
    generalised law's, which covers noise and what gamma may be, and reach to the estimate; those of
    N_opt, D_opt and L also cover what the law was off by beyond noise in back-tests.
    """

    flops: float
    """The budget C, in FLOPs."""
    params: Interval
    """N_opt, in parameters."""
    tokens: Interval
    """D_opt = C / c(N_opt), in tokens."""
    loss: Interval
    """L at the optimum, in nats/token: the mean over runs."""
    new_run: Interval
    """L of one new run there."""
    exponent: Interval
    """The local d ln N_opt / d ln C."""
    params_weight: float
    """Share of the generalised law in N_opt, D_opt and the exponent, 0 to 1; Hoffmann's has the
    rest."""
    loss_weight: float
    """Its share in L."""
    noise: Shares
    """Standard deviations of ln N_opt and ln L due to noise alone; infinite where an
    interval is open."""
    by_law: Shares
    """Standard deviations of the law's error beyond noise at that C."""
    discrepancy: Discrepancy
    """The discrepancy from which `by_law` is computed."""
    ratio_note: str | None
    """A sentence on how far D/N at the optimum lies outside the measured range, else None; one of
    `notes`."""
    forecasts: tuple[Forecast, ...]
    """What each law says by itself: N, D and the exponents as fitted to the recent budgets, L as
    fitted to all."""
    recent: Pair
    """The fits behind N_opt."""
    all: Pair
    """The fits behind L."""
    over_top_budget: float
    """C over that of the largest budget measured."""
    notes: tuple[str, ...]
    """Which observations each number rests on, and what weakens it."""

    @property
    def params_law(self) -> str:
        """Whose N_opt it is, in words."""
        return _whose(self.params_weight)

    @property
    def loss_law(self) -> str:
        """Whose L it is, in words."""
        return _whose(self.loss_weight)


def _whose(weight: float) -> str:
    if weight == 0.0:
        return "hoffmann"
    return (
        "generalised" if weight > 0.995 else f"{weight:.0%} generalised, {1 - weight:.0%} hoffmann"
    )


def headline(
    obs: Observations,
    flops: float,
    cost: FlopsPerToken,
    level: float = 0.9,
    *,
    method: Method = LEAST_SQUARES,
    basis: Basis | None = None,
    discrepancy: Discrepancy | None = None,
) -> Headline:
    """The forecast at `flops`: ln N_opt from the recent budgets, ln L from all, of both laws.

    Each is the mean of both laws' answers, the generalised one with weight F / (1 + F), F that of
    the test of gamma = 1. In simulation with noise of .3% (five truths from Hoffmann's to Kaplan's,
    off-centre and drifting grids, departures of small models, 3 and 100 times the top budget) the
    root mean square error of ln N_opt was .067 and .144; for Hoffmann's law alone .156 and .271,
    for the generalised alone .069 and .149, for a switch at p = .05 .080 and .157.

    Parameters
    ----------
    obs
        What to fit.
    flops
        Budget C in FLOPs.
    cost
        FLOPs per token as a function of N.
    level
        Nominal coverage.
    method
        How to fit.
    basis
        The fits, where the caller has them.
    discrepancy
        How far the law is off beyond noise; by default what back-tests of `obs` tell.

    Raises
    ------
    InputError
        If Hoffmann's law cannot be fitted, or N_opt or D_opt is below 1. Without the generalised
        law (which needs one more observation) Hoffmann's answers alone, and a note says so.
    """
    basis = basis or fit_basis(obs, method)
    noise = combine(basis, flops, cost, level)
    _require_a_model(flops, noise.params, _tokens(noise.params, flops, cost))
    valleys = isoflop(obs, level)
    over_top, reach = _reach(obs, valleys, flops)
    distance = distance_outside(obs, flops, valleys)
    discrepancy = discrepancy or discrepancy_of(predictions(obs, cost, method=method))
    found = with_discrepancy(noise, discrepancy, distance)
    tokens = _tokens(found.params, flops, cost)
    outside = outside_ratios(obs, found.params.estimate, tokens.estimate, "the optimum")
    ratio = f"the forecast extrapolates in D/N: {outside}" if outside else None
    return Headline(
        flops=flops,
        params=found.params,
        tokens=tokens,
        loss=found.loss,
        new_run=found.new_run,
        exponent=found.exponent,
        params_weight=basis.recent.weight,
        loss_weight=basis.all.weight,
        noise=noise_of(noise),
        by_law=discrepancy.at(distance),
        discrepancy=discrepancy,
        ratio_note=ratio,
        forecasts=found.forecasts,
        recent=basis.recent,
        all=basis.all,
        over_top_budget=over_top,
        notes=(
            *_basis_notes(basis, obs, valleys),
            *_discrepancy_notes(discrepancy),
            *([ratio] if ratio else []),
            *reach,
        ),
    )


def flops_for(
    basis: Basis,
    cost: FlopsPerToken,
    obs: Observations,
    *,
    params: float | None = None,
    tokens: float | None = None,
) -> float:
    """The budget C, in FLOPs, whose headline N_opt is `params`, or whose D_opt is `tokens`.

    Raises
    ------
    InputError
        If the wanted number is not positive, or no C within 1e30 times the observed ones has it.
    """
    wanted, what = (params, "parameters") if params is not None else (tokens, "tokens")
    if wanted is None or not (math.isfinite(wanted) and wanted > 0):
        raise InputError(f"a forecast needs a positive number of {what}, not {wanted}")
    pair = basis.recent
    target = math.log(wanted)

    def distance(log_c: float) -> float:
        n = [log_optimal_params(f.theta, math.exp(log_c), cost) for f in pair.fits]
        at = n if params is not None else [log_c - float(cost.log_and_slope(x)[0]) for x in n]
        return (1.0 - pair.weight) * at[0] + pair.weight * at[-1] - target

    low, high = math.log(obs.flops.min()) - 69.0, math.log(obs.flops.max()) + 69.0
    if distance(low) > 0.0 or distance(high) < 0.0:
        raise InputError(
            f"no budget near those observed has its optimum at {wanted:.3g} {what}: "
            "is the unit right?"
        )
    return math.exp(float(brentq(distance, low, high, xtol=1e-10)))


def _basis_notes(basis: Basis, obs: Observations, valleys: IsoflopFit) -> list[str]:
    notes = []
    used, total = basis.recent.hoffmann.n, basis.all.hoffmann.n
    if used < total:
        notes.append(
            f"N_opt from the last {RECENT_BUDGETS} budgets, {used} of {total} observations"
        )
    if basis.all.note:
        notes.append(
            f"loss by the hoffmann law alone, which tends to over-predict it: {basis.all.note}"
        )
    pairs = [("", basis.all)] if used == total else [(" (recent)", basis.recent), ("", basis.all)]
    for where, pair in pairs:
        for item in pair.fits:
            found = [item.reason, item.warning]
            if not item.sound:
                found.append("its forecast has no interval and does not count")
            if pair is basis.all:
                found.append(lack_of_fit(item, obs, valleys))
            notes += [f"{item.law.name} law{where}: {note}" for note in found if note]
    stray = strays(basis.all.fits, obs)
    return [*notes, stray] if stray else notes


def _discrepancy_notes(discrepancy: Discrepancy) -> list[str]:
    """Return a note that names the default discrepancy, if no back-test replaces it."""
    if discrepancy.source != "default":
        return []
    number = discrepancy.back_tests
    few = "no back-test tells"
    if number:
        few = f"{number} back-test{' is' if number == 1 else 's are'} too noisy to tell"
    return [
        f"{few} how far the law is off: intervals take a default, the {DEFAULT.params:.0%} that "
        f"N_opt was off beyond noise in public studies for each factor {math.e:.1f} in C"
    ]


RATIO_MARGIN = 1.1
"""Factor by which D/N may leave the measured range unsaid: grids are rounded by as much."""


def outside_ratios(obs: Observations, params: float, tokens: float, whose: str) -> str | None:
    """Return a sentence on how far D/N lies outside the measured range, or None inside it.

    Parameters
    ----------
    obs
        What was measured.
    params, tokens
        N and D.
    whose
        As in "the D/N of ...".
    """
    measured = obs.tokens / obs.params
    ratio = tokens / params if params > 0.0 else math.inf
    low, high = float(measured.min()), float(measured.max())
    if not 0.0 < ratio < math.inf:  # an exponent at its bound put the optimum beyond any number
        return None
    if low / RATIO_MARGIN <= ratio <= high * RATIO_MARGIN:
        return None
    far, side, end = (
        (ratio / high, "above the largest", high)
        if ratio > high
        else (low / ratio, "below the smallest", low)
    )
    return (
        f"the D/N of {whose}, {ratio:.3g}, is {far:.2g} times {side} D/N that was measured, "
        f"{end:.3g}"
    )


def _require_a_model(flops: float, params: Interval, tokens: Interval) -> None:
    for name, part, unit in (("N", params, "parameters"), ("D", tokens, "tokens")):
        if part.estimate < 1.0:
            raise InputError(
                f"at {flops:.3g} FLOPs {name}_opt would be {part.estimate:.3g} {unit}, less than "
                "one: ask for a budget nearer to those measured, or measure more budgets"
            )


def _reach(obs: Observations, valleys: IsoflopFit, flops: float) -> tuple[float, list[str]]:
    """C over the largest budget's, and in what the forecast leaves what was seen."""
    seen = [v.flops for v in valleys.vertices] or [obs.flops.min(), obs.flops.max()]
    over_top = flops / top_flops(obs, valleys)
    notes = list(valleys.faults)
    if valleys.vertices and not valleys.interior:
        notes.append("no budget's optimum was seen inside its grid: the forecast extrapolates in N")
    if over_top > TESTED_REACH:
        notes.append(
            f"C is {over_top:.3g} times the largest budget, {seen[-1]:.3g} FLOPs: "
            f"intervals were tested up to {TESTED_REACH:g} times"
        )
    if flops < 0.99 * seen[0]:
        notes.append(f"C is below the smallest budget, {seen[0]:.3g} FLOPs")
    return over_top, notes


def _tokens(params: Interval, flops: float, cost: FlopsPerToken) -> Interval:
    """Interval of C / c(N) from that of N: c rises with N, so that the ends change places."""

    def tokens(n: float) -> float:
        if n == 0.0 or math.isinf(n):
            return math.inf if n == 0.0 else 0.0
        return flops / cost(n)

    return Interval(tokens(params.estimate), tokens(params.high), tokens(params.low), params.level)
