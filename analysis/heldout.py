"""How forecasts did where the answer is known: top budgets held out, and each budget in turn.

Both sides are read through the same parabola, so that its bias is no error of a law.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from analysis.approaches import Vertex, isoflop, top_flops
from analysis.combined import Combined, combine, noise_of, with_discrepancy
from analysis.discrepancy import Discrepancy, Miss, Shares, estimate, quantile, widened
from analysis.errors import InputError
from analysis.fitting import LEAST_SQUARES, Fit, Method, fit
from analysis.intervals import Interval, add_in_quadrature, t_quantile
from analysis.laws import GENERALISED, HOFFMANN, KAPLAN, log_loss
from analysis.observations import FloatArray, Observations
from analysis.optimum import FlopsPerToken
from analysis.pair import Basis, Pair, fit_basis

TOP_BUDGETS = 3
"""Budgets that are held out one after the other, where enough are left below them."""
BACK_TESTS = 8
"""The most back-tests, of the largest budgets, that a discrepancy rests on."""
EVIDENCE_LEVEL = 0.9
"""Coverage of the intervals from which a prediction's noise is read: the discrepancy is then the
same at every level that is asked for."""
_FEWEST_BELOW = 3
_FEWEST_FITTED = 2  # budgets, of which a law can be fitted at all
HEADLINE = "headline"
"""The name under which the combined forecast stands beside the laws."""


@dataclass(frozen=True, kw_only=True)
class HeldoutError:
    """How one law, fitted to other budgets, did at one."""

    law: str
    """A law's name, or `headline`."""
    loss_error: float | None
    """ln L predicted - ln L measured."""
    params_error: float | None
    """ln N predicted - ln N measured, at the vertex of the budget's parabola."""
    reason: str | None
    """Why an error is None."""


@dataclass(frozen=True, kw_only=True)
class Heldout:
    """Forecasts of one budget from others, against what was measured there."""

    budget: float
    """The nominal budget, in FLOPs."""
    n_fitted: int
    """Observations that the laws were fitted to."""
    vertex: Vertex
    """The budget's IsoFLOP parabola."""
    errors: tuple[HeldoutError, ...]
    """One for each law, and one for the headline."""


class Reading(NamedTuple):
    """The bottom of a budget's valley, as a law predicted it and as it was measured.

    Both sides are parabolas through losses at the same N and D. A law whose bottom lies outside of
    the budget's grid is off by much, which is what the comparison is to tell.
    """

    params: float
    """N, in parameters, predicted: at the parabola's vertex, also where that is outside the grid;
    without a vertex the end of the grid to which the predicted losses fall, which the law's bottom
    lies beyond."""
    loss: float
    """L, in nats/token, predicted: at the vertex, or the lowest of the grid where the vertex is not
    inside."""
    vertex: Vertex
    """The measured optimum at this budget."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """One budget predicted from those below it, before anything is said of discrepancy."""

    budget: float
    """The nominal budget, in FLOPs."""
    basis: Basis
    """The fits to the budgets below."""
    distance: float
    """ln C of the measured vertex above that of the largest budget below."""
    reading: Reading
    ahead: Combined
    """The headline forecast at this budget, with intervals for noise at `EVIDENCE_LEVEL`."""

    @property
    def params_miss(self) -> Miss:
        """The error of ln N_opt, and what noise explains of it."""
        vertex, ahead = self.reading.vertex, self.ahead.params
        error = math.log(self.reading.params / (vertex.params or 1.0))
        own = _equivalent(vertex.params_stderr, vertex.dof)
        return Miss(error, math.hypot(_towards(ahead, error), own), self.distance)

    @property
    def loss_miss(self) -> Miss:
        """The error of ln L, and what noise explains of it: what its runs share is in it too."""
        vertex, ahead = self.reading.vertex, self.ahead.loss
        error = math.log(self.reading.loss / (vertex.loss or 1.0))
        own = _equivalent(vertex.loss_stderr, vertex.dof)
        return Miss(error, math.hypot(_towards(ahead, error), own, self.shared), self.distance)

    @property
    def shared(self) -> float:
        """Standard deviation of what all runs of a budget share in ln L, as the fit tells it."""
        pair = self.basis.all
        wide = pair.fits[-1 if pair.weight else 0]
        return math.sqrt(wide.scatter.shared)

    @property
    def tells(self) -> bool:
        """Whether it is evidence of discrepancy: the noise of both sides is known."""
        noises = self.params_miss.noise, self.loss_miss.noise
        known = self.reading.vertex.dof > 0.0 and all(map(math.isfinite, noises))
        return known and self.distance > 0.0


def _towards(ahead: Interval, error: float) -> float:
    """Standard deviation of a forecast's noise on the side where the measurement lies."""
    end = ahead.low if error > 0.0 else ahead.high
    if not 0.0 < end < math.inf:
        return math.inf
    return abs(math.log(end / ahead.estimate)) / quantile(ahead.level)


