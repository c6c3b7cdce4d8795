"""MLflow made equal to the ledger, and compared with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from analysis.errors import InputError, first_line
from analysis.observations import ObservationId
from orchestrator.masking import masked
from orchestrator.planner import Planned
from orchestrator.project import Project
from orchestrator.runs import (
    CURVES,
    METRICS,
    PLAN_TAG,
    TRIAL_TAG,
    name_of,
    params_of,
    points_of,
    status_of,
)
from orchestrator.tracking import Store, Tracker


@dataclass(frozen=True, kw_only=True)
class Synced:
    """What `sync` did."""

    experiment: str
    """Its name in MLflow."""
    written: int
    evaluated: int
    """Runs that were given scores of their models, which they lacked."""
    half_written: int
    """Runs of a writer that died, removed."""
    duplicates: int
    """Runs removed since there was another of the same observation."""
    refused: dict[ObservationId, str]
    """Observations that MLflow does not take, and why."""
    unknown: list[ObservationId]
    """Runs of observations that the ledger lacks; they are left."""
    differences: list[str]
    """How MLflow still differs from the ledger."""


def sync(
    project: Project, store: Store, told: Callable[[int, int], None] = lambda done, all_: None
) -> Synced:
    """Write what the ledger has and MLflow lacks, of all plans; remove halves and doubles.

    Parameters
    ----------
    project
        Whose ledger. No driver may be at work in it, which writes MLflow itself.
    store
        Where MLflow is.
    told
        Called with how many runs are written and how many were missing, as it goes on.

    Raises
    ------
    InputError
        If the store does not answer, or not as MLflow does.
    """
    from mlflow.exceptions import MlflowException

    try:
        tracker = Tracker(project, store)
        missing = tracker.missing()
        told(0, len(missing))
        written = 0
        for written, _ in enumerate(tracker.write(missing), start=1):
            told(written, len(missing))
        return Synced(
            experiment=tracker.experiment,
            written=written,
            evaluated=tracker.add_evaluations(),
            half_written=tracker.half_written,
            duplicates=tracker.duplicates,
            refused=tracker.refused,
            unknown=tracker.unknown(),
            differences=differences(project, tracker),
        )
    except (MlflowException, OSError) as error:
        raise _failed(store, error) from error


def add_scores(project: Project, store: Store, name: ObservationId) -> None:
    """Give MLflow's runs the scores of their models that they lack, above all those of `name`.

    Parameters
    ----------
    project, store
        As for `sync`.
    name
        Whose run must be there.

    Raises
    ------
    InputError
        If it is not, or as for `sync`.
    """
    from mlflow.exceptions import MlflowException

    try:
        tracker = Tracker(project, store)
        tracker.add_evaluations()
        if name in tracker.missing():
            raise InputError(f"MLflow at {store.shown} has no run of {name[0]} yet")
    except (MlflowException, OSError) as error:
        raise _failed(store, error) from error


def _failed(store: Store, error: Exception) -> InputError:
    return InputError(
        f"MLflow at {store.shown} failed ({masked(first_line(error, named=True))}): what it "
        "has is kept, run isoflop sync again when it answers"
    )


def differences(project: Project, tracker: Tracker) -> list[str]:
    """How MLflow differs from the ledger in what plans ask for, a sentence each."""
    runs: dict[ObservationId, list[Any]] = {}
    for run in tracker.search(TRIAL_TAG):
        runs.setdefault(name_of(run), []).append(run)
    asked = {plan.name: {p.id: p for p in plan.planned} for plan in project.plans()}
    said = []
    rows = project.ledger.survey(project.ledger.ids() & tracker.planned.keys())
    said += [f"the ledger: {odd}" for odd in rows.left_out]
    for row in rows.table.to_pylist():
        name = row["trial"], row["tokens"]
        found = runs.get(name, [])
        if len(found) == 1:
            # The plan that the run says: which of several asked first may have changed since.
            plan = asked.get(found[0].data.tags.get(PLAN_TAG), {})
            wrong = _wrong(tracker, row, plan.get(name, tracker.planned[name]), found[0])
        else:
            wrong = [f"{len(found)} runs"]
        said += [f"{name[0]} at {name[1]} tokens: {what}" for what in wrong]
    return said


def _wrong(tracker: Tracker, row: dict[str, Any], planned: Planned, run: Any) -> list[str]:
    """What a run says that its row does not."""
    points = points_of(row)
    asked = {
        "status": status_of(row),
        **params_of(row, planned),
        **{name: value for name, value, _, _ in points if name in METRICS},
        **{f"points of {k}": sum(point[0] == k for point in points) for k in CURVES},
    }
    client, data = tracker.client, run.data
    there = {
        "status": run.info.status,
        **data.params,
        **data.metrics,
        **{f"points of {k}": len(client.get_metric_history(run.info.run_id, k)) for k in CURVES},
    }
    return [
        f"{name} is {there.get(name)} in MLflow and {value} in the ledger"
        for name, value in asked.items()
        if there.get(name) != value
    ]
