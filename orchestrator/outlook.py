"""A forecast at one budget, as the command line gives it: how flat, served, and its price."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.diagnosis import Rate
from analysis.errors import InputError
from analysis.fitting import Fit, Method
from analysis.headline import Headline, flops_for, headline
from analysis.optimum import FlopsPerToken, optimum
from analysis.pair import fit_basis
from analysis.study_json import SHARES, forecast_json, near
from analysis.tradeoffs import FORWARD, ServedOptimum, served_optimum
from analysis.wording import CONVENTIONS, count, made_of, plural, span
from orchestrator.source import Observed


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What is expected at a budget."""

    observed: Observed
    ahead: Headline
    served: ServedOptimum | None
    """The optimum that counts serving too; None unless asked for."""
    rate: Rate | None
    """What a FLOP costs; None where nobody said."""


def outlook(
    observed: Observed,
    method: Method,
    level: float,
    *,
    flops: float | None = None,
    params: float | None = None,
    tokens: float | None = None,
    served_tokens: float | None = None,
    rate: Rate | None = None,
) -> Outlook:
    """Forecast at C, or at the C whose optimum is N or D.

    Raises
    ------
    InputError
        Unless one of C, N and D is given, or where nothing can be forecast.
    """
    if sum(given is not None for given in (flops, params, tokens)) != 1:
        raise InputError("a forecast is at one of --flops C, --at-params N and --at-tokens D")
    obs, cost = observed.obs, observed.cost
    basis = fit_basis(obs, method)
    at = flops or flops_for(basis, cost, obs, params=params, tokens=tokens)
    ahead = headline(obs, at, cost, level, method=method, basis=basis)
    served = None
    if served_tokens is not None:
        served = _served(basis.recent.leading, ahead, served_tokens, cost)
    return Outlook(observed=observed, ahead=ahead, served=served, rate=rate)


def _served(
    leading: Fit, ahead: Headline, served_tokens: float, cost: FlopsPerToken
) -> ServedOptimum:
    """What serving does to the optimum by one law, done to the headline's: equal at no tokens."""
    alone = optimum(leading.theta, ahead.flops, cost)
    found = served_optimum(leading.law, leading.theta, ahead.flops, served_tokens, cost)
    n = found.params / alone.params * ahead.params.estimate
    serving = FORWARD * served_tokens * cost(n)
    if serving >= ahead.flops:
        return found
    return ServedOptimum(
        params=n,
        tokens=(ahead.flops - serving) / cost(n),
        loss=found.loss / alone.loss * ahead.loss.estimate,
        served_tokens=served_tokens,
        training_flops=ahead.flops - serving,
        serving_flops=serving,
    )


def outlook_json(found: Outlook) -> dict[str, Any]:
    """The contract of `isoflop forecast --json`."""
    obs, observed = found.observed.obs, found.observed
    said = forecast_json(found.ahead, observed.cost)
    served, rate = found.served, found.rate
    return said | {
        "convention": {"params": obs.params_convention, "flops": obs.flops_convention},
        "excluded": [{"reason": r, "count": n} for r, n in observed.excluded.items()],
        "served": {
            "tokens_served": served.served_tokens,
            "params": served.params,
            "tokens": served.tokens,
            "loss": served.loss,
            "training_flops": served.training_flops,
            "serving_flops": served.serving_flops,
        }
        if served
        else None,
        "money": {
            "gpu": rate.gpu,
            "mfu": rate.mfu,
            "gpu_hours": rate.gpu_hours(found.ahead.flops),
            "dollars": rate.dollars(found.ahead.flops),
        }
        if rate
        else None,
        "warnings": [*observed.notes, *said["warnings"]],
    }


def show_outlook(console: Console, found: Outlook) -> None:
    """The answer, how flat the optimum is, and what each law says by itself."""
    ahead, obs = found.ahead, found.observed.obs
    flops = CONVENTIONS[obs.flops_convention]
    console.print(Text(f"At C = {ahead.flops:.4g} ({flops})", style="bold"))
    console.print(_answer(found))
    console.print(Text(made_of(ahead), style="dim"))
    console.print(f"{ahead.tokens.estimate / ahead.params.estimate:.3g} tokens a parameter")
    for name, share in SHARES.items():
        low, high = near(ahead, found.observed.cost, share)
        ends = f"{count(low) if low else '0'} to {count(high) if high else '∞'}"
        console.print(f"loss within {name} of the best: N from {ends}")
    for item in ahead.forecasts:
        console.print(
            f"{item.law} law alone: N_opt {count(item.params.estimate)}, "
            f"D_opt {count(item.tokens.estimate)}, L {item.loss.estimate:.4f}"
        )
    if found.served:
        console.print(_serving(found.served))
    if found.rate:
        console.print(_price(found.rate, ahead.flops))
    for note in (*found.observed.notes, *ahead.notes):
        console.print(Text(f"! {note}", style="yellow"))
    for reason, n in found.observed.excluded.items():
        console.print(
            Text(f"! {plural(n, 'observation')} not in the fit: {reason}", style="yellow")
        )


def _answer(found: Outlook) -> Table:
    ahead = found.ahead
    params = f"N_opt, {CONVENTIONS[found.observed.obs.params_convention]}"
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("estimate", justify="right")
    table.add_column(f"{ahead.params.level:.0%} interval", justify="right")
    table.add_column("law")
    for name, part, law in (
        (params, ahead.params, ahead.params_law),
        ("D_opt, tokens", ahead.tokens, ahead.params_law),
    ):
        table.add_row(name, count(part.estimate), span(part), law)
    for name, part, law in (
        (f"L, {found.observed.obs.loss_unit}", ahead.loss, ahead.loss_law),
        ("L of one new run", ahead.new_run, ahead.loss_law),
        ("a = d ln N_opt / d ln C", ahead.exponent, ahead.params_law),
    ):
        table.add_row(name, f"{part.estimate:.4f}", span(part, "plain"), law)
    return table


def _serving(served: ServedOptimum) -> str:
    return (
        f"with {count(served.served_tokens)} tokens served from the same FLOPs: "
        f"N {count(served.params)}, D {count(served.tokens)}, L {served.loss:.4f}; "
        f"{served.training_flops:.3g} FLOPs train, {served.serving_flops:.3g} serve"
    )


def _price(rate: Rate, flops: float) -> str:
    dollars = rate.dollars(flops)
    price = f", {dollars:,.0f} dollars" if dollars is not None else ""
    return f"{rate.gpu_hours(flops):,.0f} {rate.gpu} hours at {rate.mfu:.0%} of peak{price}"
