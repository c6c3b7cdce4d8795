"""What a person sees when the fit is done: tables for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.approaches import Vertex
from analysis.heldout import HEADLINE, median_error
from analysis.intervals import Interval
from analysis.rungs import PROBES, verdict
from analysis.study import Study
from analysis.wording import (
    CONVENTIONS,
    count,
    figures_of,
    held,
    made_of,
    percent,
    plural,
    span,
)
from orchestrator.project import Project
from orchestrator.tables import plain_table, show_table


def show_study(console: Console, found: Study) -> None:
    """A row a budget, the forecast, the exponents, the constants and the held-out errors."""
    obs = found.obs
    conventions = f"N: {CONVENTIONS[obs.params_convention]}, C: {CONVENTIONS[obs.flops_convention]}"
    title = f"Compute-optimal models  ({obs.rows} observations; {conventions})"
    show_table(console, title, _valleys(found))
    if found.next is not None:
        console.print(Text(made_of(found.next), style="dim"))
    if found.at_top or found.isoflop.exponent:
        show_table(console, "\nExponent a of N_opt ∝ C^a", _exponents(found))
    if found.fits:
        objective = found.method.objective
        by = objective if objective == "squares" else f"huber, delta {found.method.delta:g}"
        show_table(console, f"\nConstants, by {by}", _constants(found))
    if found.gamma:
        console.print(
            f"gamma = 1 (hoffmann) against gamma free: F = {found.gamma.statistic:.3g}, "
            f"p = {found.gamma.p:.2g}"
        )
    if found.heldout:
        show_table(
            console, "\nL / N_opt at budgets held out, predicted from those below", _heldout(found)
        )
    if found.back_tests:
        title = (
            f"\n{found.level:.0%} intervals that forecasts of those budgets would have had, "
            "and what was measured"
        )
        show_table(console, title, _back_tests(found))
    for item in found.heldout:
        for reason in dict.fromkeys(error.reason for error in item.errors if error.reason):
            console.print(Text(f"at {item.vertex.flops:.3g} FLOPs: {reason}", style="yellow"))
    console.print()
    for warning in found.warnings:
        console.print(Text(f"! {warning}", style="yellow"))
    for reason, n in found.excluded.items():
        mark, style = ("", "dim") if reason == PROBES else ("! ", "yellow")
        console.print(
            Text(f"{mark}{plural(n, 'observation')} not in the fit: {reason}", style=style)
        )
    if rates := verdict(found.rungs):
        console.print(Text(rates, style="dim"))


def show_files(console: Console, project: Project, proposal: str) -> None:
    """Where to look and what to run next."""
    console.print()
    console.print(Text.assemble(("Proposal  ", "bold"), proposal))
    console.print(Text.assemble(("Report    ", "bold"), _short(project.report)))
    console.print(Text.assemble(("MLflow    ", "bold"), f"isoflop ui {_short(project.uri)}"))


def _valleys(found: Study) -> Table:
    """A row a budget and the forecast; with budgets and a forecast the law's optimum beside."""
    beside = ["N_opt by law"] if found.next and found.isoflop.vertices else []
    loss = f"L, {found.obs.loss_unit}"
    table = plain_table("C, FLOPs", "N_opt", *beside, "D_opt", "D/N", loss, "status")
    for vertex, by_law in zip(found.isoflop.vertices, found.by_law, strict=True):
        style = "" if vertex.status == "interior" else "yellow"
        flops, n, *rest = _vertex_cells(vertex)
        table.add_row(flops, n, *(count(by_law) for _ in beside), *rest, style=style)
    if found.next is not None:
        blank = ["" for _ in beside]
        params, tokens, ahead = found.next.params, found.next.tokens, found.next.loss
        table.add_row(
            f"{found.next.flops:.3g}",
            count(params.estimate),
            *blank,
            count(tokens.estimate),
            f"{tokens.estimate / params.estimate:.3g}",
            f"{ahead.estimate:.4f}",
            "forecast",
            style="bold cyan",
        )
        table.add_row(
            f"{found.level:.0%} interval",
            span(params),
            *blank,
            span(tokens),
            "",
            span(ahead, "plain"),
            f"{_share(found.next.params_weight)} in N and D, {_share(found.next.loss_weight)} in L",
            style="cyan",
        )
    return table


