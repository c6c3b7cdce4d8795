"""What a person sees when the fit is done: tables for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.approaches import Vertex
from analysis.forecast import Heldout
from analysis.intervals import Interval
from analysis.study import Study
from analysis.wording import CONVENTIONS, count, percent, span
from cluster.capacity import estimated_seconds
from cluster.placement import cpu_slots
from orchestrator.planner import PF_DAY, Plan
from orchestrator.project import Project, counts
from trainers.flops import params, trial_flops

DAY = 86_400
"""Seconds; what would take longer on CPU cores is not meant for them."""


def show_study(console: Console, found: Study) -> None:
    """A row a budget, the forecast, the exponents and the held-out errors."""
    obs = found.obs
    conventions = f"N: {CONVENTIONS[obs.params_convention]}, C: {CONVENTIONS[obs.flops_convention]}"
    title = f"Compute-optimal models  ({len(obs)} observations; {conventions})"
    _show(console, title, _valleys(found))
    if found.at_top or found.isoflop.exponent:
        _show(console, "\nExponent a of N_opt ∝ C^a", _exponents(found))
    if found.heldout is not None:
        top = f"{found.heldout.vertex.flops:.3g} FLOPs"
        title = f"\nThe valley at {top}, predicted from the budgets below"
        _show(console, title, _heldout(found.heldout))
    console.print()
    for warning in found.warnings:
        console.print(Text(f"! {warning}", style="yellow"))
    for reason, n in found.excluded.items():
        console.print(Text(f"! {n} observations not in the fit: {reason}", style="yellow"))


def show_forecast(console: Console, found: Study) -> None:
    """The answer at one budget, and what each law says by itself."""
    ahead = found.next
    assert ahead is not None
    conventions = (found.obs.params_convention, found.obs.flops_convention)
    table = _table("", "estimate", f"{found.level:.0%} interval", "law")
    rows = (
        (f"N_opt, {CONVENTIONS[conventions[0]]}", ahead.params, ahead.params_law, "count"),
        ("D_opt, tokens", ahead.tokens, ahead.tokens_law, "count"),
        ("L, nats/token", ahead.loss, ahead.loss_law, "plain"),
        ("a = d ln N_opt / d ln C", ahead.exponent, ahead.exponent_law, "plain"),
    )
    for name, part, law, style in rows:
        estimate = count(part.estimate) if style == "count" else f"{part.estimate:.4f}"
        table.add_row(name, estimate, span(part, "count" if style == "count" else "plain"), law)
    _show(console, f"At C = {ahead.flops:.4g} ({CONVENTIONS[conventions[1]]})", table)
    for item in ahead.forecasts:
        console.print(
            f"{item.law} law alone: N_opt {count(item.params.estimate)}, "
            f"D_opt {count(item.tokens.estimate)}, L {item.loss.estimate:.4f}"
        )
    for note in ahead.notes:
        console.print(Text(f"! {note}", style="yellow"))


def show_plan(console: Console, plan: Plan) -> None:
    """The trials of a plan, a row a budget, and what they cost."""
    table = _table("C, FLOPs", "trials", "widths", "N, non-embedding", "D", "FLOPs")
    for budget in sorted({p.budget for p in plan.planned}):
        trials = [p.trial for p in plan.planned if p.budget == budget]
        n = [params(t.shape).non_embedding for t in trials]
        d = [t.tokens for t in trials]
        table.add_row(
            f"{budget:.3g}",
            str(len(trials)),
            " ".join(str(w) for w in sorted({t.shape.width for t in trials})),
            f"{count(min(n))} to {count(max(n))}",
            f"{count(min(d))} to {count(max(d))}",
            f"{sum(map(trial_flops, trials)):.3g}",
        )
    _show(console, f"{plan.name}: {len(plan.planned)} trials", table)
    console.print(f"{plan.flops:.4g} FLOPs in all, {plan.flops / PF_DAY:.3g} PF-days")
    seconds = [estimated_seconds(trial) for trial in plan.trials]
    slots = cpu_slots()
    here = max(sum(seconds) / slots, max(seconds))
    if here < DAY:
        console.print(f"roughly {here / 60:.1f} minutes on this machine's {slots} cores")


def show_status(console: Console, project: Project, plans: list[Plan]) -> None:
    """A line a plan: how many observations are in which state."""
    states = ("complete", "diverged", "failed", "waiting")
    table = _table("plan", "observations", *states)
    for plan in plans:
        found = counts(project.outcomes(plan))
        table.add_row(
            plan.name,
            str(len(plan.planned)),
            *(str(found[state]) for state in states),
        )
    console.print(table)


def show_files(console: Console, project: Project, proposal: str) -> None:
    """Where to look and what to run next."""
    console.print()
    console.print(Text.assemble(("Proposal  ", "bold"), proposal))
    console.print(Text.assemble(("Report    ", "bold"), _short(project.report)))
    console.print(Text.assemble(("MLflow    ", "bold"), f"isoflop ui {_short(project.path)}"))


def _valleys(found: Study) -> Table:
    table = _table("C, FLOPs", "N_opt", "D_opt", "D/N", "L, nats/token", "status")
    for vertex in found.isoflop.vertices:
        style = "" if vertex.status == "interior" else "yellow"
        table.add_row(*_vertex_cells(vertex), vertex.status, style=style)
    if found.next is not None:
        n, d, loss = found.next.params, found.next.tokens, found.next.loss
        table.add_row(
            f"{found.next.flops:.3g}",
            count(n.estimate),
            count(d.estimate),
            f"{d.estimate / n.estimate:.3g}",
            f"{loss.estimate:.4f}",
            "forecast",
            style="bold cyan",
        )
        table.add_row(
            f"{found.level:.0%} interval",
            span(n),
            span(d),
            "",
            span(loss, "plain"),
            f"N, D by the {found.next.params_law} law, L by the {found.next.loss_law} law",
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
    ]


def _exponents(found: Study) -> Table:
    table = _table("by", "a", f"{found.level:.0%} interval", "where")

    def row(name: str, part: Interval, where: str) -> None:
        table.add_row(name, f"{part.estimate:.3f}", span(part, "plain"), where)

    if found.isoflop.exponent is not None:
        interior = len(found.isoflop.interior)
        row("IsoFLOP parabolas", found.isoflop.exponent, f"line through {interior} minima")
    for item in found.at_top:
        row(f"{item.law} law", item.exponent, f"local, at {item.flops:.3g} FLOPs")
    return table


def _heldout(found: Heldout) -> Table:
    table = _table("by", "L", "N_opt", "")
    for error in found.errors:
        errors = (percent(error.loss_error), percent(error.params_error))
        table.add_row(f"{error.law} law", *errors, error.reason or "")
    return table


def _table(*columns: str) -> Table:
    """A plain table: columns of words on the left, of numbers on the right."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        words = column in ("", "by", "law", "status", "where", "widths", "plan")
        table.add_column(column, justify="left" if words else "right")
    return table


def _show(console: Console, title: str, table: Table) -> None:
    """A table under its title, which may be the wider of the two."""
    console.print(Text(title, style="bold"))
    console.print(table)


def _short(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