def _equivalent(stderr: float | None, dof: float) -> float:
    """The normal's standard deviation whose interval is as wide as the t interval."""
    if stderr is None:
        return 0.0
    return stderr * t_quantile(dof, EVIDENCE_LEVEL) / quantile(EVIDENCE_LEVEL)


@dataclass(frozen=True, kw_only=True)
class BackTest:
    """The forecast that would have been given for a budget, beside what was measured there."""

    budget: float
    """The nominal budget, in FLOPs."""
    flops: float
    """C at the measured vertex, in FLOPs under the observations' convention."""
    params_interval: Interval | None
    """N at the vertex: what the budgets below let one expect of this measurement, with its own
    error; None where there is no valley to compare."""
    params_measured: float | None
    """N at the measured vertex, in parameters."""
    loss_interval: Interval | None
    """L at the vertex, likewise."""
    loss_measured: float | None
    """L at the measured vertex, in nats/token."""
    noise: Shares | None
    """Errors of the forecasts of ln N_opt and ln L due to noise alone, as standard
    deviations."""
    by_law: Shares | None
    """Errors of the law beyond noise, as standard deviations of ln N_opt and ln L."""
    discrepancy: Discrepancy | None
    """The source of `by_law`: back-tests among the budgets below this one, or the default."""
    reason: str | None
    """Why there are no intervals, else None."""

    @property
    def params_held(self) -> bool | None:
        """Whether the measured N fell into its interval; None without one."""
        return _inside(self.params_interval, self.params_measured)

    @property
    def loss_held(self) -> bool | None:
        """Whether the measured L fell into its interval; None without one."""
        return _inside(self.loss_interval, self.loss_measured)


def _inside(part: Interval | None, value: float | None) -> bool | None:
    return None if part is None or value is None else part.low <= value <= part.high


def predictions(
    obs: Observations,
    cost: FlopsPerToken,
    *,
    method: Method = LEAST_SQUARES,
    most: int = BACK_TESTS,
) -> tuple[Prediction, ...]:
    """Each of the largest budgets as predicted from all those below it, smallest first.

    Parameters
    ----------
    obs
        Observations with nominal budgets.
    cost
        Training FLOPs per token as a function of N.
    method
        How to fit.
    most
        How many budgets, of those with two or more below them.

    Returns
    -------
    Those that can be compared: the measured valley has its bottom inside the budget's grid.
    """
    budgets = obs.budgets()[_FEWEST_FITTED:][-most:]
    made = []
    for budget in budgets:
        rest = _below(obs, float(budget))
        try:
            basis = fit_basis(rest, method)
        except InputError:
            continue
        held = obs.select(obs.budget == budget)
        prediction = predict(basis, held, cost, top_flops(rest))
        made += [prediction] if prediction else []
    return tuple(made)


def predict(
    basis: Basis,
    held: Observations,
    cost: FlopsPerToken,
    top: float,
    vertex: Vertex | None = None,
) -> Prediction | None:
    """A budget's valley from fits to the budgets below; None where none was measured.

    Parameters
    ----------
    basis
        The fits.
    held
        The budget's observations.
    cost
        Training FLOPs per token as a function of N.
    top
        C of the largest budget fitted, in FLOPs.
    vertex
        The measured vertex, where the caller has it.
    """
    vertex = vertex or isoflop(held).vertices[0]
    if vertex.status != "interior":
        return None
    near, far = _mean_losses(basis.recent, held), _mean_losses(basis.all, held)
    return Prediction(
        budget=vertex.budget,
        basis=basis,
        distance=math.log(vertex.flops / top),
        reading=Reading(_bottom_params(held, near), _bottom_loss(held, far), vertex),
        ahead=combine(basis, vertex.flops, cost, EVIDENCE_LEVEL),
    )


def _bottom_params(held: Observations, losses: FloatArray) -> float:
    """N of the predicted bottom, see `Reading`."""
    at = _read(held, losses).params
    if at is not None:
        return at
    ends = int(np.argmin(held.params)), int(np.argmax(held.params))
    return float(held.params[min(ends, key=lambda row: float(losses[row]))])


def _bottom_loss(held: Observations, losses: FloatArray) -> float:
    """L of the predicted bottom, see `Reading`."""
    at = _read(held, losses).loss
    return float(np.exp(losses.min())) if at is None else at


def discrepancy_of(made: Sequence[Prediction]) -> Discrepancy:
    """Estimate the discrepancy from predictions; the default where they tell nothing."""
    telling = [item for item in made if item.tells][-BACK_TESTS:]
    return estimate([item.params_miss for item in telling], [item.loss_miss for item in telling])


