"""Everything that the observations of one kind say, in one value: for people, figures and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.approaches import IsoflopFit, Vertex, isoflop
from analysis.errors import InputError
from analysis.fitting import Fit, fit
from analysis.forecast import Forecast, Headline, Heldout, forecast, headline, heldout
from analysis.intervals import Interval, constant_intervals
from analysis.lack_of_fit import lack_of_fit
from analysis.laws import LAWS, FlopsPerToken
from analysis.observations import Observations

NEXT_STEP = (2.0, 10.0)
"""Least and largest ratio of the next budget to the top one, where not given."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Approaches, fits, held-out errors and the forecast at the next budget."""

    obs: Observations
    excluded: Mapping[str, int]
    """Observations left out, by reason."""
    level: float
    """Nominal coverage of all intervals."""
    cost: FlopsPerToken
    isoflop: IsoflopFit
    fits: tuple[Fit, ...]
    refusals: Mapping[str, str]
    """Laws that could not be fitted, with the reason."""
    at_top: tuple[Forecast, ...]
    """What each law says at the top budget."""
    heldout: Heldout | None
    next: Headline | None
    """The forecast at the next budget; None where there is none."""
    next_refusal: str | None
    """Why the laws that were fitted give no forecast at the next budget, else None."""

    @property
    def top_flops(self) -> float:
        """C of the largest budget, in FLOPs under the convention of `obs`."""
        return self.isoflop.vertices[-1].flops

    @property
    def warnings(self) -> tuple[str, ...]:
        """What weakens the answer, a sentence each."""
        found = [f"{name} law: {reason}" for name, reason in self.refusals.items()]
        found += self.isoflop.faults
        for item in self.fits:
            misfit = lack_of_fit(item, self.obs, self.isoflop)
            found += [f"{item.law.name} law: {s}" for s in (item.reason, item.warning, misfit) if s]
        found += [self.next_refusal] if self.next_refusal else []
        return tuple(dict.fromkeys([*found, *(self.next.notes if self.next else ())]))


def study(
    obs: Observations,
    *,
    cost: FlopsPerToken,
    level: float = 0.9,
    excluded: Mapping[str, int] | None = None,
    next_flops: float | None = None,
) -> Study:
    """Fit everything to `obs`.

    Parameters
    ----------
    obs
        Observations of one kind with nominal budgets.
    cost
        Training FLOPs a token as a function of N, under the convention of `obs`.
    level
        Nominal coverage of intervals.
    excluded
        What was left out before, by reason, to be reported.
    next_flops
        Budget of the forecast; by default the top one times the ratio of the last two.

    Raises
    ------
    InputError
        If no observation has a nominal budget, or there is no forecast at `next_flops`. A law that
        cannot be fitted is a refusal with its reason, not an error; so is a default next budget
        without a forecast.
    """
    valleys = isoflop(obs, level)
    fits, refusals = [], {}
    for law in LAWS:
        try:
            fits.append(fit(law, obs))
        except InputError as error:
            refusals[str(law.name)] = str(error)
    top = valleys.vertices[-1].flops
    ahead, refusal = None, None
    try:
        ahead = headline(obs, next_flops or next_budget(obs), cost, level) if fits else None
    except InputError as error:
        if next_flops:
            raise
        refusal = str(error)
    return Study(
        obs=obs,
        excluded=excluded or {},
        level=level,
        cost=cost,
        isoflop=valleys,
        fits=tuple(fits),
        refusals=refusals,
        at_top=tuple(forecast(item, top, cost, level) for item in fits),
        heldout=heldout(obs, cost, level) if len(obs.budgets()) > 1 else None,
        next=ahead,
        next_refusal=refusal,
    )


def next_budget(obs: Observations) -> float:
    """C of the next budget, as far above the top one's as the top budget is above the one before.

    In FLOPs under the convention of `obs`.
    """
    budgets = obs.budgets()
    ratio = float(budgets[-1] / budgets[-2]) if len(budgets) > 1 else NEXT_STEP[0]
    return float(isoflop(obs).vertices[-1].flops * np.clip(ratio, *NEXT_STEP))


