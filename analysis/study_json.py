"""A study and a forecast as JSON-ready values: the contract of `--json`.

Infinite and missing numbers are null.
"""

from __future__ import annotations

import math
from typing import Any

from analysis.approaches import Vertex, distance_outside
from analysis.discrepancy import Discrepancy, Shares
from analysis.fitting import Fit
from analysis.forecast import Forecast
from analysis.headline import Headline
from analysis.heldout import HEADLINE, BackTest, Heldout, median_error
from analysis.intervals import Interval
from analysis.laws import LAWS
from analysis.optimum import FlopsPerToken
from analysis.rungs import rungs_json
from analysis.study import Study, next_budget
from analysis.tradeoffs import within
from analysis.uncertainty import LawIntervals

SHARES = {"0.1%": 0.001, "1%": 0.01}
"""How far above the best the loss may be in a range of N, by the name it is reported under."""


def to_json(found: Study) -> dict[str, Any]:
    """The study; every exponent is under `convention`, a law's is local, at `at_flops`.

    Budgets are nominal, in exact FLOPs; all other FLOPs are under the convention.
    """
    laws = {
        str(item.law.name): _law(item, said, known, found.level)
        for item, said, known in zip(found.fits, found.at_top, found.intervals, strict=True)
    }
    for law in LAWS:
        laws.setdefault(str(law.name), _refused(found.refusals.get(law.name), found.level))
    return {
        "observations": found.obs.rows,
        "excluded": [{"reason": r, "count": n} for r, n in found.excluded.items()],
        "convention": _convention(found),
        "loss_unit": found.obs.loss_unit,
        "cells": {"rows": found.obs.rows, "distinct": found.cells},
        "factors": [
            {"column": factor.column, "cells": factor.cells, "share": factor.share}
            for factor in found.factors
        ],
        "budgets": found.obs.budgets().tolist(),
        "vertices": _vertices(found),
        "exponents": _exponents(found, laws),
        "laws": laws,
        "approaches": {
            "envelope": _envelope(found),
            "isoflop": _isoflop(found),
            "parametric": _parametric(found),
        },
        "heldout": _heldout(found.heldout),
        "back_tests": [_back_test(item) for item in found.back_tests],
        "discrepancy": _discrepancy(found),
        "leave_one_out": _heldout(found.left_out),
        "gamma_test": {"statistic": _finite(found.gamma.statistic), "p": found.gamma.p}
        if found.gamma
        else None,
        "forecast": forecast_json(found.next, found.cost) if found.next else None,
        "rungs": rungs_json(found.rungs),
        "warnings": list(found.warnings),
    }


def forecast_json(ahead: Headline, cost: FlopsPerToken) -> dict[str, Any]:
    """A forecast, each number with its interval and how much the generalised law has in it."""
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
        **{f"{name}_interval": ends(part) for name, part in parts.items()},
        "new_run_interval": ends(ahead.new_run),
        "noise": _shares(ahead.noise),
        "discrepancy": discrepancy_json(ahead.discrepancy, ahead.by_law),
        "level": ahead.params.level,
        "params_law": ahead.params_law,
        "loss_law": ahead.loss_law,
        "generalised_weight": {"params": ahead.params_weight, "loss": ahead.loss_weight},
        "laws": {str(item.law): _said(item) for item in ahead.forecasts},
        "within": {name: list(near(ahead, cost, share)) for name, share in SHARES.items()},
        "warnings": list(ahead.notes),
    }


def near(ahead: Headline, cost: FlopsPerToken, share: float) -> tuple[float | None, float | None]:
    """The range of N whose loss at that C is within `share` of the best; None for an open end.

    By the law with the greater weight, as a factor about the forecast N_opt.
    """
    leading = ahead.recent.leading
    own = next(item for item in ahead.forecasts if item.law == leading.law.name)
    low, high = within(leading.law, leading.theta, ahead.flops, cost, share)
    scale = ahead.params.estimate / own.params.estimate
    return (low * scale or None), _finite(high * scale)


