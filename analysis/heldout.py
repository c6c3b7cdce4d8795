"""How forecasts did where the answer is known: top budgets held out, and each budget in turn.

Both sides are read through the same parabola, so that its bias is no error of a law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from analysis.approaches import Vertex, isoflop
from analysis.errors import InputError
from analysis.fitting import LEAST_SQUARES, Fit, Method, fit
from analysis.laws import GENERALISED, HOFFMANN, KAPLAN, log_loss
from analysis.observations import FloatArray, Observations
from analysis.pair import Pair, fit_basis

TOP_BUDGETS = 3
"""Budgets that are held out one after the other, where enough are left below them."""
_FEWEST_BELOW = 3
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


def roll_forward(
    obs: Observations, *, top: int | None = None, method: Method = LEAST_SQUARES
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
        small = obs.flops < 0.99 * obs.flops[obs.budget == budget].min()
        below = np.where(np.isfinite(obs.budget), obs.budget < budget, small)
        found.append(_heldout(obs, float(budget), obs.select(below), method))
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


def _heldout(obs: Observations, budget: float, rest: Observations, method: Method) -> Heldout:
    held = obs.select(obs.budget == budget)
    (vertex,) = isoflop(held).vertices
    try:
        basis = fit_basis(rest, method)
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


def _compared(
    law: str, predicted: tuple[FloatArray, FloatArray], held: Observations, vertex: Vertex
) -> HeldoutError:
    """Errors of predicted ln L at the held-out rows: N from the first of two, L from the second."""
    near, far = (isoflop(replace(held, loss=np.exp(losses))).vertices[0] for losses in predicted)
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