def back_tests(
    obs: Observations,
    made: Sequence[Prediction],
    cost: FlopsPerToken,
    *,
    top: int,
    level: float,
) -> tuple[BackTest, ...]:
    """The forecasts that would have been given for the largest budgets, largest first.

    Parameters
    ----------
    obs
        Observations with nominal budgets.
    made
        Their predictions, smallest budget first.
    cost
        Training FLOPs per token as a function of N.
    top
        How many budgets.
    level
        Nominal coverage of the intervals.

    Notes
    -----
    No interval has seen the budget that it is of: the discrepancy in it is by the back-tests among
    the budgets below. A valley that was predicted outside of the budget's grid is compared, too:
    evidence is left out for what was measured only, never for how far a forecast was off.
    """
    by_budget = {item.budget: item for item in made}
    found = []
    for vertex in isoflop(obs).vertices[::-1][:top]:
        prediction = by_budget.get(vertex.budget)
        if prediction is None:
            below = int(np.sum(obs.budgets() < vertex.budget))
            found.append(_no_back_test(vertex, below))
            continue
        before = [item for item in made if item.budget < vertex.budget]
        found.append(_back_test(prediction, discrepancy_of(before), cost, level))
    return tuple(found)


def _no_back_test(vertex: Vertex, below: int) -> BackTest:
    why = vertex.reason or "the budgets below do not determine a law"
    if below < _FEWEST_FITTED:
        why = f"no law can be fitted to the {below} budgets below"
    return BackTest(
        budget=vertex.budget,
        flops=vertex.flops,
        params_interval=None,
        params_measured=vertex.params if vertex.status == "interior" else None,
        loss_interval=None,
        loss_measured=vertex.loss,
        noise=None,
        by_law=None,
        discrepancy=None,
        reason=why,
    )


def _back_test(
    made: Prediction, discrepancy: Discrepancy, cost: FlopsPerToken, level: float
) -> BackTest:
    """The interval of the headline, read through the parabola, with the measurement's own error."""
    vertex = made.reading.vertex
    noise = combine(made.basis, vertex.flops, cost, level)
    ahead = with_discrepancy(noise, discrepancy, made.distance)
    t = t_quantile(vertex.dof, level) if vertex.dof > 0.0 else 0.0
    params = _moved(ahead.params, made.reading.params)
    loss = widened(_moved(ahead.loss, made.reading.loss), made.shared)
    return BackTest(
        budget=made.budget,
        flops=vertex.flops,
        params_interval=add_in_quadrature(params, t * (vertex.params_stderr or 0.0)),
        params_measured=vertex.params,
        loss_interval=add_in_quadrature(loss, t * (vertex.loss_stderr or 0.0)),
        loss_measured=vertex.loss,
        noise=noise_of(noise),
        by_law=discrepancy.at(made.distance),
        discrepancy=discrepancy,
        reason=None,
    )


def _moved(part: Interval, estimate: float) -> Interval:
    """The interval about another estimate, as wide in logarithms."""
    low, high = (
        estimate * (end / part.estimate) if 0.0 < end < math.inf else end
        for end in (part.low, part.high)
    )
    return Interval(estimate, low, high, part.level)


def _below(obs: Observations, budget: float) -> Observations:
    """Observations of smaller budgets, and those without one that are smaller than all of this."""
    small = obs.flops < 0.99 * obs.flops[obs.budget == budget].min()
    return obs.select(np.where(np.isfinite(obs.budget), obs.budget < budget, small))


def roll_forward(
    obs: Observations,
    *,
    top: int | None = None,
    method: Method = LEAST_SQUARES,
    bases: Mapping[float, Basis] | None = None,
) -> tuple[Heldout, ...]:
    """Predict each of the largest budgets from all those below it, largest first.

    Parameters
    ----------
    obs
        Observations with nominal budgets; fewer than two give nothing.
    top
        How many budgets to hold out, or 0; by default up to three, while three are left below.
    method
        How to fit.
    bases
        Fits to what is below a nominal budget, where the caller has them.

    Raises
    ------
    InputError
        If more budgets are to be held out than have one below them.

    Notes
    -----
    What is tested is what a headline uses: L from fits to all budgets below, N_opt from fits to the
    last four of them. Rows without a nominal budget that are as large as the held-out one are left
    out too: they would give it away.
    """
    budgets = obs.budgets()
    most = max(len(budgets) - 1, 0)
    if top is not None and not 0 <= top <= most:
        raise InputError(f"{top} of {len(budgets)} budgets cannot be held out: at most {most} can")
    usual = min(TOP_BUDGETS, max(len(budgets) - _FEWEST_BELOW, 1), most)
    chosen = usual if top is None else top
    found = []
    for budget in budgets[::-1][: max(chosen, 0)]:
        known = (bases or {}).get(float(budget))
        found.append(_heldout(obs, float(budget), _below(obs, float(budget)), method, known))
    return tuple(found)