def _exponents(found: Study, laws: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every a in one place, with what it holds for."""
    line = found.isoflop.exponent
    by_line = {
        "a": line.estimate if line else None,
        "a_interval": ends(line) if line else [None, None],
        "at_flops": None,
    }
    by_law = {
        name: {part: laws[name][part] for part in ("a", "a_interval", "status")}
        | {"at_flops": found.top_flops}
        for name in laws
        if laws[name]["status"] != "refused"
    }
    shared = {"level": found.level, **_convention(found)}
    return {name: {**part, **shared} for name, part in {**by_law, "isoflop": by_line}.items()}


def _refused(reason: str | None, level: float) -> dict[str, Any]:
    """A law that could not be fitted, under the keys of one that could."""
    nothing: dict[str, Any] = dict.fromkeys(
        ("a", "b", "objective", "rmse_log", "condition", "parameters", "intervals")
    )
    ends = {"a_interval": [None, None], "b_interval": [None, None], "level": level}
    return {**nothing, **ends, "status": "refused", "reason": reason}


def _convention(found: Study) -> dict[str, str]:
    return {"params": found.obs.params_convention, "flops": found.obs.flops_convention}


def _said(item: Forecast) -> dict[str, Any]:
    parts = {"params": item.params, "tokens": item.tokens, "loss": item.loss, "a": item.exponent}
    return {
        **{name: _finite(part.estimate) for name, part in parts.items()},
        **{f"{name}_interval": ends(part) for name, part in parts.items()},
    }


def _law(item: Fit, said: Forecast, known: LawIntervals, level: float) -> dict[str, Any]:
    return {
        "parameters": item.constants,
        "intervals": {
            # An E of 0 is an end, not the want of one.
            name: [i.low, _finite(i.high)] if name == "E" else ends(i)
            for name, i in known.constants.items()
        },
        "level": level,
        "a": _finite(said.exponent.estimate),
        "a_interval": ends(known.exponent),
        "b": _finite(said.tokens_exponent.estimate),
        "b_interval": ends(known.tokens_exponent),
        "objective": item.objective,
        "rmse_log": item.rmse,
        "condition": item.condition,
        "status": item.status,
        "reason": item.reason,
    }


def _line(a: Interval | None, b: Interval | None, reason: str | None) -> dict[str, Any]:
    return {
        "a": _finite(a.estimate) if a else None,
        "a_interval": ends(a) if a else [None, None],
        "b": _finite(b.estimate) if b else None,
        "b_interval": ends(b) if b else [None, None],
        **({"reason": reason} if reason else {}),
    }


def _envelope(found: Study) -> dict[str, Any]:
    line = found.envelope
    known = _line(line.exponent, line.tokens_exponent, line.reason)
    at = found.next.flops if found.next else None
    ahead = _optimum_at(at, line.params_at(at), line.tokens_at(at)) if at else None
    return {"status": line.status, **known, "crossings": len(line.crossings), "line": ahead}


def _isoflop(found: Study) -> dict[str, Any]:
    line = found.isoflop
    at = found.next.flops if found.next else None
    return {
        "status": "ok" if line.exponent else "refused",
        **_line(line.exponent, line.tokens_exponent, line.reason),
        "line": _optimum_at(at, line.params_at(at), line.tokens_at(at)) if at else None,
        "vertices": _vertices(found),
    }


def _parametric(found: Study) -> dict[str, Any]:
    """Approach 3 is Hoffmann's law."""
    ahead = found.next.forecasts[0] if found.next else None
    for item, said, known in zip(found.fits, found.at_top, found.intervals, strict=True):
        if item.law.name == "hoffmann":
            line = _line(known.exponent, known.tokens_exponent, item.reason)
            at = _optimum_at(ahead.flops, ahead.params, ahead.tokens) if ahead else None
            return {"status": item.status, "at_flops": said.flops, **line, "line": at}
    return {"status": "refused", **_line(None, None, found.refusals.get("hoffmann"))}


def _optimum_at(flops: float, params: Interval | None, tokens: Interval | None) -> dict[str, Any]:
    """What an approach's line says at the C of the forecast."""
    return {
        "flops": flops,
        "params": _finite(params.estimate) if params else None,
        "params_interval": ends(params) if params else [None, None],
        "tokens": _finite(tokens.estimate) if tokens else None,
        "tokens_interval": ends(tokens) if tokens else [None, None],
    }


def discrepancy_json(discrepancy: Discrepancy, by_law: Shares) -> dict[str, Any]:
    """Return the error of the law beyond noise, as standard deviations of ln N_opt and ln L.

    At one C; `per_log_flops` for each unit of ln C above the largest budget.
    """
    return {
        **_shares(by_law),
        "source": discrepancy.source,
        "back_tests": discrepancy.back_tests,
        "per_log_flops": {"params": discrepancy.params, "loss": discrepancy.loss},
    }


def _discrepancy(found: Study) -> dict[str, Any]:
    """At the C of the forecast, also where the laws give none there."""
    flops = found.next.flops if found.next else next_budget(found.obs)
    by_law = found.discrepancy.at(distance_outside(found.obs, flops, found.isoflop))
    return {"flops": flops, **discrepancy_json(found.discrepancy, by_law)}


def _shares(part: Shares) -> dict[str, float | None]:
    return {"params": _finite(part.params), "loss": _finite(part.loss)}


def _back_test(item: BackTest) -> dict[str, Any]:
    return {
        "budget": item.budget,
        "flops": item.flops,
        "params_interval": ends(item.params_interval) if item.params_interval else [None, None],
        "params_measured": item.params_measured,
        "loss_interval": ends(item.loss_interval) if item.loss_interval else [None, None],
        "loss_measured": item.loss_measured,
        "held": {"params": item.params_held, "loss": item.loss_held},
        "noise": _shares(item.noise) if item.noise else None,
        "discrepancy": discrepancy_json(item.discrepancy, item.by_law)
        if item.discrepancy and item.by_law
        else None,
        **({"reason": item.reason} if item.reason else {}),
    }


def _vertices(found: Study) -> list[dict[str, Any]]:
    pairs = zip(found.isoflop.vertices, found.by_law, strict=True)
    return [{**_vertex(vertex), "params_by_law": _known(n)} for vertex, n in pairs]


def _known(value: float | None) -> float | None:
    return None if value is None else _finite(value)


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


def _heldout(found: tuple[Heldout, ...]) -> dict[str, Any]:
    parts = ("loss_error", "params_error")
    return {
        "top_budgets": [item.budget for item in found],
        "laws": {
            law: {part: median_error(found, law, part) for part in parts}
            for law in (*(law.name for law in LAWS), HEADLINE)
        },
        "budgets": [
            {
                "budget": item.budget,
                "observations": item.n_fitted,
                "laws": {
                    error.law: {
                        **{part: getattr(error, part) for part in parts},
                        **({"reason": error.reason} if error.reason else {}),
                    }
                    for error in item.errors
                },
            }
            for item in found
        ],
    }


def ends(part: Interval) -> list[float | None]:
    """Both ends; null where the data set none: infinite, or the 0 that stands for no lower end."""
    return [_finite(part.low) if part.low != 0.0 else None, _finite(part.high)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