def _vertex_cells(vertex: Vertex) -> list[str]:
    ratio = vertex.tokens / vertex.params if vertex.tokens and vertex.params else None
    return [
        f"{vertex.flops:.3g}",
        count(vertex.params),
        count(vertex.tokens),
        f"{ratio:.3g}" if ratio else "–",
        f"{vertex.loss:.4f}" if vertex.loss else "–",
        vertex.status,
    ]


def _share(weight: float) -> str:
    """How much of a forecast is by which law."""
    return f"generalised {weight:.0%}" if weight else "hoffmann"


def _exponents(found: Study) -> Table:
    table = plain_table("by", "a", f"{found.level:.0%} interval", "where")

    def row(name: str, part: Interval, where: str) -> None:
        table.add_row(name, f"{part.estimate:.3f}", span(part, "plain"), where)

    if found.envelope.exponent is not None:
        crossings = f"line through {len(found.envelope.crossings)} crossings"
        biased = ", biased: curves not decayed" if found.envelope.status == "biased" else ""
        row("envelope of runs", found.envelope.exponent, crossings + biased)
    if found.isoflop.exponent is not None:
        interior = len(found.isoflop.interior)
        row("IsoFLOP parabolas", found.isoflop.exponent, f"line through {interior} minima")
    for item, known in zip(found.at_top, found.intervals, strict=True):
        row(
            f"{item.law} law",
            known.exponent,
            f"local, at {item.flops:.3g} FLOPs, by all observations",
        )
    return table


def _constants(found: Study) -> Table:
    """A row a law, and below it how well its constants are known."""
    names = ("A", "B", "E", "alpha", "beta", "gamma")
    table = plain_table("law", *names, "rmse of ln L", "")
    for item, known in zip(found.fits, found.intervals, strict=True):
        constants = item.constants
        cells = [figures_of(constants[name]) if name in constants else "–" for name in names]
        pinned = ", ".join(f"{name} pinned" for name in sorted(item.law.pinned))
        status = item.status if item.status != "converged" else pinned
        table.add_row(item.law.name, *cells, f"{item.rmse:.2%}", status)
        parts = [known.constants.get(name) for name in names]
        ends = [f"{figures_of(i.low, 3)}–{figures_of(i.high, 3)}" if i else "" for i in parts]
        table.add_row(f"  {found.level:.0%}", *ends, "", "", style="dim")
    return table


def _heldout(found: Study) -> Table:
    """Errors of L and N_opt: a row a law, a column a budget, and their medians."""
    laws = dict.fromkeys(error.law for item in found.heldout for error in item.errors)
    budgets = [f"{item.vertex.flops:.3g}" for item in found.heldout]
    several = len(budgets) > 1
    table = plain_table("by", *budgets, *(["median, without sign"] if several else []))
    for law in laws:
        cells = []
        for item in found.heldout:
            error = next((error for error in item.errors if error.law == law), None)
            parts = (error.loss_error, error.params_error) if error else (None, None)
            cells.append(" / ".join(percent(part) for part in parts))
        if several:
            names = ("loss_error", "params_error")
            medians = [percent(median_error(found.heldout, law, name)) for name in names]
            cells.append(" / ".join(median.lstrip("+") for median in medians))
        table.add_row(law, *cells, style="bold" if law == HEADLINE else "")
    return table


def _back_tests(found: Study) -> Table:
    """A row a budget: what was expected of N and L at its vertex, and whether it came so."""
    table = plain_table(
        "C, FLOPs", "N expected", "N measured", "", "L expected", "L measured", "", "law"
    )
    for item in found.back_tests:
        source = item.discrepancy
        told = "default" if source and source.source == "default" else "by back-tests below"
        table.add_row(
            f"{item.flops:.3g}",
            span(item.params_interval),
            count(item.params_measured),
            held(item.params_held),
            span(item.loss_interval, "plain"),
            f"{item.loss_measured:.4f}" if item.loss_measured else "–",
            held(item.loss_held),
            told if source else "",
        )
    return table


def _short(place: str) -> str:
    """Relative to the working directory where it lies in it; a URI as it is."""
    return place.removeprefix(f"{Path.cwd()}/")