def leave_one_out(obs: Observations, *, method: Method = LEAST_SQUARES) -> tuple[Heldout, ...]:
    """Predict each nominal budget from all others, smallest first; nothing from fewer than three.

    Rows without a nominal budget stay in. Unlike `roll_forward` this asks for interpolation too.
    """
    budgets = obs.budgets()
    if len(budgets) < _FEWEST_BELOW:
        return ()
    return tuple(
        _heldout(obs, float(budget), obs.select(obs.budget != budget), method) for budget in budgets
    )


def median_error(found: tuple[Heldout, ...], law: str, part: str) -> float | None:
    """Over budgets the median of a law's absolute errors; of one budget the error with its sign.

    Parameters
    ----------
    found
        Held-out budgets.
    law
        A law's name, or `headline`.
    part
        `loss_error` or `params_error`.
    """
    errors = [getattr(error, part) for item in found for error in item.errors if error.law == law]
    known = [value for value in errors if value is not None]
    if not known:
        return None
    return float(np.median(np.abs(known))) if len(found) > 1 else float(known[0])


def _heldout(
    obs: Observations,
    budget: float,
    rest: Observations,
    method: Method,
    basis: Basis | None = None,
) -> Heldout:
    held = obs.select(obs.budget == budget)
    (vertex,) = isoflop(held).vertices
    try:
        basis = basis or fit_basis(rest, method)
    except InputError as error:
        errors = tuple(_refused(law, str(error)) for law in (HOFFMANN.name, HEADLINE))
        return Heldout(budget=budget, n_fitted=0, vertex=vertex, errors=errors)
    found = [_error(HOFFMANN.name, (basis.recent.hoffmann, basis.all.hoffmann), held, vertex)]
    near, far = basis.recent.generalised, basis.all.generalised
    if near and far:
        found.append(_error(GENERALISED.name, (near, far), held, vertex))
    else:
        found.append(_refused(GENERALISED.name, basis.recent.note or basis.all.note or ""))
    try:
        kaplan = fit(KAPLAN, rest, method=method)
        found.append(_error(KAPLAN.name, (kaplan, kaplan), held, vertex))
    except InputError as error:
        found.append(_refused(KAPLAN.name, str(error)))
    predicted = _mean_losses(basis.recent, held), _mean_losses(basis.all, held)
    found.append(_compared(HEADLINE, predicted, held, vertex))
    return Heldout(budget=budget, n_fitted=len(rest), vertex=vertex, errors=tuple(found))


def _refused(law: str, reason: str) -> HeldoutError:
    return HeldoutError(law=law, loss_error=None, params_error=None, reason=reason)


def _error(law: str, fits: tuple[Fit, Fit], held: Observations, vertex: Vertex) -> HeldoutError:
    near, far = (_log_losses(item, held) for item in fits)
    return _compared(law, (near, far), held, vertex)


def _log_losses(item: Fit, held: Observations) -> FloatArray:
    return log_loss(item.theta, np.log(held.params), np.log(held.tokens))


def _mean_losses(pair: Pair, held: Observations) -> FloatArray:
    """Both laws' ln L at the rows, weighted as a headline weights them."""
    losses = _log_losses(pair.hoffmann, held)
    if pair.generalised is None or pair.weight == 0.0:
        return losses
    return (1.0 - pair.weight) * losses + pair.weight * _log_losses(pair.generalised, held)


def _read(held: Observations, losses: FloatArray) -> Vertex:
    """The vertex of a budget's parabola through other ln L than were measured."""
    return isoflop(replace(held, loss=np.exp(losses))).vertices[0]


def _compared(
    law: str, predicted: tuple[FloatArray, FloatArray], held: Observations, vertex: Vertex
) -> HeldoutError:
    """Errors of predicted ln L at the held-out rows: N from the first of two, L from the second."""
    near, far = (_read(held, losses) for losses in predicted)
    reason = next((v.reason for v in (vertex, near, far) if v.status != "interior"), None)
    if reason is None and all(v.params and v.loss for v in (vertex, near, far)):
        return HeldoutError(
            law=law,
            loss_error=math.log((far.loss or 1.0) / (vertex.loss or 1.0)),
            params_error=math.log((near.params or 1.0) / (vertex.params or 1.0)),
            reason=None,
        )
    best = int(np.argmin(held.loss))
    return HeldoutError(
        law=law,
        loss_error=float(predicted[1][best] - np.log(held.loss[best])),
        params_error=None,
        reason=f"no valley to compare, {reason}; loss compared at the budget's best observation",
    )
