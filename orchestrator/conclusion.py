"""From a source to what follows from it: proposal, figures, report."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import replace
from errno import ENOENT
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis.design import Centre, Proposal, propose
from analysis.errors import InputError
from analysis.headline import headline
from analysis.study import Study, next_budget
from analysis.wording import count
from orchestrator.family import corpus_id, family
from orchestrator.planner import Plan, make_plan, most_tokens, text_limit, trainable
from orchestrator.project import in_project
from orchestrator.reading import Convention
from orchestrator.source import Source
from orchestrator.spec import Budget, SweepSpec, code_of, to_toml
from orchestrator.storage import is_uri, split
from trainers.flops import flops_per_token
from trainers.flops import params as count_params

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = 7
"""Sizes of a proposal, unless its spend allows fewer."""


def propose_next(
    found: Source,
    *,
    output: str | Path,
    flops: float | None = None,
    spend: float | None = None,
    sizes: int = SIZES,
    sweep: SweepSpec | None = None,
) -> tuple[Proposal, Plan]:
    """Write the next sweep: sizes around the forecast, within the FLOPs given.

    Parameters
    ----------
    found
        What to forecast from.
    output
        The sweep file to write: a path or URI.
    flops
        FLOPs of each trial; by default the next budget.
    spend
        FLOPs of all trials together, exact; by default `sizes` times `flops`.
    sizes
        Model sizes.
    sweep
        A sweep file that the user named, whose recipe is taken. A project is read without running
        code, so that of a person's own recipe it has the name alone.

    Raises
    ------
    InputError
        If no law can be fitted, `sweep` has another recipe, the spend is too small, or the source
        has no sweep to go on with.
    """
    if found.plan is None:
        raise InputError(
            f"no sweep trained the runs of {found.name}, so that nothing says which models can be "
            "built: use isoflop forecast for N and D, and write a sweep around them"
        )
    seen = found.study(Convention())
    obs, cost = seen.obs, seen.cost
    spec = found.plan.spec if sweep is None else _with_recipe(found.plan, sweep)
    ahead_flops = flops or next_budget(obs)
    # A little inside, since whole steps may round a horizon up.
    margin = 1 + 0.5 / spec.recipe.rules.min_steps
    shapes = trainable(spec, ahead_flops * margin)
    short = _short_of_text(spec, ahead_flops, margin)
    n = np.array([count_params(shape).non_embedding for shape in shapes], dtype=np.float64)

    def forecast_at(c: float) -> Centre:
        ahead = headline(obs, c, cost, seen.level, discrepancy=seen.discrepancy).params
        return Centre(ahead.estimate, ahead.low, ahead.high)

    allowed = spend
    while True:
        try:
            found_sizes = propose(
                forecast_at=forecast_at,
                next_flops=ahead_flops,
                spend=allowed,
                params=n,
                sizes=sizes,
                top_flops=float(obs.budgets()[-1]),
            )
        except InputError as error:
            raise InputError(f"{error}; {short}" if short else str(error)) from error
        if short and found_sizes.reason:
            found_sizes = replace(found_sizes, reason=f"{found_sizes.reason}; {short}")
        widths = [shapes[i].width for i in found_sizes.indices]
        next_spec = _next_spec(spec, found_sizes.flops, widths)
        plan = make_plan(next_spec)
        if spend is None or allowed is None or plan.flops <= spend:
            break
        allowed *= spend / plan.flops * (1 - 1e-6)  # whole steps round a horizon up or down
    write(output, to_toml(next_spec, _why(found_sizes, forecast_at(found_sizes.flops), plan)))
    return found_sizes, plan


def _with_recipe(plan: Plan, sweep: SweepSpec) -> SweepSpec:
    """Return the spec of a plan with the recipe of a sweep file, if that trained the plan."""
    trained, named = plan.trials[0].recipe, sweep.recipe.id
    if named != trained:
        raise InputError(
            f"--sweep {sweep.name} has the recipe {named.name} with the hash {named.hash}, and the "
            f"runs of {plan.name} were trained with {trained.name}, {trained.hash}: name the sweep "
            "file that was run, with its module as it was"
        )
    return plan.spec.model_copy(update={"recipe": sweep.recipe})


def _short_of_text(spec: SweepSpec, flops: float, margin: float) -> str | None:
    """Return which sizes the text is too short for at a budget, and what bounds it; or None.

    `margin` is by what factor the whole steps of a run may exceed its horizon.
    """
    most = most_tokens(spec, corpus_id(spec))
    cut = [shape for shape in family(spec) if margin * flops / flops_per_token(shape) > most]
    if not cut:
        return None
    n = max(count_params(shape).non_embedding for shape in cut)
    limit = text_limit(spec)
    remedy = "give more text" if limit == "more text" else f"raise {limit}"
    return (
        f"at {flops:.3g} FLOPs sizes of N up to {count(n)} would need more than the {count(most)} "
        f"tokens that the corpus has in epochs = {spec.epochs:g}: {remedy} or epochs"
    )


def _next_spec(spec: SweepSpec, flops: float, widths: list[int]) -> SweepSpec:
    """The same sweep at one further budget, under a name of its own."""
    rounded = float(f"{flops:.3g}")
    base = spec.name.split("-next-")[0]
    budget = Budget(flops=rounded if rounded <= flops else flops, widths=widths)
    return spec.model_copy(
        update={
            "name": f"{base}-next-{budget.flops:.3g}".replace("+", ""),
            "budgets": [budget],
            "seeds": spec.seeds[:1],
        }
    )


def _why(chosen: Proposal, ahead: Centre, plan: Plan) -> str:
    """The comment at the head of a proposal."""
    n = [count_params(trial.shape).non_embedding for trial in plan.trials]
    lines = [
        f"Proposed by isoflop: {len(plan.planned)} trials at {chosen.flops:.3g} FLOPs, "
        f"{plan.flops:.3g} FLOPs in all.",
        f"Forecast there: N_opt = {count(ahead.params)}, {count(ahead.low)} to "
        f"{count(ahead.high)} (90%, non-embedding); sizes from {count(min(n))} to {count(max(n))}.",
    ]
    lines += [f"Note: {chosen.reason}."] if chosen.reason else []
    lines += [f"Running it executes {phrase}." for phrase in code_of(plan.spec)]
    return "\n".join(lines)


def write(location: str | Path, text: str) -> None:
    """Write a text to a path or URI, of which the directory is there.

    In a project a link is replaced, which somebody may have planted. Elsewhere it is followed, and
    a device or a pipe is written to.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    place = location
    try:
        if not is_uri(location) and not in_project(Path(location)):
            path = Path(location)
            if path.exists() and not path.is_file() and not path.is_dir():
                path.write_text(text, encoding="utf-8")
                return
            place = os.path.realpath(path)
        storage, name = split(place)
        if storage.local is not None and not storage.local.is_dir():
            raise FileNotFoundError(ENOENT, os.strerror(ENOENT))  # a typing error, not a new place
        storage.replace(name, text.encode())
    except OSError as error:
        raise InputError(f"cannot write {location}: {error.strerror or error}") from error