def require_laws(found: Study) -> None:
    """Refuse a study in which no law could be fitted.

    Raises
    ------
    InputError
        With the reason of the first law.
    """
    if not found.fits:
        raise InputError(next(iter(found.refusals.values())))


def to_json(found: Study) -> dict[str, Any]:
    """The study as JSON-ready values: infinite and missing numbers are null.

    Every exponent says its convention; a law's is local, at `at_flops`, and has its fit's status.
    Budgets are nominal, in exact FLOPs; all other FLOPs are under the convention.
    """
    convention = {"params": found.obs.params_convention, "flops": found.obs.flops_convention}
    exponents: dict[str, dict[str, Any]] = {
        str(item.law): {
            "a": item.exponent.estimate,
            "a_interval": _ends(item.exponent),
            "level": found.level,
            "at_flops": item.flops,
            "status": fitted.status,
            **convention,
        }
        for item, fitted in zip(found.at_top, found.fits, strict=True)
    }
    line = found.isoflop.exponent
    exponents["isoflop"] = {
        "a": line.estimate if line else None,
        "a_interval": _ends(line) if line else [None, None],
        "level": found.level,
        "at_flops": None,
        **convention,
    }
    return {
        "observations": len(found.obs),
        "excluded": [{"reason": r, "count": n} for r, n in found.excluded.items()],
        "convention": convention,
        "budgets": found.obs.budgets().tolist(),
        "vertices": [_vertex(v) for v in found.isoflop.vertices],
        "exponents": {
            name: exponents.get(name) for name in (*(law.name for law in LAWS), "isoflop")
        },
        "laws": {item.law.name: _law(item, found.level) for item in found.fits},
        "heldout": _heldout(found.heldout),
        "forecast": forecast_json(found.next) if found.next else None,
        "warnings": list(found.warnings),
    }


def forecast_json(ahead: Headline) -> dict[str, Any]:
    """A forecast as JSON-ready values, each number with its interval and law."""
    ratio = Interval(
        ahead.tokens.estimate / ahead.params.estimate,
        ahead.tokens.low / ahead.params.high,
        ahead.tokens.high / ahead.params.low if ahead.params.low else math.inf,
        ahead.params.level,
    )
    parts = {
        "params": ahead.params,
        "tokens": ahead.tokens,
        "tokens_per_param": ratio,
        "loss": ahead.loss,
        "exponent": ahead.exponent,
    }
    return {
        "flops": ahead.flops,
        "over_top_budget": ahead.over_top_budget,
        **{name: _finite(part.estimate) for name, part in parts.items()},
        **{f"{name}_interval": _ends(part) for name, part in parts.items()},
        "level": ahead.params.level,
        "params_law": ahead.params_law,
        "loss_law": ahead.loss_law,
        "laws": {
            item.law: {
                "params": item.params.estimate,
                "params_interval": _ends(item.params),
                "tokens": item.tokens.estimate,
                "loss": item.loss.estimate,
                "loss_interval": _ends(item.loss),
            }
            for item in ahead.forecasts
        },
        "warnings": list(ahead.notes),
    }


def _vertex(vertex: Vertex) -> dict[str, Any]:
    return {
        "budget": vertex.budget,
        "flops": vertex.flops,
        "params": vertex.params,
        "tokens": vertex.tokens,
        "loss": vertex.loss,
        "status": vertex.status,
        "reason": vertex.reason,
    }


def _law(item: Fit, level: float) -> dict[str, Any]:
    return {
        "parameters": item.constants,
        "intervals": {name: _ends(i) for name, i in constant_intervals(item, level).items()},
        "level": level,
        "objective": item.objective,
        "rmse_log": math.sqrt(item.objective / item.n),
        "status": item.status,
        "reason": item.reason,
    }


def _heldout(found: Heldout | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "top_budgets": [found.budget],
        "laws": {
            error.law: {
                "loss_error": error.loss_error,
                "params_error": error.params_error,
                **({"reason": error.reason} if error.reason else {}),
            }
            for error in found.errors
        },
    }


def _ends(part: Interval) -> list[float | None]:
    """Both ends; null where the data set none: infinite, or the 0 that stands for no lower end."""
    return [_finite(part.low) if part.low != 0.0 else None, _finite(part.high)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
