"""Where observations come from: a project, a file or an MLflow experiment, opened as one value.

What follows from them is for `conclusion.py`; what columns and files mean, for `analysis`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict, Unpack, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analysis.budgets import name_budgets
from analysis.cells import cells
from analysis.envelope import Curve, training_curves
from analysis.errors import InputError
from analysis.factors import Factor, is_hyperparameter
from analysis.files import is_table_file
from analysis.fitting import LEAST_SQUARES, Method
from analysis.foreign import Foreign, foreign
from analysis.observations import (
    KIND_COLUMNS,
    FlopsConvention,
    ObservationId,
    Observations,
    ParamsConvention,
    as_schema,
    has_schema,
    observations,
    require_one_kind,
    where,
)
from analysis.optimum import FlopsPerToken
from analysis.pooling import pool, sample
from analysis.rungs import Rung, rungs, undertuned
from analysis.study import Study, study
from analysis.uncertainty import IntervalKind
from orchestrator.exclusion import read_exclusions, rule_out
from orchestrator.family import family_cost
from orchestrator.planner import Plan
from orchestrator.project import Project, budgets, open_project, roles
from orchestrator.reading import Convention, Conventions, Reading, read_file
from orchestrator.roles import of_roles
from trainers.shape import DIMENSIONS

MLFLOW = "mlflow:"
"""How a source begins that is an MLflow experiment's name."""


class Options(TypedDict, total=False):
    """What is passed on to `analysis.study.study`."""

    method: Method
    next_flops: float | None
    heldout: int | None
    intervals: IntervalKind
    rungs: Sequence[Rung]


@dataclass(frozen=True, kw_only=True)
class Observed:
    """The observations of a source under one convention, and what is known of them."""

    obs: Observations
    cost: FlopsPerToken
    """Training FLOPs a token as a function of N."""
    excluded: Mapping[str, int]
    """Rows that were left out, by reason."""
    notes: tuple[str, ...]
    """What was assumed or is doubtful in reading, a sentence each."""
    cells: int
    """Distinct cells of N and D."""
    factors: tuple[Factor, ...] = ()
    """Columns that explain differences among rows of equal N and D."""

    def study(
        self, level: float, curves: Sequence[Curve] | None, **options: Unpack[Options]
    ) -> Study:
        """Fit everything; arguments are those of `analysis.study.study`."""
        return study(
            self.obs,
            cost=self.cost,
            excluded=self.excluded,
            notes=self.notes,
            level=level,
            curves=curves,
            cells=self.cells,
            factors=self.factors,
            **options,
        )


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Rows of isoflop's own schema, of one kind, and what is known of where they are from."""

    name: str
    table: pa.Table
    """Rows of one kind, diverged ones included."""
    excluded: Mapping[str, int]
    """Rows that were left out, by reason."""
    notes: tuple[str, ...] = ()
    """What is doubtful in reading, a sentence each."""
    rungs: tuple[Rung, ...] = ()
    """Those of its rows that were probed at other rates."""
    reading: Reading = field(default_factory=Reading)
    project: Project | None = None
    """None where the rows are a file's or an experiment's."""
    plan: Plan | None = None
    """The latest plan with rows of that kind, if any: it tells the family of models."""
    budgets: Mapping[ObservationId, float] = field(default_factory=dict)
    """Nominal FLOP budgets of what the project's plans ask for."""

    @property
    def conventions(self) -> Conventions:
        """Under which conventions its rows count N and C, the usual one first."""
        known = [c for c in get_args(ParamsConvention) if c != "derived"]
        params = tuple(c for c in known if self._has(f"params_{c}"))
        flops = tuple(c for c in get_args(FlopsConvention) if c == "6nd" or self._has(f"flops_{c}"))
        return Conventions(params=params or ("non_embedding",), flops=flops)

    def _has(self, column: str) -> bool:
        return bool(self.table[column].null_count < self.table.num_rows)

    def observed(self, convention: Convention, method: Method = LEAST_SQUARES) -> Observed:
        """Its observations, under a convention; millions are made fewer as the method allows."""
        params, flops = self.conventions.choose(convention)
        loss = self.reading.loss or "loss"
        obs = observations(self.table, self.budgets, params=params, flops=flops, loss=loss)
        usual = obs
        if flops != self.conventions.flops[0]:
            first = self.conventions.flops[0]
            usual = observations(self.table, self.budgets, params=params, flops=first, loss=loss)
        diverged = pc.sum(pc.equal(self.table["status"], "diverged")).as_py() or 0
        lacking = self.table.num_rows - diverged - len(obs)
        excluded = {**self.excluded, "diverged": diverged, f"without N, C or {loss}": lacking}
        cost = None
        if self.plan and "given" not in (params, flops):
            cost = family_cost(self.plan.spec, params=params, flops=flops)
        robust = method.objective == "huber"
        return _observed(self, obs, usual, excluded, cost, robust=robust)

    def study(
        self, convention: Convention, *, undecayed: bool = False, **options: Unpack[Options]
    ) -> Study:
        """Fit everything, under a convention; `undecayed` as in `envelope`."""
        curves = None
        if undecayed:
            params, flops = self.conventions.choose(convention)
            own = flops != "given"  # external rows have no curves
            curves = training_curves(self.table, params=params, flops=flops) if own else ()
        seen = self.observed(convention, options.get("method", LEAST_SQUARES))
        options["rungs"] = self.rungs
        return seen.study(convention.level, curves, **options)