def write_report(
    found: Source, seen: Study, output: str | Path, proposal: str | None
) -> dict[str, Figure]:
    """Write one self-contained page at `output`, a path or URI; returns its figures, by name.

    `proposal` is the text of a proposed sweep, to be shown on the page.
    """
    # On nodes without a writable home it says that fonts are listed anew each time.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from analysis.figures import draw
    from analysis.report import page

    figures = draw(seen)
    html = page(seen, figures, table=found.table, name=found.name, proposal=proposal)
    write(output, html)
    return figures


def write_pictures(figures: dict[str, Figure], directory: Path) -> list[Path]:
    """Write figures into a directory, which is made if need be; returns the PNG files."""
    from analysis.figures import save

    return save(figures, directory)


def metrics(seen: Study) -> dict[str, float]:
    """The sweep's results as MLflow metrics; only finite ones."""
    values: dict[str, float] = {"observations": seen.obs.rows}
    for item in seen.at_top:
        values[f"exponent_{item.law}"] = item.exponent.estimate
    if seen.isoflop.exponent:
        values["exponent_isoflop"] = seen.isoflop.exponent.estimate
    for error in seen.heldout[0].errors if seen.heldout else ():
        for part in ("loss_error", "params_error"):
            value = getattr(error, part)
            if value is not None:
                values[f"heldout_{part}_{error.law}"] = value
    if seen.next:
        values["next_params"] = seen.next.params.estimate
        values["next_loss"] = seen.next.loss.estimate
    return {name: value for name, value in values.items() if math.isfinite(value)}
