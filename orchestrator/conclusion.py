"""From a project's ledger to what it says: study, proposal, figures, report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analysis.design import Centre, Proposal, propose
from analysis.errors import InputError
from analysis.forecast import headline
from analysis.observations import (
    KIND_COLUMNS,
    FlopsConvention,
    ParamsConvention,
    observations,
    require_one_kind,
    where,
)
from analysis.study import Study, next_budget, study
from analysis.wording import count
from orchestrator.ledger import write_text
from orchestrator.planner import Plan, family_cost, make_plan, trainable
from orchestrator.project import Project
from orchestrator.spec import Budget, SweepSpec, to_toml
from trainers.flops import params as count_params
from trainers.recipe import named

SIZES = 7
"""Sizes of a proposal, unless its spend allows fewer."""


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How N and C are counted, and how sure intervals are."""

    params: ParamsConvention = "non_embedding"
    flops: FlopsConvention = "exact"
    level: float = 0.9

    def __post_init__(self) -> None:
        for name, value, known in (
            ("--params", self.params, get_args(ParamsConvention)),
            ("the convention of FLOPs", self.flops, get_args(FlopsConvention)),
        ):
            if value not in known:
                raise InputError(f"{name} is {value!r}; it must be one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The rows of one kind that a project holds, and the family of models that they are of."""

    project: Project
    table: pa.Table
    """Rows of one kind, diverged ones included."""
    excluded: Mapping[str, int]
    """Rows of other kinds, by reason."""
    plan: Plan
    """The latest plan with rows of that kind."""

    def study(self, convention: Convention, next_flops: float | None = None) -> Study:
        """Fit everything, under a convention."""
        diverged = pc.sum(pc.equal(self.table["status"], "diverged")).as_py() or 0
        excluded = {**self.excluded, **({"diverged": diverged} if diverged else {})}
        return study(
            observations(
                self.table,
                self.project.budgets(),
                params=convention.params,
                flops=convention.flops,
            ),
            cost=family_cost(self.plan.spec, params=convention.params, flops=convention.flops),
            level=convention.level,
            excluded=excluded,
            next_flops=next_flops,
        )


def evidence(
    project: Project, conditions: Mapping[str, str] | None = None, *, kind_of: Plan | None = None
) -> Evidence:
    """What a project's ledger holds of one kind.

    Parameters
    ----------
    project
        Where to read.
    conditions
        Column = value, to select among kinds.
    kind_of
        Select the kind of this plan's own rows instead; others are counted as excluded.

    Raises
    ------
    InputError
        If there are no rows, or rows of several kinds and nothing selects one.
    """
    table = project.ledger.read()
    if table.num_rows == 0:
        raise InputError(f"the ledger of {project.path} is empty: run its sweep first")
    total = table.num_rows
    table = where(table, conditions or {})
    if kind_of is not None:
        own = pc.is_in(table["trial"], pa.array([trial.key for trial in kind_of.trials]))
        first = table.filter(own).slice(0, 1).to_pylist()[0]
        for name in KIND_COLUMNS:
            table = table.filter(pc.equal(table[name], first[name]))
    require_one_kind(table)
    trials = set(table["trial"].to_pylist())
    reason = "of another kind" if kind_of else "not selected"
    left = total - table.num_rows
    excluded = {reason: left} if left else {}
    plan = kind_of or _latest_plan(project, trials)
    own_family = _of_family(table, plan)
    foreign = table.num_rows - (pc.sum(own_family).as_py() or 0)
    if foreign and kind_of is None:
        raise InputError(
            f"{foreign} observations are of another family of shapes than those of {plan.name}, "
            "so that N does not fix their FLOPs a token: select with --where depth=... or heads=..."
        )
    if foreign:
        table = table.filter(own_family)
        excluded["of another family of shapes"] = foreign
    return Evidence(project=project, table=table, excluded=excluded, plan=plan)


def _of_family(table: pa.Table, plan: Plan) -> pa.Array:
    """Which rows have the shape that the plan's family has at their width."""
    shapes = plan.spec.shapes
    rows = table.select(["width", "depth", "vocabulary"]).to_pylist()
    return pa.array([shapes.depth_at(row["width"]) == row["depth"] for row in rows], pa.bool_())


def propose_next(
    found: Evidence,
    *,
    output: Path,
    flops: float | None = None,
    spend: float | None = None,
    sizes: int = SIZES,
) -> tuple[Proposal, Plan]:
    """Write the next sweep: sizes around the forecast, within the FLOPs given.

    Parameters
    ----------
    found
        What to forecast from.
    output
        The sweep file to write.
    flops
        FLOPs of each trial; by default the next budget.
    spend
        FLOPs of all trials together, exact; by default `sizes` times `flops`.
    sizes
        Model sizes.

    Raises
    ------
    InputError
        If no law can be fitted, or the spend is too small.
    """
    seen = found.study(Convention())
    obs, cost = seen.obs, seen.cost
    spec = found.plan.spec
    ahead_flops = flops or next_budget(obs)
    # A little inside, since whole steps may round a horizon up.
    shapes = trainable(spec, ahead_flops * (1 + 0.5 / named(spec.recipe).min_steps))
    n = np.array([count_params(shape).non_embedding for shape in shapes], dtype=np.float64)

    def forecast_at(c: float) -> Centre:
        ahead = headline(obs, c, cost, seen.level).params
        return Centre(ahead.estimate, ahead.low, ahead.high)

    allowed = spend
    while True:
        found_sizes = propose(
            forecast_at=forecast_at,
            next_flops=ahead_flops,
            spend=allowed,
            params=n,
            sizes=sizes,
            top_flops=float(obs.budgets()[-1]),
        )
        widths = [shapes[i].width for i in found_sizes.indices]
        next_spec = _next_spec(spec, found_sizes.flops, widths)
        plan = make_plan(next_spec)
        if spend is None or allowed is None or plan.flops <= spend:
            break
        allowed *= spend / plan.flops * (1 - 1e-6)  # whole steps round a horizon up or down
    _write(output, to_toml(next_spec, _why(found_sizes, forecast_at(found_sizes.flops), plan)))
    return found_sizes, plan


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
    return "\n".join([*lines, *([f"Note: {chosen.reason}."] if chosen.reason else [])])


def _latest_plan(project: Project, trials: set[str]) -> Plan:
    for plan in reversed(project.plans()):
        if any(trial.key in trials for trial in plan.trials):
            return plan
    raise InputError(f"no plan of {project.path} asks for the rows in its ledger")


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def write_report(found: Evidence, seen: Study, output: Path, proposal: Path | None) -> list[Path]:
    """Figures into the project and one self-contained page at `output`; returns the pictures."""
    from analysis.figures import draw, save
    from analysis.report import page

    figures = draw(seen)
    html = page(seen, figures, table=found.table, name=found.plan.name, proposal=_text(proposal))
    _write(output, html)
    return save(figures, found.project.figures)


def _text(path: Path | None) -> str | None:
    return path.read_text() if path and path.exists() else None


def metrics(seen: Study) -> dict[str, float]:
    """The sweep's results as MLflow metrics; only finite ones."""
    values: dict[str, float] = {"observations": len(seen.obs)}
    for item in seen.at_top:
        values[f"exponent_{item.law}"] = item.exponent.estimate
    if seen.isoflop.exponent:
        values["exponent_isoflop"] = seen.isoflop.exponent.estimate
    for error in seen.heldout.errors if seen.heldout else ():
        for part in ("loss_error", "params_error"):
            value = getattr(error, part)
            if value is not None:
                values[f"heldout_{part}_{error.law}"] = value
    if seen.next:
        values["next_params"] = seen.next.params.estimate
        values["next_loss"] = seen.next.loss.estimate
    return {name: value for name, value in values.items() if math.isfinite(value)}