@dataclass(frozen=True, kw_only=True)
class Points:
    """Rows of somebody else's table."""

    name: str
    found: Foreign
    excluded: Mapping[str, int]
    """Rows that were left out, by reason."""
    reading: Reading = field(default_factory=Reading)
    table: None = None
    project: None = None
    plan: None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed or is doubtful in reading, a sentence each."""
        return self.found.notes

    @property
    def conventions(self) -> Conventions:
        """N as given, and C as given or by 6ND."""
        obs = self.found.obs
        params = (obs.params_convention,)
        if obs.flops_convention == "6nd":
            return Conventions(params=params, flops=("6nd",))
        same = np.allclose(obs.flops, 6.0 * obs.params * obs.tokens, rtol=1e-6)
        return Conventions(params=params, flops=("given", "6nd"), same_flops=same)

    def observed(self, convention: Convention, method: Method = LEAST_SQUARES) -> Observed:
        """Its observations, under a convention; millions are made fewer as the method allows."""
        _, flops = self.conventions.choose(convention)
        usual = obs = self.found.obs
        if flops != usual.flops_convention:
            c = 6.0 * obs.params * obs.tokens
            obs = replace(obs, flops=c, flops_convention=flops)
        robust = method.objective == "huber"
        seen = _observed(self, obs, usual, self.excluded, robust=robust)
        return replace(seen, factors=self.found.factors)

    def study(
        self, convention: Convention, *, undecayed: bool = False, **options: Unpack[Options]
    ) -> Study:
        """Fit everything, under a convention; `undecayed` as in `envelope`."""
        seen = self.observed(convention, options.get("method", LEAST_SQUARES))
        curves = () if undecayed else None
        return seen.study(convention.level, curves, **options)


Source = Evidence | Points


def _observed(
    source: Source,
    obs: Observations,
    usual: Observations,
    excluded: Mapping[str, int],
    cost: FlopsPerToken | None = None,
    *,
    robust: bool,
) -> Observed:
    """What all sources have in common: the largest losses dropped, budgets and C/D found.

    Budgets are found from C as it is `usual`: under 6ND trials of one budget differ in C.
    """
    k = source.reading.drop_largest
    kept = obs.without_largest(k)
    dropped = {f"among the largest losses (--drop-largest {k})": len(obs) - len(kept)}
    notes = list(source.notes)
    if source.reading.find_budgets and not np.isfinite(kept.budget).any():
        alike = usual.without_largest(k) if len(usual) == len(obs) else kept
        budget, note = name_budgets(alike.flops, alike.params)
        kept, notes = replace(kept, budget=budget), [*notes, note]
    idle = int(np.sum(kept.weight == 0.0))
    kept = kept.select(kept.weight > 0.0)
    distinct = int(cells(kept.params, kept.tokens).max()) + 1
    # A run to come is one of the usual weight, whatever the weights' unit.
    kept = replace(kept, weight=kept.weight / kept.weight.mean())
    pooled, width = (sample(kept), 0.0) if robust else pool(kept)
    if len(pooled) < len(kept):
        notes.append(
            f"{len(kept)} observations sampled to {len(pooled)}: Huber's loss needs single rows"
            if robust
            else f"{len(kept)} observations pooled into {len(pooled)} cells of N and D, each "
            f"{width:.0%} wide and weighted by its number"
        )
    if cost is None and pooled.flops_convention == "6nd":
        cost = FlopsPerToken.six_n()
    return Observed(
        obs=pooled,
        cost=cost or FlopsPerToken.from_observations(pooled),
        excluded={
            reason: n for reason, n in {**excluded, **dropped, "of weight 0": idle}.items() if n
        },
        notes=tuple(notes),
        cells=distinct,
    )


def open_source(source: str, reading: Reading) -> Source:
    """Open a project, a CSV or Parquet file, each by path or URI, or `mlflow:EXPERIMENT`.

    Raises
    ------
    InputError
        If there is none, it cannot be read, or it has rows of several kinds and nothing selects
        one.
    """
    path = Path(source)
    if source.startswith(MLFLOW):
        from orchestrator.experiment import read_experiment

        name = source.removeprefix(MLFLOW)
        table = read_experiment(name, reading.tracking_uri, own=not reading.columns)
    elif path.is_file() or is_table_file(source):
        name, table = path.name, read_file(source)
    else:
        return evidence(open_project(source), reading)
    if has_schema(table.column_names) and not reading.columns:
        return _evidence_of(table, name, reading)
    return points(table, name, reading)


def points(table: pa.Table, name: str, reading: Reading) -> Points:
    """What somebody else's table says.

    Raises
    ------
    InputError
        If a column is missing or holds no numbers, or nothing is left.
    """
    chosen = where(table, reading.where)
    columns = {**reading.columns, **({"loss": reading.loss} if reading.loss else {})}
    found = foreign(chosen, columns, reading.selection)
    excluded = {**_left("not selected", table, chosen), **found.excluded}
    one = [name for name in reading.where if is_hyperparameter(name) and len(chosen) < len(table)]
    notes = [
        f"all rows have one {name!r}, which may suit some sizes better than others: --best-of "
        f"{shlex.quote(name)} takes the best of each N and D"
        for name in one
    ]
    found = replace(found, notes=(*found.notes, *notes))
    return Points(name=name, found=found, excluded=excluded, reading=reading)


def _evidence_of(table: pa.Table, name: str, reading: Reading) -> Evidence:
    """Rows of a file or an experiment that has the columns of a ledger."""
    reading.require_own(name)
    row = pa.array(np.arange(table.num_rows))
    names = table.select(["trial", "tokens"]).append_column("row", row)
    firsts = names.group_by(["trial", "tokens"]).aggregate([("row", "min")])["row_min"]
    distinct = table.take(np.sort(firsts.to_numpy()))
    excluded = _left("the same observation again", table, distinct)
    if "role" in distinct.column_names:
        kept = distinct.filter(pc.is_in(distinct["role"], pa.array(reading.roles)))
        excluded |= _left("asked for in another role", distinct, kept)
        distinct = kept
    every = as_schema(distinct, name)
    ours, marked = of_roles(every, {}, reading.roles)
    excluded |= marked
    chosen = where(ours, reading.where)
    _require_rows(chosen, total=table.num_rows, excluded=excluded)
    require_one_kind(chosen)
    excluded |= _left("not selected", ours, chosen)
    return _probed(Evidence(name=name, table=chosen, excluded=excluded, reading=reading), every)


def _probed(found: Evidence, every: pa.Table) -> Evidence:
    """With what probes among `every` row, those of no fit included, say of its rates."""
    probed = rungs(found.table, every)
    return replace(found, rungs=probed, notes=(*undertuned(probed), *found.notes))


def _require_rows(chosen: pa.Table, *, total: int, excluded: Mapping[str, int]) -> None:
    if chosen.num_rows == 0:
        reasons = ", ".join(excluded) or "of another kind"
        raise InputError(f"all {total} observations are left out: {reasons}")


def _left(reason: str, before: pa.Table, after: pa.Table) -> dict[str, int]:
    n = before.num_rows - after.num_rows
    return {reason: n} if n else {}


def evidence(
    project: Project, reading: Reading | None = None, *, kind_of: Plan | None = None
) -> Evidence:
    """What a project's ledger holds of one kind.

    Parameters
    ----------
    project
        Where to read.
    reading
        Which of it; `where` selects among kinds.
    kind_of
        Select the kind of this plan's own rows; others are counted as excluded.

    Raises
    ------
    InputError
        If there are no rows, or rows of several kinds and nothing selects one.
    """
    reading = reading or Reading()
    reading.require_own(project.uri)
    rows, (plans, odd_plans) = project.ledger.survey(), project.survey_plans()
    every = rows.table
    if every.num_rows == 0:
        reasons = "".join(f"; {odd}" for odd in rows.left_out[:1])
        raise InputError(f"the ledger of {project.uri} is empty: run its sweep first{reasons}")
    every, misshapen = _of_their_shapes(every, plans)
    allowed, excluded, notes = rule_out(every, read_exclusions(project.storage))
    excluded |= misshapen
    table, other_roles = of_roles(allowed, roles(plans), reading.roles)
    chosen = where(table, reading.where)
    if kind_of is not None:
        own = pc.is_in(every["trial"], pa.array([trial.key for trial in kind_of.trials]))
        first = every.filter(own).slice(0, 1).to_pylist()[0]
        for name in KIND_COLUMNS:
            chosen = chosen.filter(pc.equal(chosen[name], first[name]))
    _require_rows(chosen, total=every.num_rows, excluded=excluded | other_roles)
    require_one_kind(chosen)
    excluded |= other_roles | _left("of another kind" if kind_of else "not selected", table, chosen)
    plan = kind_of or _latest_plan(plans, set(chosen["trial"].to_pylist()))
    if plan is not None:
        family = chosen.filter(_of_family(chosen, plan))
        foreign_shapes = _left("of another family of shapes", chosen, family)
        if foreign_shapes and kind_of is None:
            raise InputError(
                f"{chosen.num_rows - family.num_rows} observations are of another family of shapes "
                f"than those of {plan.name}, so that N does not fix their FLOPs a token: select "
                "with --where depth=... or heads=..."
            )
        chosen, excluded = family, excluded | foreign_shapes
    odd = (*rows.left_out, *odd_plans)
    if rows.left_out:
        excluded |= {"files of the ledger that are no rows of it": len(rows.left_out)}
    found = Evidence(
        name=plan.name if plan else project.name,
        table=chosen,
        excluded=excluded,
        notes=(*notes, *map(str, odd)),
        reading=reading,
        project=project,
        plan=plan,
        budgets=budgets(plans),
    )
    return _probed(found, allowed)


def _of_their_shapes(table: pa.Table, plans: Sequence[Plan]) -> tuple[pa.Table, dict[str, int]]:
    """Rows without those that say another shape than the trial of their key has."""
    shapes = {
        trial.key: tuple(getattr(trial.shape, name) for name in DIMENSIONS)
        for plan in plans
        for trial in plan.trials
    }
    rows = zip(*(table[name].to_pylist() for name in ("trial", *DIMENSIONS)), strict=True)
    kept = table.filter(
        pa.array([shapes.get(key, (*own,)) == (*own,) for key, *own in rows], pa.bool_())
    )
    return kept, _left("of another shape than their trials (isoflop verify)", table, kept)


def _of_family(table: pa.Table, plan: Plan) -> pa.Array:
    """Which rows have the shape that the plan's family has at their width."""
    shapes = plan.spec.shapes
    rows = table.select(["width", "depth"]).to_pylist()
    return pa.array(
        [
            row["width"] is not None and shapes.depth_at(row["width"]) == row["depth"]
            for row in rows
        ],
        pa.bool_(),
    )


def _latest_plan(plans: Sequence[Plan], trials: set[str]) -> Plan | None:
    """The latest of the plans that asks for one of the trials; none does if all are external."""
    for plan in reversed(plans):
        if any(trial.key in trials for trial in plan.trials):
            return plan
    return None
